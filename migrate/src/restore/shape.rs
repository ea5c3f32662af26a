//! From one shape of a tree to the next: what a skeleton has to change to follow the running original. Pure.
//!
//! Both sides compute it from the same two trees: the destination to do it, the source to know which pages the destination loses by it. So no
//! message about losses is needed, and none can be forgotten.

use crate::image::{Backing, FileId, Tree, Vma};
use std::collections::HashMap;

/// A tree with the names its address spaces and objects have in page runs. Names are never used twice within a migration, so that an address
/// space that was replaced by execve(2), or an object that only has the number of a former one, is told apart.
#[derive(Debug, Clone, Copy)]
pub struct Named<'a> {
    /// The tree.
    pub tree: &'a Tree,
    /// Name of each of its address spaces.
    pub spaces: &'a [u32],
    /// Name of each of its objects.
    pub objects: &'a [u32],
}

/// How processes change.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// For each new process the former one that it goes on from.
    pub from: Vec<Option<usize>>,
    /// Former processes that are no more, children before their parents.
    pub gone: Vec<usize>,
    /// New processes that call setsid(2) now.
    pub setsid: Vec<usize>,
}

/// What becomes of the processes. Err: why the skeleton has to be built anew.
pub fn processes(old: &Tree, new: &Tree) -> Result<Shape, String> {
    let index: HashMap<i32, usize> = old.processes.iter().enumerate().map(|(i, p)| (p.pid, i)).collect();
    let parent = |t: &Tree, i: usize| t.processes[i].parent.map(|p| t.processes[p as usize].pid);
    let mut shape = Shape::default();
    let mut kept = vec![false; old.processes.len()];
    for (i, p) in new.processes.iter().enumerate() {
        let from = index.get(&p.pid).copied().filter(|&o| {
            let same_parent = parent(old, o) == parent(new, i);
            // The parent itself has to go on, or the child went with it.
            let alive = p.parent.is_none_or(|x| shape.from[x as usize].is_some());
            let back_from_the_dead = old.processes[o].zombie.is_some() && p.zombie.is_none();
            same_parent && alive && !back_from_the_dead
        });
        if i == 0 && from.is_none() {
            return Err("its root is another process".into());
        }
        match from {
            Some(o) => {
                kept[o] = true;
                let was = &old.processes[o];
                if was.sid != p.sid {
                    if p.sid != p.pid {
                        return Err(format!("process {} is in another session than before", p.pid));
                    }
                    shape.setsid.push(i);
                }
            }
            None => {
                let parent = &new.processes[p.parent.unwrap_or(0) as usize];
                if p.sid == p.pid && p.zombie.is_none() {
                    shape.setsid.push(i);
                } else if p.sid != parent.sid && p.zombie.is_none() {
                    return Err(format!(
                        "process {} is in a session it cannot inherit from its parent {}",
                        p.pid, parent.pid
                    ));
                }
            }
        }
        shape.from.push(from);
    }
    shape.gone = (0..old.processes.len()).rev().filter(|&o| !kept[o]).collect();
    Ok(shape)
}

/// How the mappings of one address space change. Everything here is done in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Unmapped: what was there is lost.
    pub unmap: Vec<(u64, u64)>,
    /// Mapped, empty.
    pub map: Vec<Vma>,
    /// (start, end, protection, key): mprotect(2) or pkey_mprotect(2).
    pub protect: Vec<(u64, u64, u8, u8)>,
    /// (start, end, advice): madvise(2).
    pub advise: Vec<(u64, u64, i32)>,
    /// (start, end, name): PR_SET_VMA_ANON_NAME.
    pub name: Vec<(u64, u64, Option<String>)>,
}

impl Change {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Change::default()
    }
}

/// The changes from `old` mappings to `new` ones. `same_object`: whether an object of the old tree and one of the new are one. None: the address
/// space has to be emptied and built anew (the kernel's own mappings moved).
pub fn mappings(old: &[Vma], new: &[Vma], same_object: &dyn Fn(u32, u32) -> bool) -> Option<Change> {
    let special = |v: &&Vma| matches!(v.backing, Backing::Special(_));
    if !old.iter().filter(special).eq(new.iter().filter(special)) {
        return None;
    }
    let mut c = Change::default();
    let mut k = 0;
    // Old mappings are used up from the front; `at` is where the rest of old[k] begins.
    let mut at = old.first().map_or(0, |v| v.start);
    let lose = |c: &mut Change, a: u64, b: u64| match c.unmap.last_mut() {
        Some(l) if l.1 == a => l.1 = b,
        _ => c.unmap.push((a, b)),
    };
    for n in new {
        let mut cursor = n.start;
        while let Some(o) = old.get(k) {
            at = at.max(o.start);
            if at >= n.end {
                break;
            }
            if at < cursor {
                // Before this mapping: gone.
                let end = o.end.min(cursor);
                lose(&mut c, at, end);
                at = end;
            } else {
                if at > cursor {
                    c.map.push(piece(n, cursor, at));
                }
                let end = o.end.min(n.end);
                if same(o, n, same_object) {
                    tweak(&mut c, o, n, at, end);
                } else {
                    lose(&mut c, at, end);
                    c.map.push(piece(n, at, end));
                }
                at = end;
                cursor = end;
            }
            if at >= o.end {
                k += 1;
            }
        }
        if cursor < n.end {
            c.map.push(piece(n, cursor, n.end));
        }
    }
    while let Some(o) = old.get(k) {
        lose(&mut c, at.max(o.start), o.end);
        k += 1;
    }
    // Pieces of one mapping that follow each other are one.
    let mut joined: Vec<Vma> = Vec::with_capacity(c.map.len());
    for v in c.map.drain(..) {
        match joined.last_mut() {
            Some(l) if l.end == v.start && piece(l, v.start, v.start) == piece(&v, v.start, v.start) => l.end = v.end,
            _ => joined.push(v),
        }
    }
    c.map = joined;
    Some(c)
}

/// The part of a mapping from `start` to `end`.
fn piece(v: &Vma, start: u64, end: u64) -> Vma {
    let mut p = v.clone();
    (p.start, p.end) = (start, end);
    if let Backing::File { offset, .. } | Backing::Object { offset, .. } = &mut p.backing {
        *offset = offset.wrapping_add(start.wrapping_sub(v.start));
    }
    p
}

/// Whether what is mapped is the same thing, at the same place of it.
fn same(o: &Vma, n: &Vma, same_object: &dyn Fn(u32, u32) -> bool) -> bool {
    let offset = |v: &Vma, offset: u64| offset.wrapping_sub(v.start);
    let backing = match (&o.backing, &n.backing) {
        (Backing::Anonymous, Backing::Anonymous) => true,
        (
            Backing::File {
                file: a,
                offset: x,
                writable: w,
            },
            Backing::File {
                file: b,
                offset: y,
                writable: u,
            },
        ) => same_file(a, b) && offset(o, *x) == offset(n, *y) && w == u,
        (
            Backing::Object {
                object: a,
                offset: x,
                writable: w,
            },
            Backing::Object {
                object: b,
                offset: y,
                writable: u,
            },
        ) => same_object(*a, *b) && offset(o, *x) == offset(n, *y) && w == u,
        (Backing::Special(a), Backing::Special(b)) => a == b && (o.start, o.end) == (n.start, n.end),
        _ => false,
    };
    let (f, g) = (&o.flags, &n.flags);
    // No call takes these back.
    let fixed = (f.grows_down, f.no_reserve, f.droppable) == (g.grows_down, g.no_reserve, g.droppable);
    let thp = (f.huge, f.no_huge) == (g.huge, g.no_huge) || g.huge || g.no_huge;
    backing && fixed && thp && o.shared == n.shared
}

fn same_file(a: &FileId, b: &FileId) -> bool {
    (&a.path, a.dev, a.ino) == (&b.path, b.dev, b.ino)
}

fn tweak(c: &mut Change, o: &Vma, n: &Vma, start: u64, end: u64) {
    if (o.prot, o.pkey) != (n.prot, n.pkey) {
        c.protect.push((start, end, n.prot, n.pkey));
    }
    let (f, g) = (&o.flags, &n.flags);
    let mut advise = |differs: bool, advice: i32| {
        if differs {
            c.advise.push((start, end, advice));
        }
    };
    let pick = |on: bool, yes: i32, no: i32| if on { yes } else { no };
    advise(
        f.dont_fork != g.dont_fork,
        pick(g.dont_fork, libc::MADV_DONTFORK, libc::MADV_DOFORK),
    );
    advise(
        f.wipe_on_fork != g.wipe_on_fork,
        pick(g.wipe_on_fork, libc::MADV_WIPEONFORK, libc::MADV_KEEPONFORK),
    );
    advise(
        f.dont_dump != g.dont_dump,
        pick(g.dont_dump, libc::MADV_DONTDUMP, libc::MADV_DODUMP),
    );
    advise(
        (f.sequential, f.random) != (g.sequential, g.random),
        pick(
            g.sequential,
            libc::MADV_SEQUENTIAL,
            pick(g.random, libc::MADV_RANDOM, libc::MADV_NORMAL),
        ),
    );
    advise(
        f.mergeable != g.mergeable,
        pick(g.mergeable, libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE),
    );
    advise(
        (f.huge, f.no_huge) != (g.huge, g.no_huge),
        pick(g.huge, libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE),
    );
    if o.name != n.name && n.backing == Backing::Anonymous {
        c.name.push((start, end, n.name.clone()));
    }
}

/// What a destination that holds pages of `old` loses when it becomes `new`: whole spaces and objects by name, and ranges of spaces.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Everything: the skeleton is built anew.
    pub all: bool,
    /// Ranges by space.
    pub ranges: Vec<(u32, u64, u64)>,
}

/// See [`Losses`]. Spaces and objects that `new` does not name any more are not listed.
pub fn losses(old: Named<'_>, new: Named<'_>) -> Losses {
    let mut out = Losses::default();
    let Ok(shape) = processes(old.tree, new.tree) else {
        out.all = true;
        return out;
    };
    let same_object = |a: u32, b: u32| old.objects.get(a as usize) == new.objects.get(b as usize);
    for (p, from) in new.tree.processes.iter().zip(&shape.from).filter(|(p, _)| p.zombie.is_none()) {
        let space = new.spaces[p.mm as usize];
        let all = |out: &mut Losses| out.ranges.push((space, 0, !0xfff));
        let Some(o) = from.map(|o| &old.tree.processes[o]) else {
            all(&mut out);
            continue;
        };
        if old.spaces[o.mm as usize] != space {
            continue;
        }
        let (a, b) = (&old.tree.mms[o.mm as usize], &new.tree.mms[p.mm as usize]);
        match change(a, b, &same_object) {
            Some(c) => out.ranges.extend(c.unmap.iter().map(|r| (space, r.0, r.1))),
            None => all(&mut out),
        }
    }
    out
}

/// The change of one address space as a whole; None: built anew.
pub fn change(old: &crate::image::Mm, new: &crate::image::Mm, same_object: &dyn Fn(u32, u32) -> bool) -> Option<Change> {
    // Keys are handed out in order; the executable can only be set where the old one is not mapped any more.
    if old.pkeys != new.pkeys || !same_file(&old.exe, &new.exe) {
        return None;
    }
    mappings(&old.vmas, &new.vmas, same_object)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::VmaFlags;
    use proptest::prelude::*;

    fn vma(start: u64, end: u64, prot: u8, kind: u8) -> Vma {
        Vma {
            start: start << 12,
            end: end << 12,
            prot,
            shared: kind == 2,
            backing: match kind {
                0 => Backing::Anonymous,
                1 => Backing::File {
                    file: FileId {
                        path: b"/f".to_vec(),
                        ..Default::default()
                    },
                    offset: start << 12,
                    writable: false,
                },
                _ => Backing::Object {
                    object: 0,
                    offset: start << 12,
                    writable: true,
                },
            },
            flags: VmaFlags::default(),
            pkey: 0,
            name: None,
        }
    }

    fn apply(old: &[Vma], c: &Change) -> Vec<Option<(Vma, bool)>> {
        // One entry a page: what is mapped there, and whether it was there before.
        let mut pages: Vec<Option<(Vma, bool)>> = vec![None; 64];
        for v in old {
            for p in v.start >> 12..v.end >> 12 {
                pages[p as usize] = Some((piece(v, p << 12, (p + 1) << 12), true));
            }
        }
        for (a, b) in &c.unmap {
            for p in a >> 12..b >> 12 {
                pages[p as usize].take().expect("unmapped twice");
            }
        }
        for v in &c.map {
            for p in v.start >> 12..v.end >> 12 {
                assert!(pages[p as usize].is_none(), "mapped over something");
                pages[p as usize] = Some((piece(v, p << 12, (p + 1) << 12), false));
            }
        }
        for (a, b, prot, _) in &c.protect {
            for p in a >> 12..b >> 12 {
                pages[p as usize].as_mut().unwrap().0.prot = *prot;
            }
        }
        pages
    }

    fn list(shape: &[(u64, u64, u8, u8)]) -> Vec<Vma> {
        let mut at = 0;
        let mut out = Vec::new();
        for (gap, len, prot, kind) in shape {
            let start = at + gap;
            at = start + len;
            if at > 64 {
                break;
            }
            out.push(vma(start, at, *prot, *kind));
        }
        out
    }

    proptest! {
        #[test]
        fn old_becomes_new(a in proptest::collection::vec((0u64..4, 1u64..8, 0u8..8, 0u8..3), 0..12),
                           b in proptest::collection::vec((0u64..4, 1u64..8, 0u8..8, 0u8..3), 0..12)) {
            let (old, new) = (list(&a), list(&b));
            let c = mappings(&old, &new, &|a, b| a == b).unwrap();
            let got = apply(&old, &c);
            let mut want: Vec<Option<Vma>> = vec![None; 64];
            for v in &new {
                for p in v.start >> 12..v.end >> 12 {
                    want[p as usize] = Some(piece(v, p << 12, (p + 1) << 12));
                }
            }
            for (g, w) in got.iter().zip(&want) {
                prop_assert_eq!(g.as_ref().map(|g| &g.0), w.as_ref());
            }
            // What is the same thing in both is kept.
            for o in &old {
                for n in &new {
                    for p in (o.start.max(n.start) >> 12)..(o.end.min(n.end) >> 12) {
                        if same(o, n, &|a, b| a == b) {
                            prop_assert!(got[p as usize].as_ref().unwrap().1);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn growth_maps_only_what_is_new() {
        let c = mappings(&[vma(1, 3, 3, 0)], &[vma(1, 6, 3, 0)], &|_, _| true).unwrap();
        assert_eq!(c.map.len(), 1);
        assert_eq!((c.map[0].start, c.map[0].end), (3 << 12, 6 << 12));
        assert!(c.unmap.is_empty() && c.protect.is_empty());
    }

    #[test]
    fn a_file_mapped_at_another_offset_is_another_mapping() {
        let mut n = vma(1, 3, 1, 1);
        if let Backing::File { offset, .. } = &mut n.backing {
            *offset += 4096;
        }
        let c = mappings(&[vma(1, 3, 1, 1)], &[n], &|_, _| true).unwrap();
        assert_eq!(c.unmap, [(1 << 12, 3 << 12)]);
        assert_eq!(c.map.len(), 1);
    }
}

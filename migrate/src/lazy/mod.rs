//! Lazy pages: the copy runs, and what it misses follows, on demand and by itself.
//!
//! ```text
//!  source agent                        destination agent               keeper
//!   push.rs    ==== page streams ====>  fetch.rs   ==== ring ====>      pager.rs   UFFDIO_COPY    the program
//!   serve.rs   <--- Fault ------------             <--- Fault -----                <-- fault ---
//!              ==== page, at once ===>             ==== ring ====>                 UFFDIO_COPY
//! ```
//!
//! The freeze sends a few pages ([`split`]) and a list of those that follow. The destination registers every mapping that misses some with a
//! userfaultfd of that process, hands the descriptors to the *keeper*, and lets the program run. The originals stay stopped at the source until the
//! keeper has said that nothing is missing: they are the only copy of what has not arrived.
//!
//! What follows, and what cannot ([`can_wait`], [`objects`]): private anonymous memory follows. Everything else is sent within the freeze: written pages of private file
//! mappings, which userfaultfd does not cover; locked memory, which the kernel would fill with zeros as soon as it is locked again; memory that a
//! fork wipes, since a child must not get what its parent misses there; and shared memory that others could reach, by a descriptor above all. Shared
//! anonymous memory follows in a way of its own: [`object`].

pub mod audit;
pub mod bits;
pub mod fetch;
pub mod ipc;
pub mod keeper;
pub mod lane;
pub mod object;
pub mod pager;
pub mod push;
pub mod serve;
pub mod table;

use crate::{
    dump::pages::{OBJECT_SPACE, SpacePlan},
    image::{Backing, Kind, ObjectKind, PAGE, Tree, Vma},
    pages::PageSet,
    restore::rebuild::Names,
};
use std::collections::HashSet;

/// Whether missing pages of a mapping can follow: see the module.
pub fn can_wait(v: &Vma) -> bool {
    let f = &v.flags;
    v.backing == Backing::Anonymous && !v.shared && !f.is_locked() && !f.wipe_on_fork && !f.droppable
}

/// Names of the objects whose pages can follow: shared anonymous memory that no descriptor leads to, and of which no process has a mapping that
/// would not do ([`object`]). Small ones are not worth it.
pub fn objects(tree: &Tree, names: &Names) -> HashSet<u32> {
    let mut out: HashSet<u32> = (0..)
        .zip(&tree.objects)
        .filter(|(_, o)| o.kind == ObjectKind::SharedAnonymous && o.size >= LEAST)
        .map(|(i, _)| i)
        .collect();
    for d in &tree.descriptions {
        if let Kind::Object { object, .. } = d.kind {
            out.remove(&object);
        }
    }
    for v in tree.mms.iter().flat_map(|m| &m.vmas) {
        let Backing::Object { object, offset, writable } = v.backing else {
            continue;
        };
        let f = &v.flags;
        if !v.shared || !writable || offset % PAGE != 0 || f.is_locked() {
            out.remove(&object);
        }
    }
    out.into_iter().filter_map(|o| names.objects.get(o as usize).copied()).collect()
}

/// The memory of an address space in which they can.
pub fn waiting(vmas: &[Vma]) -> PageSet {
    PageSet::from_ranges(vmas.iter().filter(|v| can_wait(v)).map(|v| (v.start, v.end)))
}

/// Bytes of the smallest shared memory that follows.
const LEAST: u64 = 64 << 10;

/// A frozen tree's pages, by when they are sent.
#[derive(Debug, Default)]
pub struct Split {
    /// Within the freeze.
    pub now: Vec<SpacePlan>,
    /// After the resume.
    pub later: Vec<SpacePlan>,
}

/// Decides which pages can follow. `budget`: bytes of them that are sent within the freeze nevertheless; when everything fits, nothing follows.
/// Pages that every task needs for its first step go first. `shared`: the destination can let shared memory follow.
pub fn split(tree: &Tree, names: &Names, plans: Vec<SpacePlan>, budget: u64, shared: bool) -> Split {
    let mut out = Split::default();
    let mut spare = budget;
    let objects = if shared { objects(tree, names) } else { HashSet::new() };
    for plan in plans {
        if objects.contains(&plan.space) && !plan.ranges.is_empty() {
            if plan.bytes() <= spare {
                spare -= plan.bytes();
                out.now.push(plan);
            } else {
                out.later.push(plan);
            }
            continue;
        }
        let Some(m) = names
            .spaces
            .iter()
            .position(|n| *n == plan.space)
            .filter(|_| plan.space < OBJECT_SPACE)
        else {
            out.now.push(plan);
            continue;
        };
        let Some(mm) = tree.mms.get(m) else { continue };
        let all = PageSet::from_ranges(plan.ranges.iter().copied());
        let mut later = all.intersection(&waiting(&mm.vmas));
        later.subtract(&first(tree, m));
        if later.bytes() <= spare {
            spare -= later.bytes();
            out.now.push(plan);
            continue;
        }
        let now = all.difference(&later);
        let cut = |set: &PageSet| SpacePlan {
            space: plan.space,
            ranges: at_borders(set, &mm.vmas),
        };
        out.now.push(cut(&now));
        out.later.push(cut(&later));
    }
    out
}

/// Pages that a task touches as soon as it runs: its stack and its code, its thread area, what the kernel writes for it. And the arguments and the
/// environment, which others read through /proc, where the kernel does not wait for a page: ps(1) would show a program without a name.
pub fn first(tree: &Tree, mm: usize) -> PageSet {
    let mut set = PageSet::new();
    let mut add = |at: u64, before: u64, len: u64| {
        if at > PAGE * 16 && at < 1 << 56 {
            set.insert(at - before, at + len);
        }
    };
    let l = &tree.mms[mm].layout;
    for (start, end) in [(l.arg_start, l.arg_end), (l.env_start, l.env_end)] {
        const MOST: u64 = 128 << 10;
        if start < end {
            add(start, 0, (end - start).min(MOST));
        }
    }
    for p in tree.processes.iter().filter(|p| p.mm as usize == mm && p.zombie.is_none()) {
        for t in &p.threads {
            // The red zone below, a frame or two above.
            add(t.regs.rsp, 256, PAGE);
            add(t.regs.rip, 0, 16);
            add(t.regs.fs_base, PAGE / 2, PAGE / 2);
            if let Some(r) = &t.rseq {
                add(r.address, 0, u64::from(r.len));
            }
        }
    }
    set
}

/// The ranges of a set, cut at the borders of mappings.
pub fn at_borders(set: &PageSet, vmas: &[Vma]) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    for v in vmas {
        out.extend(set.clip(v.start, v.end).ranges());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Host, Mm, Process, VmaFlags};

    fn vma(start: u64, end: u64, backing: Backing, flags: VmaFlags) -> Vma {
        Vma {
            start: start * PAGE,
            end: end * PAGE,
            prot: 3,
            shared: false,
            backing,
            flags,
            pkey: 0,
            name: None,
        }
    }

    fn tree() -> (Tree, Names) {
        let locked = VmaFlags {
            locked: true,
            ..Default::default()
        };
        let file = Backing::File {
            file: Default::default(),
            offset: 0,
            writable: false,
        };
        let mut tree = Tree::empty(Host::default());
        tree.mms.push(Mm {
            vmas: vec![
                vma(0x100, 0x200, Backing::Anonymous, VmaFlags::default()),
                vma(0x200, 0x210, file, VmaFlags::default()),
                vma(0x300, 0x310, Backing::Anonymous, locked),
                vma(0x400, 0x410, Backing::Anonymous, VmaFlags::default()),
            ],
            ..Mm::default()
        });
        tree.processes.push(Process {
            mm: 0,
            ..Process::default()
        });
        let names = Names {
            spaces: vec![9],
            objects: Vec::new(),
        };
        (tree, names)
    }

    fn plan(space: u32, ranges: &[(u64, u64)]) -> SpacePlan {
        SpacePlan {
            space,
            ranges: ranges.iter().map(|(a, b)| (a * PAGE, b * PAGE)).collect(),
        }
    }

    #[test]
    fn what_cannot_follow_goes_now() {
        let (tree, names) = tree();
        let all = [(0x100, 0x180), (0x200, 0x204), (0x300, 0x302), (0x400, 0x401)];
        let s = split(&tree, &names, vec![plan(9, &all), plan(OBJECT_SPACE, &[(0, 4)])], 0, true);
        let ranges = |p: &[SpacePlan]| -> Vec<(u32, u64, u64)> {
            p.iter()
                .flat_map(|p| p.ranges.iter().map(|r| (p.space, r.0 / PAGE, r.1 / PAGE)))
                .collect()
        };
        assert_eq!(ranges(&s.later), [(9, 0x100, 0x180), (9, 0x400, 0x401)]);
        assert_eq!(ranges(&s.now), [(9, 0x200, 0x204), (9, 0x300, 0x302), (OBJECT_SPACE, 0, 4)]);
    }

    #[test]
    fn a_little_is_not_worth_it() {
        let (tree, names) = tree();
        let s = split(&tree, &names, vec![plan(9, &[(0x100, 0x104)])], 4 * PAGE, true);
        assert!(s.later.is_empty() && s.now.len() == 1);
        let s = split(&tree, &names, vec![plan(9, &[(0x100, 0x105)])], 4 * PAGE, true);
        assert_eq!(s.later.len(), 1);
    }
}

//! The memory oracle: hashes of every page with content, on both sides, by the slow and simple way.
//!
//! `send --verify` takes them while the tree is frozen; the destination takes its own before the release and refuses the handover when one
//! differs. In anonymous memory a page of zeros and an absent page are the same to the program and to the oracle; over a file they are not.
//!
//! Beside the pages the destination holds what the kernel has mapped in the copy against the tree it was sent: memory without pages, such as a
//! reserve without rights, has no hashes.

use crate::{
    dump::{
        self,
        pages::{self, OBJECT_SPACE, Reader},
    },
    image::{Backing, Mm, PAGE, Tree, Vma, VmaFlags},
    procfs::maps::Mapping,
    sys::mem::Mem,
};
use std::{fs::File, io, os::fd::OwnedFd};

/// First 8 bytes of a page's blake3.
pub fn hash(page: &[u8]) -> u64 {
    let h = blake3::hash(page);
    u64::from_le_bytes(h.as_bytes()[..8].try_into().unwrap())
}

/// (space, address, [`hash`]) of every page that is not zero, or not what an untouched page would be, ascending.
pub fn hashes(tree: &Tree, pids: &[i32], objects: &[OwnedFd]) -> io::Result<Vec<(u32, u64, u64)>> {
    let (plans, _) = pages::plan_tree(tree, pids, objects)?;
    let mut out = Vec::new();
    for plan in plans {
        let reader = if plan.space >= OBJECT_SPACE {
            Reader::Object(File::from(objects[(plan.space - OBJECT_SPACE) as usize].try_clone()?))
        } else {
            let at = tree
                .processes
                .iter()
                .position(|p| p.mm == plan.space && p.zombie.is_none())
                .unwrap_or(0);
            Reader::Process(Mem::open(pids[at])?)
        };
        let vmas = tree.mms.get(plan.space as usize).map_or(&[][..], |m| &m.vmas);
        pages::read_plan(&plan, &reader, &mut |batch| {
            let mut data = batch.data.iter().flat_map(|d| d.chunks(PAGE as usize));
            for run in &batch.runs {
                if run.zero {
                    let over_file = |at: u64| vmas.iter().any(|v| (v.start..v.end).contains(&at) && crate::track::over_file(v));
                    if over_file(run.start) {
                        out.extend((0..u64::from(run.pages)).map(|k| (plan.space, run.start + k * PAGE, 0)));
                    }
                    continue;
                }
                for k in 0..run.pages as u64 {
                    let page = data.next().unwrap_or_default();
                    out.push((plan.space, run.start + k * PAGE, hash(page)));
                }
            }
            true
        })?;
    }
    out.sort_unstable();
    Ok(out)
}

/// What a page belongs to, in words.
fn owner(mms: &[Mm], space: u32, at: u64) -> String {
    let vmas = mms.get(space as usize).map_or(&[][..], |m| &m.vmas);
    match vmas.iter().find(|v| (v.start..v.end).contains(&at)) {
        Some(v) => format!("{:x}-{:x}, rights {}, {:?}", v.start, v.end, v.prot, v.backing),
        None if space >= OBJECT_SPACE => "shared memory".into(),
        None => "no mapping".into(),
    }
}

/// The first few differences, in words; empty when equal. `mms`: the address spaces that the pages are of.
pub fn differences(expected: &[(u32, u64, u64)], got: &[(u32, u64, u64)], mms: &[Mm]) -> Vec<String> {
    let mut out = Vec::new();
    let (mut i, mut k) = (0, 0);
    let mut count = 0;
    while i < expected.len() || k < got.len() {
        let e = expected.get(i).map(|x| (x.0, x.1));
        let g = got.get(k).map(|x| (x.0, x.1));
        let text = match (e, g) {
            (Some(e), Some(g)) if e == g => {
                let same = expected[i].2 == got[k].2;
                i += 1;
                k += 1;
                if same {
                    continue;
                }
                format!("page {:#x} of space {:#x} ({}) differs", e.1, e.0, owner(mms, e.0, e.1))
            }
            (Some(e), g) if g.is_none_or(|g| e < g) => {
                i += 1;
                format!("page {:#x} of space {:#x} ({}) is missing", e.1, e.0, owner(mms, e.0, e.1))
            }
            (_, Some(g)) => {
                k += 1;
                format!("page {:#x} of space {:#x} ({}) should be zero", g.1, g.0, owner(mms, g.0, g.1))
            }
            _ => break,
        };
        count += 1;
        if out.len() < 8 {
            out.push(text);
        }
    }
    if count > out.len() {
        out.push(format!("and {} more", count - out.len()));
    }
    out
}

/// A range with what a program can tell of it: rights, sharing, where in a file or object it begins (its start taken off), properties, key.
type Range = (u64, u64, (u8, bool, Option<u64>, VmaFlags, u8));

/// Neighbours that do not differ are one: the kernel merges and splits as it likes.
fn joined(ranges: impl Iterator<Item = Range>) -> Vec<Range> {
    let mut out: Vec<Range> = Vec::new();
    for r in ranges {
        match out.last_mut() {
            Some(l) if l.1 == r.0 && l.2 == r.2 => l.1 = r.1,
            _ => out.push(r),
        }
    }
    out
}

/// What a kernel may refuse or a sysctl overrule is not compared.
fn comparable(mut f: VmaFlags) -> VmaFlags {
    (f.stack, f.no_reserve) = (false, false);
    // Droppable memory (Linux 6.11) is wiped on fork and not dumped; on an older kernel that is all that is left of it.
    if f.droppable {
        (f.droppable, f.wipe_on_fork, f.dont_dump) = (false, true, true);
    }
    f
}

/// Where what is mapped (`now`, from smaps) is not what an address space should have, in words; the kernel's own mappings are left out, and
/// what overlaps `ours`.
pub fn mappings(vmas: &[Vma], now: &[Mapping], ours: &[(u64, u64)]) -> Vec<String> {
    let foreign = |a: u64, b: u64| ours.iter().any(|o| a < o.1 && o.0 < b);
    let expected = vmas
        .iter()
        .filter(|v| !matches!(v.backing, Backing::Special(_)) && !foreign(v.start, v.end));
    let expected = joined(expected.map(|v| {
        let offset = match &v.backing {
            Backing::File { offset, .. } | Backing::Object { offset, .. } => Some(offset.wrapping_sub(v.start)),
            _ => None,
        };
        (v.start, v.end, (v.prot, v.shared, offset, comparable(v.flags), v.pkey))
    }));
    let now = now.iter().filter(|m| !m.name.starts_with(b"[v") && !foreign(m.start, m.end));
    let got = joined(now.map(|m| {
        let backed = m.ino != 0 || m.name.starts_with(b"/");
        let offset = backed.then(|| m.offset.wrapping_sub(m.start));
        (m.start, m.end, (m.prot, m.shared, offset, comparable(dump::mm::flags(m)), m.pkey))
    }));
    let text = |r: &Range| format!("{:x}-{:x} {:?}", r.0, r.1, r.2);
    let missing = expected
        .iter()
        .filter(|r| !got.contains(r))
        .map(|r| format!("not mapped: {}", text(r)));
    let extra = got.iter().filter(|r| !expected.contains(r)).map(|r| format!("mapped: {}", text(r)));
    missing.chain(extra).take(8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_that_are_not_as_they_should_be_show() {
        let vma = |start, end, prot| Vma {
            start,
            end,
            prot,
            shared: false,
            backing: Backing::Anonymous,
            flags: VmaFlags::default(),
            pkey: 0,
            name: None,
        };
        let now = |start, end, prot| Mapping {
            start,
            end,
            prot,
            ..Default::default()
        };
        let vmas = [vma(0x1000, 0x3000, 3), vma(0x3000, 0x4000, 3), vma(0x8000, 0x9000, 0)];
        let right = [now(0x1000, 0x2000, 3), now(0x2000, 0x4000, 3), now(0x8000, 0x9000, 0)];
        assert_eq!(mappings(&vmas, &right, &[]), Vec::<String>::new());
        assert_eq!(mappings(&vmas, &right[..2], &[]).len(), 1, "a reserve is missing");
        assert_eq!(mappings(&vmas, &right[..2], &[(0x8000, 0x9000)]).len(), 0, "ours is not looked at");
        let mut wrong = right.to_vec();
        wrong[2].prot = 1;
        assert_eq!(mappings(&vmas, &wrong, &[]).len(), 2, "one too few and one too many");
        let mut more = right.to_vec();
        more.push(now(0xa000, 0xb000, 1));
        assert_eq!(mappings(&vmas, &more, &[]).len(), 1);
        // Droppable memory, on a kernel that has it and on one that has not.
        let mut droppable = vmas.to_vec();
        droppable[2].flags.droppable = true;
        for flags in [&[*b"dp", *b"wf", *b"dd"][..], &[*b"wf", *b"dd"]] {
            let mut there = right.to_vec();
            there[2].vm_flags = flags.to_vec();
            assert_eq!(mappings(&droppable, &there, &[]), Vec::<String>::new(), "{flags:?}");
        }
        more[3].name = b"[vdso]".to_vec();
        assert_eq!(mappings(&vmas, &more, &[]).len(), 0, "the kernel's own");
        let mut advised = right.to_vec();
        advised[0].vm_flags = vec![*b"dc"];
        assert_eq!(mappings(&vmas, &advised, &[]).len(), 3, "one that should not be inherited");
    }

    #[test]
    fn every_kind_of_difference_shows() {
        let a = [(0, 4096, 1), (0, 8192, 2), (1, 4096, 3)];
        assert!(differences(&a, &a, &[]).is_empty());
        assert_eq!(differences(&a, &a[..2], &[]).len(), 1);
        assert_eq!(differences(&a[1..], &a, &[]).len(), 1);
        let mut b = a;
        b[1].2 = 9;
        assert_eq!(differences(&a, &b, &[]), vec!["page 0x2000 of space 0x0 (no mapping) differs"]);
    }
}

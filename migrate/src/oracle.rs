//! The memory oracle: hashes of every page with content, on both sides, by the slow and simple way.
//!
//! `send --verify` takes them while the tree is frozen; the destination takes its own before the release and refuses the handover when one
//! differs. In anonymous memory a page of zeros and an absent page are the same to the program and to the oracle; over a file they are not.

use crate::{
    dump::pages::{self, OBJECT_SPACE, Reader},
    image::{PAGE, Tree},
    sys::mem::Mem,
};
use std::{fs::File, io, os::fd::OwnedFd};

/// (space, address, first 8 bytes of blake3) of every page that is not zero, or not what an untouched page would be, ascending.
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
                    let h = blake3::hash(page);
                    out.push((
                        plan.space,
                        run.start + k * PAGE,
                        u64::from_le_bytes(h.as_bytes()[..8].try_into().unwrap()),
                    ));
                }
            }
            true
        })?;
    }
    out.sort_unstable();
    Ok(out)
}

/// The first few differences, in words; empty when equal.
pub fn differences(expected: &[(u32, u64, u64)], got: &[(u32, u64, u64)]) -> Vec<String> {
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
                format!("page {:#x} of space {:#x} differs", e.1, e.0)
            }
            (Some(e), g) if g.is_none_or(|g| e < g) => {
                i += 1;
                format!("page {:#x} of space {:#x} is missing", e.1, e.0)
            }
            (_, Some(g)) => {
                k += 1;
                format!("page {:#x} of space {:#x} should be zero", g.1, g.0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_difference_shows() {
        let a = [(0, 4096, 1), (0, 8192, 2), (1, 4096, 3)];
        assert!(differences(&a, &a).is_empty());
        assert_eq!(differences(&a, &a[..2]).len(), 1);
        assert_eq!(differences(&a[1..], &a).len(), 1);
        let mut b = a;
        b[1].2 = 9;
        assert_eq!(differences(&a, &b), vec!["page 0x2000 of space 0x0 differs"]);
    }
}

//! In which order processes have to be made, so that each is born into the right session. Pure.
//!
//! A process inherits its session at fork and leaves it only by setsid(2), as a leader. So a child that shares its parent's *former* session
//! is made before the parent calls setsid, one that shares the parent's present session after it.

use crate::image::Process;
use std::collections::HashSet;

/// What a process does, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Makes the child with this index.
    Clone(usize),
    /// setsid(2).
    Setsid,
}

/// The steps of each process, same order as the processes. Err: why the sessions cannot be rebuilt.
///
/// Sessions whose leader is not in the tree count as one: the one the root is born into.
pub fn sessions(processes: &[Process]) -> Result<Vec<Vec<Step>>, String> {
    const OUTSIDE: i32 = 0;
    let leaders: HashSet<i32> = processes.iter().filter(|p| p.sid == p.pid).map(|p| p.sid).collect();
    let sid = |p: &Process| if leaders.contains(&p.sid) { p.sid } else { OUTSIDE };
    let outside: HashSet<i32> = processes.iter().filter(|p| sid(p) == OUTSIDE).map(|p| p.sid).collect();
    if outside.len() > 1 {
        return Err(format!(
            "the tree spans {} sessions whose leaders are outside it or have ended",
            outside.len()
        ));
    }
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); processes.len()];
    for (i, p) in processes.iter().enumerate().skip(1) {
        match p.parent {
            Some(parent) if (parent as usize) < i => children[parent as usize].push(i),
            _ => return Err(format!("process {} has no parent before it", p.pid)),
        }
    }
    // The session a process must be born into; None: any, it leads one and no child of it needs the former one.
    let mut born: Vec<Option<i32>> = vec![None; processes.len()];
    for i in (0..processes.len()).rev() {
        let p = &processes[i];
        born[i] = if p.sid != p.pid {
            Some(sid(p))
        } else {
            let mut former = None;
            for &c in &children[i] {
                match born[c] {
                    Some(s) if s != p.pid => {
                        if former.is_some_and(|f| f != s) {
                            return Err(format!("children of process {} belong to different sessions", p.pid));
                        }
                        former = Some(s);
                    }
                    _ => {}
                }
            }
            former
        };
    }
    if born.first().copied().flatten().is_some_and(|s| s != OUTSIDE) {
        return Err("the root belongs to the session of one of its descendants".into());
    }
    let mut out = Vec::with_capacity(processes.len());
    // The session each process is really born into, known top down.
    let mut actual = vec![OUTSIDE; processes.len()];
    for (i, p) in processes.iter().enumerate() {
        let mut steps = Vec::new();
        if p.sid == p.pid {
            for &c in &children[i] {
                if born[c].is_some_and(|s| s != p.pid) {
                    if born[c] != Some(actual[i]) {
                        return Err(format!(
                            "process {} is in a session it cannot inherit from its parent {}",
                            processes[c].pid, p.pid
                        ));
                    }
                    actual[c] = actual[i];
                    steps.push(Step::Clone(c));
                }
            }
            steps.push(Step::Setsid);
            for &c in &children[i] {
                if born[c].is_none_or(|s| s == p.pid) {
                    actual[c] = p.pid;
                    steps.push(Step::Clone(c));
                }
            }
        } else {
            for &c in &children[i] {
                if born[c].is_some_and(|s| s != actual[i]) {
                    return Err(format!(
                        "process {} is in a session it cannot inherit from its parent {}",
                        processes[c].pid, p.pid
                    ));
                }
                actual[c] = actual[i];
                steps.push(Step::Clone(c));
            }
        }
        out.push(steps);
    }
    for p in processes {
        let group = p.pgid;
        if group != 0 && group != p.pid && !processes.iter().any(|q| q.pid == group) && processes[0].pgid != group {
            return Err(format!("process {} is in group {group}, whose leader has ended", p.pid));
        }
    }
    Ok(out)
}

/// An address range free in all of `used` (sorted or not), `len` bytes, page aligned, for code and data of ours.
pub fn free_range(used: &[(u64, u64)], len: u64) -> Option<u64> {
    let mut used = used.to_vec();
    used.sort_unstable();
    // Above what small-model programs and low reserves use, below the mmap area.
    let mut at = 0x1000_0000_0000u64;
    for (a, b) in used {
        if b <= at {
            continue;
        }
        if a >= at + len {
            break;
        }
        at = b.next_multiple_of(1 << 21);
    }
    (at + len < 0x7fff_0000_0000).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn p(pid: i32, parent: Option<u32>, sid: i32) -> Process {
        Process {
            pid,
            parent,
            parent_tid: 0,
            pgid: pid,
            sid,
            zombie: None,
            comm: String::new(),
            threads: vec![],
            mm: 0,
            fds: vec![],
            cwd: Default::default(),
            umask: 0,
            sigactions: vec![],
            pending: vec![],
            itimers: Default::default(),
            timers: vec![],
            rlimits: vec![],
            subreaper: false,
            exit_signal: 17,
        }
    }

    #[test]
    fn a_job_of_a_shell_outside() {
        let s = sessions(&[p(10, None, 5), p(11, Some(0), 5)]).unwrap();
        assert_eq!(s, vec![vec![Step::Clone(1)], vec![]]);
    }

    #[test]
    fn a_child_from_before_setsid() {
        let s = sessions(&[p(10, None, 10), p(11, Some(0), 5), p(12, Some(0), 10), p(13, Some(0), 13)]).unwrap();
        assert_eq!(s[0], vec![Step::Clone(1), Step::Setsid, Step::Clone(2), Step::Clone(3)]);
        assert_eq!(s[3], vec![Step::Setsid]);
    }

    #[test]
    fn two_sessions_outside_are_refused() {
        assert!(sessions(&[p(10, None, 5), p(11, Some(0), 6)]).is_err());
        assert!(sessions(&[p(10, None, 10), p(11, Some(0), 5), p(12, Some(0), 6)]).is_err());
    }

    #[test]
    fn a_dead_group_leader_is_refused() {
        let mut v = [p(10, None, 5), p(11, Some(0), 5)];
        v[1].pgid = 99;
        assert!(sessions(&v).is_err());
        v[0].pgid = 99;
        assert!(sessions(&v).is_ok());
    }

    proptest! {
        /// Replays the plan as fork and setsid would, and compares the sessions.
        #[test]
        fn the_plan_gives_the_sessions(shape in proptest::collection::vec((0u32..6, 0u8..3), 1..8)) {
            let mut v = vec![p(10, None, 5)];
            for (i, (parent, kind)) in shape.iter().enumerate() {
                let parent = (*parent as usize).min(v.len() - 1);
                let pid = 11 + i as i32;
                let sid = match kind { 0 => v[parent].sid, 1 => pid, _ => 5 };
                v.push(p(pid, Some(parent as u32), sid));
            }
            if let Ok(plan) = sessions(&v) {
                let mut got = vec![None; v.len()];
                got[0] = Some(5);
                for i in 0..v.len() {
                    for s in &plan[i] {
                        match s {
                            Step::Setsid => got[i] = Some(v[i].pid),
                            Step::Clone(c) => { prop_assert_eq!(got[*c], None); got[*c] = got[i]; }
                        }
                    }
                }
                for (g, p) in got.iter().zip(&v) {
                    prop_assert_eq!(*g, Some(p.sid));
                }
            }
        }

        #[test]
        fn free_ranges_are_free(used in proptest::collection::vec((0u64..0x8000, 1u64..0x100), 0..40), len in 1u64..0x100) {
            let base = 0x1000_0000_0000u64 - (0x100 << 21);
            let used: Vec<(u64, u64)> = used.iter().map(|(a, l)| (base + (a << 21), base + ((a + l) << 21))).collect();
            if let Some(at) = free_range(&used, len << 12) {
                for (a, b) in used {
                    prop_assert!(at + (len << 12) <= a || at >= b);
                }
            }
        }
    }
}

//! The agent's own priority: behind the program while long rounds run, as it was for everything else.
//!
//! A round of pre-copy is work for all the cores there are: pages are read, encrypted, sent. On a host without cores to spare the program waited 20
//! to 60 ms for a core again and again, ten times as long as its freeze. Niceness settles that, but only among tasks that the scheduler compares:
//! with autogroups (sched(7)), on by default, it compares sessions first, and setpriority(2) says nothing there. The session's own niceness is
//! in /proc/PID/autogroup. It is changed only when this process leads the session (started by a service manager, by ssh, by setsid(1)):
//! in a terminal's session it would be that of the shell too.
//!
//! What is left are whole ticks of the scheduler (4 ms at HZ=250), mostly two of them: on a kernel that does not preempt, a task that wakes up waits
//! for the tick at which the running one has had its slice. A slice of 0.1 ms took the longest waits of 1 GiB at 50 MB/s, agents and program on two
//! cores, from 10 to 23 ms to 8 to 11. Nicer still (19) gave nothing more, and would stop the rounds on a busy host.
//!
//! The thread that makes the copy's processes keeps its priority, since they inherit it.

use super::misc;
use crate::tracer;
use std::{
    fs,
    io::{self, Write},
};

/// How much nicer: a tenth of the weight of a task of the same niceness as before.
const NICER: i32 = 10;
/// Nanoseconds for which a thread is kept on its core once it has it, the least there is. Linux 6.12 and later heed it
/// (Documentation/scheduler/sched-eevdf.rst); 0 gives the default back.
const SLICE: u64 = 100_000;
/// Bytes of memory from which a round is long: some tens of milliseconds. Shorter ones come near the freeze, which they keep short by being fast.
const LONG: u64 = 16 << 20;
/// The nicest.
const NICEST: i32 = 19;
/// sched_setattr(2): the policy stays as it is.
const SCHED_FLAG_KEEP_POLICY: u64 = 0x08;
/// The niceness of what others wait for.
const AHEAD: i32 = -10;
const AUTOGROUP: &str = "/proc/self/autogroup";

/// Lowers the priority of this process from time to time; gives it back when dropped.
#[derive(Debug)]
pub struct Background {
    /// Of this process.
    nice: i32,
    /// Of its session, when it leads that.
    session: Option<i32>,
    allowed: bool,
    lowered: bool,
}

impl Background {
    /// Nothing is changed yet.
    pub fn new() -> Background {
        // SAFETY: no pointers; 0 is the calling thread. -1 is a value as well as an error, and an error is not to be expected.
        let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        // SAFETY: no pointers; 0 is this process.
        let leads = unsafe { libc::getsid(0) == libc::getpid() };
        Background {
            nice,
            session: fs::read_to_string(AUTOGROUP).ok().filter(|_| leads).and_then(|t| session_nice(&t)),
            // Without the right to raise it again it would stay low in the freeze.
            allowed: rustix::process::geteuid().is_root(),
            lowered: false,
        }
    }

    /// A round with this much memory comes next.
    pub fn round(&mut self, bytes: u64) {
        if bytes >= LONG {
            self.lower();
        } else {
            self.raise();
        }
    }

    /// What comes next is no round.
    pub fn raise(&mut self) {
        if std::mem::take(&mut self.lowered) {
            self.set(0);
        }
    }

    fn lower(&mut self) {
        if self.allowed && !self.lowered {
            self.lowered = true;
            self.set(NICER);
        }
    }

    fn set(&self, more: i32) {
        if let Some(session) = self.session {
            let set = write_session((session + more).min(NICEST));
            tracing::trace!(more, ?set, "niceness of the session");
        }
        let nice = (self.nice + more).min(NICEST);
        // A thread that starts meanwhile has the priority of the one that starts it: the second pass finds those.
        for _ in 0..2 {
            for tid in threads() {
                if more == 0 || !tracer::is_tracer(tid) {
                    // One that ended meanwhile does not matter.
                    let _ = misc::set_sched(
                        tid,
                        misc::SchedAttr {
                            size: size_of::<misc::SchedAttr>() as u32,
                            flags: SCHED_FLAG_KEEP_POLICY,
                            nice,
                            runtime: if more == 0 { 0 } else { SLICE },
                            ..Default::default()
                        },
                    );
                }
            }
        }
    }
}

impl Default for Background {
    fn default() -> Self {
        Background::new()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.raise();
    }
}

/// Puts this process, which has one thread and leads its session, ahead of others: tasks wait for what it does, and it does little. Without the right
/// to it nothing changes.
pub fn ahead() {
    let _ = write_session(AHEAD);
    thread_ahead();
}

/// Puts the calling thread ahead of the others of its session.
pub fn thread_ahead() {
    let attr = misc::SchedAttr {
        size: size_of::<misc::SchedAttr>() as u32,
        flags: SCHED_FLAG_KEEP_POLICY,
        nice: AHEAD,
        runtime: SLICE,
        ..Default::default()
    };
    let _ = misc::set_sched(0, attr);
}

fn write_session(nice: i32) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(AUTOGROUP)?
        .write_all(nice.to_string().as_bytes())
}

/// "/autogroup-123 nice 0"
fn session_nice(text: &str) -> Option<i32> {
    text.split_whitespace().last()?.parse().ok()
}

fn threads() -> Vec<i32> {
    let entries = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a thread of this process.
    fn nice_of(tid: i32) -> i32 {
        // SAFETY: no pointers.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, tid as libc::id_t) }
    }

    #[test]
    fn reads_the_niceness_of_a_session() {
        assert_eq!(session_nice("/autogroup-30994 nice 0\n"), Some(0));
        assert_eq!(session_nice("/autogroup-1 nice -5\n"), Some(-5));
        assert_eq!(session_nice(""), None);
    }

    #[test]
    fn long_rounds_lower_every_thread_and_the_end_raises_them_again() {
        let (stop, wait) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || {
            // SAFETY: no pointers.
            let _ = tell.send(unsafe { libc::gettid() });
            let _ = wait.recv();
        });
        let Ok(tid) = told.recv() else { panic!("the thread says nothing") };
        let mut b = Background::new();
        let before = nice_of(tid);
        b.round(LONG - 1);
        assert_eq!(nice_of(tid), before, "a short round changes nothing");
        b.round(LONG);
        let expected = if b.allowed { (before + NICER).min(NICEST) } else { before };
        assert_eq!(nice_of(tid), expected);
        b.round(1);
        assert_eq!(nice_of(tid), before, "before a short round it is given back");
        b.round(LONG);
        drop(b);
        assert_eq!(nice_of(tid), before, "and in the end");
        drop(stop);
        let _ = other.join();
    }
}

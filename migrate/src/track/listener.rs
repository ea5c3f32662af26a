//! Hears of forks and removals in processes whose shared memory is tracked ([`super::shared`]).
//!
//! A child writes to shared memory through page tables of its own, which nobody looks at until it is known, and one that lives between two looks is
//! never known. And a hole that is punched by MADV_REMOVE leaves the write protection of its pages in place: what is read there next is zeros that
//! nobody has written. So these userfaultfds tell of both (UFFD_FEATURE_EVENT_FORK and EVENT_REMOVE, userfaultfd(2)): the call waits until a thread
//! here has read the event. A child's own userfaultfd, which comes with its event, shows for as long as it is kept whether that child is still there.
//!
//! The thread does nothing else, so that no call waits for a look or for the network; if the agent dies the kernel lets them go on. If an event cannot be
//! read, for want of a descriptor for a child, it lets go of all userfaultfds, which nobody else holds, and the calls go on as well.

use crate::sys::{
    priority,
    uffd::{Message, Userfault},
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread::JoinHandle,
};

/// How often descriptors of processes that have ended are given up.
const SWEEP: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

#[derive(Debug, Default)]
struct State {
    /// Of processes that are tracked.
    parents: Vec<Arc<Userfault>>,
    /// Of processes that were forked since, and of their children.
    children: Vec<Arc<Userfault>>,
    births: u64,
    removals: u64,
    failed: bool,
    ended: bool,
}

/// The thread; it ends when this is dropped, and nothing is left in any process.
#[derive(Debug)]
pub struct Listener {
    state: Arc<Mutex<State>>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Listener {
    /// Starts it.
    pub fn start() -> io::Result<Listener> {
        // Each child costs a descriptor until it is tracked itself, or has ended.
        crate::restore::fds::raise_limit();
        let state = Arc::new(Mutex::new(State::default()));
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (s, w) = (state.clone(), wake.clone());
        let thread = std::thread::Builder::new().name("listener".into()).spawn(move || {
            priority::thread_ahead();
            listen(&s, &w);
        })?;
        Ok(Listener {
            state,
            wake,
            thread: Some(thread),
        })
    }

    /// Listens to this userfaultfd, and keeps it as long as that is of use.
    pub fn watch(&self, fd: Userfault) -> Weak<Userfault> {
        let fd = Arc::new(fd);
        let weak = Arc::downgrade(&fd);
        lock(&self.state).parents.push(fd);
        self.nudge();
        weak
    }

    /// How many forks there were. A child that this does not count has not run yet.
    pub fn births(&self) -> u64 {
        lock(&self.state).births
    }

    /// Why what is tracked says nothing any more, if that is so.
    pub fn useless(&self) -> Option<&'static str> {
        let s = lock(&self.state);
        match (s.failed, s.removals) {
            (true, _) => Some("an event could not be read"),
            // From the page tables or for good, that is not told, and perhaps it is only about to.
            (_, 1..) => Some("madvise(2) drops some of it"),
            _ => None,
        }
    }

    /// How many of the children are there, with the memory that they were born with.
    pub fn children(&self) -> usize {
        let mut state = lock(&self.state);
        state.children.retain(|c| c.alive());
        state.children.len()
    }

    /// Gives the children up: from here on they are somebody else's, or nobody's.
    pub fn let_go(&self) {
        lock(&self.state).children.clear();
        self.nudge();
    }

    fn nudge(&self) {
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        lock(&self.state).ended = true;
        self.nudge();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

fn listen(state: &Mutex<State>, wake: &OwnedFd) {
    loop {
        let all: Vec<Arc<Userfault>> = {
            let mut s = lock(state);
            if s.ended {
                return;
            }
            s.parents.retain(|p| p.alive());
            s.children.retain(|c| c.alive());
            s.parents.iter().chain(&s.children).cloned().collect()
        };
        let mut fds: Vec<PollFd<'_>> = all.iter().map(|u| PollFd::from_borrowed_fd(u.as_fd(), PollFlags::IN)).collect();
        fds.push(PollFd::new(wake, PollFlags::IN));
        if poll(&mut fds, Some(&SWEEP)).is_err() {
            continue;
        }
        let ready: Vec<bool> = fds.iter().map(|f| !f.revents().is_empty()).collect();
        let _ = rustix::io::read(wake, &mut [0u8; 8]);
        for fd in all.iter().zip(ready).filter(|(_, r)| *r).map(|(fd, _)| fd) {
            let mut s = lock(state);
            // Whoever caused the event goes on as soon as it was read: nobody may ask before it is counted.
            let Ok(messages) = fd.read() else {
                s.failed = true;
                s.parents.clear();
                s.children.clear();
                return;
            };
            for m in messages {
                match m {
                    Message::Fork(child) => {
                        s.births += 1;
                        s.children.push(Arc::new(child));
                    }
                    _ => s.removals += 1,
                }
            }
        }
    }
}

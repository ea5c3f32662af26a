//! Trackers that need a userfaultfd of the process they track: it is made there, by an injected call, and taken.

use super::shared;
use crate::{
    arch::pilot::Record,
    inject::{InjectError, Injector},
    procfs::maps::{self, Mapping},
    sys::uffd,
    tracer::{Frozen, Proc},
    track::{Tracker, listener::Listener, shared::SharedMemory, wp_async::WpAsync},
};
use std::{io, time::Duration};

/// Mappings with pages of their own: private, and not the kernel's.
pub fn private(maps: &[Mapping]) -> impl Iterator<Item = (u64, u64)> {
    maps.iter()
        .filter(|m| !m.shared && !m.name.starts_with(b"[v"))
        .map(|m| (m.start, m.end))
}

/// Shared mappings to which writes can be watched. An injector's table is shared, but not of this kind.
pub fn shared(maps: &[Mapping]) -> impl Iterator<Item = (u64, u64)> {
    maps.iter().filter(|m| shared::trackable(m)).map(|m| (m.start, m.end))
}

/// A tracker for the private memory of a stopped process.
pub fn track(f: &mut Frozen, pid: i32) -> io::Result<WpAsync> {
    make(f, pid, &|fd, now| {
        let mut t = WpAsync::new(pid, fd)?;
        t.adopt(&private(now).collect::<Vec<_>>());
        Ok(t)
    })
}

/// One for its shared memory, in a stop of its own. None: it has none that can be tracked.
pub fn track_shared(pid: i32, listener: &Listener) -> io::Result<Option<SharedMemory>> {
    if shared(&maps::maps(pid)?).next().is_none() {
        return Ok(None);
    }
    let mut f = Frozen::freeze(pid, Duration::from_secs(5)).map_err(io::Error::other)?;
    let made = make(&mut f, pid, &|fd, now| {
        let mut t = SharedMemory::new(pid, fd, listener)?;
        t.adopt(&shared(now).collect::<Vec<_>>());
        Ok(t)
    });
    made.map(Some)
}

/// Makes something of the descriptor's number in the process, and of its mappings.
type Take<'a, T> = &'a dyn Fn(i32, &[Mapping]) -> io::Result<T>;

/// How far a process is with its userfaultfd. A signal may end a batch before or after its call was made, and has to be delivered before the next: it is kept
/// what was done already.
struct Making<T> {
    injector: Option<Injector>,
    /// What userfaultfd(2) returned, until it is closed.
    made: Option<i32>,
    /// What was made of it.
    taken: Option<io::Result<T>>,
}

/// Has a stopped process make a userfaultfd, takes it, and has the process close it.
fn make<T>(f: &mut Frozen, pid: i32, take: Take<'_, T>) -> io::Result<T> {
    let mut state = Making {
        injector: None,
        made: None,
        taken: None,
    };
    let ended = steps(f, pid, take, &mut state);
    if let Some(inj) = state.injector {
        inj.leave(f).map_err(io::Error::other)?;
    }
    ended?;
    state.taken.ok_or_else(|| io::Error::other("userfaultfd(2) gave nothing"))?
}

fn steps<T>(f: &mut Frozen, pid: i32, take: Take<'_, T>, state: &mut Making<T>) -> io::Result<()> {
    for _ in 0..100 {
        let i = f
            .procs
            .iter()
            .position(|p| p.pid == pid && !p.is_zombie() && p.tasks[0].tid == pid)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it has ended"))?;
        match step(&f.procs[i], take, state) {
            Ok(()) => return Ok(()),
            Err(InjectError::Signal { tid, signal }) => f.deliver(tid, signal)?,
            Err(e) => return Err(io::Error::other(e)),
        }
    }
    Err(io::Error::other("signals kept coming"))
}

/// The number that the next descriptor of a stopped process will have.
fn lowest_free(pid: i32) -> io::Result<i32> {
    let mut open: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    open.sort_unstable();
    Ok(open.iter().zip(0..).take_while(|(fd, k)| **fd == *k).count() as i32)
}

/// As much as can be done before a signal comes.
fn step<T>(p: &Proc, take: Take<'_, T>, state: &mut Making<T>) -> Result<(), InjectError> {
    let pid = p.pid;
    let io = |what| move |source| InjectError::Io { pid, what, source };
    let now = maps::maps(pid).map_err(io("read /proc/PID/maps"))?;
    let states = p.states().map_err(io("read /proc/PID/status"))?;
    if state.injector.is_none() && crate::vacate::left_inside(p).is_some() {
        // Perhaps still on its way out of an earlier batch, whose code this one would overwrite.
        let reason = "a thread is in the middle of the vdso".into();
        return Err(InjectError::Unfit { pid, reason });
    }
    let inj = Injector::keep(&mut state.injector, p, &now, &states)?;
    let batches = |leaders| {
        let mut batches = vec![Vec::new(); p.tasks.len()];
        batches[0] = leaders;
        batches
    };
    let close = |fd: i32| Record::new(libc::SYS_close, &[fd as u64]);
    if state.made.is_none() {
        let next = lowest_free(pid).map_err(io("read /proc/PID/fd"))?;
        let flags = libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64 | uffd::USER_MODE_ONLY;
        // Made, taken by this agent while it pauses, and closed, in one batch: if the agent dies in the middle the program closes it all the same. All
        // of its tasks are stopped, so its number is known before it is made.
        let batch = vec![Record::new(libc::SYS_userfaultfd, &[flags]), inj.pause(0), close(next)];
        let mut at_pause = || {
            if let Some(fd) = inj.returned(0, 0).filter(|fd| *fd >= 0) {
                state.taken = Some(take(fd as i32, &now));
            }
        };
        let ran = inj.run_with(&p.tasks, &batches(batch), Some((1, &mut at_pause))).map(drop);
        state.made = inj.returned(0, 0).map(|r| r as i32);
        if inj.returned(0, 2) == Some(0) && state.made == Some(next) {
            state.made = Some(-libc::EBADF);
        }
        ran?;
    }
    let Some(fd) = state.made else { return Ok(()) };
    if fd < 0 {
        state.taken.get_or_insert_with(|| Err(io::Error::from_raw_os_error(-fd)));
        return Ok(());
    }
    if state.taken.is_none() {
        state.taken = Some(take(fd, &now));
    }
    let ran = inj.run(&p.tasks, &batches(vec![close(fd)])).map(drop);
    if inj.returned(0, 0).is_some() {
        // Closed: whatever comes now, this is not done twice.
        state.made = Some(-libc::EBADF);
    }
    ran
}

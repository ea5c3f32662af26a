//! Rebuilding open file descriptions in the agent's own table.
//!
//! The agent makes every description itself and hands it to the new processes, which only put it under its number. What needs a process
//! that does not exist yet is left for later, in this order:
//!
//! ```text
//! preflight      nothing is created that stays: files compared, ports tried, devices and directories looked for
//! Early::open    files, ahead of the freeze (optional)
//! create_objects memfds and unlinked files, which others fill
//! build          one descriptor a description; None for pidfds
//! later          open_pidfds and set_owners once the processes exist, then fill_epoll; seal_objects once the content is there
//! ```

mod device;
mod epoll;
mod eventfd;
mod file;
mod inotify;
mod objects;
mod options;
mod owner;
mod pidfd;
mod pipe;
mod signalfd;
mod socket;
mod stdio;
mod tcp;
mod timerfd;
mod udp;
mod unix;

pub use epoll::fill_epoll;
pub use file::{Early, FileUse, same_file};
pub use objects::{create_objects, seal_objects};
pub use owner::set_owners;
pub use pidfd::open_pidfds;
pub use stdio::StdioFds;

use crate::{
    blocker::Blocker,
    image::{Clocks, Description, Kind, Mm, Object, Pipe, Process, Tree},
};
use rustix::fs::{OFlags, fcntl_setfl};
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

/// The parts of a tree that descriptors are rebuilt from.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// For messages only: who had the descriptor.
    pub processes: &'a [Process],
    /// What to rebuild.
    pub descriptions: &'a [Description],
    /// Pipe buffers.
    pub pipes: &'a [Pipe],
    /// Objects.
    pub objects: &'a [Object],
    /// Address spaces: files they map for writing may change too.
    pub mms: &'a [Mm],
    /// Clocks at the freeze.
    pub clocks: Clocks,
    /// Nothing can have written the tree's files since the freeze: they must be as large as then. A checkpoint's files may have grown.
    pub fresh: bool,
}

impl<'a> From<&'a Tree> for Input<'a> {
    fn from(tree: &'a Tree) -> Self {
        Input {
            processes: &tree.processes,
            descriptions: &tree.descriptions,
            pipes: &tree.pipes,
            objects: &tree.objects,
            mms: &tree.mms,
            clocks: tree.clocks,
            fresh: true,
        }
    }
}

impl Input<'_> {
    /// "pid N (comm) fd M" of the first process that has a description.
    fn place(&self, description: usize) -> String {
        for p in self.processes {
            if let Some(fd) = p.fds.iter().find(|fd| fd.description as usize == description) {
                return format!("pid {} ({}) fd {}", p.pid, p.comm, fd.fd);
            }
        }
        format!("description {description}")
    }
}

/// Rebuilt descriptions.
#[derive(Debug)]
pub struct Built {
    /// One for each description, close-on-exec; `None` for a pidfd until [`open_pidfds`].
    pub fds: Vec<Option<OwnedFd>>,
}

/// A description could not be rebuilt.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {what}: {source}")]
pub struct RestoreError {
    /// "pid N (comm) fd M", or which object.
    pub place: String,
    /// What was tried, and with what.
    pub what: String,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// An error that says what was tried; the place is added by the caller that knows it.
#[derive(Debug)]
struct Failed {
    what: String,
    source: io::Error,
}

/// `.context("open /x")` on system calls.
trait Tried<T> {
    fn tried(self, what: impl FnOnce() -> String) -> Result<T, Failed>;
}

impl<T, E: Into<io::Error>> Tried<T> for Result<T, E> {
    fn tried(self, what: impl FnOnce() -> String) -> Result<T, Failed> {
        self.map_err(|e| Failed {
            what: what(),
            source: e.into(),
        })
    }
}

/// Looks for everything that would keep the tree from being rebuilt here. Creates nothing that stays.
///
/// `input` may come from an inventory: files that are open for writing may have grown since.
pub fn preflight(input: Input<'_>, blockers: &mut Vec<Blocker>) {
    let written = file::written(input);
    for (i, d) in input.descriptions.iter().enumerate() {
        let mut refuse = |reason: String, fix: &str| blockers.push(Blocker::new(input.place(i), reason, fix));
        match &d.kind {
            Kind::File { file, .. } => {
                let usage = file::usage(file, &written, false);
                if let Err(reason) = same_file(file, usage) {
                    refuse(
                        reason,
                        "copy the file to this host with its times (rsync -a), or keep it on shared storage",
                    );
                }
            }
            Kind::Device { file } => {
                if let Err(reason) = same_file(file, FileUse::Read) {
                    refuse(reason, "create the device node");
                }
            }
            Kind::Fifo { file, .. } => {
                if let Err(reason) = same_file(file, FileUse::Read) {
                    refuse(reason, "create the fifo (mkfifo)");
                }
            }
            Kind::Inotify { watches } => {
                for w in watches {
                    if let Err(reason) = inotify::check(w) {
                        refuse(reason, "create what is watched, or remove the watch");
                    }
                }
            }
            Kind::Tcp { socket, local, .. } | Kind::Udp { socket, local, .. } => {
                if let Err((reason, fix)) = socket::probe(socket, *local) {
                    refuse(reason, fix);
                }
            }
            Kind::UnixPair { .. }
            | Kind::Object { .. }
            | Kind::Pipe { .. }
            | Kind::EventFd { .. }
            | Kind::Epoll { .. }
            | Kind::SignalFd { .. }
            | Kind::TimerFd { .. }
            | Kind::Stdio { .. }
            | Kind::PidFd { .. } => {}
        }
    }
    for (i, p) in input.pipes.iter().enumerate() {
        if let Err(reason) = pipe::check_capacity(p) {
            blockers.push(Blocker::new(format!("pipe {i}"), reason, "raise it: sysctl fs.pipe-max-size"));
        }
    }
    for (i, o) in input.objects.iter().enumerate() {
        if let Err(reason) = objects::check(o) {
            blockers.push(Blocker::new(
                format!("object {i}"),
                reason,
                "create the directory the removed file was in",
            ));
        }
    }
    let needed = (input.descriptions.len() + input.objects.len()) as u64 + 256;
    let limit = raise_limit();
    make_room(needed);
    if limit < needed {
        let reason = format!("{needed} descriptors are needed and this agent may open {limit}");
        blockers.push(Blocker::new(
            "agent",
            reason,
            "start it with a higher limit (ulimit -Hn, LimitNOFILE=)",
        ));
    }
}

/// Raises this process's own soft RLIMIT_NOFILE to the hard one; returns the limit in force.
pub fn raise_limit() -> u64 {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let old = limit.current;
        limit.current = limit.maximum;
        if setrlimit(Resource::Nofile, limit).is_err() {
            limit.current = old;
        }
    }
    limit.current.unwrap_or(u64::MAX)
}

/// Makes this process's descriptor table large enough for so many more descriptors, as far as its limit goes.
///
/// The kernel doubles a table that is full, and each time waits for all readers of RCU where threads share it (`expand_fdtable` of Linux), 8 to
/// 16 ms: in a freeze that was 40 ms for 1,000 descriptors, 50 for 10,000. It never makes one smaller.
pub fn make_room(more: u64) {
    let highest = |fd: &OwnedFd| -> io::Result<u64> {
        let names = rustix::fs::Dir::read_from(fd)?;
        let numbers = names.filter_map(|e| e.ok()?.file_name().to_str().ok()?.parse().ok());
        Ok(numbers.max().unwrap_or(0))
    };
    let grow = || -> io::Result<()> {
        let fd: OwnedFd = std::fs::File::open("/proc/self/fd")?.into();
        let last = (highest(&fd)? + more).min(raise_limit().saturating_sub(1));
        let last = i32::try_from(last).map_err(io::Error::other)?;
        rustix::io::fcntl_dupfd_cloexec(&fd, last)?;
        Ok(())
    };
    // Without, it only takes longer later.
    if let Err(error) = grow() {
        tracing::debug!(%error, more, "no room for descriptors ahead");
    }
}

/// Rebuilds every description.
///
/// `objects` are the descriptors [`create_objects`] made, in the order of the image's objects; `early` may hold files that were opened
/// ahead of the freeze. Files are compared once more, exactly:
/// `input` must come from the freeze.
///
/// # Errors
/// The first description that could not be rebuilt; what was built is closed again.
pub fn build(input: Input<'_>, objects: &[OwnedFd], stdio: &StdioFds, early: &mut Early) -> Result<Built, RestoreError> {
    raise_limit();
    let fail = |i: usize| move |e: Failed| error(input.place(i), e);
    let mut fds: Vec<Option<OwnedFd>> = (0..input.descriptions.len()).map(|_| None).collect();
    let written = file::written(input);
    let polled = epoll::polled(input.descriptions);
    let mut pipes = pipe::Pipes::new(input.pipes.len());
    for (i, d) in input.descriptions.iter().enumerate() {
        if fds[i].is_some() {
            continue;
        }
        let made = match &d.kind {
            Kind::File { file, pos } => file::build(d, file, *pos, file::usage(file, &written, input.fresh), early),
            Kind::Object { object, pos } => objects::build(d, objects.get(*object as usize), *pos),
            Kind::Device { file } => device::build(d, file),
            Kind::Pipe { pipe } => pipes.pipe(d, *pipe, input),
            Kind::Fifo { file, pipe } => pipes.fifo(d, file, *pipe, input.pipes),
            Kind::EventFd { count, semaphore } => eventfd::build(d, *count, *semaphore),
            Kind::Epoll { .. } => epoll::build(d),
            Kind::SignalFd { mask } => signalfd::build(d, *mask),
            Kind::TimerFd { .. } => timerfd::build(d, &input.clocks),
            Kind::Inotify { watches } => inotify::build(d, watches),
            Kind::UnixPair { peer, .. } => {
                let other = peer.and_then(|p| input.descriptions.get(p as usize));
                let (own, far) = unix::build(d, other).map_err(fail(i))?;
                if let (Some(p), Some(far)) = (peer, far) {
                    fds[*p as usize] = Some(far);
                }
                Ok(own)
            }
            Kind::Tcp { socket, local, backlog } => tcp::build(d, socket, *local, *backlog),
            Kind::Udp { socket, local, peer } => udp::build(d, socket, *local, *peer),
            Kind::Stdio { stream, .. } => stdio.build(d, *stream, polled.contains(&(i as u32))),
            Kind::PidFd { .. } => continue,
        };
        fds[i] = Some(made.map_err(fail(i))?);
    }
    Ok(Built { fds })
}

fn error(place: String, failed: Failed) -> RestoreError {
    RestoreError {
        place,
        what: failed.what,
        source: failed.source,
    }
}

/// Sets the status flags a new description did not get when it was made: O_NONBLOCK, O_APPEND, O_DIRECT, O_NOATIME.
fn set_status(fd: impl AsFd, flags: u32) -> Result<(), Failed> {
    let mask = OFlags::NONBLOCK | OFlags::APPEND | OFlags::DIRECT | OFlags::NOATIME;
    let wanted = OFlags::from_bits_retain(flags) & mask;
    let now = rustix::fs::fcntl_getfl(&fd).tried(|| "fcntl F_GETFL".into())?;
    if now & mask == wanted {
        return Ok(());
    }
    fcntl_setfl(&fd, (now & !mask) | wanted).tried(|| format!("fcntl F_SETFL {:o}", wanted.bits()))
}

#[cfg(test)]
mod tests;

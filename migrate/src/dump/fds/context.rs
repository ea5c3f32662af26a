//! What all kinds need while a tree's descriptors are dumped.

use super::{
    DumpError, Mode, Source, device, eventfd, file, inotify, options, owner::Owner, pidfd, pipe, sharing::Open, signalfd, socket, table,
    timerfd, unix,
};
use crate::{blocker::Blocker, dump::objects::ObjectTable, image::Kind, procfs::fdinfo};
use rustix::fs::{Mode as Permissions, OFlags, Stat, fstat, openat};
use std::{
    cell::OnceCell,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

const O_LARGEFILE: u32 = 0o100_000;
const TMPFILE_BIT: u32 = 0o20_000_000;

/// What a description was found to be.
#[derive(Debug)]
pub(super) enum Shape {
    /// Complete; the peer of a [`Kind::UnixPair`] is still the index of its open.
    Ready(Kind, Owner),
    /// An epoll instance: its entries are translated at the end.
    Epoll,
    /// A terminal: `rdev` and its name.
    Terminal {
        /// `st_rdev`.
        rdev: u64,
        /// Name.
        was: String,
    },
    /// An end of a pipe or fifo.
    Pipe(pipe::End),
    /// A unix socket.
    Unix(unix::Found),
    /// A stream that leads outside: for each holder the standard stream that it follows.
    Stdio {
        /// One for each holder.
        streams: Vec<u8>,
        /// Name.
        was: String,
    },
    /// It cannot move; a blocker says why.
    Blocked,
}

/// A process being dumped.
#[derive(Debug)]
pub(super) struct Process {
    pub source: Source,
    pub dirs: table::Dirs,
    pidfd: OnceCell<OwnedFd>,
    comm: OnceCell<String>,
}

/// The state of a dump.
pub(super) struct Context<'a> {
    pub processes: Vec<Process>,
    pub raws: Vec<table::Raw>,
    pub mode: Mode,
    pub objects: &'a mut ObjectTable,
    pub probes: &'a mut options::Probes,
    pub diag: unix::Diag,
    pub special: file::Devices,
    blockers: &'a mut Vec<Blocker>,
}

impl<'a> Context<'a> {
    pub fn new(
        sources: &[Source],
        dirs: Vec<table::Dirs>,
        raws: Vec<table::Raw>,
        mode: Mode,
        objects: &'a mut ObjectTable,
        probes: &'a mut options::Probes,
        blockers: &'a mut Vec<Blocker>,
    ) -> Self {
        let process = |(&source, dirs)| Process {
            source,
            dirs,
            pidfd: OnceCell::new(),
            comm: OnceCell::new(),
        };
        Context {
            processes: sources.iter().zip(dirs).map(process).collect(),
            raws,
            mode,
            objects,
            probes,
            diag: unix::Diag::default(),
            special: file::Devices::default(),
            blockers,
        }
    }

    /// The process and number an open is looked at through.
    pub fn at(&self, open: &Open) -> (&Process, i32) {
        let raw = &self.raws[open.first()];
        (&self.processes[raw.process], raw.fd)
    }

    /// Where it leads, as text.
    pub fn link(&self, open: &Open) -> &[u8] {
        &self.raws[open.first()].link
    }

    /// Its fdinfo.
    pub fn info(&self, open: &Open) -> &fdinfo::FdInfo {
        &self.raws[open.first()].info
    }

    /// Open flags without those of the descriptor and those that only say how it was opened.
    pub fn flags(&self, open: &Open) -> u32 {
        let flags = self.info(open).flags & !(fdinfo::O_CLOEXEC | O_LARGEFILE);
        // O_TMPFILE is its own bit and O_DIRECTORY.
        if flags & TMPFILE_BIT != 0 {
            flags & !(TMPFILE_BIT | libc::O_DIRECTORY as u32)
        } else {
            flags
        }
    }

    /// An error about this open.
    pub fn error(&self, open: &Open, operation: &'static str, source: impl Into<io::Error>) -> DumpError {
        let (process, fd) = self.at(open);
        DumpError::new(process.source.pid, fd, operation, source)
    }

    /// Adds a blocker about this open.
    pub fn refuse(&mut self, open: &Open, reason: impl Into<String>, fix: impl Into<String>) -> Shape {
        self.block(open, Blocker::new(String::new(), reason, fix))
    }

    /// Adds a blocker that is likely to pass by itself.
    pub fn refuse_for_now(&mut self, open: &Open, reason: impl Into<String>, fix: impl Into<String>) -> Shape {
        self.block(open, Blocker::new(String::new(), reason, fix).transient())
    }

    fn block(&mut self, open: &Open, mut blocker: Blocker) -> Shape {
        let (process, fd) = self.at(open);
        blocker.place = format!("pid {} ({}) fd {fd}", process.source.pid, process.comm());
        self.blockers.push(blocker);
        Shape::Blocked
    }

    /// Adds the blocker for two processes with one descriptor table.
    pub fn refuse_table_sharing(&mut self, a: usize, b: usize) {
        let (a, b) = (&self.processes[a], &self.processes[b]);
        self.blockers.push(Blocker::new(
            format!("pid {} ({})", b.source.pid, b.comm()),
            format!("shares one descriptor table with pid {} (clone with CLONE_FILES)", a.source.pid),
            "wait until it has called execve, or start it with fork",
        ));
    }

    /// stat(2) of what is open, whether or not it still has a name.
    pub fn stat(&self, open: &Open) -> Result<Stat, DumpError> {
        let missing = || self.error(open, "stat", io::Error::other("not a file"));
        self.raws[open.first()].stat.ok_or_else(missing)
    }

    /// Whether the path an open shows leads to what is open, for the process: an error says why it leads nowhere.
    pub fn is_named(&self, open: &Open, stat: &Stat) -> Result<bool, String> {
        match &self.raws[open.first()].named {
            Ok(there) => Ok(*there == (stat.st_dev, stat.st_ino)),
            Err(e) => Err(e.to_string()),
        }
    }

    /// stat(2) of another path as the process sees it, without following a symbolic link at its end.
    pub fn stat_path(&self, open: &Open, path: &[u8]) -> io::Result<Stat> {
        table::stat_path(&self.at(open).0.dirs, path)
    }

    /// A duplicate of the description in the agent's own table (pidfd_getfd(2)).
    pub fn duplicate(&self, open: &Open) -> Result<OwnedFd, DumpError> {
        let (process, fd) = self.at(open);
        process
            .pidfd()
            .and_then(|p| Ok(rustix::process::pidfd_getfd(p, fd, rustix::process::PidfdGetfdFlags::empty())?))
            .map_err(|e| self.error(open, "pidfd_getfd", e))
    }

    /// A new description of what is open, for reading, at offset 0.
    pub fn reopen(&self, open: &Open) -> Result<OwnedFd, DumpError> {
        let (process, fd) = self.at(open);
        let name = rustix::path::DecInt::new(fd);
        openat(
            &process.dirs.fd,
            name.as_c_str(),
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK,
            Permissions::empty(),
        )
        .map_err(|e| self.error(open, "open /proc/PID/fd/FD", e))
    }

    /// Finds out what an open is.
    pub fn shape(&mut self, open: &Open) -> Result<Shape, DumpError> {
        let link = self.link(open);
        let bracketed = |prefix: &[u8]| -> Option<u64> {
            let inside = link.strip_prefix(prefix)?.strip_suffix(b"]")?;
            std::str::from_utf8(inside).ok()?.parse().ok()
        };
        if link.starts_with(b"/") {
            return file::shape(self, open);
        }
        if let Some(inode) = bracketed(b"pipe:[") {
            return pipe::shape(self, open, inode);
        }
        if let Some(inode) = bracketed(b"socket:[") {
            return socket::shape(self, open, inode);
        }
        if link.starts_with(b"pidfd:") {
            return pidfd::shape(self, open);
        }
        match link.strip_prefix(b"anon_inode:") {
            Some(b"[eventfd]") => eventfd::shape(self, open),
            Some(b"[eventpoll]") => Ok(Shape::Epoll),
            Some(b"[signalfd]") => signalfd::shape(self, open),
            Some(b"[timerfd]") => timerfd::shape(self, open),
            Some(b"inotify" | b"[inotify]") => inotify::shape(self, open),
            Some(b"[pidfd]") => pidfd::shape(self, open),
            Some(name) => {
                let name = String::from_utf8_lossy(name).trim_matches(['[', ']']).to_owned();
                Ok(device::refuse_kernel_object(self, open, &name))
            }
            None => {
                let link = String::from_utf8_lossy(link).into_owned();
                Ok(self.refuse(
                    open,
                    format!("{link} belongs to this host's kernel"),
                    "close it before the migration",
                ))
            }
        }
    }
}

impl Process {
    fn pidfd(&self) -> io::Result<BorrowedFd<'_>> {
        if let Some(pidfd) = self.pidfd.get() {
            return Ok(pidfd.as_fd());
        }
        let pid = rustix::process::Pid::from_raw(self.source.pid).ok_or_else(|| io::Error::other("no such pid"))?;
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        Ok(self.pidfd.get_or_init(|| pidfd).as_fd())
    }

    /// comm of its leader.
    pub fn comm(&self) -> &str {
        self.comm.get_or_init(|| {
            let comm = std::fs::read(format!("/proc/{}/comm", self.source.pid)).unwrap_or_default();
            String::from_utf8_lossy(comm.trim_ascii_end()).into_owned()
        })
    }
}

/// Bytes of a path or link for a message.
pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// stat(2) of a descriptor of the agent's own.
pub(super) fn own_stat(fd: impl AsFd) -> io::Result<Stat> {
    Ok(fstat(fd)?)
}

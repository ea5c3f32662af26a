//! Standard streams: what the receiver gives the tree in place of its own.

use super::{Failed, Tried, set_status};
use crate::{image::Description, report::Stdio};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fcntl_getfl, fstat, openat},
    pipe::{PipeFlags, pipe_with},
};
use std::{
    io::{self, IsTerminal},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

/// The receiver's standard input, output and error for the tree.
#[derive(Debug)]
pub struct StdioFds {
    streams: [OwnedFd; 3],
}

impl StdioFds {
    /// Opens what was asked for.
    ///
    /// # Errors
    /// The output file cannot be opened, or a standard stream of the agent is closed.
    pub fn open(from: &Stdio) -> io::Result<Self> {
        let null = |flags| openat(CWD, "/dev/null", flags | OFlags::CLOEXEC, Mode::empty());
        let streams = match from {
            Stdio::Inherit => [
                io::stdin().as_fd().try_clone_to_owned()?,
                io::stdout().as_fd().try_clone_to_owned()?,
                io::stderr().as_fd().try_clone_to_owned()?,
            ],
            Stdio::Null => [null(OFlags::RDONLY)?, null(OFlags::WRONLY)?, null(OFlags::WRONLY)?],
            Stdio::File(path) => {
                let file: OwnedFd = std::fs::OpenOptions::new().create(true).append(true).open(path)?.into();
                [null(OFlags::RDONLY)?, file.try_clone()?, file]
            }
        };
        Ok(StdioFds { streams })
    }

    /// Takes descriptors as they are: input, output, error.
    pub fn from_fds(streams: [OwnedFd; 3]) -> Self {
        StdioFds { streams }
    }

    /// A description for a stream of the tree.
    ///
    /// It is a new one where that is possible (terminals, pipes), so that O_NONBLOCK set by the tree does not reach the receiver's
    /// shell. A regular file is shared, for its offset; a socket has only one description. An input that epoll watches and that cannot be
    /// polled, /dev/null, becomes a pipe that has ended, which reads the same.
    pub(super) fn build(&self, d: &Description, stream: u8, polled: bool) -> Result<OwnedFd, Failed> {
        let access = d.flags & libc::O_ACCMODE as u32;
        let index = match (access as i32, stream) {
            // An end with a direction goes by it, whatever number it had.
            (libc::O_RDONLY, _) => 0,
            (libc::O_WRONLY, 0) => 1,
            (_, n) => usize::from(n.min(2)),
        };
        let source = &self.streams[index];
        let stat = fstat(source).tried(|| "fstat of a standard stream".into())?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let null = kind == FileType::CharacterDevice && stat.st_rdev == rustix::fs::makedev(1, 3);
        if null && polled && index == 0 {
            let (read, _) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).tried(|| "pipe2".into())?;
            set_status(&read, d.flags & libc::O_NONBLOCK as u32)?;
            return Ok(read);
        }
        let fresh = match kind {
            FileType::Fifo => self.again(index, OFlags::empty()),
            FileType::CharacterDevice if null || source.is_terminal() => self.again(index, OFlags::NOCTTY),
            _ => None,
        };
        if let Some(fd) = fresh {
            set_status(&fd, d.flags & libc::O_NONBLOCK as u32)?;
            return Ok(fd);
        }
        let shared = source.try_clone().tried(|| "duplicate a standard stream".into())?;
        // Of a shared description nothing is changed, except that the tree may count on not blocking.
        if d.flags & libc::O_NONBLOCK as u32 != 0 && kind != FileType::RegularFile {
            let flags = fcntl_getfl(&shared).tried(|| "fcntl F_GETFL".into())?;
            set_status(&shared, (flags | OFlags::NONBLOCK).bits())?;
        }
        Ok(shared)
    }

    /// A new description of the same terminal, pipe or device, with the same access.
    fn again(&self, index: usize, flags: OFlags) -> Option<OwnedFd> {
        let source = &self.streams[index];
        let access = fcntl_getfl(source).ok()? & OFlags::from_bits_retain(libc::O_ACCMODE as u32);
        let path = format!("/proc/self/fd/{}", source.as_raw_fd());
        openat(CWD, path, access | flags | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()).ok()
    }
}

//! Descriptor tables as /proc shows them: one readlink and one fdinfo for each descriptor, nothing else.
//!
//! procfs makes an inode for each entry it is asked about, which is most of the cost; large tables are read by a few threads.

use super::{DumpError, Mode, Source};
use crate::procfs::fdinfo::{self, FdInfo};
use rustix::fs::{CWD, Dir, Mode as Permissions, OFlags, openat, readlinkat};
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::fd::{AsFd, OwnedFd},
};

/// Descriptors from which on a second thread pays.
const PARALLEL_FROM: usize = 256;
/// Threads at most.
const THREADS: usize = 4;
/// The longest fdinfo taken: an epoll instance with 500,000 entries.
const LONGEST: usize = 64 << 20;

/// One descriptor.
#[derive(Debug)]
pub(super) struct Raw {
    /// Index of the process.
    pub process: usize,
    /// Number.
    pub fd: i32,
    /// What /proc/PID/fd/FD leads to.
    pub link: Vec<u8>,
    /// Its fdinfo.
    pub info: FdInfo,
    /// Equal for all descriptors of one description (and, rarely, for others).
    pub key: u64,
}

/// The directories of one process.
#[derive(Debug)]
pub(super) struct Dirs {
    /// /proc/PID/fd
    pub fd: OwnedFd,
    /// /proc/PID/fdinfo
    pub info: OwnedFd,
}

/// Opens the directories of a process.
pub(super) fn dirs(source: &Source) -> Result<Dirs, DumpError> {
    let open = |name: &str| {
        openat(
            CWD,
            format!("/proc/{}/{name}", source.pid),
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Permissions::empty(),
        )
        .map_err(|e| DumpError::new(source.pid, -1, "open /proc/PID/fd", e))
    };
    Ok(Dirs {
        fd: open("fd")?,
        info: open("fdinfo")?,
    })
}

/// Reads every descriptor `wanted` lets through, ordered by process and number.
pub(super) fn read(sources: &[Source], dirs: &[Dirs], mode: Mode, wanted: &dyn Fn(i32) -> bool) -> Result<Vec<Raw>, DumpError> {
    let mut names = Vec::new();
    for (process, d) in dirs.iter().enumerate() {
        let start = names.len();
        let pid = sources[process].pid;
        for entry in Dir::read_from(&d.fd).map_err(|e| DumpError::new(pid, -1, "read /proc/PID/fd", e))? {
            let entry = entry.map_err(|e| DumpError::new(pid, -1, "read /proc/PID/fd", e))?;
            if let Some(fd) = entry.file_name().to_str().ok().and_then(|n| n.parse::<i32>().ok())
                && wanted(fd)
            {
                names.push((process, fd));
            }
        }
        names[start..].sort_unstable();
    }
    let threads = if names.len() < PARALLEL_FROM {
        1
    } else {
        std::thread::available_parallelism().map_or(1, |n| n.get()).min(THREADS)
    };
    let part = names.len().div_ceil(threads).max(1);
    let read_part = |names: &[(usize, i32)]| -> Result<Vec<Raw>, DumpError> {
        let mut buffer = vec![0; 4096];
        let mut out = Vec::with_capacity(names.len());
        for &(process, fd) in names {
            match read_one(&dirs[process], fd, &mut buffer) {
                Ok((link, info, key)) => out.push(Raw {
                    process,
                    fd,
                    link,
                    info,
                    key,
                }),
                // A running process closes descriptors while they are read.
                Err(_) if mode == Mode::Inventory => {}
                Err(e) => return Err(DumpError::new(sources[process].pid, fd, "read fdinfo", e)),
            }
        }
        Ok(out)
    };
    if threads == 1 {
        return read_part(&names);
    }
    std::thread::scope(|scope| {
        let workers: Vec<_> = names.chunks(part).map(|c| scope.spawn(|| read_part(c))).collect();
        let mut out = Vec::with_capacity(names.len());
        for w in workers {
            match w.join() {
                Ok(part) => out.append(&mut part?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(out)
    })
}

fn read_one(dirs: &Dirs, fd: i32, buffer: &mut Vec<u8>) -> io::Result<(Vec<u8>, FdInfo, u64)> {
    let name = rustix::path::DecInt::new(fd);
    let link = readlinkat(&dirs.fd, name.as_c_str(), Vec::with_capacity(128))?.into_bytes();
    let len = read_info(dirs, fd, buffer)?;
    let text = &buffer[..len];
    let info = fdinfo::parse(text).ok_or_else(|| io::Error::other("malformed fdinfo"))?;
    let mut hasher = DefaultHasher::new();
    link.hash(&mut hasher);
    // O_CLOEXEC is the one thing in there that belongs to the descriptor.
    (info.flags & !fdinfo::O_CLOEXEC).hash(&mut hasher);
    let mut lines = text.split(|&b| b == b'\n').filter(|l| !l.starts_with(b"flags:"));
    lines.try_for_each(|l| {
        l.hash(&mut hasher);
        Some(())
    });
    Ok((link, info, hasher.finish()))
}

/// Reads fdinfo into `buffer`, which grows as needed; returns the length.
fn read_info(dirs: &Dirs, fd: i32, buffer: &mut Vec<u8>) -> io::Result<usize> {
    loop {
        let name = rustix::path::DecInt::new(fd);
        let file = openat(
            dirs.info.as_fd(),
            name.as_c_str(),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Permissions::empty(),
        )?;
        let n = rustix::io::read(&file, buffer.as_mut_slice())?;
        // The kernel makes the whole text at the first read: less than asked for is all of it.
        if n < buffer.len() {
            return Ok(n);
        }
        if buffer.len() >= LONGEST {
            return Err(io::Error::other("fdinfo is too long"));
        }
        buffer.resize(buffer.len() * 4, 0);
    }
}

/// Reads the fdinfo of one descriptor again.
pub(super) fn info(dirs: &Dirs, fd: i32) -> io::Result<FdInfo> {
    let mut buffer = vec![0; 4096];
    let n = read_info(dirs, fd, &mut buffer)?;
    fdinfo::parse(&buffer[..n]).ok_or_else(|| io::Error::other("malformed fdinfo"))
}

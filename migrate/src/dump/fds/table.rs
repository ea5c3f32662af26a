//! Descriptor tables as /proc shows them: one readlink and one fdinfo for each descriptor, and for files one stat(2) of its path,
//! and of what is open where that is not the same for sure.
//!
//! That is about 7 µs a file (Linux 6.18, warm), nearly all of it in the kernel's procfs, so large tables are read by a few threads.
//! Duplicates (pidfd_getfd, fstat, close) would be a little cheaper than stat through /proc, but closing one makes NFS and FUSE flush.

use super::{DumpError, Mode, Source};
use crate::procfs::fdinfo::{self, FdInfo};
use rustix::fs::{AtFlags, CWD, Dir, Mode as Permissions, OFlags, Stat, openat, readlinkat, statat};
use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::fd::{AsFd, OwnedFd},
};

/// Descriptors from which on a second thread pays.
const PARALLEL_FROM: usize = 256;
/// Threads at most.
const THREADS: usize = 8;
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
    /// stat(2) of what is open, where the link is a path.
    pub stat: Option<Stat>,
    /// Device and inode of what that path leads to for the process, without following a symbolic link at its end.
    pub named: io::Result<(u64, u64)>,
}

/// The directories of one process.
#[derive(Debug)]
pub(super) struct Dirs {
    /// /proc/PID/fd
    pub fd: OwnedFd,
    /// /proc/PID/fdinfo
    pub info: OwnedFd,
    /// /proc/PID/root
    pub root: OwnedFd,
}

/// Opens the directories of a process.
pub(super) fn dirs(source: &Source) -> Result<Dirs, DumpError> {
    let open = |name: &str, access: OFlags| {
        openat(
            CWD,
            format!("/proc/{}/{name}", source.pid),
            access | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Permissions::empty(),
        )
        .map_err(|e| DumpError::new(source.pid, -1, "open /proc/PID/fd", e))
    };
    Ok(Dirs {
        fd: open("fd", OFlags::RDONLY)?,
        info: open("fdinfo", OFlags::RDONLY)?,
        root: open("root", OFlags::PATH)?,
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
        let mut mounts = HashMap::new();
        let mut out = Vec::with_capacity(names.len());
        for &(process, fd) in names {
            match read_one(&dirs[process], process, fd, &mut buffer, &mut mounts) {
                Ok(raw) => out.push(raw),
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

/// Reads one descriptor. `mounts` remembers the device of each mount seen so far: where a path leads to that device and to the inode that
/// fdinfo names, it leads to what is open, and one stat(2) is saved.
fn read_one(dirs: &Dirs, process: usize, fd: i32, buffer: &mut Vec<u8>, mounts: &mut HashMap<i32, u64>) -> io::Result<Raw> {
    let name = rustix::path::DecInt::new(fd);
    let link = readlinkat(&dirs.fd, name.as_c_str(), Vec::with_capacity(128))?.into_bytes();
    let len = read_info(dirs, fd, buffer)?;
    let text = &buffer[..len];
    let info = fdinfo::parse(text).ok_or_else(|| io::Error::other("malformed fdinfo"))?;
    let mut hasher = DefaultHasher::new();
    link.hash(&mut hasher);
    // O_CLOEXEC is the one thing in there that belongs to the descriptor.
    (info.flags & !fdinfo::O_CLOEXEC).hash(&mut hasher);
    for line in text.split(|&b| b == b'\n').filter(|l| !l.starts_with(b"flags:")) {
        line.hash(&mut hasher);
    }
    let (mut stat, mut named) = (None, Err(io::ErrorKind::NotFound.into()));
    if link.starts_with(b"/") {
        let there = stat_path(dirs, &link);
        named = match &there {
            Ok(s) => Ok((s.st_dev, s.st_ino)),
            Err(e) => Err(e.kind().into()),
        };
        stat = match there {
            Ok(s) if s.st_ino == info.inode && mounts.get(&info.mount) == Some(&s.st_dev) => Some(s),
            _ => {
                let open = statat(&dirs.fd, name.as_c_str(), AtFlags::empty())?;
                mounts.insert(info.mount, open.st_dev);
                Some(open)
            }
        };
    }
    Ok(Raw {
        process,
        fd,
        link,
        info,
        key: hasher.finish(),
        stat,
        named,
    })
}

/// stat(2) of a path as the process sees it, without following a symbolic link at its end.
pub(super) fn stat_path(dirs: &Dirs, path: &[u8]) -> io::Result<Stat> {
    let inside = path.strip_prefix(b"/").unwrap_or(path);
    let inside = if inside.is_empty() { b"." } else { inside };
    Ok(statat(&dirs.root, inside, AtFlags::SYMLINK_NOFOLLOW)?)
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

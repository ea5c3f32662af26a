//! Files and directories with a name: whether this host has the same ones, and opening them.

use super::{Failed, Tried};
use crate::{
    dump::files::{as_path, build_id, mtime_ns},
    image::{Description, FileId, Kind},
};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, SeekFrom, Stat, openat, seek, statat, statfs};
use std::{collections::HashSet, io, os::fd::OwnedFd};

/// What a file is used for, and so what must be equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileUse {
    /// It is only read: size and modification time must be equal, or size and build-id for one that has a build-id.
    Read,
    /// It is written by the tree itself, so it must lie on storage both hosts share.
    Write {
        /// Compared with what the freeze found: the size must be equal. Otherwise with an inventory of the running tree: it may have
        /// grown since, and be newer.
        frozen: bool,
    },
}

/// Access to a file the tree itself writes, by device and inode.
pub(super) fn written(descriptions: &[Description]) -> HashSet<(u64, u64)> {
    let writes = |d: &Description| d.flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
    let file = |d: &Description| match &d.kind {
        Kind::File { file, .. } if writes(d) => Some((file.dev, file.ino)),
        _ => None,
    };
    descriptions.iter().filter_map(file).collect()
}

/// The use of a file by one description: another of the tree may write it.
pub(super) fn usage(_: &Description, file: &FileId, written: &HashSet<(u64, u64)>, frozen: bool) -> FileUse {
    if written.contains(&(file.dev, file.ino)) {
        FileUse::Write { frozen }
    } else {
        FileUse::Read
    }
}

/// Whether this host has the file that `expected` describes.
///
/// # Errors
/// A sentence that says what differs.
pub fn same_file(expected: &FileId, usage: FileUse) -> Result<(), String> {
    let path = String::from_utf8_lossy(&expected.path).into_owned();
    let stat = match statat(CWD, &expected.path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(rustix::io::Errno::NOENT) => return Err(format!("{path} is missing on this host")),
        Err(e) => return Err(format!("{path} cannot be looked at on this host: {}", io::Error::from(e))),
    };
    compare(expected, &stat, usage).map_err(|what| format!("{path} {what}"))
}

fn compare(expected: &FileId, stat: &Stat, usage: FileUse) -> Result<(), String> {
    let (theirs, ours) = (FileType::from_raw_mode(expected.mode), FileType::from_raw_mode(stat.st_mode));
    if theirs != ours {
        return Err(format!("is a {} here and a {} there", type_name(ours), type_name(theirs)));
    }
    match ours {
        FileType::CharacterDevice | FileType::BlockDevice if stat.st_rdev != expected.rdev => {
            return Err(format!("is device {:x} here and {:x} there", stat.st_rdev, expected.rdev));
        }
        FileType::RegularFile => {}
        _ => return Ok(()),
    }
    let (size, mtime) = (stat.st_size as u64, mtime_ns(stat));
    let differs = match usage {
        FileUse::Read if size != expected.size => Some(format!("has {size} bytes here and {} there", expected.size)),
        FileUse::Read if mtime == expected.mtime_ns => None,
        FileUse::Read => match &expected.build_id {
            Some(id) if build_id(as_path(&expected.path)).as_ref() == Some(id) => None,
            Some(_) => Some("has another build-id here: it was built from other sources or in another way".to_owned()),
            None => Some(format!(
                "was modified at {} here and at {} there",
                seconds(mtime),
                seconds(expected.mtime_ns)
            )),
        },
        FileUse::Write { frozen: true } if size != expected.size => Some(format!(
            "is written by the tree, and has {size} bytes here and {} there: it is not on storage both hosts share",
            expected.size
        )),
        FileUse::Write { frozen: true } => None,
        FileUse::Write { frozen: false } if size < expected.size || mtime < expected.mtime_ns => Some(format!(
            "is written by the tree, and is smaller or older here ({size} bytes, there {}): it is not on storage both hosts share",
            expected.size
        )),
        FileUse::Write { frozen: false } => None,
    };
    match differs {
        Some(_) if is_kernel_file(&expected.path) => Ok(()),
        Some(what) => Err(what),
        None => Ok(()),
    }
}

/// Nanoseconds since the epoch as "seconds.nanoseconds", for comparison by eye.
fn seconds(ns: i64) -> String {
    format!("{}.{:09}", ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000))
}

fn type_name(t: FileType) -> &'static str {
    match t {
        FileType::RegularFile => "regular file",
        FileType::Directory => "directory",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Fifo => "fifo",
        FileType::Symlink => "symbolic link",
        FileType::Socket => "socket",
        FileType::Unknown => "file of unknown type",
    }
}

/// Files of proc, sysfs and cgroups are made at each look: their size and times say nothing.
fn is_kernel_file(path: &[u8]) -> bool {
    // PROC_SUPER_MAGIC, SYSFS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC (linux/magic.h)
    const TYPES: [u64; 4] = [0x9fa0, 0x6265_6572, 0x27_e0eb, 0x6367_7270];
    statfs(path).is_ok_and(|fs| TYPES.contains(&(fs.f_type as u64)))
}

/// Flags that mean something only while a file is created, and those set on the description later.
const NOT_AT_OPEN: u32 = (libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC) as u32;

/// The flags to open a file with again.
pub(super) fn open_flags(flags: u32) -> OFlags {
    OFlags::from_bits_retain(flags & !NOT_AT_OPEN) | OFlags::CLOEXEC | OFlags::NOCTTY
}

/// Opens a file and puts the offset where it was.
pub(super) fn build(d: &Description, file: &FileId, pos: u64, usage: FileUse) -> Result<OwnedFd, Failed> {
    let name = || String::from_utf8_lossy(&file.path).into_owned();
    same_file(file, usage).map_err(io::Error::other).tried(|| "compare files".into())?;
    let fd = openat(CWD, &file.path, open_flags(d.flags), Mode::empty()).tried(|| format!("open {}", name()))?;
    if pos != 0 && d.flags & libc::O_PATH as u32 == 0 {
        seek(&fd, SeekFrom::Start(pos)).tried(|| format!("lseek {} to {pos}", name()))?;
    }
    Ok(fd)
}

//! Files and directories with a name: whether this host has the same ones, and opening them.

use super::{Failed, Input, Tried};
use crate::{
    dump::files::{as_path, build_id, mtime_ns},
    image::{Backing, Description, FileId, Kind, Vma},
};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, SeekFrom, Stat, fstat, openat, seek, statat, statfs};
use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::OwnedFd,
};

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

/// Files the tree itself writes, through a descriptor or a shared mapping, by device and inode.
pub(super) fn written(input: Input<'_>) -> HashSet<(u64, u64)> {
    let writes = |d: &Description| d.flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
    let file = |d: &Description| match &d.kind {
        Kind::File { file, .. } if writes(d) => Some((file.dev, file.ino)),
        _ => None,
    };
    let mapped = |v: &Vma| match &v.backing {
        Backing::File { file, writable: true, .. } if v.shared => Some((file.dev, file.ino)),
        _ => None,
    };
    let mappings = input.mms.iter().flat_map(|m| m.vmas.iter());
    input
        .descriptions
        .iter()
        .filter_map(file)
        .chain(mappings.filter_map(mapped))
        .collect()
}

/// The use of a file by one description: another of the tree may write it.
pub(super) fn usage(file: &FileId, written: &HashSet<(u64, u64)>, frozen: bool) -> FileUse {
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

/// Files opened ahead of the freeze, for [`super::build`] to take: inside the freeze only size, times and offset are left to do.
#[derive(Debug, Default)]
pub struct Early {
    files: HashMap<(Vec<u8>, u32), Vec<OwnedFd>>,
}

impl Early {
    /// Opens the files of an inventory. What cannot be opened is left to the build, which says why.
    pub fn open(descriptions: &[Description]) -> Self {
        super::raise_limit();
        let mut early = Early::default();
        for d in descriptions {
            if let Kind::File { file, .. } = &d.kind
                && same_file(file, FileUse::Write { frozen: false }).is_ok()
                && let Ok(fd) = openat(CWD, &file.path, open_flags(d.flags), Mode::empty())
            {
                early.files.entry((file.path.clone(), d.flags)).or_default().push(fd);
            }
        }
        early
    }

    /// One that was opened with these flags and is the file expected now.
    fn take(&mut self, d: &Description, file: &FileId, usage: FileUse) -> Option<OwnedFd> {
        // Nothing to hash when nothing was opened.
        if self.files.is_empty() {
            return None;
        }
        let fd = self.files.get_mut(&(file.path.clone(), d.flags))?.pop()?;
        let stat = fstat(&fd).ok()?;
        // It may have been removed or replaced since.
        (stat.st_nlink > 0 && compare(file, &stat, usage).is_ok()).then_some(fd)
    }
}

/// Opens a file and puts the offset where it was.
pub(super) fn build(d: &Description, file: &FileId, pos: u64, usage: FileUse, early: &mut Early) -> Result<OwnedFd, Failed> {
    let name = || String::from_utf8_lossy(&file.path).into_owned();
    let fd = match early.take(d, file, usage) {
        Some(fd) => fd,
        None => {
            same_file(file, usage).map_err(io::Error::other).tried(|| "compare files".into())?;
            openat(CWD, &file.path, open_flags(d.flags), Mode::empty()).tried(|| format!("open {}", name()))?
        }
    };
    if pos != 0 && d.flags & libc::O_PATH as u32 == 0 {
        seek(&fd, SeekFrom::Start(pos)).tried(|| format!("lseek {} to {pos}", name()))?;
    }
    Ok(fd)
}

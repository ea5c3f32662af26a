//! Regular files, directories, unlinked files and memfds; devices and fifos are told apart here and handled beside.

use super::{
    DumpError,
    context::{Context, Shape, own_stat, text},
    device,
    owner::Owner,
    pipe,
    sharing::Open,
};
use crate::{
    dump::files::{as_path, file_id},
    image::{Kind, Object, ObjectKind},
};
use rustix::fs::{FileType, Stat};
use std::{
    collections::HashMap,
    os::unix::ffi::OsStrExt,
    path::{Component, Path},
};

const DELETED: &[u8] = b" (deleted)";
/// File system types of statfs(2), from linux/magic.h.
const PROC_SUPER_MAGIC: u64 = 0x9fa0;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
const SECRETMEM_MAGIC: u64 = 0x5345_434d;

/// What is known of the devices files were found on.
#[derive(Default)]
pub(super) struct Devices {
    /// The kernel's internal shmem mount, where memfds and shared anonymous memory live; 0 when it cannot be told.
    shmem: Option<u64>,
    /// File system type by `st_dev`.
    types: HashMap<u64, u64>,
}

impl Devices {
    fn is_shmem(&mut self, dev: u64) -> bool {
        let own = *self.shmem.get_or_insert_with(|| {
            rustix::fs::memfd_create("probe", rustix::fs::MemfdFlags::CLOEXEC)
                .ok()
                .and_then(|fd| own_stat(fd).ok())
                .map_or(0, |s| s.st_dev)
        });
        own == dev
    }
}

/// Tells what an open with a path is.
pub(super) fn shape(context: &mut Context<'_>, open: &Open) -> Result<Shape, DumpError> {
    let stat = context.stat(open)?;
    let path_only = context.info(open).flags & libc::O_PATH as u32 != 0;
    match FileType::from_raw_mode(stat.st_mode) {
        _ if path_only => {}
        FileType::CharacterDevice | FileType::BlockDevice => return device::shape(context, open, &stat),
        FileType::Fifo => return fifo(context, open, &stat),
        FileType::RegularFile | FileType::Directory => {}
        other => {
            let path = text(context.link(open));
            return Ok(context.refuse(
                open,
                format!("{path} is of a kind that cannot be open ({other:?})"),
                "close it before the migration",
            ));
        }
    }
    if let Some(lock) = context.info(open).locks.first() {
        let reason = format!("{} holds a {}", text(context.link(open)), lock_name(lock));
        return Ok(context.refuse(
            open,
            reason,
            "let the process release the lock, or stop and start it on the other host instead",
        ));
    }
    let path = context.link(open).to_vec();
    if stat.st_nlink == 0 && path.ends_with(DELETED) {
        return deleted(context, open, &stat, &path[..path.len() - DELETED.len()]);
    }
    match context.is_named(open, &stat) {
        Ok(true) => {}
        Ok(false) => {
            let reason = format!(
                "{} is another file now than the one that is open (replaced, mounted over, or in another root)",
                text(&path)
            );
            return Ok(context.refuse(open, reason, "reopen the file, or let the process restart"));
        }
        Err(_) if path.ends_with(DELETED) => {
            let name = text(&path[..path.len() - DELETED.len()]);
            let reason = format!("{name} was removed but still has another name somewhere (hard link)");
            return Ok(context.refuse(open, reason, "link it back to its old name, or reopen it"));
        }
        Err(e) => {
            const MQUEUE_MAGIC: u64 = 0x1980_0202;
            if fs_type(context, open, &stat) == MQUEUE_MAGIC {
                let reason = format!("{} is a POSIX message queue, which cannot move yet", text(&path));
                return Ok(context.refuse(open, reason, "close it before the migration"));
            }
            let reason = format!("{} cannot be found from the root directory of the process: {e}", text(&path));
            return Ok(context.refuse(
                open,
                reason,
                "move processes with a root or mounts of their own only where the agent sees the same paths",
            ));
        }
    }
    if path.starts_with(b"/proc/") && path.get(6).is_some_and(u8::is_ascii_digit) && fs_type(context, open, &stat) == PROC_SUPER_MAGIC {
        // Programs look into /proc for an instant; the C library does when a thread asks for its stack.
        let reason = format!("{} shows a process of this host", text(&path));
        return Ok(context.refuse_for_now(open, reason, "close it before the migration"));
    }
    let file = file_id(&path, &stat);
    let pos = context.info(open).pos;
    Ok(Shape::Ready(Kind::File { file, pos }, Owner::default()))
}

fn fs_type(context: &mut Context<'_>, open: &Open, stat: &Stat) -> u64 {
    if let Some(&t) = context.special.types.get(&stat.st_dev) {
        return t;
    }
    let t = match context.duplicate(open).map(rustix::fs::fstatfs) {
        Ok(Ok(fs)) => fs.f_type as u64,
        _ => 0,
    };
    context.special.types.insert(stat.st_dev, t);
    t
}

fn fifo(context: &mut Context<'_>, open: &Open, stat: &Stat) -> Result<Shape, DumpError> {
    let path = context.link(open).to_vec();
    match context.is_named(open, stat) {
        Ok(true) => pipe::named(context, open, file_id(&path, stat)),
        _ => Ok(context.refuse(
            open,
            format!("the fifo {} has no name any more, or another one", text(&path)),
            "reopen it, or use a pipe without a name",
        )),
    }
}

/// What a `lock:` line of fdinfo is about: "1: POSIX  ADVISORY  WRITE 691 00:22:5 0 EOF".
fn lock_name(line: &str) -> String {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (kind, _, access) = (words.next().unwrap_or("?"), words.next(), words.next().unwrap_or("?"));
    match kind {
        "POSIX" => format!("POSIX record lock (fcntl F_SETLK, {access})"),
        "OFDLCK" => format!("open file description lock (fcntl F_OFD_SETLK, {access})"),
        "FLOCK" => format!("file lock (flock, {access})"),
        "LEASE" => format!("lease (fcntl F_SETLEASE, {access})"),
        "DELEG" => format!("delegation ({access})"),
        other => format!("{other} lock"),
    }
}

/// A file without a name: a memfd, or an unlinked file whose content moves with the tree.
fn deleted(context: &mut Context<'_>, open: &Open, stat: &Stat, path: &[u8]) -> Result<Shape, DumpError> {
    let refuse_kind = |context: &mut Context<'_>, what: &str| {
        Ok(context.refuse(open, format!("{} is {what}", text(path)), "close it before the migration"))
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return refuse_kind(context, "a directory or special file that was removed");
    }
    let fs = fs_type(context, open, stat);
    if fs == HUGETLBFS_MAGIC {
        return refuse_kind(context, "memory of huge pages (hugetlbfs or a hugetlb memfd), which is not moved");
    }
    if fs == SECRETMEM_MAGIC || path == b"/secretmem" {
        return refuse_kind(context, "secret memory (memfd_secret), which nobody but the process can read");
    }
    if path.starts_with(b"/SYSV") && context.special.is_shmem(stat.st_dev) {
        return refuse_kind(context, "System V shared memory");
    }
    let kind = if context.special.is_shmem(stat.st_dev) {
        match path.strip_prefix(b"/memfd:") {
            Some(name) => ObjectKind::Memfd(name.to_vec()),
            None => ObjectKind::SharedAnonymous,
        }
    } else {
        let dir = parent(as_path(path));
        match context.stat_path(open, &dir) {
            Ok(d) if FileType::from_raw_mode(d.st_mode) == FileType::Directory => {}
            _ => return refuse_kind(context, "a removed file in a directory that is gone too"),
        }
        ObjectKind::Unlinked { dir }
    };
    let made = context.reopen(open);
    let object = context.objects.get_or_insert(stat.st_dev, stat.st_ino, || {
        let source = made?;
        let seals = match kind {
            ObjectKind::Memfd(_) => rustix::fs::fcntl_get_seals(&source).map_or(0, |s| s.bits()),
            _ => 0,
        };
        let object = Object {
            kind,
            size: stat.st_size as u64,
            owner: (stat.st_uid, stat.st_gid, stat.st_mode),
            seals,
        };
        Ok::<_, DumpError>((object, source))
    })?;
    let pos = context.info(open).pos;
    Ok(Shape::Ready(Kind::Object { object, pos }, Owner::default()))
}

/// The directory of an absolute path; "/" for "/".
fn parent(path: &Path) -> Vec<u8> {
    match path.parent() {
        Some(p) if p.components().any(|c| matches!(c, Component::Normal(_))) => p.as_os_str().as_bytes().to_vec(),
        _ => b"/".to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_have_names() {
        assert_eq!(lock_name("1: FLOCK  ADVISORY  WRITE 691 00:22:5 0 EOF"), "file lock (flock, WRITE)");
        assert!(lock_name("1: POSIX  ADVISORY  READ 691 00:22:5 0 EOF").starts_with("POSIX record lock"));
        let _ = lock_name("");
    }

    #[test]
    fn parents() {
        assert_eq!(parent(Path::new("/a")), b"/");
        assert_eq!(parent(Path::new("/a/b")), b"/a");
    }
}

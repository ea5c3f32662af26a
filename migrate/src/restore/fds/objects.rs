//! Memfds, unlinked files and shared anonymous memory, and descriptions of them.

use super::{Failed, RestoreError, Tried, error, file};
use crate::{
    dump::files::as_path,
    image::{Description, Object, ObjectKind},
    sys::fdcalls,
};
use rustix::fs::{
    CWD, Gid, MemfdFlags, Mode, OFlags, SealFlags, SeekFrom, Uid, fchmod, fchown, ftruncate, memfd_create, openat, seek, unlinkat,
};
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

/// Whether an object can be made here.
pub(super) fn check(object: &Object) -> Result<(), String> {
    match &object.kind {
        ObjectKind::Unlinked { dir } if !as_path(dir).is_dir() => Err(format!(
            "{} is missing on this host, where the tree keeps a removed file",
            String::from_utf8_lossy(dir)
        )),
        _ => Ok(()),
    }
}

/// Makes every object, empty, with its size, owner and permissions: descriptors for reading and writing, in the order given.
///
/// # Errors
/// The first object that cannot be made, for example because the directory of an unlinked file is missing.
pub fn create_objects(objects: &[Object]) -> Result<Vec<OwnedFd>, RestoreError> {
    let make = |(i, o): (usize, &Object)| create(o).map_err(|e| error(format!("object {i}"), e));
    objects.iter().enumerate().map(make).collect()
}

fn create(object: &Object) -> Result<OwnedFd, Failed> {
    let fd = match &object.kind {
        // No owner or mode shows on it, and its size is that of the mapping.
        ObjectKind::SharedAnonymous => return fdcalls::shared_anonymous(object.size).tried(|| "mmap MAP_SHARED".into()),
        ObjectKind::Memfd(name) => memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).tried(|| "memfd_create".into())?,
        ObjectKind::Unlinked { dir } => unlinked(dir).tried(|| format!("create a file in {}", String::from_utf8_lossy(dir)))?,
    };
    let (uid, gid, mode) = object.owner;
    fchown(&fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).tried(|| "fchown".into())?;
    fchmod(&fd, Mode::from_raw_mode(mode & 0o7777)).tried(|| "fchmod".into())?;
    ftruncate(&fd, object.size).tried(|| format!("ftruncate to {} bytes", object.size))?;
    Ok(fd)
}

/// A file without a name, of a directory's file system.
fn unlinked(dir: &[u8]) -> io::Result<OwnedFd> {
    let owner_only = Mode::RUSR | Mode::WUSR;
    if let Ok(fd) = openat(CWD, dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, owner_only) {
        return Ok(fd);
    }
    // A file system without O_TMPFILE.
    let dir = openat(CWD, dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for n in 0..1000 {
        let name = format!(".migrate-{}-{n}", std::process::id());
        match openat(
            &dir,
            &name,
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC,
            owner_only,
        ) {
            Ok(fd) => {
                unlinkat(&dir, &name, rustix::fs::AtFlags::empty())?;
                return Ok(fd);
            }
            Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(io::Error::other("no free name"))
}

/// Applies the seals of memfds. Call it when the content is complete and no mapping of the agent's is left that could write.
///
/// # Errors
/// EBUSY while a writable mapping exists that F_SEAL_WRITE excludes (fcntl(2)).
pub fn seal_objects(objects: &[Object], fds: &[OwnedFd]) -> Result<(), RestoreError> {
    for (i, (object, fd)) in objects.iter().zip(fds).enumerate() {
        if matches!(object.kind, ObjectKind::Memfd(_)) && object.seals != 0 {
            if rustix::fs::fcntl_get_seals(fd).is_ok_and(|s| s.bits() == object.seals) {
                continue;
            }
            rustix::fs::fcntl_add_seals(fd, SealFlags::from_bits_retain(object.seals))
                .tried(|| format!("fcntl F_ADD_SEALS {:x}", object.seals))
                .map_err(|e| error(format!("object {i}"), e))?;
        }
    }
    Ok(())
}

/// A description of its own of an object.
pub(super) fn build(d: &Description, object: Option<&OwnedFd>, pos: u64) -> Result<OwnedFd, Failed> {
    let object = object
        .ok_or_else(|| io::Error::other("no such object"))
        .tried(|| "open an object".into())?;
    let path = format!("/proc/self/fd/{}", object.as_raw_fd());
    // O_NOFOLLOW would refuse the link in /proc.
    let flags = file::open_flags(d.flags) & !OFlags::NOFOLLOW;
    let fd = openat(CWD, path, flags, Mode::empty()).tried(|| "open an object again".into())?;
    if pos != 0 && d.flags & libc::O_PATH as u32 == 0 {
        seek(&fd, SeekFrom::Start(pos)).tried(|| format!("lseek to {pos}"))?;
    }
    Ok(fd)
}

//! inotify(7).

use super::{Failed, Tried, set_status};
use crate::{
    image::{Description, InotifyWatch},
    sys::fdcalls,
};
use rustix::fs::{AtFlags, CWD, FileType, inotify, statat};
use std::{ffi::CString, io, os::fd::OwnedFd};

/// The largest watch descriptor that is rebuilt: the kernel only counts up, at about two microseconds a step.
const HIGHEST: i32 = 1 << 20;
/// What inotify_add_watch takes of the bits that fdinfo shows: events, IN_EXCL_UNLINK, IN_ONESHOT.
const SETTABLE: u32 = 0xfff | 1 << 26 | 1 << 31;
/// IN_DONT_FOLLOW: the path is already what was watched.
const DONT_FOLLOW: u32 = 1 << 25;

/// Whether what is watched is there.
pub(super) fn check(watch: &InotifyWatch) -> Result<(), String> {
    let path = String::from_utf8_lossy(&watch.file.path);
    if watch.wd > HIGHEST || watch.wd < 1 {
        return Err(format!("the inotify watch of {path} has number {}, more than {HIGHEST}", watch.wd));
    }
    match statat(CWD, &watch.file.path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(s) if FileType::from_raw_mode(s.st_mode) == FileType::from_raw_mode(watch.file.mode) => Ok(()),
        Ok(_) => Err(format!("{path}, which inotify watches, is of another kind on this host")),
        Err(_) => Err(format!("{path}, which inotify watches, is missing on this host")),
    }
}

/// Makes an instance with the same watches under the same numbers.
///
/// The kernel numbers watches by counting up, so the numbers in between are used up with a watch that is removed again. The events this
/// makes are taken out at the end.
pub(super) fn build(d: &Description, watches: &[InotifyWatch]) -> Result<OwnedFd, Failed> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let fd = inotify::init(flags).tried(|| "inotify_init1".into())?;
    let mut sorted: Vec<&InotifyWatch> = watches.iter().collect();
    sorted.sort_by_key(|w| w.wd);
    let mut next = 1;
    for watch in sorted {
        check(watch).map_err(io::Error::other).tried(|| "inotify".into())?;
        while next < watch.wd {
            let wd = fdcalls::inotify_add(&fd, c"/", 0x400).tried(|| "inotify_add_watch /".into())?;
            fdcalls::inotify_remove(&fd, wd).tried(|| "inotify_rm_watch".into())?;
            next = wd + 1;
        }
        let path = || String::from_utf8_lossy(&watch.file.path).into_owned();
        let name = CString::new(watch.file.path.clone()).map_err(io::Error::other).tried(path)?;
        let mask = watch.mask & SETTABLE | DONT_FOLLOW;
        let wd = fdcalls::inotify_add(&fd, &name, mask).tried(|| format!("inotify_add_watch {}", path()))?;
        if wd != watch.wd {
            return Err(io::Error::other(format!("it got number {wd}, not {}", watch.wd)))
                .tried(|| format!("inotify_add_watch {}", path()));
        }
        next = wd + 1;
    }
    let mut events = [0; 4096];
    while rustix::io::read(&fd, &mut events).is_ok_and(|n| n > 0) {}
    set_status(&fd, d.flags)?;
    Ok(fd)
}

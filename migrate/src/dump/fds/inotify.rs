//! inotify(7): watches are inodes in fdinfo, and are brought back to paths.

use super::{
    DumpError, Mode,
    context::{Context, Shape, text},
    owner,
    sharing::Open,
};
use crate::{
    dump::files::file_id,
    image::{InotifyWatch, Kind},
    procfs::fdinfo::{Watch, sdev_to_dev},
    sys::fdcalls,
};
use rustix::fs::{CWD, Mode as Permissions, OFlags, fstat, makedev, openat, readlinkat};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

/// Turns watches into paths.
pub(super) fn shape(context: &mut Context<'_>, open: &Open) -> Result<Shape, DumpError> {
    let fd = context.duplicate(open)?;
    let owner = match owner::read(context, open, fd.as_fd())? {
        Ok(owner) => owner,
        Err(blocked) => return Ok(blocked),
    };
    let unread = rustix::io::ioctl_fionread(&fd).map_err(|e| context.error(open, "ioctl FIONREAD", e))?;
    if unread > 0 && context.mode == Mode::Frozen {
        let reason = format!("inotify has {unread} bytes of events that were not read");
        return Ok(context.refuse_for_now(open, reason, "it passes once the process reads them"));
    }
    let mut watches = Vec::new();
    let mut mounts = Vec::new();
    let mut told = false;
    for watch in context.info(open).watches.clone() {
        let dev = sdev_to_dev(watch.sdev);
        if !mounts.iter().any(|(d, _)| *d == dev) {
            mounts.extend(mount_fds(context, open, dev).into_iter().map(|fd| (dev, fd)));
        }
        let tried = mounts
            .iter()
            .filter(|(d, _)| *d == dev)
            .find_map(|(_, m)| resolve(context, open, m, &watch));
        match tried {
            Some(file) => watches.push(InotifyWatch {
                wd: watch.wd,
                file,
                mask: watch.mask,
            }),
            None if !told => {
                told = true;
                let reason = format!(
                    "inotify watches inode {} of device {:x}, whose path cannot be found",
                    watch.inode, watch.sdev
                );
                context.refuse(
                    open,
                    reason,
                    "remove the watch, or watch files on ext4, xfs, btrfs or tmpfs that still exist",
                );
            }
            None => {}
        }
    }
    if told {
        return Ok(Shape::Blocked);
    }
    Ok(Shape::Ready(Kind::Inotify { watches }, owner))
}

/// The path behind a watch, if it leads back to the same inode.
fn resolve(context: &Context<'_>, open: &Open, mount: &OwnedFd, watch: &Watch) -> Option<crate::image::FileId> {
    let fd = fdcalls::open_by_handle(mount, watch.handle_type, &watch.handle).ok()?;
    let stat = fstat(&fd).ok()?;
    let path = readlinkat(CWD, format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())
        .ok()?
        .into_bytes();
    let there = context.stat_path(open, &path).ok()?;
    ((there.st_dev, there.st_ino) == (stat.st_dev, stat.st_ino)).then(|| file_id(&path, &stat))
}

/// A descriptor on each mount of a device, as the process sees them.
fn mount_fds(context: &Context<'_>, open: &Open, dev: u64) -> Vec<OwnedFd> {
    let (process, _) = context.at(open);
    let text = std::fs::read(format!("/proc/{}/mountinfo", process.source.pid)).unwrap_or_default();
    let open_mount = |path: Vec<u8>| -> io::Result<OwnedFd> {
        let inside = path.strip_prefix(b"/").unwrap_or(&path);
        let inside = if inside.is_empty() { b"." } else { inside };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = openat(&process.dirs.root, inside, flags, Permissions::empty())?;
        // Something else may be mounted over it.
        if fstat(&fd)?.st_dev == dev {
            Ok(fd)
        } else {
            Err(io::Error::other("mounted over"))
        }
    };
    mount_points(&text, dev).into_iter().filter_map(|p| open_mount(p).ok()).collect()
}

/// The mount points of a device in a mountinfo file (proc_pid_mountinfo(5)).
fn mount_points(mountinfo: &[u8], dev: u64) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for line in mountinfo.split(|&b| b == b'\n') {
        let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
        let (Some(numbers), Some(point)) = (fields.get(2), fields.get(4)) else {
            continue;
        };
        let numbers = text(numbers);
        let Some((major, minor)) = numbers.split_once(':') else { continue };
        if let (Ok(major), Ok(minor)) = (major.parse(), minor.parse())
            && makedev(major, minor) == dev
        {
            out.push(unescape(point));
        }
    }
    out
}

/// Undoes the octal escapes of mountinfo.
fn unescape(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3).and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok()))
            .flatten();
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_a_device() {
        let text = b"27 1 254:0 / / rw - ext4 /dev/vda rw\n30 25 0:27 / /mnt/a\\040b rw - tmpfs t rw\nbroken\n";
        assert_eq!(mount_points(text, makedev(254, 0)), [b"/".to_vec()]);
        assert_eq!(mount_points(text, makedev(0, 27)), [b"/mnt/a b".to_vec()]);
        assert_eq!(unescape(b"\\9"), b"\\9");
    }
}

//! pipe(7) and fifo(7).

use super::{Failed, Input, Tried, set_status};
use crate::image::{Description, FileId, Kind, Pipe};
use rustix::{
    fs::{CWD, Gid, Mode, OFlags, Uid, fchmod, fchown, openat},
    io::{Errno, write},
    pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with},
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

/// Pipes on the way to their descriptions.
///
/// An end that no description takes is closed with this: that is how a pipe whose other end was gone becomes one again.
pub(super) struct Pipes {
    made: Vec<Option<Made>>,
}

struct Made {
    /// Taken by the first description of that end, whole.
    read: Option<OwnedFd>,
    write: Option<OwnedFd>,
    /// "/proc/self/fd/N" of an end that stays open, to open more of.
    again: String,
    /// Keeps a fifo's buffer while its ends are opened.
    _holder: Option<OwnedFd>,
}

/// Whether the agent may make a pipe that large.
pub(super) fn check_capacity(pipe: &Pipe) -> Result<(), String> {
    if pipe.capacity <= 1 << 20 {
        return Ok(());
    }
    let (_read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| format!("pipe2: {e}"))?;
    match fcntl_setpipe_size(&write, pipe.capacity as usize) {
        Ok(_) => Ok(()),
        Err(e) => Err(format!("a pipe of {} bytes cannot be made here: {e}", pipe.capacity)),
    }
}

impl Pipes {
    pub fn new(count: usize) -> Self {
        Pipes {
            made: (0..count).map(|_| None).collect(),
        }
    }

    /// An end of a pipe.
    pub fn pipe(&mut self, d: &Description, index: u32, input: Input<'_>) -> Result<OwnedFd, Failed> {
        let no_pipe = || io::Error::other("no such pipe in the image");
        let slot = self
            .made
            .get_mut(index as usize)
            .ok_or_else(no_pipe)
            .tried(|| "make a pipe".into())?;
        if slot.is_none() {
            let image = input.pipes.get(index as usize).ok_or_else(no_pipe).tried(|| "make a pipe".into())?;
            let packets = input
                .descriptions
                .iter()
                .any(|d| matches!(d.kind, Kind::Pipe { pipe } if pipe == index) && d.flags & libc::O_DIRECT as u32 != 0);
            *slot = Some(create(image, packets)?);
        }
        let Some(made) = slot else {
            return Err(no_pipe()).tried(|| "make a pipe".into());
        };
        let direct = d.flags & libc::O_DIRECT as u32 != 0;
        let taken = match d.flags & libc::O_ACCMODE as u32 {
            0 => made.read.take(),
            // pipe2 gave O_DIRECT to the write end only if some description has it: another must be opened without.
            1 => match &made.write {
                Some(w) if is_direct(w)? == direct => made.write.take(),
                _ => None,
            },
            _ => None,
        };
        let fd = match taken {
            Some(fd) => fd,
            None => {
                let mode = OFlags::from_bits_retain(d.flags & (libc::O_ACCMODE | libc::O_DIRECT | libc::O_NONBLOCK) as u32);
                openat(CWD, &made.again, mode | OFlags::CLOEXEC, Mode::empty()).tried(|| "open a pipe again".into())?
            }
        };
        made.again = again(&fd);
        set_status(&fd, d.flags)?;
        Ok(fd)
    }

    /// An end of a fifo. Its buffer is filled before the first end is opened.
    pub fn fifo(&mut self, d: &Description, file: &FileId, index: u32, images: &[Pipe]) -> Result<OwnedFd, Failed> {
        let name = || String::from_utf8_lossy(&file.path).into_owned();
        let slot = self.made.get_mut(index as usize).zip(images.get(index as usize));
        let (slot, image) = slot
            .ok_or_else(|| io::Error::other("no such pipe in the image"))
            .tried(|| format!("open {}", name()))?;
        if slot.is_none() {
            super::same_file(file, super::FileUse::Read)
                .map_err(io::Error::other)
                .tried(|| "compare files".into())?;
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let holder = openat(CWD, &file.path, flags, Mode::empty()).tried(|| format!("open {}", name()))?;
            if rustix::io::ioctl_fionread(&holder).tried(|| "ioctl FIONREAD".into())? > 0 {
                return Err(io::Error::other("another process uses this fifo")).tried(|| format!("open {}", name()));
            }
            fill(&holder, image)?;
            *slot = Some(Made {
                read: None,
                write: None,
                again: String::new(),
                _holder: Some(holder),
            });
        }
        // Without O_NONBLOCK an open could wait for ever.
        let mode = OFlags::from_bits_retain(d.flags & (libc::O_ACCMODE | libc::O_DIRECT) as u32);
        let flags = mode | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = openat(CWD, &file.path, flags, Mode::empty()).tried(|| format!("open {}", name()))?;
        set_status(&fd, d.flags)?;
        Ok(fd)
    }
}

fn again(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn is_direct(fd: &OwnedFd) -> Result<bool, Failed> {
    Ok(rustix::fs::fcntl_getfl(fd)
        .tried(|| "fcntl F_GETFL".into())?
        .contains(OFlags::DIRECT))
}

fn create(image: &Pipe, packets: bool) -> Result<Made, Failed> {
    let mut flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
    if packets && image.data.is_empty() {
        flags |= PipeFlags::DIRECT;
    }
    let (read, write) = pipe_with(flags).tried(|| "pipe2".into())?;
    fill(&write, image)?;
    let (uid, gid, mode) = image.owner;
    fchown(&write, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).tried(|| "fchown of a pipe".into())?;
    fchmod(&write, Mode::from_raw_mode(mode & 0o7777)).tried(|| "fchmod of a pipe".into())?;
    Ok(Made {
        again: again(&read),
        read: Some(read),
        write: Some(write),
        _holder: None,
    })
}

/// Sets the capacity and writes what was in flight; `write` must not block.
fn fill(fd: impl AsFd, image: &Pipe) -> Result<(), Failed> {
    let capacity = image.capacity as usize;
    if fcntl_getpipe_size(&fd).tried(|| "fcntl F_GETPIPE_SZ".into())? != capacity {
        fcntl_setpipe_size(&fd, capacity).tried(|| format!("fcntl F_SETPIPE_SZ {capacity}"))?;
    }
    let mut rest = image.data.as_slice();
    while !rest.is_empty() {
        match write(&fd, rest) {
            Ok(n) => rest = &rest[n..],
            Err(Errno::INTR) => {}
            Err(e) => return Err(e).tried(|| format!("write the last {} of {} bytes into a pipe", rest.len(), image.data.len())),
        }
    }
    Ok(())
}

//! pipe(7) and fifo(7): finding both ends, and copying what is in flight with tee(2).

use super::{
    DumpError, Mode,
    context::{Context, Shape, own_stat, text},
    owner::{self, Owner},
    sharing::Open,
    stdio,
};
use crate::image::{FileId, Kind, Pipe};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, tee},
};
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
};

/// An end of a pipe.
#[derive(Debug)]
pub(super) struct End {
    /// Device (0 for a pipe without a name) and inode.
    key: (u64, u64),
    /// The fifo's file.
    file: Option<FileId>,
    owner: Owner,
}

/// Takes note of a pipe end.
pub(super) fn shape(context: &mut Context<'_>, open: &Open, inode: u64) -> Result<Shape, DumpError> {
    end(context, open, (0, inode), None)
}

/// Takes note of an end of a fifo.
pub(super) fn named(context: &mut Context<'_>, open: &Open, file: FileId) -> Result<Shape, DumpError> {
    end(context, open, (file.dev, file.ino), Some(file))
}

fn end(context: &mut Context<'_>, open: &Open, key: (u64, u64), file: Option<FileId>) -> Result<Shape, DumpError> {
    let fd = context.duplicate(open)?;
    Ok(match owner::read(context, open, fd.as_fd())? {
        Ok(owner) => Shape::Pipe(End { key, file, owner }),
        Err(blocked) => blocked,
    })
}

/// The far side of a read end.
enum Writers {
    /// Nobody can write any more.
    None,
    /// Somebody can.
    Alive,
}

fn access(context: &Context<'_>, open: &Open) -> u32 {
    context.flags(open) & libc::O_ACCMODE as u32
}

/// Decides for every pipe whether it lies within the tree, leads outside as a standard stream, or cannot move.
pub(super) fn resolve(context: &mut Context<'_>, opens: &[Open], shapes: &mut [Shape]) -> Result<Vec<Pipe>, DumpError> {
    let mut by_inode: BTreeMap<(u64, u64), Vec<usize>> = BTreeMap::new();
    for (i, shape) in shapes.iter().enumerate() {
        if let Shape::Pipe(end) = shape {
            by_inode.entry(end.key).or_default().push(i);
        }
    }
    let mut pipes = Vec::new();
    for members in by_inode.into_values() {
        let reads = |&&i: &&usize| access(context, &opens[i]) != libc::O_WRONLY as u32;
        let writes = |&&i: &&usize| access(context, &opens[i]) != libc::O_RDONLY as u32;
        let reader = members.iter().find(reads).copied();
        let writer = members.iter().find(writes).copied();
        let resolved = match (reader, writer) {
            (Some(r), Some(_)) => within(context, opens, &members, Some(r), &mut pipes),
            (Some(r), None) => reading(context, opens, &members, r, &mut pipes),
            (None, Some(w)) => writing(context, opens, &members, w, &mut pipes),
            (None, None) => continue,
        };
        let outcome = match resolved {
            Err(_) if context.mode == Mode::Inventory => Outcome::Blocked,
            other => other?,
        };
        for i in members {
            let old = std::mem::replace(&mut shapes[i], Shape::Blocked);
            let Shape::Pipe(end) = old else { continue };
            shapes[i] = match outcome {
                Outcome::Pipe(pipe) => {
                    let kind = match end.file {
                        Some(file) => Kind::Fifo { file, pipe },
                        None => Kind::Pipe { pipe },
                    };
                    Shape::Ready(kind, end.owner)
                }
                Outcome::Stdio(stream) => Shape::Stdio {
                    streams: vec![stream; opens[i].holders.len()],
                    was: text(context.link(&opens[i])),
                },
                Outcome::Blocked => Shape::Blocked,
            };
        }
    }
    Ok(pipes)
}

#[derive(Clone, Copy)]
enum Outcome {
    Pipe(u32),
    Stdio(u8),
    Blocked,
}

/// A pipe of the tree's own: its buffer moves.
fn within(
    context: &mut Context<'_>,
    opens: &[Open],
    members: &[usize],
    reader: Option<usize>,
    pipes: &mut Vec<Pipe>,
) -> Result<Outcome, DumpError> {
    let through = &opens[reader.unwrap_or(members[0])];
    let fd = context.duplicate(through)?;
    let stat = own_stat(&fd).map_err(|e| context.error(through, "fstat", e))?;
    let capacity = fcntl_getpipe_size(&fd).map_err(|e| context.error(through, "fcntl F_GETPIPE_SZ", e))?;
    let data = match reader {
        Some(_) if context.mode == Mode::Frozen => copy(&fd, capacity).map_err(|e| context.error(through, "copy of a pipe", e))?,
        _ => Vec::new(),
    };
    let packets = members.iter().any(|&i| context.flags(&opens[i]) & libc::O_DIRECT as u32 != 0);
    if packets && !data.is_empty() {
        let reason = format!(
            "{} has {} bytes in packets (O_DIRECT) that were not read",
            text(context.link(through)),
            data.len()
        );
        context.refuse_for_now(through, reason, "it passes once the reader takes them");
        return Ok(Outcome::Blocked);
    }
    pipes.push(Pipe {
        capacity: capacity as u32,
        data,
        owner: (stat.st_uid, stat.st_gid, stat.st_mode),
    });
    Ok(Outcome::Pipe(pipes.len() as u32 - 1))
}

/// Only read ends are in the tree.
fn reading(
    context: &mut Context<'_>,
    opens: &[Open],
    members: &[usize],
    reader: usize,
    pipes: &mut Vec<Pipe>,
) -> Result<Outcome, DumpError> {
    let open = &opens[reader];
    let fd = context.duplicate(open)?;
    let (writers, unread) = writers(&fd).map_err(|e| context.error(open, "poll of a pipe", e))?;
    let name = text(context.link(open));
    match (writers, lowest(context, opens, members, |n| n == 0)) {
        (Writers::None, _) => within(context, opens, members, Some(reader), pipes),
        (Writers::Alive, Some(stream)) if unread == 0 => Ok(Outcome::Stdio(stream)),
        (Writers::Alive, Some(_)) if context.mode == Mode::Inventory => Ok(Outcome::Stdio(0)),
        (Writers::Alive, Some(stream)) => {
            let reason = format!("standard stream {stream} ({name}) has {unread} bytes from outside the tree that were not read");
            context.refuse_for_now(open, reason, "it passes once the process reads them");
            Ok(Outcome::Blocked)
        }
        (Writers::Alive, None) => {
            let reason = format!("{name} is written by a process outside the tree");
            context.refuse(open, reason, "migrate the common parent of both processes, or end the other one");
            Ok(Outcome::Blocked)
        }
    }
}

/// Only write ends are in the tree.
fn writing(
    context: &mut Context<'_>,
    opens: &[Open],
    members: &[usize],
    writer: usize,
    pipes: &mut Vec<Pipe>,
) -> Result<Outcome, DumpError> {
    if let Some(stream) = lowest(context, opens, members, |n| n != 0) {
        return Ok(Outcome::Stdio(stream));
    }
    let open = &opens[writer];
    let fd = context.duplicate(open)?;
    let events = poll_now(&fd, PollFlags::OUT).map_err(|e| context.error(open, "poll of a pipe", e))?;
    if events.contains(PollFlags::ERR) {
        // Nobody can read any more: SIGPIPE is what the writer gets there too.
        return within(context, opens, members, None, pipes);
    }
    let name = text(context.link(open));
    let reason = format!("{name} is read by a process outside the tree");
    context.refuse(open, reason, "migrate the common parent of both processes, or end the other one");
    Ok(Outcome::Blocked)
}

/// The lowest standard number of any of these opens, one that suits the direction before one that does not.
fn lowest(context: &Context<'_>, opens: &[Open], members: &[usize], suits: fn(u8) -> bool) -> Option<u8> {
    let among = |fits: &dyn Fn(u8) -> bool| members.iter().filter_map(|&i| stdio::lowest(context, &opens[i], fits)).min();
    among(&suits).or_else(|| among(&|_| true))
}

fn poll_now(fd: &OwnedFd, flags: PollFlags) -> io::Result<PollFlags> {
    let mut fds = [PollFd::new(fd, flags)];
    poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(fds[0].revents())
}

/// Whether somebody can still write, and how much waits to be read.
///
/// POLLHUP means that there is no writer, except on a fifo that never had one; tee(2) from an empty pipe tells: 0 without writers,
/// EAGAIN with.
fn writers(fd: &OwnedFd) -> io::Result<(Writers, u64)> {
    let unread = rustix::io::ioctl_fionread(fd)?;
    if poll_now(fd, PollFlags::IN)?.contains(PollFlags::HUP) {
        return Ok((Writers::None, unread));
    }
    if unread == 0 {
        let (_read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        match tee(fd, &write, 1, SpliceFlags::NONBLOCK) {
            Ok(0) => return Ok((Writers::None, 0)),
            Ok(_) => return Ok((Writers::Alive, 1)),
            Err(Errno::AGAIN) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok((Writers::Alive, unread))
}

/// Copies what is in a pipe without taking it: tee(2) into a pipe as large, which is then read.
fn copy(fd: &OwnedFd, capacity: usize) -> io::Result<Vec<u8>> {
    let unread = rustix::io::ioctl_fionread(fd)? as usize;
    if unread == 0 {
        return Ok(Vec::new());
    }
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // tee copies whole buffers by reference: the copy needs as many slots.
    fcntl_setpipe_size(&write, capacity)?;
    tee(fd, &write, i32::MAX as usize, SpliceFlags::NONBLOCK)?;
    let mut data = vec![0; unread];
    let mut filled = 0;
    while filled < unread {
        match rustix::io::read(&read, &mut data[filled..]) {
            Ok(0) | Err(Errno::AGAIN) => break,
            Ok(n) => filled += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    if filled != unread {
        return Err(io::Error::other(format!("{filled} of {unread} bytes copied")));
    }
    Ok(data)
}

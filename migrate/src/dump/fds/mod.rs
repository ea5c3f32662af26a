//! Dumping descriptors: tables, open file descriptions, and what is behind them.
//!
//! Nothing is consumed and nothing is changed that the tree could notice: pipes are copied with tee(2), socket queues peeked, the rest is
//! read from fdinfo. Where a description must be looked into, the agent takes a duplicate with pidfd_getfd(2) and drops it at once.
//!
//! ```text
//! table      /proc/PID/fd + fdinfo           -> Raw, one a descriptor
//! sharing    kcmp(2) among those that look alike -> Open, one a description
//! shape      what each is, by link and stat  -> Shape
//! resolve    both ends of pipes and sockets, standard streams -> Description
//! epoll      numbers to descriptions
//! ```
//!
//! What cannot move is put among the blockers, and left out of the tables.
//!
//! **Standard streams.** A terminal, a pipe or a unix stream socket that leads outside the tree and is open as descriptor 0, 1 or 2
//! becomes [`Kind::Stdio`]: the receiver attaches its own. A pipe end has a direction, so its description stays one, with the lowest
//! standard number that fits. A terminal or socket is one description for input and output, which the receiver's streams in
//! general are not (input from /dev/null, output to a log): it is split, one description for each of the numbers 0, 1, 2 that refer to it;
//! any other number follows the lowest of these. All that is lost is that status flags are no longer shared between the three.

mod context;
mod device;
mod epoll;
mod eventfd;
mod file;
mod inotify;
mod options;
mod owner;
mod pidfd;
mod pipe;
mod sharing;
mod signalfd;
mod socket;
mod stdio;
mod table;
mod tcp;
mod timerfd;
mod udp;
mod unix;

use super::objects::ObjectTable;
use crate::{
    blocker::Blocker,
    image::{Description, Fd, Kind, Pipe},
    procfs::fdinfo,
};
use context::{Context, Shape};
use std::{collections::HashMap, io};

/// A process whose descriptors are dumped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// In the agent's pid namespace.
    pub pid: i32,
    /// As the tree sees it.
    pub inner_pid: i32,
}

/// What the dump is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The tree runs: find blockers and files, tolerate what comes and goes, do not touch any queue. Queues stay empty in the result.
    Inventory,
    /// The tree runs, and descriptors are left out altogether: tables stay empty.
    Outline,
    /// The tree is stopped: everything counts.
    Frozen,
}

/// What an inventory leaves for the looks after it: nothing but what they would find out as well.
#[derive(Debug, Default)]
pub struct Known {
    /// The order of descriptors that look alike.
    order: sharing::Order,
    /// Options of fresh sockets, of which making one and asking it for eighty takes as long as looking at a socket of the tree.
    probes: options::Probes,
}

/// The descriptors of a tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    /// Per process, in the order given; ascending numbers.
    pub fds: Vec<Vec<Fd>>,
    /// Open file descriptions.
    pub descriptions: Vec<Description>,
    /// Pipe buffers.
    pub pipes: Vec<Pipe>,
}

/// A system call failed that should not have.
#[derive(Debug, thiserror::Error)]
#[error("dump of pid {pid}{}: {operation}: {source}", fd_suffix(*.fd))]
pub struct DumpError {
    /// Process, in the agent's pid namespace.
    pub pid: i32,
    /// Descriptor, -1 when none is concerned.
    pub fd: i32,
    /// What was tried.
    pub operation: &'static str,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

fn fd_suffix(fd: i32) -> String {
    if fd < 0 { String::new() } else { format!(" fd {fd}") }
}

impl DumpError {
    pub(crate) fn new(pid: i32, fd: i32, operation: &'static str, source: impl Into<io::Error>) -> Self {
        DumpError {
            pid,
            fd,
            operation,
            source: source.into(),
        }
    }
}

/// Dumps the descriptors of `processes`.
///
/// `objects` collects unlinked files and memfds, shared with the dump of mappings; their content is not read here. Whatever cannot move
/// is added to `blockers` and missing in the result. `known`: what earlier looks have found out.
///
/// # Errors
/// A failed system call: for [`Mode::Frozen`] also when a process or descriptor has vanished.
pub fn dump(
    processes: &[Source],
    objects: &mut ObjectTable,
    mode: Mode,
    known: &mut Known,
    blockers: &mut Vec<Blocker>,
) -> Result<Tables, DumpError> {
    dump_selected(processes, objects, mode, known, blockers, &|_| true)
}

/// [`dump`], of the descriptor numbers that `wanted` lets through only: the others are as if closed.
pub fn dump_selected(
    processes: &[Source],
    objects: &mut ObjectTable,
    mode: Mode,
    known: &mut Known,
    blockers: &mut Vec<Blocker>,
    wanted: &dyn Fn(i32) -> bool,
) -> Result<Tables, DumpError> {
    if mode == Mode::Outline {
        return Ok(Tables {
            fds: vec![Vec::new(); processes.len()],
            ..Tables::default()
        });
    }
    let dirs = processes.iter().map(table::dirs).collect::<Result<Vec<_>, _>>()?;
    let raws = table::read(processes, &dirs, mode, wanted)?;
    let opens = sharing::group(processes, &raws, mode, &mut known.order)?;
    let mut context = Context::new(processes, dirs, raws, mode, objects, &mut known.probes, blockers);
    for (a, b) in sharing::shared_tables(processes) {
        context.refuse_table_sharing(a, b);
    }

    let mut shapes = Vec::with_capacity(opens.len());
    for open in &opens {
        shapes.push(match context.shape(open) {
            Err(_) if mode == Mode::Inventory => Shape::Blocked,
            other => other?,
        });
    }
    stdio::terminals(&mut context, &opens, &mut shapes);
    let pipes = pipe::resolve(&mut context, &opens, &mut shapes)?;
    unix::resolve(&mut context, &opens, &mut shapes)?;
    assemble(&mut context, &opens, shapes, pipes)
}

/// Numbers the descriptions, fills the tables, and translates what refers to descriptions.
fn assemble(context: &mut Context<'_>, opens: &[sharing::Open], mut shapes: Vec<Shape>, pipes: Vec<Pipe>) -> Result<Tables, DumpError> {
    let mut out = Tables {
        fds: vec![Vec::new(); context.processes.len()],
        pipes,
        ..Tables::default()
    };
    // Index of the (first) description of an open, and of each descriptor.
    let mut index: Vec<Option<u32>> = vec![None; opens.len()];
    let mut of_raw: Vec<Option<u32>> = vec![None; context.raws.len()];
    let mut epolls = Vec::new();
    for (o, (open, shape)) in opens.iter().zip(&mut shapes).enumerate() {
        let next = out.descriptions.len() as u32;
        let raw = &context.raws[open.first()];
        let mut description = Description {
            flags: context.flags(open),
            owner: None,
            signal: 0,
            kind: Kind::Epoll { entries: Vec::new() },
        };
        match std::mem::replace(shape, Shape::Blocked) {
            Shape::Ready(kind, owner) => {
                if matches!(kind, Kind::TimerFd { .. } | Kind::File { .. } | Kind::Object { .. }) {
                    description.flags &= !(libc::O_ASYNC as u32);
                }
                (description.kind, description.owner, description.signal) = (kind, owner.id, owner.signal);
            }
            Shape::Epoll => epolls.push((o, next)),
            Shape::Stdio { streams, was } => {
                description.flags &= !(libc::O_ASYNC as u32);
                let mut made: HashMap<u8, u32> = HashMap::new();
                for (&holder, &stream) in open.holders.iter().zip(&streams) {
                    let d = *made.entry(stream).or_insert_with(|| {
                        let was = was.clone();
                        out.descriptions.push(Description {
                            kind: Kind::Stdio { stream, was },
                            ..description.clone()
                        });
                        out.descriptions.len() as u32 - 1
                    });
                    of_raw[holder] = Some(d);
                }
                index[o] = Some(next);
                continue;
            }
            Shape::Blocked => continue,
            shape @ (Shape::Terminal { .. } | Shape::Pipe { .. } | Shape::Unix(_)) => {
                unreachable!("unresolved {shape:?} of fd {}", raw.fd)
            }
        }
        index[o] = Some(next);
        out.descriptions.push(description);
        for &holder in &open.holders {
            of_raw[holder] = Some(next);
        }
    }
    // Peers were found as opens; a blocked one is as good as none, since the dump is refused then.
    for d in &mut out.descriptions {
        if let Kind::UnixPair { peer: Some(peer), .. } = &mut d.kind {
            let found = index.get(*peer as usize).copied().flatten();
            if let Kind::UnixPair { peer, .. } = &mut d.kind {
                *peer = found;
            }
        }
    }
    for (raw, description) in context.raws.iter().zip(&of_raw) {
        if let &Some(description) = description {
            out.fds[raw.process].push(Fd {
                fd: raw.fd,
                cloexec: raw.info.flags & fdinfo::O_CLOEXEC != 0,
                description,
            });
        }
    }
    for (o, d) in epolls {
        out.descriptions[d as usize].kind = Kind::Epoll {
            entries: epoll::entries(context, &opens[o], &of_raw)?,
        };
    }
    Ok(out)
}

#[cfg(test)]
pub(crate) mod tests;

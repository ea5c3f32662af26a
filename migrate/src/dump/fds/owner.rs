//! Who is told about input and output: F_SETOWN and F_SETSIG (fcntl(2)).

use super::{
    DumpError,
    context::{Context, Shape},
    sharing::Open,
};
use crate::sys::fdcalls;
use std::os::fd::BorrowedFd;

/// The owner of a description.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Owner {
    /// Type and id as the tree numbers it.
    pub id: Option<(i32, i32)>,
    /// F_SETSIG.
    pub signal: i32,
}

/// Reads the owner through a duplicate; `Err` is the shape of a refused open.
pub(super) fn read(context: &mut Context<'_>, open: &Open, fd: BorrowedFd<'_>) -> Result<Result<Owner, Shape>, DumpError> {
    let (kind, id) = fdcalls::owner(fd).map_err(|e| context.error(open, "fcntl F_GETOWN_EX", e))?;
    let signal = fdcalls::signal(fd).map_err(|e| context.error(open, "fcntl F_GETSIG", e))?;
    if id == 0 {
        return Ok(Ok(Owner { id: None, signal }));
    }
    let of = |pid: i32| context.processes.iter().find(|p| p.source.pid == pid).map(|p| p.source.inner_pid);
    let inner = match kind {
        // A thread: its number inside is known where both sides count alike, or where it is the leader.
        0 => of(id).or_else(|| {
            let in_tree = |p: &super::context::Process| {
                p.source.pid == p.source.inner_pid && std::path::Path::new(&format!("/proc/{}/task/{id}", p.source.pid)).exists()
            };
            context.processes.iter().any(in_tree).then_some(id)
        }),
        _ => of(id),
    };
    match inner {
        Some(inner) => Ok(Ok(Owner {
            id: Some((kind, inner)),
            signal,
        })),
        None => {
            let what = ["thread", "process", "process group"].get(kind as usize).copied().unwrap_or("task");
            let reason = format!("its signals go to {what} {id}, outside the tree (fcntl F_SETOWN)");
            Ok(Err(context.refuse(
                open,
                reason,
                "migrate that process too, or clear the owner with fcntl(F_SETOWN, 0)",
            )))
        }
    }
}

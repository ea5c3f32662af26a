//! pidfd_open(2).

use super::{
    DumpError,
    context::{Context, Shape},
    owner::Owner,
    sharing::Open,
};
use crate::image::Kind;

/// A pidfd of a process in the tree moves; any other has nothing to refer to on the other host.
pub(super) fn shape(context: &mut Context<'_>, open: &Open) -> Result<Shape, DumpError> {
    let Some(pid) = context.info(open).pid else {
        return Err(context.error(open, "fdinfo", std::io::Error::other("pidfd without a pid")));
    };
    if let Some(process) = context.processes.iter().find(|p| p.source.pid == pid) {
        let pid = process.source.inner_pid;
        return Ok(Shape::Ready(Kind::PidFd { pid }, Owner::default()));
    }
    let reason = match pid {
        -1 => "a pidfd of a process that has ended is open".to_owned(),
        _ => format!("a pidfd of process {pid}, outside the tree, is open"),
    };
    Ok(context.refuse(open, reason, "migrate that process too, or close the pidfd"))
}

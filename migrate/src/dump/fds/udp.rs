//! udp(7).

use super::{
    DumpError, Mode,
    context::{Context, Shape},
    sharing::Open,
    socket, tcp,
};
use crate::image::{Kind, Socket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::OwnedFd;

/// Reads a UDP socket.
pub(super) fn shape(context: &mut Context<'_>, open: &Open, fd: &OwnedFd, mut socket: Socket) -> Result<Shape, DumpError> {
    if context.mode == Mode::Frozen {
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map_err(|e| context.error(open, "poll", e))?;
        if fds[0].revents().intersects(PollFlags::IN | PollFlags::ERR) {
            let reason = "UDP datagrams or errors wait to be received";
            return Ok(context.refuse_for_now(open, reason, "it passes once the process receives them"));
        }
    }
    let (local, peer) = (tcp::local(fd), tcp::peer(fd));
    for addr in [local, peer] {
        if let Some(refused) = tcp::refuse_scoped(context, open, addr) {
            return Ok(refused);
        }
    }
    Ok(match socket::common(context, open, fd, &mut socket)? {
        Err(blocked) => blocked,
        Ok(owner) => Shape::Ready(Kind::Udp { socket, local, peer }, owner),
    })
}

//! tcp(7): listeners and sockets that have no connection.

use super::{
    DumpError,
    context::{Context, Shape},
    sharing::Open,
    socket,
};
use crate::{
    image::{Kind, Socket},
    sys::fdcalls,
};
use std::{
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
};

/// Bytes of `struct tcp_info` (linux/tcp.h) up to tcpi_segs_in.
const INFO: usize = 144;
/// `tcpi_state` values.
const CLOSE: u8 = 7;
const LISTEN: u8 = 10;

/// A bound address; `None` for an unbound socket.
pub(super) fn local(fd: &OwnedFd) -> Option<SocketAddr> {
    let addr = socket2::SockRef::from(fd).local_addr().ok()?.as_socket()?;
    (addr.port() != 0 || !addr.ip().is_unspecified()).then_some(addr)
}

/// The connected peer.
pub(super) fn peer(fd: &OwnedFd) -> Option<SocketAddr> {
    socket2::SockRef::from(fd).peer_addr().ok()?.as_socket()
}

/// Refuses addresses that mean something else on another host.
pub(super) fn refuse_scoped(context: &mut Context<'_>, open: &Open, addr: Option<SocketAddr>) -> Option<Shape> {
    match addr {
        Some(SocketAddr::V6(a)) if a.scope_id() != 0 => {
            let reason = format!("its socket is bound to {a}, on interface number {} of this host", a.scope_id());
            Some(context.refuse(open, reason, "bind to a global address or to [::]"))
        }
        _ => None,
    }
}

/// Reads a TCP socket.
pub(super) fn shape(context: &mut Context<'_>, open: &Open, fd: &OwnedFd, mut socket: Socket) -> Result<Shape, DumpError> {
    let info = fdcalls::get_option(fd.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, INFO).map_err(|e| context.error(open, "TCP_INFO", e))?;
    let word = |at: usize| info.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
    let state = info.first().copied().unwrap_or(0);
    // Of a listener: how many connections may wait for accept(2).
    let backlog = word(28);
    let segments = word(136);
    match state {
        LISTEN => {}
        CLOSE if segments == 0 && peer(fd).is_none() => {}
        CLOSE => {
            let reason = "a TCP connection that was reset or closed is still open here";
            return Ok(context.refuse_for_now(open, reason, "it passes once the process closes it"));
        }
        _ => {
            let to = peer(fd).map_or_else(|| "an unknown peer".to_owned(), |p| p.to_string());
            let reason = format!("open TCP connection to {to} ({})", state_name(state));
            let fix = "connections do not move: wait until it closes, or let the clients reconnect";
            return Ok(context.refuse_for_now(open, reason, fix));
        }
    }
    // Connections that wait to be accepted are no obstacle: more arrive as long as the tree stands still, none of them has been served, and all are
    // reset when the original ends. Refusing them kept a busy server from ever moving.
    // A protocol on top (kTLS, MPTCP) has a state of its own.
    if let Ok(ulp) = fdcalls::get_option(fd.as_fd(), libc::IPPROTO_TCP, 31, 16)
        && ulp.first().is_some_and(|&b| b != 0)
    {
        let name = String::from_utf8_lossy(&ulp).trim_end_matches('\0').to_owned();
        return Ok(context.refuse(
            open,
            format!("its socket uses the TCP upper layer protocol {name}"),
            "close it before the migration",
        ));
    }
    let local = local(fd);
    if let Some(refused) = refuse_scoped(context, open, local) {
        return Ok(refused);
    }
    Ok(match socket::common(context, open, fd, &mut socket)? {
        Err(blocked) => blocked,
        Ok(owner) => {
            let backlog = (state == LISTEN).then_some(backlog);
            Shape::Ready(Kind::Tcp { socket, local, backlog }, owner)
        }
    })
}

fn state_name(state: u8) -> &'static str {
    let names = [
        "unknown",
        "established",
        "connecting",
        "being accepted",
        "closing, FIN-WAIT-1",
        "closing, FIN-WAIT-2",
        "TIME-WAIT",
        "closed",
        "closed by the peer, CLOSE-WAIT",
        "closing, LAST-ACK",
        "listening",
        "closing",
    ];
    names.get(state as usize).copied().unwrap_or("unknown")
}

//! Sockets: which family and protocol, asked of a duplicate.

use super::{
    DumpError,
    context::{Context, Shape},
    owner,
    sharing::Open,
    tcp, udp, unix,
};
use crate::{image::Socket, sys::fdcalls};
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

/// Tells what a socket is.
pub(super) fn shape(context: &mut Context<'_>, open: &Open, inode: u64) -> Result<Shape, DumpError> {
    let fd = context.duplicate(open)?;
    let get = |name| int(&fd, libc::SOL_SOCKET, name).map_err(|e| context.error(open, "getsockopt", e));
    let socket = Socket {
        domain: get(libc::SO_DOMAIN)?,
        kind: get(libc::SO_TYPE)?,
        protocol: get(libc::SO_PROTOCOL)?,
        options: Vec::new(),
    };
    match (socket.domain, socket.kind, socket.protocol) {
        (libc::AF_UNIX, ..) => unix::shape(context, open, fd, socket, inode),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => tcp::shape(context, open, &fd, socket),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP) => udp::shape(context, open, &fd, socket),
        (domain, kind, protocol) => {
            let name = family(domain, kind, protocol);
            let fix = match domain {
                libc::AF_NETLINK => "close it before the migration; a library opens it to list or watch network interfaces",
                _ => "close it before the migration",
            };
            Ok(context.refuse(open, format!("{name} is open"), fix))
        }
    }
}

/// The name of a kind of socket that does not move.
fn family(domain: i32, kind: i32, protocol: i32) -> String {
    let known = match (domain, kind, protocol) {
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_RAW, _) => "a raw IP socket",
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6) => "a ping socket",
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_SCTP) => "an SCTP socket",
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_MPTCP) => "a multipath TCP socket",
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_UDPLITE) => "a UDP-Lite socket",
        (libc::AF_NETLINK, ..) => "a netlink socket",
        (libc::AF_PACKET, ..) => "a packet socket",
        (libc::AF_VSOCK, ..) => "a vsock socket",
        (libc::AF_ALG, ..) => "a kernel crypto socket (AF_ALG)",
        (libc::AF_BLUETOOTH, ..) => "a Bluetooth socket",
        (libc::AF_CAN, ..) => "a CAN socket",
        (libc::AF_XDP, ..) => "an XDP socket",
        (libc::AF_RDS, ..) => "an RDS socket",
        (libc::AF_TIPC, ..) => "a TIPC socket",
        (43, ..) => "an SMC socket",
        _ => return format!("a socket of family {domain}, type {kind}, protocol {protocol}"),
    };
    known.to_owned()
}

/// An integer option.
pub(super) fn int(fd: impl AsFd, level: i32, name: i32) -> io::Result<i32> {
    let value = fdcalls::get_option(fd, level, name, 4)?;
    let bytes = value.try_into().map_err(|_| io::Error::other("option is not an integer"))?;
    Ok(i32::from_ne_bytes(bytes))
}

/// The owner and, in `socket`, the options; `Err` is the shape of a refused open.
pub(super) fn common(
    context: &mut Context<'_>,
    open: &Open,
    fd: &OwnedFd,
    socket: &mut Socket,
) -> Result<Result<owner::Owner, Shape>, DumpError> {
    let owner = match owner::read(context, open, fd.as_fd())? {
        Ok(owner) => owner,
        Err(blocked) => return Ok(Err(blocked)),
    };
    let filter = match fdcalls::filter_length(fd) {
        Ok(0) => None,
        Ok(n) => Some(format!("a BPF filter of {n} instructions")),
        Err(_) => Some("an eBPF filter".to_owned()),
    };
    if let Some(filter) = filter {
        let reason = format!("its socket has {filter} attached");
        return Ok(Err(context.refuse(
            open,
            reason,
            "detach it (SO_DETACH_FILTER) before the migration",
        )));
    }
    socket.options = context
        .probes
        .options(fd, socket.domain, socket.kind, socket.protocol)
        .map_err(|e| context.error(open, "getsockopt", e))?;
    Ok(Ok(owner))
}

//! What TCP and UDP share: making a socket with its options and binding it.

use super::{Failed, Tried, options};
use crate::image::Socket;
use socket2::{Domain, Protocol, SockAddr, Type};
use std::{io, net::SocketAddr};

/// A socket of the same kind with the same options.
pub(super) fn create(image: &Socket) -> Result<socket2::Socket, Failed> {
    let protocol = (image.protocol != 0).then(|| Protocol::from(image.protocol));
    let made = socket2::Socket::new(Domain::from(image.domain), Type::from(image.kind), protocol).tried(|| "socket".into())?;
    options::set(&made, &image.options)?;
    Ok(made)
}

/// Binds it; what stands in the way is said in words.
pub(super) fn bind(socket: &socket2::Socket, local: Option<SocketAddr>) -> Result<(), Failed> {
    let Some(local) = local else { return Ok(()) };
    socket
        .bind(&SockAddr::from(local))
        .map_err(|e| explain(e, local))
        .tried(|| format!("bind {local}"))
}

pub(super) fn explain(e: io::Error, local: SocketAddr) -> io::Error {
    match e.raw_os_error() {
        Some(libc::EADDRINUSE) => io::Error::new(e.kind(), format!("port {} is in use here", local.port())),
        Some(libc::EADDRNOTAVAIL) => io::Error::new(e.kind(), format!("the address {} is not on this host", local.ip())),
        _ => e,
    }
}

/// Tries socket, options and address, and closes it again: a reason and what to do about it.
pub(super) fn probe(image: &Socket, local: Option<SocketAddr>) -> Result<(), (String, &'static str)> {
    let socket = create(image).map_err(|e| {
        (
            format!("{}: {}", e.what, e.source),
            "load the kernel module or raise the limit it needs",
        )
    })?;
    let fix = |e: &io::Error| match e.kind() {
        io::ErrorKind::AddrInUse => "stop what uses it on this host (ss -tulpn shows it)",
        io::ErrorKind::AddrNotAvailable => "add the address to an interface of this host, or let the program listen on 0.0.0.0",
        _ => "make the address usable on this host",
    };
    bind(&socket, local).map_err(|e| (e.source.to_string(), fix(&e.source)))
}

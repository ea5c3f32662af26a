//! udp(7).

use super::{Failed, Tried, set_status, socket};
use crate::image::{Description, Socket};
use std::{net::SocketAddr, os::fd::OwnedFd};

/// Makes, binds and connects it.
pub(super) fn build(d: &Description, image: &Socket, local: Option<SocketAddr>, peer: Option<SocketAddr>) -> Result<OwnedFd, Failed> {
    let made = socket::create(image)?;
    socket::bind(&made, local)?;
    if let Some(peer) = peer {
        made.connect(&peer.into()).tried(|| format!("connect to {peer}"))?;
    }
    let fd = OwnedFd::from(made);
    set_status(&fd, d.flags)?;
    Ok(fd)
}

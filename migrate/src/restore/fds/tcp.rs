//! tcp(7): listeners and sockets without a connection.

use super::{Failed, Tried, set_status, socket};
use crate::image::{Description, Socket};
use std::{net::SocketAddr, os::fd::OwnedFd};

/// Makes, binds and, for a listener, opens it.
pub(super) fn build(d: &Description, image: &Socket, local: Option<SocketAddr>, backlog: Option<u32>) -> Result<OwnedFd, Failed> {
    let made = socket::create(image)?;
    socket::bind(&made, local)?;
    if let Some(backlog) = backlog {
        let listened = made.listen(i32::try_from(backlog).unwrap_or(i32::MAX));
        let listened = match local {
            Some(local) => listened.map_err(|e| socket::explain(e, local)),
            None => listened,
        };
        listened.tried(|| format!("listen with backlog {backlog}"))?;
    }
    let fd = OwnedFd::from(made);
    set_status(&fd, d.flags)?;
    Ok(fd)
}

//! Setting socket options again.

use super::{Failed, Tried};
use crate::{image::SockOpt, sys::fdcalls};
use std::os::fd::AsFd;

/// SO_SNDBUFFORCE and SO_RCVBUFFORCE: past net.core.wmem_max and rmem_max, for which the agent is privileged.
const SNDBUFFORCE: i32 = 32;
const RCVBUFFORCE: i32 = 33;

/// Sets options in order. The kernel doubles buffer sizes when they are set and shows the double: half of it is set.
pub(super) fn set(fd: impl AsFd, options: &[SockOpt]) -> Result<(), Failed> {
    for o in options {
        let tried = || format!("setsockopt level {} option {}", o.level, o.name);
        match (o.level, o.name) {
            (libc::SOL_SOCKET, libc::SO_SNDBUF) => buffer(&fd, SNDBUFFORCE, o).tried(tried)?,
            (libc::SOL_SOCKET, libc::SO_RCVBUF) => buffer(&fd, RCVBUFFORCE, o).tried(tried)?,
            _ => fdcalls::set_option(&fd, o.level, o.name, &o.value).tried(tried)?,
        }
    }
    Ok(())
}

fn buffer(fd: impl AsFd, force: i32, option: &SockOpt) -> std::io::Result<()> {
    let value = option.value.as_slice().try_into().map_err(std::io::Error::other)?;
    let half = (i32::from_ne_bytes(value) / 2).to_ne_bytes();
    fdcalls::set_option(&fd, libc::SOL_SOCKET, force, &half).or_else(|_| fdcalls::set_option(&fd, libc::SOL_SOCKET, option.name, &half))
}

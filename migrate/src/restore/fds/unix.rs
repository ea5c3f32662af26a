//! unix(7): pairs.

use super::{Failed, Tried, options, set_status};
use crate::{
    image::{Description, Kind, Message, SockOpt, Socket},
    sys::fdcalls,
};
use socket2::{Domain, Protocol, Type};
use std::{io, net::Shutdown, os::fd::OwnedFd};

const SNDBUFFORCE: i32 = 32;
const SO_BUF_LOCK: i32 = 72;

struct End<'a> {
    flags: u32,
    socket: &'a Socket,
    queue: &'a [Message],
    shutdown: u8,
}

fn end(d: &Description) -> Option<End<'_>> {
    match &d.kind {
        Kind::UnixPair {
            socket, queue, shutdown, ..
        } => Some(End {
            flags: d.flags,
            socket,
            queue,
            shutdown: *shutdown,
        }),
        _ => None,
    }
}

/// Makes both ends: this one and, when it was open, the other. Queues are refilled from the far end before anything is shut down.
///
/// Credentials the kernel notes when a pair is made (SO_PEERCRED) are the agent's.
pub(super) fn build(d: &Description, other: Option<&Description>) -> Result<(OwnedFd, Option<OwnedFd>), Failed> {
    let not_a_pair = || io::Error::other("not a unix pair");
    let own = end(d).ok_or_else(not_a_pair).tried(|| "socketpair".into())?;
    let far = match other {
        Some(d) => Some(end(d).ok_or_else(not_a_pair).tried(|| "socketpair".into())?),
        None => None,
    };
    let protocol = (own.socket.protocol != 0).then(|| Protocol::from(own.socket.protocol));
    let pair = socket2::Socket::pair(Domain::UNIX, Type::from(own.socket.kind), protocol);
    let (a, b) = pair.tried(|| "socketpair".into())?;
    refill(&b, own.queue)?;
    if let Some(far) = &far {
        refill(&a, far.queue)?;
    }
    options::set(&a, &own.socket.options)?;
    if let Some(far) = &far {
        options::set(&b, &far.socket.options)?;
    }
    shutdown(&a, own.shutdown)?;
    let a = OwnedFd::from(a);
    set_status(&a, own.flags)?;
    let Some(far) = far else { return Ok((a, None)) };
    shutdown(&b, far.shutdown)?;
    let b = OwnedFd::from(b);
    set_status(&b, far.flags)?;
    Ok((a, Some(b)))
}

/// Sends what the peer of `from` had not read. The sender's buffer may have to be larger for a moment: what was sent piece by piece, or
/// by a process with a large SO_SNDBUF, does not fit into a new socket's.
fn refill(from: &socket2::Socket, queue: &[Message]) -> Result<(), Failed> {
    const SEND_BUFFER: i32 = libc::SO_SNDBUF;
    let total: usize = queue.iter().map(|m| m.0.len() + 1024).sum();
    let before = from.send_buffer_size().tried(|| "getsockopt SO_SNDBUF".into())?;
    let raised = total * 2 > before;
    if raised {
        let size = i32::try_from(total * 2).unwrap_or(i32::MAX / 2).to_ne_bytes();
        fdcalls::set_option(from, libc::SOL_SOCKET, SNDBUFFORCE, &size).tried(|| "setsockopt SO_SNDBUFFORCE".into())?;
    }
    let stream = from.r#type().tried(|| "getsockopt SO_TYPE".into())? == Type::STREAM;
    for message in queue {
        let mut rest = message.0.as_slice();
        loop {
            let n = from.send_with_flags(rest, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL).tried(|| {
                "put back what a unix socket had not read (a queue longer than net.unix.max_dgram_qlen, or no CAP_NET_ADMIN)".into()
            })?;
            rest = &rest[n..];
            if !stream || rest.is_empty() {
                break;
            }
        }
    }
    if raised {
        let value = i32::try_from(before).unwrap_or(i32::MAX).to_ne_bytes().to_vec();
        let back = SockOpt {
            level: libc::SOL_SOCKET,
            name: SEND_BUFFER,
            value,
        };
        options::set(from, &[back])?;
        // The size is the kernel's again, not the process's.
        fdcalls::set_option(from, libc::SOL_SOCKET, SO_BUF_LOCK, &0i32.to_ne_bytes()).tried(|| "setsockopt SO_BUF_LOCK".into())?;
    }
    Ok(())
}

fn shutdown(socket: &socket2::Socket, bits: u8) -> Result<(), Failed> {
    let how = match bits & 3 {
        0 => return Ok(()),
        1 => Shutdown::Read,
        2 => Shutdown::Write,
        _ => Shutdown::Both,
    };
    match socket.shutdown(how) {
        Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
        other => other.tried(|| format!("shutdown {how:?}")),
    }
}

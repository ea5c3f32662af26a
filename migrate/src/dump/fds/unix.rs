//! unix(7): pairs within the tree, and stream sockets that stand for a standard stream.
//!
//! Who the peer is, no system call on the socket tells; the kernel's sock_diag does, asked for one inode at a time.

use super::{
    DumpError, Mode,
    context::{Context, Shape, text},
    owner::Owner,
    sharing::Open,
    socket, stdio,
};
use crate::{
    image::{Kind, Message, Socket},
    sys::fdcalls,
};
use rustix::{
    io::Errno,
    net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, recv, recvmsg},
};
use std::{
    collections::HashMap,
    io::{self, IoSliceMut},
    os::fd::{AsFd, OwnedFd},
};

/// SO_PEEK_OFF, socket(7).
const SO_PEEK_OFF: i32 = 42;
/// What a message is first tried with; Linux sends at most the sender's SO_SNDBUF.
const MESSAGE: usize = 256 << 10;
/// The largest message taken.
const LARGEST: usize = 64 << 20;

/// What sock_diag says of a unix socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Info {
    /// TCP_LISTEN is 10.
    state: u8,
    /// Inode of the peer; 0 when it has been closed.
    peer: Option<u32>,
    /// Name it is bound to.
    name: Option<Vec<u8>>,
    /// Bit 0 no more receiving, bit 1 no more sending.
    shutdown: u8,
}

/// The connection to sock_diag.
#[derive(Default)]
pub(super) struct Diag {
    socket: Option<socket2::Socket>,
}

impl Diag {
    /// Asks about one socket by its inode (sock_diag(7)).
    fn ask(&mut self, inode: u32) -> io::Result<Info> {
        const NETLINK_SOCK_DIAG: i32 = 4;
        if self.socket.is_none() {
            let made = socket2::Socket::new(
                socket2::Domain::from(libc::AF_NETLINK),
                socket2::Type::RAW,
                Some(socket2::Protocol::from(NETLINK_SOCK_DIAG)),
            )?;
            made.set_read_timeout(Some(std::time::Duration::from_secs(2)))?;
            self.socket = Some(made);
        }
        let Some(socket) = &self.socket else {
            return Err(io::Error::other("no sock_diag"));
        };
        socket.send(&request(inode))?;
        let mut buffer = vec![0; 8192];
        let n = recv(socket, buffer.as_mut_slice(), RecvFlags::empty())?.0;
        reply(&buffer[..n])
    }
}

/// A SOCK_DIAG_BY_FAMILY request: `struct nlmsghdr` and `struct unix_diag_req` (linux/unix_diag.h).
fn request(inode: u32) -> Vec<u8> {
    const SHOW_NAME: u32 = 1;
    const SHOW_PEER: u32 = 4;
    let mut r = Vec::with_capacity(40);
    r.extend(40u32.to_ne_bytes());
    r.extend(20u16.to_ne_bytes()); // SOCK_DIAG_BY_FAMILY
    r.extend(1u16.to_ne_bytes()); // NLM_F_REQUEST
    r.extend([0; 8]);
    r.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    r.extend(u32::MAX.to_ne_bytes()); // any state
    r.extend(inode.to_ne_bytes());
    r.extend((SHOW_NAME | SHOW_PEER).to_ne_bytes());
    r.extend([0xff; 8]); // any cookie
    r
}

/// Reads the answer. Pure.
fn reply(bytes: &[u8]) -> io::Result<Info> {
    let short = || io::Error::other("malformed sock_diag answer");
    let u16_at = |b: &[u8], at: usize| b.get(at..at + 2).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    let u32_at = |b: &[u8], at: usize| b.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
    let kind = u16_at(bytes, 4).ok_or_else(short)?;
    if kind == 2 {
        let errno = u32_at(bytes, 16).ok_or_else(short)? as i32;
        return Err(io::Error::from_raw_os_error(errno.wrapping_neg()));
    }
    let mut info = Info {
        state: *bytes.get(18).ok_or_else(short)?,
        ..Info::default()
    };
    let mut rest = bytes.get(32..).ok_or_else(short)?;
    while rest.len() >= 4 {
        let len = u16_at(rest, 0).ok_or_else(short)? as usize;
        let value = rest.get(4..len).ok_or_else(short)?;
        match u16_at(rest, 2).ok_or_else(short)? {
            0 => info.name = Some(value.to_vec()),
            2 => info.peer = Some(u32_at(value, 0).ok_or_else(short)?),
            6 => info.shutdown = value.first().copied().unwrap_or(0),
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(info)
}

/// A unix socket, before its peer is known to be in the tree.
#[derive(Debug)]
pub(super) struct Found {
    inode: u64,
    info: Info,
    socket: Socket,
    owner: Owner,
}

/// Reads a unix socket.
pub(super) fn shape(context: &mut Context<'_>, open: &Open, fd: OwnedFd, mut socket: Socket, inode: u64) -> Result<Shape, DumpError> {
    let info = match context.diag.ask(inode as u32) {
        Ok(info) => info,
        Err(e) => {
            let reason = format!("the peer of its unix socket cannot be found out: {e}");
            return Ok(context.refuse(open, reason, "load the kernel module unix_diag (modprobe unix_diag)"));
        }
    };
    Ok(match socket::common(context, open, &fd, &mut socket)? {
        Err(blocked) => blocked,
        Ok(owner) => Shape::Unix(Found {
            inode,
            info,
            socket,
            owner,
        }),
    })
}

/// Finds pairs among the unix sockets and refuses the rest, but for standard streams.
pub(super) fn resolve(context: &mut Context<'_>, opens: &[Open], shapes: &mut [Shape]) -> Result<(), DumpError> {
    let mut by_inode: HashMap<u64, usize> = HashMap::new();
    let mut named: Vec<u64> = Vec::new();
    for (i, shape) in shapes.iter().enumerate() {
        if let Shape::Unix(found) = shape {
            by_inode.insert(found.inode, i);
            if found.info.name.is_some() {
                named.push(found.inode);
            }
        }
    }
    for (open, shape) in opens.iter().zip(shapes.iter_mut()) {
        if !matches!(shape, Shape::Unix(_)) {
            continue;
        }
        let Shape::Unix(found) = std::mem::replace(shape, Shape::Blocked) else {
            continue;
        };
        let tree_peer = found.info.peer.and_then(|p| by_inode.get(&u64::from(p)).copied());
        let peer_named = found.info.peer.is_some_and(|p| named.contains(&u64::from(p)));
        *shape = match (found.info.peer, tree_peer) {
            _ if found.info.name.is_some() => refuse_named(context, open, &found.info),
            (Some(_), Some(_)) if peer_named => {
                let reason = "its unix socket is connected to a named socket of the tree";
                context.refuse(
                    open,
                    reason,
                    "named unix sockets do not move: close the connection before the migration",
                )
            }
            (Some(0), _) if closed(&found) => pair(context, open, found, None)?,
            (Some(_), Some(peer)) => pair(context, open, found, Some(peer as u32))?,
            (Some(peer), None) => outside(context, open, &found, peer),
            (None, _) => context.refuse(open, "an unconnected unix socket is open", "close it before the migration"),
        };
    }
    Ok(())
}

/// Whether a peer without an inode has been closed. The alternative, of a stream, is one that was not accepted yet.
fn closed(found: &Found) -> bool {
    found.socket.kind == libc::SOCK_DGRAM || found.info.shutdown & 3 == 3
}

/// "@abstract" or the path.
fn printable(name: &[u8]) -> String {
    match name.split_first() {
        Some((0, rest)) => format!("@{}", text(rest)),
        _ => text(name.strip_suffix(b"\0").unwrap_or(name)),
    }
}

fn refuse_named(context: &mut Context<'_>, open: &Open, info: &Info) -> Shape {
    let name = printable(info.name.as_deref().unwrap_or_default());
    let what = if info.state == 10 { "listens on" } else { "is bound to" };
    let fix = "named unix sockets do not move: let the program listen on TCP, or close the socket before the migration";
    context.refuse(open, format!("its unix socket {what} {name}"), fix)
}

fn unnamed(inode: u32) -> String {
    match inode {
        0 => "a socket that has not accepted it yet".to_owned(),
        _ => format!("the unnamed socket {inode}"),
    }
}

/// A connection to a process outside the tree.
fn outside(context: &mut Context<'_>, open: &Open, found: &Found, peer: u32) -> Shape {
    if found.socket.kind == libc::SOCK_STREAM
        && let Some(rest) = stdio::lowest(context, open, |_| true)
    {
        return Shape::Stdio {
            streams: stdio::split(context, open, rest),
            was: text(context.link(open)),
        };
    }
    let to = context
        .diag
        .ask(peer)
        .ok()
        .and_then(|i| i.name)
        .map_or_else(|| unnamed(peer), |name| printable(&name));
    let fix = match to.as_str() {
        "/dev/log" | "/run/systemd/journal/dev-log" | "/run/systemd/journal/socket" => {
            "close the log (closelog) before the migration, or log to standard error"
        }
        _ => "migrate the process at the other end too, or close the connection",
    };
    context.refuse(open, format!("its unix socket leads outside the tree, to {to}"), fix)
}

fn pair(context: &mut Context<'_>, open: &Open, found: Found, peer: Option<u32>) -> Result<Shape, DumpError> {
    let mut queue = Vec::new();
    if context.mode == Mode::Frozen {
        let fd = context.duplicate(open)?;
        let waiting = rustix::io::ioctl_fionread(&fd).map_err(|e| context.error(open, "ioctl FIONREAD", e))?;
        let has_option = |name| found.socket.options.iter().any(|o| o.level == libc::SOL_SOCKET && o.name == name);
        if waiting > 0 && has_option(libc::SO_PASSCRED) {
            let reason = format!("its unix socket has {waiting} bytes with credentials that were not read");
            return Ok(context.refuse_for_now(open, reason, "it passes once the process reads them"));
        }
        let peeked = match found.socket.kind {
            libc::SOCK_STREAM => peek_stream(&fd, waiting as usize),
            _ => peek_messages(&fd, found.info.shutdown & 1 != 0),
        };
        match peeked {
            Ok(Some(q)) => queue = q,
            Ok(None) => {
                let reason = "its unix socket has descriptors, credentials or urgent data in flight";
                return Ok(context.refuse_for_now(open, reason, "it passes once the process receives them"));
            }
            Err(e) => return Err(context.error(open, "recv MSG_PEEK", e)),
        }
    }
    let kind = Kind::UnixPair {
        peer,
        socket: found.socket,
        queue,
        shutdown: found.info.shutdown & 3,
    };
    Ok(Shape::Ready(kind, found.owner))
}

/// All bytes of a stream's queue; `None` when there is more to it than bytes.
fn peek_stream(fd: &OwnedFd, waiting: usize) -> io::Result<Option<Vec<Message>>> {
    if waiting == 0 {
        return Ok(Some(Vec::new()));
    }
    let mut data = vec![0; waiting];
    match peek(fd, &mut data)? {
        Some((n, false)) if n == waiting => Ok(Some(vec![Message(data)])),
        _ => Ok(None),
    }
}

/// Every message of a datagram or seqpacket queue, one after the other by means of SO_PEEK_OFF, which is put back.
///
/// An empty message that an earlier freeze has peeked already is not seen again: the kernel has no way to step over it.
fn peek_messages(fd: &OwnedFd, ended: bool) -> io::Result<Option<Vec<Message>>> {
    let before = fdcalls::get_option(fd, libc::SOL_SOCKET, SO_PEEK_OFF, 4)?;
    let mut offset = 0usize;
    let mut run = || -> io::Result<Option<Vec<Message>>> {
        let mut out = Vec::new();
        let mut buffer = vec![0; MESSAGE];
        loop {
            let at = i32::try_from(offset).map_err(io::Error::other)?;
            fdcalls::set_option(fd, libc::SOL_SOCKET, SO_PEEK_OFF, &at.to_ne_bytes())?;
            let Some((n, control)) = peek(fd, &mut buffer)? else {
                return Ok(Some(out));
            };
            if control {
                return Ok(None);
            }
            if n > buffer.len() {
                if n > LARGEST {
                    return Err(io::Error::other("message too large"));
                }
                buffer.resize(n, 0);
                continue;
            }
            // The end of a queue that nothing more comes to looks like an empty message, and would do so for ever.
            if n == 0 && ended {
                return Ok(Some(out));
            }
            out.push(Message(buffer[..n].to_vec()));
            offset += n;
        }
    };
    let peeked = run();
    fdcalls::set_option(fd, libc::SOL_SOCKET, SO_PEEK_OFF, &before)?;
    peeked
}

/// One peek: the message's full length and whether it carries control data; `None` when nothing is there.
fn peek(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<Option<(usize, bool)>> {
    let mut control = RecvAncillaryBuffer::default();
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::TRUNC;
    match recvmsg(fd, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
        Ok(m) => Ok(Some((m.bytes, m.flags.contains(ReturnFlags::CTRUNC)))),
        Err(Errno::AGAIN) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn answers() {
        let mut a = vec![0; 16];
        a[4] = 20;
        a.extend([1, 1, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        a.extend([8, 0, 2, 0, 7, 0, 0, 0]);
        a.extend([5, 0, 6, 0, 3, 0, 0, 0]);
        a.extend([7, 0, 0, 0, 0, b'a', b'b', 0]);
        let info = reply(&a).unwrap();
        assert_eq!((info.state, info.peer, info.shutdown), (1, Some(7), 3));
        assert_eq!(printable(&info.name.unwrap()), "@ab");
        assert!(reply(&a[..20]).is_err());
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = reply(&bytes);
        }
    }
}

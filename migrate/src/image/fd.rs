//! File descriptors, open file descriptions and what is behind them.

use super::FileId;
use serde::{Deserialize, Serialize};

/// An entry of a descriptor table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fd {
    /// The number.
    pub fd: i32,
    /// FD_CLOEXEC.
    pub cloexec: bool,
    /// Index into [`super::Tree::descriptions`]; equal for descriptors that dup(2) or fork(2) made from one open.
    pub description: u32,
}

/// An open file description (open(2)): what dup and fork share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Open flags as /proc/PID/fdinfo shows them, without O_CLOEXEC: access mode and status flags.
    pub flags: u32,
    /// fcntl(F_SETOWN_EX): type (0 tid, 1 pid, 2 pgrp) and id; `None` when unset.
    pub owner: Option<(i32, i32)>,
    /// fcntl(F_SETSIG).
    pub signal: i32,
    /// What is open.
    pub kind: Kind,
}

/// What a description has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A regular file or directory with a name; `pos` is its offset.
    File {
        /// Which.
        file: FileId,
        /// Offset in bytes (directories: the file system's cookie).
        pos: u64,
    },
    /// An unlinked regular file or a memfd: the content moves as an object.
    Object {
        /// Index into [`super::Tree::objects`].
        object: u32,
        /// Offset in bytes.
        pos: u64,
    },
    /// A device without state of its own: null, zero, full, random, urandom.
    Device {
        /// Which; `rdev` says the device.
        file: FileId,
    },
    /// An end of a pipe made by pipe2(2).
    Pipe {
        /// Index into [`super::Tree::pipes`]. The access mode tells the end.
        pipe: u32,
    },
    /// An end of a named pipe.
    Fifo {
        /// Its path.
        file: FileId,
        /// Index into [`super::Tree::pipes`].
        pipe: u32,
    },
    /// eventfd(2).
    EventFd {
        /// Counter.
        count: u64,
        /// EFD_SEMAPHORE.
        semaphore: bool,
    },
    /// epoll(7).
    Epoll {
        /// Registered descriptors.
        entries: Vec<EpollEntry>,
    },
    /// signalfd(2), with the signals it accepts.
    SignalFd {
        /// Bit n-1 for signal n.
        mask: u64,
    },
    /// timerfd_create(2).
    TimerFd {
        /// Clock id.
        clock: i32,
        /// Expirations not read yet.
        ticks: u64,
        /// timerfd_settime flags.
        settime_flags: u32,
        /// Nanoseconds to the next expiry, 0 when disarmed.
        value_ns: u64,
        /// Nanoseconds between expiries.
        interval_ns: u64,
    },
    /// inotify(7).
    Inotify {
        /// Watches.
        watches: Vec<InotifyWatch>,
    },
    /// One end of a pair of connected unix sockets whose other end is in the tree too.
    UnixPair {
        /// Index of the other end among the descriptions, `None` when it was closed.
        peer: Option<u32>,
        /// State and what was received and not read.
        socket: Socket,
        /// Messages (one for each send on a datagram or seqpacket socket; a stream's bytes in any split).
        queue: Vec<Message>,
        /// 1 when shutdown for reading, 2 for writing, 3 both.
        shutdown: u8,
    },
    /// A TCP socket that listens, or was only created or bound.
    Tcp {
        /// State.
        socket: Socket,
        /// Bound address.
        local: Option<std::net::SocketAddr>,
        /// Backlog when listening.
        backlog: Option<u32>,
    },
    /// A UDP socket.
    Udp {
        /// State.
        socket: Socket,
        /// Bound address.
        local: Option<std::net::SocketAddr>,
        /// Connected peer.
        peer: Option<std::net::SocketAddr>,
    },
    /// A standard stream that leads outside the tree: the receiver attaches its own.
    Stdio {
        /// 0, 1 or 2: the lowest standard descriptor it was open as.
        stream: u8,
        /// What it was, for messages ("/dev/pts/3", `pipe:[1234]`).
        was: String,
    },
    /// pidfd_open(2) of a process in the tree.
    PidFd {
        /// The process.
        pid: i32,
    },
}

/// A descriptor registered with an epoll instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollEntry {
    /// The number it was registered under.
    pub fd: i32,
    /// Its description.
    pub description: u32,
    /// Event mask with its EPOLLET, EPOLLONESHOT, EPOLLEXCLUSIVE bits.
    pub events: u32,
    /// epoll_data.
    pub data: u64,
}

/// An inotify watch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InotifyWatch {
    /// Watch descriptor.
    pub wd: i32,
    /// What is watched.
    pub file: FileId,
    /// Event mask.
    pub mask: u32,
}

/// A pipe's buffer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    /// F_GETPIPE_SZ, bytes.
    pub capacity: u32,
    /// What was written and not read.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
    /// Owner and mode of the pipe's inode.
    pub owner: (u32, u32, u32),
}

/// A queued message of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message(#[serde(with = "serde_bytes")] pub Vec<u8>);

/// What every socket has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// AF_*.
    pub domain: i32,
    /// SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET.
    pub kind: i32,
    /// Protocol number.
    pub protocol: i32,
    /// Options that differ from a new socket's: (level, name, raw value).
    pub options: Vec<SockOpt>,
}

/// A socket option and its value as getsockopt(2) gave it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SockOpt {
    /// SOL_SOCKET, IPPROTO_TCP, ...
    pub level: i32,
    /// Option number.
    pub name: i32,
    /// Raw value.
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
}

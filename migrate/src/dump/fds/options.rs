//! Socket options: which exist, and which of them differ from those of a fresh socket.

use crate::{image::SockOpt, sys::fdcalls};
use socket2::{Domain, Protocol, Socket, Type};
use std::{collections::HashMap, io, os::fd::AsFd};

/// The most bytes an option is taken with; the longest in the table are names.
const LONGEST: usize = 64;

/// SOL_SOCKET (socket(7), asm-generic/socket.h), for every family. SO_SNDBUF and SO_RCVBUF are treated apart.
#[rustfmt::skip]
const SOCKET: &[i32] = &[
    2,  // SO_REUSEADDR
    15, // SO_REUSEPORT
    9,  // SO_KEEPALIVE
    6,  // SO_BROADCAST
    5,  // SO_DONTROUTE
    10, // SO_OOBINLINE
    11, // SO_NO_CHECK
    13, // SO_LINGER
    16, // SO_PASSCRED
    34, // SO_PASSSEC
    18, // SO_RCVLOWAT
    20, // SO_RCVTIMEO
    21, // SO_SNDTIMEO
    25, // SO_BINDTODEVICE
    29, // SO_TIMESTAMP
    35, // SO_TIMESTAMPNS
    37, // SO_TIMESTAMPING
    36, // SO_MARK
    40, // SO_RXQ_OVFL
    41, // SO_WIFI_STATUS
    42, // SO_PEEK_OFF
    43, // SO_NOFCS
    45, // SO_SELECT_ERR_QUEUE
    46, // SO_BUSY_POLL
    47, // SO_MAX_PACING_RATE
    60, // SO_ZEROCOPY
    61, // SO_TXTIME
    69, // SO_PREFER_BUSY_POLL
    70, // SO_BUSY_POLL_BUDGET
    74, // SO_TXREHASH
    75, // SO_RCVMARK
    76, // SO_PASSPIDFD
    82, // SO_RCVPRIORITY
    83, // SO_PASSRIGHTS
];

/// IPPROTO_IP (ip(7), linux/in.h), for both internet families.
#[rustfmt::skip]
const IP: &[i32] = &[
    1,  // IP_TOS
    2,  // IP_TTL
    4,  // IP_OPTIONS
    6,  // IP_RECVOPTS
    7,  // IP_RETOPTS
    8,  // IP_PKTINFO
    10, // IP_MTU_DISCOVER
    11, // IP_RECVERR
    12, // IP_RECVTTL
    13, // IP_RECVTOS
    15, // IP_FREEBIND
    19, // IP_TRANSPARENT
    20, // IP_RECVORIGDSTADDR
    21, // IP_MINTTL
    22, // IP_NODEFRAG
    23, // IP_CHECKSUM
    24, // IP_BIND_ADDRESS_NO_PORT
    25, // IP_RECVFRAGSIZE
    26, // IP_RECVERR_RFC4884
    32, // IP_MULTICAST_IF
    33, // IP_MULTICAST_TTL
    34, // IP_MULTICAST_LOOP
    49, // IP_MULTICAST_ALL
    50, // IP_UNICAST_IF
    51, // IP_LOCAL_PORT_RANGE
];

/// IPPROTO_IPV6 (ipv6(7), linux/in6.h).
#[rustfmt::skip]
const IPV6: &[i32] = &[
    26, // IPV6_V6ONLY
    16, // IPV6_UNICAST_HOPS
    17, // IPV6_MULTICAST_IF
    18, // IPV6_MULTICAST_HOPS
    19, // IPV6_MULTICAST_LOOP
    23, // IPV6_MTU_DISCOVER
    25, // IPV6_RECVERR
    29, // IPV6_MULTICAST_ALL
    31, // IPV6_RECVERR_RFC4884
    33, // IPV6_FLOWINFO_SEND
    49, // IPV6_RECVPKTINFO
    51, // IPV6_RECVHOPLIMIT
    53, // IPV6_RECVHOPOPTS
    56, // IPV6_RECVRTHDR
    58, // IPV6_RECVDSTOPTS
    60, // IPV6_RECVPATHMTU
    62, // IPV6_DONTFRAG
    66, // IPV6_RECVTCLASS
    67, // IPV6_TCLASS
    70, // IPV6_AUTOFLOWLABEL
    72, // IPV6_ADDR_PREFERENCES
    73, // IPV6_MINHOPCOUNT
    74, // IPV6_RECVORIGDSTADDR
    75, // IPV6_TRANSPARENT
    76, // IPV6_UNICAST_IF
    77, // IPV6_RECVFRAGSIZE
    78, // IPV6_FREEBIND
];

/// IPPROTO_TCP (tcp(7), linux/tcp.h).
#[rustfmt::skip]
const TCP: &[i32] = &[
    1,  // TCP_NODELAY
    2,  // TCP_MAXSEG
    3,  // TCP_CORK
    4,  // TCP_KEEPIDLE
    5,  // TCP_KEEPINTVL
    6,  // TCP_KEEPCNT
    7,  // TCP_SYNCNT
    8,  // TCP_LINGER2
    9,  // TCP_DEFER_ACCEPT
    10, // TCP_WINDOW_CLAMP
    12, // TCP_QUICKACK
    13, // TCP_CONGESTION
    16, // TCP_THIN_LINEAR_TIMEOUTS
    18, // TCP_USER_TIMEOUT
    23, // TCP_FASTOPEN
    25, // TCP_NOTSENT_LOWAT
    27, // TCP_SAVE_SYN
    30, // TCP_FASTOPEN_CONNECT
    34, // TCP_FASTOPEN_NO_COOKIE
    36, // TCP_INQ
    37, // TCP_TX_DELAY
];

/// IPPROTO_UDP (udp(7), linux/udp.h).
#[rustfmt::skip]
const UDP: &[i32] = &[
    1,   // UDP_CORK
    100, // UDP_ENCAP
    101, // UDP_NO_CHECK6_TX
    102, // UDP_NO_CHECK6_RX
    103, // UDP_SEGMENT
    104, // UDP_GRO
];

/// SO_PRIORITY comes after IP_TOS, which changes it.
const SO_PRIORITY: i32 = 12;
/// SO_BUF_LOCK: which buffer sizes the process has set itself.
const SO_BUF_LOCK: i32 = 72;

/// The options of a kind of socket, in the order in which they are to be set.
fn table(domain: i32, kind: i32, protocol: i32) -> impl Iterator<Item = (i32, i32)> {
    let inet = matches!(domain, libc::AF_INET | libc::AF_INET6);
    let when = |on: bool, level: i32, names: &'static [i32]| (if on { names } else { &[] }).iter().map(move |&n| (level, n));
    let tcp = inet && kind == libc::SOCK_STREAM && protocol == libc::IPPROTO_TCP;
    let udp = inet && kind == libc::SOCK_DGRAM && protocol == libc::IPPROTO_UDP;
    when(true, libc::SOL_SOCKET, SOCKET)
        .chain(when(domain == libc::AF_INET6, libc::IPPROTO_IPV6, IPV6))
        .chain(when(inet, libc::IPPROTO_IP, IP))
        .chain(when(tcp, libc::IPPROTO_TCP, TCP))
        .chain(when(udp, libc::IPPROTO_UDP, UDP))
        .chain([(libc::SOL_SOCKET, SO_PRIORITY)])
}

/// Values of every option of a kind of socket, in the table's order; `None` for those this kernel does not know.
type Values = Vec<Option<Vec<u8>>>;

/// Fresh sockets' options, by (domain, type, protocol).
#[derive(Debug, Default)]
pub(super) struct Probes {
    fresh: HashMap<(i32, i32, i32), Values>,
}

impl Probes {
    /// The options of a socket that differ from those of a fresh one of its kind, in the order to set them.
    ///
    /// # Errors
    /// The fresh socket could not be made. Options that this kernel does not know are left out.
    pub fn options(&mut self, fd: impl AsFd, domain: i32, kind: i32, protocol: i32) -> io::Result<Vec<SockOpt>> {
        let fd = fd.as_fd();
        let read = |fd: std::os::fd::BorrowedFd<'_>| -> Values {
            table(domain, kind, protocol)
                .map(|(level, name)| fdcalls::get_option(fd, level, name, LONGEST).ok())
                .collect()
        };
        let fresh = match self.fresh.entry((domain, kind, protocol)) {
            std::collections::hash_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::hash_map::Entry::Vacant(e) => {
                let protocol = (protocol != 0).then(|| Protocol::from(protocol));
                let probe = Socket::new(Domain::from(domain), Type::from(kind), protocol)?;
                e.insert(read(probe.as_fd()))
            }
        };
        let mut out: Vec<SockOpt> = table(domain, kind, protocol)
            .zip(read(fd))
            .zip(fresh.iter())
            .filter_map(|(((level, name), value), fresh)| {
                let value = value?;
                (Some(&value) != fresh.as_ref()).then_some(SockOpt { level, name, value })
            })
            .collect();
        // Sizes the kernel adjusts by itself are its own business; those the process set are locked.
        let locked = super::socket::int(fd, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(0);
        for (bit, name) in [(1, libc::SO_SNDBUF), (2, libc::SO_RCVBUF)] {
            if locked & bit != 0 {
                let value = fdcalls::get_option(fd, libc::SOL_SOCKET, name, LONGEST)?;
                out.push(SockOpt {
                    level: libc::SOL_SOCKET,
                    name,
                    value,
                });
            }
        }
        Ok(out)
    }
}

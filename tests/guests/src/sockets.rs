//! Sockets: unix pairs with data queued, listeners and UDP sockets with their options.

use crate::kit::{Kit, sys, sys0};
use std::{
    io::{self, Read, Write},
    mem::size_of_val,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, RawFd},
    os::unix::net::{UnixDatagram, UnixStream},
    process::ExitCode,
    time::Duration,
};

fn option(fd: RawFd, level: i32, name: i32) -> i32 {
    let mut value = 0_i32;
    let mut size = size_of_val(&value) as u32;
    if sys!(getsockopt(fd, level, name, (&raw mut value).cast(), &mut size)).is_err() {
        return -1;
    }
    value
}

fn set(fd: RawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    sys!(setsockopt(fd, level, name, (&raw const value).cast(), size_of_val(&value) as u32)).map(drop)
}

const OPTIONS: &[(&str, i32, i32)] = &[
    ("SO_REUSEADDR", libc::SOL_SOCKET, libc::SO_REUSEADDR),
    ("SO_REUSEPORT", libc::SOL_SOCKET, libc::SO_REUSEPORT),
    ("SO_KEEPALIVE", libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    ("SO_BROADCAST", libc::SOL_SOCKET, libc::SO_BROADCAST),
    ("SO_RCVBUF", libc::SOL_SOCKET, libc::SO_RCVBUF),
    ("SO_SNDBUF", libc::SOL_SOCKET, libc::SO_SNDBUF),
    ("SO_PRIORITY", libc::SOL_SOCKET, libc::SO_PRIORITY),
    ("SO_MARK", libc::SOL_SOCKET, libc::SO_MARK),
    ("SO_PASSCRED", libc::SOL_SOCKET, libc::SO_PASSCRED),
    ("SO_ACCEPTCONN", libc::SOL_SOCKET, libc::SO_ACCEPTCONN),
    ("SO_TYPE", libc::SOL_SOCKET, libc::SO_TYPE),
    ("SO_LINGER", libc::SOL_SOCKET, libc::SO_LINGER),
    ("SO_OOBINLINE", libc::SOL_SOCKET, libc::SO_OOBINLINE),
    ("TCP_NODELAY", libc::IPPROTO_TCP, libc::TCP_NODELAY),
    ("TCP_KEEPIDLE", libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    ("TCP_KEEPINTVL", libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    ("TCP_KEEPCNT", libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    ("TCP_DEFER_ACCEPT", libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    ("TCP_USER_TIMEOUT", libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    ("TCP_FASTOPEN", libc::IPPROTO_TCP, libc::TCP_FASTOPEN),
    ("IP_TOS", libc::IPPROTO_IP, libc::IP_TOS),
    ("IP_TTL", libc::IPPROTO_IP, libc::IP_TTL),
    ("IP_FREEBIND", libc::IPPROTO_IP, libc::IP_FREEBIND),
    ("IP_PKTINFO", libc::IPPROTO_IP, libc::IP_PKTINFO),
    ("IP_MTU_DISCOVER", libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    ("IPV6_V6ONLY", libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    ("IPV6_UNICAST_HOPS", libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    ("IPV6_RECVPKTINFO", libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
];

fn image(fd: RawFd) -> Vec<(&'static str, i32)> {
    OPTIONS
        .iter()
        .map(|(name, level, number)| (*name, option(fd, *level, *number)))
        .collect()
}

fn talks(to: SocketAddr, listener: &TcpListener) -> io::Result<bool> {
    let mut client = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
    client.write_all(b"hello")?;
    let (mut served, _) = listener.accept()?;
    let mut bytes = [0; 5];
    served.read_exact(&mut bytes)?;
    Ok(&bytes == b"hello")
}

/// One of each kind; nothing is connected over TCP.
pub fn sockets(mut kit: Kit) -> io::Result<ExitCode> {
    let v4 = TcpListener::bind("0.0.0.0:0")?;
    let v6 = TcpListener::bind("[::]:0")?;
    let fd = v4.as_raw_fd();
    for (level, name, value) in [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::SOL_SOCKET, libc::SO_RCVBUF, 100_000),
        (libc::SOL_SOCKET, libc::SO_SNDBUF, 50_000),
        (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 11),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 4),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 9000),
        (libc::IPPROTO_IP, libc::IP_TOS, 0x10),
        (libc::IPPROTO_IP, libc::IP_TTL, 33),
    ] {
        set(fd, level, name, value)?;
    }
    v6.set_nonblocking(true)?;
    let udp4 = UdpSocket::bind("0.0.0.0:0")?;
    let udp6 = UdpSocket::bind("[::1]:0")?;
    let connected = UdpSocket::bind("127.0.0.1:0")?;
    connected.connect(("127.0.0.1", udp4.local_addr()?.port()))?;
    set(udp4.as_raw_fd(), libc::SOL_SOCKET, libc::SO_BROADCAST, 1)?;
    set(udp4.as_raw_fd(), libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
    udp6.set_nonblocking(true)?;
    let unbound = {
        let fd = sys!(socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0))?;
        set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        fd
    };

    // Queued in both directions; a record-keeping one; one whose other end said goodbye; one with a shut-down half.
    let (mut left, mut right) = UnixStream::pair()?;
    left.write_all(b"to the right")?;
    right.write_all(b"to the left")?;
    let (from, to) = UnixDatagram::pair()?;
    from.send(b"first")?;
    from.send(b"")?;
    from.send(b"third")?;
    let mut seq = [0; 2];
    sys!(socketpair(
        libc::AF_UNIX,
        libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK,
        0,
        seq.as_mut_ptr()
    ))?;
    sys!(send(seq[0], b"packet".as_ptr().cast(), 6, 0))?;
    // Nothing queued here: what is queued with credentials cannot be queued again by anyone else.
    let (asks_who, _quiet) = UnixStream::pair()?;
    set(asks_who.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, 1)?;
    let (mut closing, mut other) = UnixStream::pair()?;
    closing.write_all(b"last")?;
    closing.shutdown(std::net::Shutdown::Write)?;
    let all = [
        v4.as_raw_fd(),
        v6.as_raw_fd(),
        udp4.as_raw_fd(),
        udp6.as_raw_fd(),
        connected.as_raw_fd(),
        unbound,
        left.as_raw_fd(),
        right.as_raw_fd(),
        asks_who.as_raw_fd(),
        seq[0],
    ];
    let before: Vec<_> = all.iter().map(|fd| image(*fd)).collect();
    let addresses = |v4: &TcpListener, v6: &TcpListener| -> io::Result<Vec<SocketAddr>> {
        Ok(vec![
            v4.local_addr()?,
            v6.local_addr()?,
            udp4.local_addr()?,
            udp6.local_addr()?,
            connected.local_addr()?,
            connected.peer_addr()?,
        ])
    };
    let addresses_before = addresses(&v4, &v6)?;
    kit.ready()?;
    let mut first_time = true;
    Ok(kit.run(
        |_| {},
        |kit| {
            let first = std::mem::replace(&mut first_time, false);
            for (i, fd) in all.iter().enumerate() {
                for (now, before) in image(*fd).into_iter().zip(&before[i]) {
                    if now != *before {
                        kit.differs(format!("socket number {i} {}: now {}, before {}", now.0, now.1, before.1));
                    }
                }
            }
            let now = addresses(&v4, &v6);
            let now = kit.expect("addresses", now);
            kit.equal("addresses", now, Some(addresses_before.clone()));
            let said = talks(SocketAddr::from(([127, 0, 0, 1], addresses_before[0].port())), &v4);
            let said = kit.expect("TCP v4 listener", said);
            kit.equal("TCP v4 listener", said, Some(true));
            kit.check(
                v6.accept().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock),
                "the v6 listener blocks",
            );
            let _ = v6.set_nonblocking(false);
            let said = talks(SocketAddr::from(([0_u16, 0, 0, 0, 0, 0, 0, 1], addresses_before[1].port())), &v6);
            let _ = v6.set_nonblocking(true);
            let said = kit.expect("TCP v6 listener", said);
            kit.equal("TCP v6 listener", said, Some(true));

            let sent = connected.send(b"datagram");
            kit.expect("connected UDP", sent);
            let mut bytes = [0; 64];
            let _ = udp4.set_read_timeout(Some(Duration::from_secs(2)));
            let got = udp4.recv_from(&mut bytes).map(|(n, from)| (bytes[..n].to_vec(), from));
            let _ = udp4.set_read_timeout(None);
            let got = kit.expect("UDP v4", got);
            kit.equal("UDP v4", got, Some((b"datagram".to_vec(), addresses_before[4])));

            let read = |s: &mut UnixStream| -> Vec<u8> {
                let mut bytes = [0; 64];
                let _ = s.set_nonblocking(true);
                let n = s.read(&mut bytes).unwrap_or(0);
                let _ = s.set_nonblocking(false);
                bytes[..n].to_vec()
            };
            kit.equal("queued to the right", read(&mut right), b"to the right".to_vec());
            kit.equal("queued to the left", read(&mut left), b"to the left".to_vec());
            let again = left.write_all(b"to the right").and_then(|()| right.write_all(b"to the left"));
            kit.expect("unix pair", again);
            let mut records = Vec::new();
            let _ = to.set_nonblocking(true);
            while let Ok(n) = to.recv(&mut bytes) {
                records.push(bytes[..n].to_vec());
            }
            let _ = to.set_nonblocking(false);
            kit.equal("datagrams queued", records, vec![b"first".to_vec(), vec![], b"third".to_vec()]);
            let again = from.send(b"first").and(from.send(b"")).and(from.send(b"third"));
            kit.expect("unix datagrams", again);
            let n = sys0!(recv(seq[1], bytes.as_mut_ptr().cast(), 64, 0));
            kit.equal(
                "packet queued",
                bytes.get(..n.max(0) as usize).map(<[u8]>::to_vec),
                Some(b"packet".to_vec()),
            );
            sys0!(send(seq[0], b"packet".as_ptr().cast(), 6, 0));
            if first {
                kit.equal("data before a shutdown", read(&mut other), b"last".to_vec());
            }
            kit.equal("end after a shutdown", read(&mut other), vec![]);
            kit.check(closing.write(b"x").is_err(), "the half that was shut down takes data");
        },
    ))
}

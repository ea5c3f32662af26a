//! Sockets.

use super::*;
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::unix::net::{UnixDatagram, UnixStream},
};

#[test]
fn unix_streams_keep_bytes_and_shutdown() {
    let (mut a, mut b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    b.write_all(b"to a").unwrap();
    b.write_all(&[7; 100_000]).unwrap();
    a.write_all(b"to b").unwrap();
    a.shutdown(std::net::Shutdown::Write).unwrap();
    a.set_read_timeout(Some(std::time::Duration::from_secs(3))).unwrap();
    let (t, fds) = copies(&[a.as_raw_fd(), b.as_raw_fd()]);
    assert!(
        matches!(
            &t.descriptions[0].kind,
            Kind::UnixPair {
                peer: Some(1),
                shutdown: 2,
                ..
            }
        ),
        "{:?}",
        t.descriptions[0]
    );
    let [a2, b2] = <[OwnedFd; 2]>::try_from(fds).unwrap().map(UnixStream::from);
    assert_eq!(a2.read_timeout().unwrap(), Some(std::time::Duration::from_secs(3)));
    for (mut a, mut b) in [(a, b), (a2, b2)] {
        let mut s = String::new();
        b.read_to_string(&mut s).unwrap();
        assert_eq!(s, "to b");
        drop(b);
        let mut v = Vec::new();
        a.read_to_end(&mut v).unwrap();
        assert_eq!((v.len(), &v[..4]), (100_004, &b"to a"[..]));
    }
}

#[test]
fn unix_messages_stay_apart() {
    let (a, b) = UnixDatagram::pair().unwrap();
    for m in [&b"one"[..], b"", b"three"] {
        b.send(m).unwrap();
    }
    let (_, fds) = copies(&[a.as_raw_fd(), b.as_raw_fd()]);
    let [a2, _b2] = <[OwnedFd; 2]>::try_from(fds).unwrap().map(UnixDatagram::from);
    for a in [a, a2] {
        a.set_nonblocking(true).unwrap();
        let mut buffer = [0; 16];
        let lengths: Vec<usize> = std::iter::from_fn(|| a.recv(&mut buffer).ok()).collect();
        assert_eq!(lengths, [3, 0, 5]);
    }
    // A queue larger than a new socket's send buffer takes.
    let (a, b) = UnixStream::pair().unwrap();
    socket2::SockRef::from(&b).set_send_buffer_size(4 << 20).unwrap();
    b.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while let Ok(n) = (&b).write(&[1; 100]) {
        sent += n;
    }
    drop(b);
    hung_up(&a);
    let mut copy = UnixStream::from(copy(a.as_raw_fd()).1);
    let mut v = Vec::new();
    copy.read_to_end(&mut v).unwrap();
    assert_eq!(v.len(), sent);
}

#[test]
fn tcp_listener_with_options() {
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.set_only_v6(true).unwrap();
    socket.set_tcp_nodelay(true).unwrap();
    socket.set_keepalive(true).unwrap();
    socket.set_recv_buffer_size(100_000).unwrap();
    socket.set_linger(Some(std::time::Duration::from_secs(4))).unwrap();
    socket.bind(&"[::1]:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    socket.listen(77).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let (t, o) = dumped(&[socket.as_raw_fd()]);
    assert!(matches!(t.descriptions[0].kind, Kind::Tcp { backlog: Some(77), local: Some(l), .. } if l == address));
    let mut blockers = Vec::new();
    preflight(input(&t, &[]), &mut blockers);
    assert!(
        blockers[0].reason.contains(&format!("port {} is in use here", address.port())),
        "{blockers:?}"
    );
    let before = dumped(&[socket.as_raw_fd()]).0;
    drop(socket);
    settle(|| TcpListener::bind(address).is_ok());
    let made = built(&t, o);
    let fd = made.fds[0].as_ref().unwrap();
    assert_eq!(dumped(&[fd.as_raw_fd()]).0.descriptions, before.descriptions);
    let listener = TcpListener::from(fd.try_clone().unwrap());
    let client = TcpStream::connect(address).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    assert!(accepted.nodelay().unwrap());
    drop(client);
}

#[test]
fn tcp_that_was_only_created_or_bound() {
    let fresh = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let (t, _) = copy(fresh.as_raw_fd());
    let Kind::Tcp {
        socket,
        local: None,
        backlog: None,
    } = &t.descriptions[0].kind
    else {
        panic!("{t:?}")
    };
    assert!(socket.options.is_empty(), "{socket:?}");
    let missing: std::net::SocketAddr = "203.0.113.9:80".parse().unwrap();
    let reason = socket::probe(socket, Some(missing)).unwrap_err().0;
    assert!(reason.contains("the address 203.0.113.9 is not on this host"), "{reason}");
}

#[test]
fn udp_sockets() {
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(peer.local_addr().unwrap()).unwrap();
    socket.set_broadcast(true).unwrap();
    socket.set_ttl(9).unwrap();
    let address = socket.local_addr().unwrap();
    let (t, o) = dumped(&[socket.as_raw_fd()]);
    drop(socket);
    settle(|| UdpSocket::bind(address).is_ok());
    let made = built(&t, o);
    let copy = UdpSocket::from(made.fds[0].as_ref().unwrap().try_clone().unwrap());
    assert_eq!(
        (copy.local_addr().unwrap(), copy.peer_addr().unwrap()),
        (address, peer.local_addr().unwrap())
    );
    assert!(copy.broadcast().unwrap() && copy.ttl().unwrap() == 9);
    copy.send(b"hello").unwrap();
    assert_eq!(peer.recv(&mut [0; 9]).unwrap(), 5);
}

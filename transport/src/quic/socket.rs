//! The UDP socket under quinn: large buffers, and batches that fit into one segmentation offload.
//!
//! quinn hands the kernel up to ten datagrams at once. The kernel takes at most 64 KiB, answers a longer batch with EMSGSIZE, and quinn
//! takes that for a probe that was too large, and drops it silently. With datagrams over about 6,500 bytes every full batch was lost: the
//! connection hung or fell back to the smallest size. So the batch is capped here by bytes.

use std::{
    collections::VecDeque,
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr, UdpSocket},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker, ready},
};

use quinn::{
    AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use rustix::{io::Errno, net::sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// What is asked of the kernel for each direction.
const BUFFER: usize = 8 << 20;
/// Of the first byte: a long header, and its type, which is 0 for the packet in which a connection begins (RFC 9000, 17.2).
const LONG_HEADER: u8 = 0x80;
const LONG_TYPE: u8 = 0x30;
/// Reads of another socket that may wait here. More are lost, as on any full queue.
const PASSED: usize = 256;
/// The most bytes in one batch: an IP packet's 65,535 less the largest headers, with something to spare.
const MAX_BATCH: usize = 65_000;

/// A UDP socket with large buffers.
pub fn open(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = unbound(addr)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

fn unbound(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Root may go beyond net.core.rmem_max. Others get what there is, which works, only slower.
    if sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER).is_err() {
        socket.set_recv_buffer_size(BUFFER)?;
    }
    if sockopt::set_socket_send_buffer_size(&socket, BUFFER).is_err() {
        tracing::debug!("the kernel keeps its own send buffer size");
    }
    Ok(socket)
}

/// The largest UDP payload that the route to `peer` takes, as far as this host knows.
pub fn path_datagram(peer: SocketAddr) -> Option<u16> {
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let any: SocketAddr = if peer.is_ipv4() {
        ([0; 4], 0).into()
    } else {
        ([0u16; 8], 0).into()
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(peer).ok()?;
    let (mtu, headers) = if peer.is_ipv4() {
        (sockopt::ip_mtu(&socket).ok()?, 28)
    } else {
        (sockopt::ipv6_mtu(&socket).ok()?, 48)
    };
    Some(u16::try_from(mtu.saturating_sub(headers)).unwrap_or(u16::MAX).max(1200))
}

/// quinn's own tokio socket, with the batch capped.
#[derive(Debug)]
pub struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// The same socket, for its options.
    own: UdpSocket,
    /// Set if it hears one address alone.
    only: Option<Only>,
    passed: Mutex<Passed>,
    /// The largest datagram that any connection of this socket may send.
    datagram: AtomicUsize,
}

/// Of a socket that hears one peer alone.
#[derive(Debug)]
struct Only {
    peer: SocketAddr,
    /// The peer has begun a connection here.
    begun: AtomicBool,
    /// The socket that its connections before belong to, at the same port.
    before: Arc<CappedSocket>,
}

/// What another socket has heard for connections of this one.
#[derive(Debug, Default)]
struct Passed {
    reads: VecDeque<(RecvMeta, Box<[u8]>)>,
    /// Who waits for the next.
    reader: Option<Waker>,
}

impl CappedSocket {
    pub fn new(socket: UdpSocket) -> io::Result<Arc<Self>> {
        Self::with(socket, None)
    }

    fn with(socket: UdpSocket, only: Option<Only>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            own: socket.try_clone()?,
            inner: TokioRuntime.wrap_udp_socket(socket)?,
            only,
            passed: Mutex::default(),
            datagram: AtomicUsize::new(1200),
        }))
    }

    /// A second socket at the same port, which hears `peer` alone: a connected socket is preferred to one that is not (udp(7), SO_REUSEPORT in socket(7)).
    /// Nobody else can bind to the port: it is shared for this moment only. `local`: this host's address, as the peer knows it. What it hears before the peer
    /// begins a connection here it passes on to this one: without that a packet lost at the wrong moment left the first connection deaf, and the second never came.
    pub fn apart(self: &Arc<Self>, local: IpAddr, peer: SocketAddr) -> io::Result<Arc<Self>> {
        static SHARED: Mutex<()> = Mutex::new(());
        let here = self.own.local_addr()?;
        // Of the same family: the peer's address is given as this socket sees it.
        let local = match (here, local) {
            (SocketAddr::V6(_), IpAddr::V4(v4)) => v4.to_ipv6_mapped().into(),
            (_, local) => local,
        };
        let mut at = SocketAddr::new(local, here.port());
        if let (SocketAddr::V6(at), SocketAddr::V6(peer)) = (&mut at, peer) {
            at.set_scope_id(peer.scope_id());
        }
        let socket = unbound(here)?;
        sockopt::set_socket_reuseport(&socket, true)?;
        {
            let _one = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
            sockopt::set_socket_reuseport(&self.own, true)?;
            let bound = socket.bind(&at.into());
            sockopt::set_socket_reuseport(&self.own, false)?;
            bound?;
        }
        socket.connect(&peer.into())?;
        let only = Only {
            peer,
            begun: AtomicBool::new(false),
            before: self.clone(),
        };
        Self::with(socket.into(), Some(only))
    }

    fn passed(&self) -> MutexGuard<'_, Passed> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What another socket has passed on, if anything.
    fn take_passed(&self, cx: &Context, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> usize {
        let mut passed = self.passed();
        let mut n = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta) {
            let Some((about, bytes)) = passed.reads.pop_front() else { break };
            // Both sockets' buffers are of one size.
            let Some(room) = buf.get_mut(..bytes.len()) else { break };
            room.copy_from_slice(&bytes);
            *meta = about;
            n += 1;
        }
        if n == 0 {
            passed.reader = Some(cx.waker().clone());
        }
        n
    }

    fn pass(&self, reads: impl Iterator<Item = (RecvMeta, Box<[u8]>)>) {
        let mut passed = self.passed();
        let room = PASSED - passed.reads.len();
        passed.reads.extend(reads.take(room));
        let reader = passed.reader.take();
        drop(passed);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Announces datagrams of up to this size.
    pub fn expect_datagrams(&self, size: u16) {
        self.datagram.fetch_max(size.into(), Ordering::Relaxed);
    }
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(&self, cx: &mut Context, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        loop {
            let n = self.take_passed(cx, bufs, meta);
            if n > 0 {
                return Poll::Ready(Ok(n));
            }
            let read = ready!(self.inner.poll_recv(cx, bufs, meta));
            let Some(only) = &self.only else {
                return Poll::Ready(read);
            };
            match read {
                // Anybody can send ICMP: `watch` judges it.
                Err(e) if is_icmp(&e) => {}
                // What came before it was connected may be anybody's.
                Ok(n) if meta[..n].iter().any(|m| m.addr != only.peer) => {}
                // The peer's connection before is used until a new one begins, and nothing is known of it here: it would be reset (RFC 9000, 10.3).
                Ok(n) if !only.begun.load(Ordering::Relaxed) && !bufs[..n].iter().any(|b| begins(b)) => {
                    let reads = bufs.iter().zip(&*meta).take(n);
                    only.before.pass(reads.map(|(buf, meta)| (*meta, buf[..meta.len].into())));
                }
                r => {
                    only.begun.store(true, Ordering::Relaxed);
                    return Poll::Ready(r);
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let fit = MAX_BATCH / self.datagram.load(Ordering::Relaxed).max(1);
        self.inner.max_transmit_segments().min(fit).max(1)
    }

    /// Sizes quinn's receive buffers: this many of the largest datagram, 64 KiB. What the kernel joins is never longer than one.
    fn max_receive_segments(&self) -> usize {
        1
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// Whether a connection begins with this packet.
fn begins(packet: &[u8]) -> bool {
    packet.first().is_some_and(|first| first & (LONG_HEADER | LONG_TYPE) == LONG_HEADER)
}

/// What only a connected socket hears of: ICMP's errors, and what the kernel finds wrong with the route (icmp(7), udp(7)). It is told once, and the socket
/// works as before.
fn is_icmp(e: &io::Error) -> bool {
    let told = [
        Errno::CONNREFUSED,
        Errno::HOSTUNREACH,
        Errno::NETUNREACH,
        Errno::HOSTDOWN,
        Errno::NETDOWN,
        Errno::NONET,
        Errno::NOPROTOOPT,
        Errno::OPNOTSUPP,
        Errno::PROTO,
        Errno::ACCESS,
        Errno::MSGSIZE,
    ];
    Errno::from_io_error(e).is_some_and(|e| told.contains(&e))
}

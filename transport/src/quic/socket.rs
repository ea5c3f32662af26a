//! The UDP socket under quinn: large buffers, and batches that fit into one segmentation offload.
//!
//! quinn hands the kernel up to ten datagrams at once. The kernel takes at most 64 KiB, answers a longer batch with EMSGSIZE, and quinn
//! takes that for a probe that was too large, and drops it silently. With datagrams over about 6,500 bytes every full batch was lost: the
//! connection hung or fell back to the smallest size. So the batch is capped here by bytes.

use std::{
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use quinn::{
    AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

/// What is asked of the kernel for each direction.
const BUFFER: usize = 8 << 20;
/// The most bytes in one batch: an IP packet's 65,535 less the largest headers, with something to spare.
const MAX_BATCH: usize = 65_000;

/// A UDP socket with large buffers.
pub fn open(addr: SocketAddr) -> io::Result<UdpSocket> {
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
    socket.bind(&addr.into())?;
    Ok(socket.into())
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
    /// The largest datagram that any connection of this socket may send.
    datagram: AtomicUsize,
}

impl CappedSocket {
    pub fn new(socket: UdpSocket) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            inner: TokioRuntime.wrap_udp_socket(socket)?,
            datagram: AtomicUsize::new(1200),
        }))
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
        self.inner.poll_recv(cx, bufs, meta)
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

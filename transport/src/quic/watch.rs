//! Whether anybody is there at all.
//!
//! quinn ignores ICMP, so that a host that answers "port unreachable" looks to it like one that is silent. A datagram of one byte from a
//! socket of its own tells the two apart: the kernel reports the answer to that socket. A live endpoint ignores the byte. Where a firewall
//! swallows the answer nothing is learnt, and the time-outs decide as before.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use quinn::Connection;
use tokio::{net::UdpSocket, time};

use super::{Tuning, code};

/// Returns when the host of `addr` has answered that nothing listens there; otherwise never.
pub async fn refused(addr: SocketAddr) {
    if probe(addr).await.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        return;
    }
    std::future::pending().await
}

async fn probe(addr: SocketAddr) -> io::Result<()> {
    let addr = SocketAddr::new(addr.ip().to_canonical(), addr.port());
    let any: SocketAddr = if addr.is_ipv4() {
        ([0; 4], 0).into()
    } else {
        ([0u16; 8], 0).into()
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(addr).await?;
    socket.send(&[0]).await?;
    socket.recv(&mut [0]).await.map(drop)
}

/// Closes the connection when the peer has fallen silent and its host says, twice, that its port is closed: the agent is dead, and there
/// is no need to wait for the idle time-out.
pub async fn until_gone(conn: Connection, tuning: Tuning, lost: Arc<OnceLock<&'static str>>) {
    const PATIENCE: Duration = Duration::from_millis(500);
    // A live peer is heard at least once in a keep-alive interval, and once more for its acknowledgement of ours.
    let silence = tuning.keep_alive * 5 / 2;
    let heard = || conn.stats().udp_rx.datagrams;
    let mut last = heard();
    let mut refusals = 0;
    loop {
        let pause = if refusals == 0 { silence } else { PATIENCE };
        if time::timeout(pause, conn.closed()).await.is_ok() {
            return;
        }
        let now = heard();
        if now != last {
            (last, refusals) = (now, 0);
        } else if time::timeout(PATIENCE, refused(conn.remote_address())).await.is_err() {
            refusals = 0;
        } else if refusals == 0 {
            refusals = 1;
        } else {
            let _ = lost.set("its host says that the agent's port is closed: the agent has died");
            conn.close(code::LOST.into(), b"");
            return;
        }
    }
}

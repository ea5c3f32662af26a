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
use tokio::{
    net::UdpSocket,
    time::{self, Instant},
};

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
    // A host sends one such answer a second (icmp_ratelimit), and the connection's own packets, which come about as often, may get it each time.
    let mut tick = time::interval(Duration::from_millis(50));
    let mut answer = [0];
    loop {
        tokio::select! {
            _ = tick.tick() => socket.send(&[0]).await.map(drop)?,
            r = socket.recv(&mut answer) => return r.map(drop),
        }
    }
}

/// Why the watch gave a connection up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// The peer's host says that nobody has its port.
    Dead,
    /// Nothing was heard from it for the idle time-out.
    Silent,
}

/// How many idle time-outs this host may stand still without a connection of its being given up for it.
pub const PAUSE: u32 = 20;

/// Closes the connection when the peer has fallen silent: when its host says, twice, that its port is closed, since then the agent is dead and there is no need
/// to wait; else after the idle time-out.
///
/// QUIC's own time-out goes by a clock that runs on while this host stands still (a virtual machine that is paused, a laptop's lid). Afterwards it finds that
/// nothing was heard for long before it looks at what has arrived, on both hosts if both stood still, and a handover was lost for nothing. So the silence is
/// counted here, in steps during which this side was there to hear, and QUIC's is [`PAUSE`] times as long.
pub async fn until_gone(conn: Connection, tuning: Tuning, lost: Arc<OnceLock<Lost>>) {
    const PATIENCE: Duration = Duration::from_millis(1200);
    // A live peer is heard at least once in a keep-alive interval, and once more for its acknowledgement of ours.
    let suspicious = tuning.keep_alive * 5 / 2;
    let heard = || conn.stats().udp_rx.datagrams;
    let mut last = heard();
    let mut silence = Duration::ZERO;
    let mut refusals = 0;
    let give_up = |why| {
        let _ = lost.set(why);
        conn.close(code::LOST.into(), b"");
    };
    loop {
        let step = tuning.keep_alive / 2;
        if time::timeout(step, conn.closed()).await.is_ok() {
            return;
        }
        let now = heard();
        if now != last {
            (last, silence, refusals) = (now, Duration::ZERO, 0);
            continue;
        }
        silence += step;
        if silence >= tuning.idle_timeout {
            return give_up(Lost::Silent);
        }
        if silence < suspicious {
            continue;
        }
        let asked = Instant::now();
        if time::timeout(PATIENCE, refused(conn.remote_address())).await.is_ok() {
            refusals += 1;
            if refusals == 2 {
                return give_up(Lost::Dead);
            }
        }
        silence += asked.elapsed().min(PATIENCE);
    }
}

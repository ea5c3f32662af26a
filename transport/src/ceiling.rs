//! How fast plain quinn is here: the yardstick for the page streams.
//!
//! The same endpoints, the same parameters, and TLS, but nobody is authenticated and nothing is framed: random bytes are written to
//! streams, and thrown away where they arrive. Not for anything but measuring.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use bytes::Bytes;
use quinn::{Connection, RecvStream};
use tokio::task::{AbortHandle, JoinSet};

use crate::{
    quic::{Tuning, client_endpoint, config_server, server_endpoint},
    trust::{
        Identity,
        tls::{Pin, PinnedServer, SERVER_NAME},
    },
};

const ALPN: &[u8] = b"migrate-ceiling/1";
/// Bytes in one write: as in a full page frame.
const CHUNK: usize = 1 << 20;

/// Throws away what it is sent, until it is dropped.
#[derive(Debug)]
pub struct Server {
    local: SocketAddr,
    task: AbortHandle,
}

impl Server {
    /// The address it listens on.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub struct Throughput {
    /// Bytes that were acknowledged.
    pub bytes: u64,
    /// From the first write to the last acknowledgement.
    pub elapsed: Duration,
    /// The largest datagram found to fit.
    pub datagram_size: u16,
}

impl Throughput {
    /// In 10⁶ bytes a second.
    pub fn mb_per_s(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Starts a server on this address.
pub async fn serve(addr: SocketAddr) -> io::Result<Server> {
    let id = Identity::ephemeral().map_err(io::Error::other)?;
    let config = config_server(&id, ALPN).map_err(io::Error::other)?;
    let endpoint = server_endpoint(&id, config.clone(), addr)?;
    let local = endpoint.quinn.local_addr()?;
    let task = tokio::spawn(async move {
        let tuning = Tuning::default();
        let mut connections = JoinSet::new();
        while let Some(incoming) = endpoint.quinn.accept().await {
            let mut config = config.clone();
            config.transport_config(endpoint.transport(&tuning, incoming.remote_address()));
            connections.spawn(async move {
                if let Ok(connecting) = incoming.accept_with(config.into())
                    && let Ok(conn) = connecting.await
                {
                    discard(conn).await;
                }
            });
            while connections.try_join_next().is_some() {}
        }
    });
    Ok(Server {
        local,
        task: task.abort_handle(),
    })
}

async fn discard(conn: Connection) {
    let mut streams = JoinSet::new();
    while let Ok(stream) = conn.accept_uni().await {
        streams.spawn(drain(stream));
    }
}

async fn drain(mut stream: RecvStream) {
    let mut batch = vec![Bytes::new(); 64];
    while let Ok(Some(_)) = stream.read_chunks(&mut batch).await {}
}

/// Sends this many bytes on one stream.
pub async fn measure(addr: SocketAddr, bytes: u64) -> io::Result<Throughput> {
    measure_with(addr, bytes, 1, &Tuning::default()).await
}

/// Sends this many bytes, on some streams, tuned.
pub async fn measure_with(addr: SocketAddr, bytes: u64, streams: usize, tuning: &Tuning) -> io::Result<Throughput> {
    let id = Identity::ephemeral().map_err(io::Error::other)?;
    let endpoint = client_endpoint(&id, addr)?;
    let config = endpoint
        .client(&id, PinnedServer::new(Pin::Anybody), ALPN, tuning, addr)
        .map_err(io::Error::other)?;
    let conn = endpoint
        .quinn
        .connect_with(config, addr, SERVER_NAME)
        .map_err(io::Error::other)?
        .await?;
    let mut random = vec![0; CHUNK];
    aws_lc_rs::rand::fill(&mut random).map_err(|_| io::Error::other("the system has no random numbers"))?;
    let random = Bytes::from(random);

    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    let streams = streams.max(1) as u64;
    for i in 0..streams {
        let share = bytes / streams + u64::from(i < bytes % streams);
        tasks.spawn(push(conn.clone(), random.clone(), share));
    }
    while let Some(done) = tasks.join_next().await {
        done.map_err(io::Error::other)??;
    }
    let elapsed = begun.elapsed();
    let datagram_size = conn.stats().path.current_mtu;
    conn.close(0u8.into(), b"");
    let _ = tokio::time::timeout(Duration::from_millis(200), endpoint.quinn.wait_idle()).await; // a courtesy to the server
    Ok(Throughput {
        bytes,
        elapsed,
        datagram_size,
    })
}

async fn push(conn: Connection, random: Bytes, mut bytes: u64) -> io::Result<()> {
    let mut stream = conn.open_uni().await?;
    while bytes > 0 {
        let len = bytes.min(CHUNK as u64);
        stream.write_all_chunks(&mut [random.slice(..len as usize)]).await?;
        bytes -= len;
    }
    stream.finish().map_err(io::Error::other)?;
    stream.stopped().await.map(drop).map_err(io::Error::from)
}

//! Endpoints and their parameters.
//!
//! Measured on loopback with `--example throughput`: two processes on two cores that other builds were using too, plain quinn on one stream,
//! in 10⁶ bytes a second, every round counted. The spread is the machine's load; read the table for its trend only.
//!
//! | largest datagram | 1,452-1,472 | 5,000 | 8,952 | 16,000 | 32,000 | 65,000 |
//! |---|---|---|---|---|---|---|
//! | rounds | 4 | 2 | 17 | 17 | 2 | 2 |
//! | slowest to fastest | 497-734 | 683-912 | 369-2,131 | 599-2,122 | 634-1,834 | 846-1,435 |
//! | median of a run of 11 | | | 1,120 | 1,734 | | |
//!
//! - The size of a datagram matters most, so the path is probed up to what its route allows, at most 16,000: four of those fill a
//!   segmentation offload. Whether 32,000 is better still was not settled; only loopback would have it. Sizes over 6,500 only work with the
//!   cap on batches in `socket.rs`.
//! - BBR: 859 and 886, with CUBIC at 977 to 1,714 just before. quinn calls it experimental. It is there for paths that lose packets.
//! - Not measured by themselves: the larger first window (256 KiB, to save round trips at the start), and fewer acknowledgements (one in 32
//!   packets, or after 5 ms, to leave the cores to the data).
//! - Peak resident memory while page streams ran at full speed: 19 MB sending, 55 MB receiving.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use quinn::{
    AckFrequencyConfig, ClientConfig, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig,
    ServerConfig, TokioRuntime, TransportConfig, VarInt,
    congestion::{BbrConfig, CubicConfig},
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};

use super::{
    Congestion, Tuning,
    socket::{self, CappedSocket},
    watch,
};
use crate::trust::{
    Identity,
    tls::{self, PinnedServer},
};

/// Connection ids of eight random bytes. quinn's own are keyed to one life of the endpoint, and it answers no others with a reset.
struct RandomIds;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; 8];
        let _ = aws_lc_rs::rand::fill(&mut id); // without random numbers TLS has failed already
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// A quinn endpoint and the socket below it.
#[derive(Debug, Clone)]
pub struct Endpoints {
    pub quinn: Endpoint,
    socket: Arc<CappedSocket>,
}

/// An endpoint that connects out, to this address.
pub fn client_endpoint(id: &Identity, peer: SocketAddr) -> io::Result<Endpoints> {
    let local: SocketAddr = if peer.is_ipv4() {
        ([0; 4], 0).into()
    } else {
        ([0u16; 8], 0).into()
    };
    endpoint(id, None, CappedSocket::new(socket::open(local)?)?)
}

/// An endpoint that listens.
pub fn server_endpoint(id: &Identity, server: ServerConfig, local: SocketAddr) -> io::Result<Endpoints> {
    endpoint(id, Some(server), CappedSocket::new(socket::open(local)?)?)
}

fn endpoint(id: &Identity, server: Option<ServerConfig>, socket: Arc<CappedSocket>) -> io::Result<Endpoints> {
    // A fixed key and unkeyed connection ids: a receiver that was restarted can tell the peers of its former life at once that it has
    // forgotten them (a stateless reset), instead of leaving them to their time-outs.
    let mut config = EndpointConfig::new(Arc::new(id.reset_key()));
    config.cid_generator(|| Box::new(RandomIds));
    config.max_udp_payload_size(65_527).map_err(io::Error::other)?;
    let quinn = Endpoint::new_with_abstract_socket(config, server, socket.clone(), Arc::new(TokioRuntime))?;
    Ok(Endpoints { quinn, socket })
}

impl Endpoints {
    /// One at the same port that hears `peer` alone: see [`CappedSocket::apart`].
    pub fn apart(&self, id: &Identity, server: ServerConfig, local: IpAddr, peer: SocketAddr) -> io::Result<Endpoints> {
        endpoint(id, Some(server), self.socket.apart(local, peer)?)
    }

    /// The transport parameters for a connection to this peer.
    pub fn transport(&self, tuning: &Tuning, peer: SocketAddr) -> Arc<TransportConfig> {
        let datagram = socket::path_datagram(peer).unwrap_or(1452).min(tuning.max_datagram);
        self.socket.expect_datagrams(datagram);
        Arc::new(transport(tuning, datagram))
    }

    /// The whole configuration for a connection out to this peer.
    pub fn client(
        &self,
        id: &Identity,
        server: Arc<PinnedServer>,
        alpn: &[u8],
        tuning: &Tuning,
        peer: SocketAddr,
    ) -> Result<ClientConfig, String> {
        let tls = tls::client_config(id, server, alpn).map_err(|e| e.to_string())?;
        let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(|e| e.to_string())?));
        config.transport_config(self.transport(tuning, peer));
        Ok(config)
    }
}

/// The configuration for connections in; their transport parameters are set for each.
pub fn server(id: &Identity, alpn: &[u8]) -> Result<ServerConfig, String> {
    let tls = tls::server_config(id, alpn).map_err(|e| e.to_string())?;
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).map_err(|e| e.to_string())?));
    // The peer's address is part of what is remembered of it, and neither host moves while a tree does.
    config.migration(false);
    config.max_incoming(256);
    Ok(config)
}

fn transport(tuning: &Tuning, datagram: u16) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(1u8.into())
        .max_concurrent_uni_streams(64u8.into())
        .datagram_receive_buffer_size(None)
        .receive_window(tuning.receive_window.into())
        .stream_receive_window(tuning.stream_window.into())
        .send_window(tuning.send_window.into())
        .max_idle_timeout(IdleTimeout::try_from(tuning.idle_timeout * watch::PAUSE).ok())
        .keep_alive_interval(Some(tuning.keep_alive))
        // Only until the first answer: a lost first packet is sent again after three times this.
        .initial_rtt(Duration::from_millis(100));

    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(datagram).minimum_change(64);
    config.mtu_discovery_config(Some(mtu));

    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(32))
        .max_ack_delay(Some(Duration::from_millis(5)));
    config.ack_frequency_config(Some(acks));

    match tuning.congestion {
        Congestion::Cubic => {
            let mut cubic = CubicConfig::default();
            cubic.initial_window(256 << 10);
            config.congestion_controller_factory(Arc::new(cubic))
        }
        Congestion::Bbr => {
            let mut bbr = BbrConfig::default();
            bbr.initial_window(256 << 10);
            config.congestion_controller_factory(Arc::new(bbr))
        }
    };
    config
}

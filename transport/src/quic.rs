//! QUIC: the link between real hosts.
//!
//! What was measured, and what the numbers in [`Tuning`] rest on, is told in `config.rs`.

mod config;
mod connect;
mod link;
mod listener;
mod socket;
mod watch;

use std::time::Duration;

pub use connect::{connect, connect_with};
pub use link::{QuicLink, QuicPageReceiver, QuicPageSender};
pub use listener::Listener;

pub(crate) use config::{Endpoints, client_endpoint, server as config_server, server_endpoint};

use crate::error::VersionRange;

/// The versions of the protocol that this release speaks.
pub const VERSIONS: VersionRange = VersionRange { min: 1, max: 1 };

/// The port of `migrate receive`.
pub const DEFAULT_PORT: u16 = 7878;

/// Which congestion controller sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// CUBIC, as TCP does.
    #[default]
    Cubic,
    /// BBR: for long paths that lose packets.
    Bbr,
}

/// What can be tuned. The defaults are for two hosts in one data centre and hold up over a continent; tests shorten the times.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Tuning {
    /// Silence after which the peer counts as gone, not counting what this host stood still meanwhile.
    pub idle_timeout: Duration,
    /// How often a packet is sent when there is nothing to say.
    pub keep_alive: Duration,
    /// How long to wait for an answer when connecting.
    pub connect_timeout: Duration,
    /// How long a stranger may take over its handshake.
    pub handshake_timeout: Duration,
    /// Unread bytes the peer may have under way to this side, on all streams together.
    pub receive_window: u32,
    /// The same on one stream. Smaller, so that a page stream nobody reads cannot starve the control stream.
    pub stream_window: u32,
    /// Unacknowledged bytes this side keeps.
    pub send_window: u32,
    /// The congestion controller.
    pub congestion: Congestion,
    /// The largest datagram to probe for, if the path has room for it.
    pub max_datagram: u16,
    /// The versions to speak.
    pub versions: VersionRange,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(30),
            keep_alive: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            receive_window: 48 << 20,
            stream_window: 16 << 20,
            send_window: 16 << 20,
            congestion: Congestion::Cubic,
            max_datagram: 16_000,
            versions: VERSIONS,
        }
    }
}

/// Application close codes.
pub(crate) mod code {
    /// A goodbye with a reason.
    pub const BYE: u32 = 0;
    /// Not accepted; nothing more is said.
    pub const REFUSED: u32 = 1;
    /// The peer broke a rule, which is the reason.
    pub const RULE: u32 = 2;
    /// The link was dropped without a goodbye.
    pub const DROPPED: u32 = 3;
    /// The peer's port is closed: nobody hears this.
    pub const LOST: u32 = 4;
    /// On a stream: abandoned before its end.
    pub const ABANDONED: u32 = 5;
}

//! What can go wrong, in words for the person at the terminal.
//!
//! Three types, one a phase: [`ConnectError`] while reaching the other host, [`AcceptError`] for the receiver's log, and [`LinkError`] once
//! both sides know each other.

use std::{io, net::SocketAddr, time::Duration};

use crate::{
    frame::FrameError,
    trust::{Fingerprint, TrustError},
};

/// Why an established link failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The peer is gone, or this side has closed the link.
    #[error("the connection to {peer} is gone: {reason}")]
    Closed {
        /// Who the peer was, as an address.
        peer: String,
        /// The peer's own words when it said goodbye, else what was observed.
        reason: String,
        /// True when a side closed it on purpose; false when it was lost (time-out, reset, cut).
        clean: bool,
        /// Lost because nothing was heard from the peer, which may be there all the same.
        silent: bool,
    },
    /// The peer broke a rule of the protocol. Nothing it sent after that is used.
    #[error("{peer} broke the protocol: {rule}")]
    Rule {
        /// Who the peer is, as an address.
        peer: String,
        /// The rule's name and the value that broke it.
        #[source]
        rule: FrameError,
    },
    /// What this side was asked to send is not a legal frame. Nothing was sent.
    #[error("refused to send: {0}")]
    Unsendable(#[source] FrameError),
    /// The peer stopped reading this page stream, or abandoned sending it.
    #[error("{peer} abandoned a page stream")]
    Abandoned {
        /// Who the peer is, as an address.
        peer: String,
    },
    /// The two sides know no protocol version in common.
    #[error("this side speaks protocol {ours}, the peer speaks {theirs}: install the same release of migrate on both hosts")]
    Version {
        /// The versions of this side.
        ours: VersionRange,
        /// The versions of the peer.
        theirs: VersionRange,
    },
}

impl LinkError {
    /// Whether it was lost only because nothing was heard from the peer.
    pub fn is_silence(&self) -> bool {
        matches!(self, Self::Closed { silent: true, .. })
    }

    /// Whether the link itself is gone, so that reconnecting is the only way on.
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed { .. })
    }
}

/// An inclusive range of protocol versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionRange {
    /// The oldest version spoken.
    pub min: u16,
    /// The newest version spoken.
    pub max: u16,
}

impl std::fmt::Display for VersionRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.min == self.max {
            write!(f, "version {}", self.max)
        } else {
            write!(f, "versions {} to {}", self.min, self.max)
        }
    }
}

impl VersionRange {
    /// The newest version both ranges contain.
    pub fn newest_common(self, other: Self) -> Option<u16> {
        let version = self.max.min(other.max);
        (version >= self.min.max(other.min)).then_some(version)
    }
}

/// Why [`connect`](crate::quic::connect) failed. Every cause has its own variant, because each has its own cure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Not of the form HOST:PORT.
    #[error("\"{given}\" is not an address: expected HOST:PORT, for example db2.example:7878 or [2001:db8::2]:7878")]
    Address {
        /// What was given.
        given: String,
    },
    /// The name does not resolve.
    #[error("cannot find the host \"{host}\": {source}")]
    Resolve {
        /// The name looked up.
        host: String,
        /// The resolver's answer.
        source: io::Error,
    },
    /// The host answered that nothing listens on that port.
    #[error("nothing listens at {addr}: the host answered \"port unreachable\"; start `migrate receive` there, or check the port")]
    Refused {
        /// The address tried.
        addr: SocketAddr,
    },
    /// No answer at all.
    #[error(
        "no answer from {addr} within {waited:.1?}: is `migrate receive` running there, and does a firewall let UDP port {} through?",
        addr.port()
    )]
    NoAnswer {
        /// The address tried.
        addr: SocketAddr,
        /// For how long.
        waited: Duration,
    },
    /// Something answered, but it is not a `migrate` receiver.
    #[error("{addr} speaks QUIC but is not a migrate receiver ({detail})")]
    NotMigrate {
        /// The address tried.
        addr: SocketAddr,
        /// How it answered.
        detail: String,
    },
    /// A known address presents another identity than before.
    #[error(
        "the identity of {host} has changed: expected {expected}, got {seen}. Somebody may be in the middle; if the host was reinstalled, \
         run `migrate trust remove {}` and use a new ticket",
        expected.short()
    )]
    Changed {
        /// The address as given.
        host: String,
        /// The identity enrolled for it.
        expected: Fingerprint,
        /// The identity presented.
        seen: Fingerprint,
    },
    /// The receiver is not in the trust store, and no ticket was given.
    #[error("{host} is not trusted yet (its fingerprint is {seen}): run `migrate receive` there and pass its ticket with --ticket")]
    Unknown {
        /// The address as given.
        host: String,
        /// The identity presented.
        seen: Fingerprint,
    },
    /// The host that answered is not the one that made the ticket.
    #[error("{host} is not the host that made this ticket: the ticket names {expected}, {seen} answered. Check the address")]
    WrongHost {
        /// The address as given.
        host: String,
        /// The identity in the ticket.
        expected: Fingerprint,
        /// The identity presented.
        seen: Fingerprint,
    },
    /// The receiver does not know this host, and no ticket was given.
    #[error("{host} does not trust this host: pass a ticket from `migrate receive` with --ticket, or run `migrate trust add {ours}` there")]
    NotTrusted {
        /// The address as given.
        host: String,
        /// The identity of this host.
        ours: Fingerprint,
    },
    /// The receiver does not know the ticket's secret.
    #[error(
        "{host} did not accept the ticket: it is from another run of `migrate receive`; or there were too many attempts, wait a minute"
    )]
    TicketNotAccepted {
        /// The address as given.
        host: String,
    },
    /// The ticket has served already.
    #[error("{host} says that this ticket has already been used: make a new one with `migrate receive`")]
    TicketUsed {
        /// The address as given.
        host: String,
    },
    /// The ticket is too old.
    #[error("{host} says that this ticket has expired: make a new one with `migrate receive`")]
    TicketExpired {
        /// The address as given.
        host: String,
    },
    /// The receiver accepted, but could not write its own trust store; its log says why.
    #[error("{host} could not enrol this host: see the log of `migrate receive` there")]
    PeerFailed {
        /// The address as given.
        host: String,
    },
    /// The two sides know no protocol version in common, or the peer broke the protocol, or went away during the handshake.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The local trust store or identity.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// A local socket could not be made.
    #[error("cannot open a UDP socket: {0}")]
    Socket(#[source] io::Error),
    /// TLS could not be set up from the local identity.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
}

/// Why an incoming connection came to nothing: a line for the receiver's log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcceptError {
    /// The listener was closed; no more connections will come.
    #[error("the listener is closed")]
    ListenerClosed,
    /// The QUIC or TLS handshake failed.
    #[error("{addr}: the handshake failed: {detail}")]
    Handshake {
        /// Where it came from.
        addr: SocketAddr,
        /// What failed.
        detail: String,
    },
    /// It did not finish its handshake in time.
    #[error("{addr}: gave up on it after {waited:.1?} of handshake")]
    Stalled {
        /// Where it came from.
        addr: SocketAddr,
        /// The deadline.
        waited: Duration,
    },
    /// It broke the handshake's rules.
    #[error("{addr}: broke the protocol: {rule}")]
    Rule {
        /// Where it came from.
        addr: SocketAddr,
        /// The rule's name.
        #[source]
        rule: FrameError,
    },
    /// An unknown peer without a ticket.
    #[error("{addr}: refused, {fingerprint} is not trusted and brought no ticket")]
    Untrusted {
        /// Where it came from.
        addr: SocketAddr,
        /// The identity it proved.
        fingerprint: Fingerprint,
    },
    /// A ticket that was never made here.
    #[error("{addr}: refused, {fingerprint} brought a ticket that was not made by this receiver")]
    WrongTicket {
        /// Where it came from.
        addr: SocketAddr,
        /// The identity it proved.
        fingerprint: Fingerprint,
    },
    /// Too many wrong tickets from that address; this one was not looked at.
    #[error("{addr}: refused, too many wrong tickets from there in the last minute")]
    TooManyAttempts {
        /// Where it came from.
        addr: SocketAddr,
        /// The identity it proved.
        fingerprint: Fingerprint,
    },
    /// A ticket that has served already.
    #[error("{addr}: refused, {fingerprint} brought a ticket that has already been used")]
    TicketUsed {
        /// Where it came from.
        addr: SocketAddr,
        /// The identity it proved.
        fingerprint: Fingerprint,
    },
    /// A ticket past its time.
    #[error("{addr}: refused, {fingerprint} brought a ticket that has expired")]
    TicketExpired {
        /// Where it came from.
        addr: SocketAddr,
        /// The identity it proved.
        fingerprint: Fingerprint,
    },
    /// A trusted peer of another version.
    #[error("{addr}: refused: this side speaks {ours}, {fingerprint} speaks {theirs}")]
    Version {
        /// Where it came from.
        addr: SocketAddr,
        /// The identity it proved.
        fingerprint: Fingerprint,
        /// The versions of this side.
        ours: VersionRange,
        /// The versions of the peer.
        theirs: VersionRange,
    },
    /// The trust store could not be read or written.
    #[error("{addr}: refused, because of the trust store: {source}")]
    Trust {
        /// Where it came from.
        addr: SocketAddr,
        /// What happened to the store.
        source: TrustError,
    },
    /// A good ticket, but its bearer could not be written to the trust store.
    #[error("{addr}: refused, {fingerprint} brought a good ticket but cannot be enrolled: {source}")]
    Enrol {
        /// Where it came from.
        addr: SocketAddr,
        /// The identity it proved.
        fingerprint: Fingerprint,
        /// What happened to the store.
        source: TrustError,
    },
}

impl AcceptError {
    /// Whether [`accept`](crate::quic::Listener::accept) can never succeed again.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::ListenerClosed)
    }
}

/// Why a listener could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The address is taken, or not one of this host's.
    #[error("cannot listen on {addr}: {source}")]
    Socket {
        /// The address asked for.
        addr: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// TLS could not be set up from the local identity.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
}

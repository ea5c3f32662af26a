//! The sender's side of the door.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use quinn::{Connection, ConnectionError, ReadExactError, TransportErrorCode};
use tokio::{net::lookup_host, time};

use super::{Endpoints, QuicLink, Tuning, client_endpoint, link::End, listener::exporter, watch};
use crate::{
    error::{ConnectError, LinkError},
    frame::hello::{ANSWER, Answer, Hello, Verdict},
    link::Peer,
    trust::{
        Fingerprint, Identity, PeerName, Proof, Ticket, TrustError, TrustStore,
        tls::{self, Pin, PinnedServer},
    },
};

/// TLS alert: no protocol in common.
const NO_APPLICATION_PROTOCOL: u8 = 120;

/// Connects to a receiver: one that is trusted, or the one that made the ticket, which is then trusted from now on.
pub async fn connect(host_port: &str, id: &Identity, store: &TrustStore, ticket: Option<&Ticket>) -> Result<QuicLink, ConnectError> {
    connect_with(host_port, id, store, ticket, &Tuning::default()).await
}

/// As [`connect`], tuned.
pub async fn connect_with(
    host_port: &str,
    id: &Identity,
    store: &TrustStore,
    ticket: Option<&Ticket>,
    tuning: &Tuning,
) -> Result<QuicLink, ConnectError> {
    let addresses = resolve(host_port).await?;
    let caller = Caller {
        host_port: host_port.to_owned(),
        id: id.clone(),
        store: store.clone(),
        ticket: ticket.cloned(),
        tuning: tuning.clone(),
        expected: Expected::new(store, host_port, ticket)?,
    };
    let mut last = None;
    for (i, &addr) in addresses.iter().enumerate() {
        // An address that swallows everything must not use up the time of those after it.
        let patience = if i + 1 == addresses.len() {
            tuning.connect_timeout
        } else {
            tuning.connect_timeout / 2
        };
        match caller.attempt(addr, patience).await {
            Err(error @ (ConnectError::Refused { .. } | ConnectError::NoAnswer { .. } | ConnectError::Socket(_))) => last = Some(error),
            done => return done,
        }
    }
    let nothing = || ConnectError::Resolve {
        host: host_port.to_owned(),
        source: io::Error::other("the name has no address"),
    };
    Err(last.unwrap_or_else(nothing))
}

async fn resolve(host_port: &str) -> Result<Vec<SocketAddr>, ConnectError> {
    if let Ok(addr) = host_port.parse() {
        return Ok(vec![addr]);
    }
    let bad = || ConnectError::Address {
        given: host_port.chars().take(200).collect(),
    };
    let (host, port) = host_port.rsplit_once(':').ok_or_else(bad)?;
    let port: u16 = port.parse().map_err(|_| bad())?;
    if host.is_empty() || host.contains(|c: char| c == ':' || c.is_whitespace() || c.is_control()) {
        return Err(bad());
    }
    let found = lookup_host((host, port)).await.map_err(|source| ConnectError::Resolve {
        host: host.to_owned(),
        source,
    })?;
    // A few: a name with dozens of addresses is no host.
    Ok(found.take(4).collect())
}

/// Which receiver may answer, and what it means when another does.
#[derive(Clone)]
enum Expected {
    Ticket(Fingerprint),
    Enrolled(Fingerprint),
    Trusted(Vec<Fingerprint>),
}

impl Expected {
    fn new(store: &TrustStore, host_port: &str, ticket: Option<&Ticket>) -> Result<Self, TrustError> {
        if let Some(ticket) = ticket {
            return Ok(Self::Ticket(ticket.receiver()));
        }
        let peers = store.list()?;
        let enrolled = peers.iter().find(|peer| peer.addresses.iter().any(|address| address == host_port));
        Ok(match enrolled {
            Some(peer) => Self::Enrolled(peer.fingerprint),
            None => Self::Trusted(peers.iter().map(|peer| peer.fingerprint).collect()),
        })
    }

    fn pin(&self) -> Pin {
        match self {
            Self::Ticket(expected) | Self::Enrolled(expected) => Pin::Exactly(*expected),
            Self::Trusted(trusted) => Pin::AnyOf(trusted.clone()),
        }
    }

    /// The error for an identity that is not the expected one.
    fn mismatch(&self, host: &str, seen: Fingerprint) -> Option<ConnectError> {
        let host = host.to_owned();
        match self {
            Self::Ticket(expected) if *expected != seen => Some(ConnectError::WrongHost {
                host,
                expected: *expected,
                seen,
            }),
            Self::Enrolled(expected) if *expected != seen => Some(ConnectError::Changed {
                host,
                expected: *expected,
                seen,
            }),
            Self::Trusted(trusted) if !trusted.contains(&seen) => Some(ConnectError::Unknown { host, seen }),
            _ => None,
        }
    }
}

/// What it takes to connect.
#[derive(Clone)]
pub(super) struct Caller {
    host_port: String,
    id: Identity,
    store: TrustStore,
    ticket: Option<Ticket>,
    tuning: Tuning,
    expected: Expected,
}

impl Caller {
    async fn attempt(&self, addr: SocketAddr, patience: Duration) -> Result<QuicLink, ConnectError> {
        let endpoint = client_endpoint(&self.id, addr).map_err(ConnectError::Socket)?;
        self.connect(endpoint, addr, patience).await
    }

    /// See [`Link::again`](crate::Link::again).
    pub(super) async fn again(&self, endpoint: &Endpoints, peer: &Peer) -> Result<QuicLink, ConnectError> {
        self.connect(endpoint.clone(), peer.address, self.tuning.connect_timeout).await
    }

    async fn connect(&self, endpoint: Endpoints, addr: SocketAddr, patience: Duration) -> Result<QuicLink, ConnectError> {
        let server = PinnedServer::new(self.expected.pin());
        let config = endpoint
            .client(&self.id, server.clone(), tls::ALPN, &self.tuning, addr)
            .map_err(ConnectError::Tls)?;
        let connecting = endpoint
            .quinn
            .connect_with(config, addr, tls::SERVER_NAME)
            .map_err(|e| ConnectError::Socket(io::Error::other(e)))?;
        let conn = tokio::select! {
            connected = connecting => connected.map_err(|error| self.explain(addr, patience, error, &server))?,
            () = watch::refused(addr) => return Err(ConnectError::Refused { addr }),
            () = time::sleep(patience) => return Err(ConnectError::NoAnswer { addr, waited: patience }),
        };
        let conversation = self.introduce(&conn, addr);
        let deadline = self.tuning.handshake_timeout;
        let stalled = |_| closed(addr, format!("it did not answer the greeting within {deadline:.1?}"));
        let (streams, peer) = time::timeout(deadline, conversation).await.map_err(stalled)??;
        // Enrolled by now: a ticket is good for once.
        let again = Caller {
            ticket: None,
            expected: Expected::Enrolled(peer.fingerprint),
            ..self.clone()
        };
        let end = End::Client(Arc::new(again));
        Ok(QuicLink::new(endpoint, conn, streams, peer, &self.tuning, end))
    }

    /// Says who this is, and hears what the receiver makes of it.
    async fn introduce(&self, conn: &Connection, addr: SocketAddr) -> Result<((quinn::SendStream, quinn::RecvStream), Peer), ConnectError> {
        let lost = |detail: String| closed(addr, detail);
        let fingerprint = tls::proven_peer(conn.peer_identity()).ok_or_else(|| lost("it has no certificate".into()))?;
        let proof = match &self.ticket {
            Some(ticket) => {
                let exporter = exporter(conn).ok_or_else(|| ConnectError::Tls("it exports no keys".into()))?;
                Some(ticket.prove(&Proof {
                    exporter: &exporter,
                    sender: self.id.fingerprint(),
                    receiver: fingerprint,
                }))
            }
            None => None,
        };
        let (mut send, mut recv) = conn.open_bi().await.map_err(|e| lost(e.to_string()))?;
        let hello = Hello {
            versions: self.tuning.versions,
            name: self.id.name().clone(),
            proof,
        };
        send.write_all(&hello.encode()).await.map_err(|e| lost(e.to_string()))?;
        let mut bytes = [0; ANSWER];
        recv.read_exact(&mut bytes).await.map_err(|e| match e {
            ReadExactError::FinishedEarly(_) => lost("it hung up in the middle of its answer".into()),
            ReadExactError::ReadError(e) => lost(conn.close_reason().map_or_else(|| e.to_string(), |reason| reason.to_string())),
        })?;
        let answer = Answer::decode(&bytes).map_err(|rule| LinkError::Rule {
            peer: addr.to_string(),
            rule,
        })?;
        self.heed(&answer, addr)?;

        let self_given = answer.name.unwrap_or_else(|| PeerName::from_lossy(&self.host_port));
        let known = self.store.get(&fingerprint)?;
        let enrolled_now = known.is_none();
        let name = match known {
            Some(peer) if peer.addresses.contains(&self.host_port) => peer.name,
            // By the ticket, or trusted already and now met under this address for the first time.
            known => {
                let name = known.map_or(self_given, |peer| peer.name);
                self.store.enrol(fingerprint, &name, Some(&self.host_port))?.name
            }
        };
        let peer = Peer {
            fingerprint,
            address: conn.remote_address(),
            name: name.to_string(),
            enrolled_now,
            version: answer.version,
        };
        Ok(((send, recv), peer))
    }

    fn heed(&self, answer: &Answer, addr: SocketAddr) -> Result<(), ConnectError> {
        let host = self.host_port.clone();
        let ours = self.tuning.versions;
        match answer.verdict {
            Verdict::Welcome if (ours.min..=ours.max).contains(&answer.version) => Ok(()),
            Verdict::Welcome => {
                let rule = crate::frame::FrameError::Field {
                    what: "the version agreed on",
                    got: answer.version.into(),
                };
                Err(LinkError::Rule {
                    peer: addr.to_string(),
                    rule,
                }
                .into())
            }
            Verdict::Version => Err(LinkError::Version {
                ours,
                theirs: answer.versions,
            }
            .into()),
            Verdict::NotAccepted if self.ticket.is_some() => Err(ConnectError::TicketNotAccepted { host }),
            Verdict::NotAccepted => Err(ConnectError::NotTrusted {
                host,
                ours: self.id.fingerprint(),
            }),
            Verdict::TicketUsed => Err(ConnectError::TicketUsed { host }),
            Verdict::TicketExpired => Err(ConnectError::TicketExpired { host }),
            Verdict::Failed => Err(ConnectError::PeerFailed { host }),
        }
    }

    /// What a failed TLS or QUIC handshake means.
    fn explain(&self, addr: SocketAddr, waited: Duration, error: ConnectionError, server: &PinnedServer) -> ConnectError {
        let code = match &error {
            ConnectionError::TransportError(e) => Some(e.code),
            ConnectionError::ConnectionClosed(close) => Some(close.error_code),
            _ => None,
        };
        if code == Some(TransportErrorCode::crypto(NO_APPLICATION_PROTOCOL)) {
            return ConnectError::NotMigrate {
                addr,
                detail: "it does not offer the protocol migrate/1".into(),
            };
        }
        // Only this side's refusal of a certificate is a local transport error.
        if let (ConnectionError::TransportError(_), Some(seen)) = (&error, server.seen())
            && let Some(mismatch) = self.expected.mismatch(&self.host_port, seen)
        {
            return mismatch;
        }
        match error {
            ConnectionError::TimedOut => ConnectError::NoAnswer { addr, waited },
            ConnectionError::VersionMismatch => ConnectError::NotMigrate {
                addr,
                detail: "it speaks no common version of QUIC".into(),
            },
            _ if code == Some(TransportErrorCode::CONNECTION_REFUSED) => closed(addr, "it lets nobody in at the moment".into()),
            ConnectionError::TransportError(e) => ConnectError::NotMigrate {
                addr,
                detail: e.to_string(),
            },
            other => closed(addr, other.to_string()),
        }
    }
}

fn closed(addr: SocketAddr, reason: String) -> ConnectError {
    LinkError::Closed {
        peer: addr.to_string(),
        reason,
        clean: false,
        silent: false,
    }
    .into()
}

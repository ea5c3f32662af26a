//! The receiver's side of the door.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use quinn::{Connection, Incoming, RecvStream, SendStream, ServerConfig};
use tokio::{
    sync::{Mutex, Semaphore, mpsc},
    task::AbortHandle,
    time,
};

use super::{Endpoints, QuicLink, Tuning, code, config, link::End, server_endpoint};
use crate::{
    error::{AcceptError, BindError},
    frame::hello::{Answer, HELLO, Hello, Verdict},
    link::{Link, Peer},
    trust::{Fingerprint, Identity, PeerName, Proof, TicketVerdict, Tickets, TrustStore, tls},
};

/// Strangers in the middle of a handshake at a time; more are turned away.
const MAX_HANDSHAKES: usize = 64;
/// Above this many, a stranger must first show that it can be reached at its address.
const RETRY_ABOVE: usize = 16;
/// Results waiting for [`Listener::accept`].
const BACKLOG: usize = 64;

/// Listens for peers. Handshakes run side by side and each against a deadline, so that nobody can hold the door shut.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoints,
    local: SocketAddr,
    results: Mutex<mpsc::Receiver<Result<QuicLink, AcceptError>>>,
    task: AbortHandle,
}

/// What every handshake needs.
#[derive(Clone)]
pub(super) struct Door {
    endpoint: Endpoints,
    server: ServerConfig,
    id: Identity,
    store: TrustStore,
    tickets: Tickets,
    tuning: Tuning,
}

impl Listener {
    /// Starts to listen.
    pub async fn bind(addr: SocketAddr, id: &Identity, store: TrustStore, tickets: Tickets) -> Result<Self, BindError> {
        Self::bind_with(addr, id, store, tickets, Tuning::default()).await
    }

    /// As [`bind`](Self::bind), tuned.
    pub async fn bind_with(
        addr: SocketAddr,
        id: &Identity,
        store: TrustStore,
        tickets: Tickets,
        tuning: Tuning,
    ) -> Result<Self, BindError> {
        let server = config::server(id, tls::ALPN).map_err(BindError::Tls)?;
        let socket = |source| BindError::Socket { addr, source };
        let endpoint = server_endpoint(id, server.clone(), addr).map_err(socket)?;
        let local = endpoint.quinn.local_addr().map_err(socket)?;
        let (sender, results) = mpsc::channel(BACKLOG);
        let door = Door {
            endpoint: endpoint.clone(),
            server,
            id: id.clone(),
            store,
            tickets,
            tuning,
        };
        let task = tokio::spawn(keep_door(Arc::new(door), sender)).abort_handle();
        Ok(Self {
            endpoint,
            local,
            results: Mutex::new(results),
            task,
        })
    }

    /// The address it listens on, with the port that the kernel chose.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The next peer that has authenticated, or the next that was refused, for the log. Only [`AcceptError::ListenerClosed`] is final.
    /// Cancel-safe.
    pub async fn accept(&self) -> Result<QuicLink, AcceptError> {
        self.results.lock().await.recv().await.unwrap_or(Err(AcceptError::ListenerClosed))
    }

    /// Lets nobody in from now on. Links that were accepted live on.
    pub async fn close(&self) {
        self.endpoint.quinn.set_server_config(None);
        self.task.abort();
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.endpoint.quinn.set_server_config(None);
        self.task.abort();
    }
}

async fn keep_door(door: Arc<Door>, results: mpsc::Sender<Result<QuicLink, AcceptError>>) {
    let places = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    // Handshakes end with this task.
    let mut handshakes = tokio::task::JoinSet::new();
    while let Some(incoming) = door.endpoint.quinn.accept().await {
        while handshakes.try_join_next().is_some() {}
        let busy = MAX_HANDSHAKES - places.available_permits();
        if busy >= RETRY_ABOVE && !incoming.remote_address_validated() && incoming.may_retry() {
            let _ = incoming.retry(); // fails only where may_retry says no
            continue;
        }
        let Ok(place) = places.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let (door, results) = (door.clone(), results.clone());
        handshakes.spawn(async move {
            let addr = incoming.remote_address();
            let waited = door.tuning.handshake_timeout;
            let result = time::timeout(waited, door.handshake(incoming, addr)).await;
            drop(place);
            match result.unwrap_or(Err(AcceptError::Stalled { addr, waited })) {
                Ok(link) => drop(results.send(Ok(link)).await), // when nobody listens any more, the link is dropped, and the peer hears so
                Err(error) => {
                    tracing::debug!(%error, "refused");
                    let _ = results.try_send(Err(error)); // a log line may be lost under a flood of strangers
                }
            }
        });
    }
}

/// What was decided about a peer.
struct Admission {
    version: u16,
    name: PeerName,
    enrolled_now: bool,
}

impl Door {
    /// See [`Link::apart`](crate::Link::apart).
    pub(super) fn apart(
        &self,
        conn: &Connection,
        peer: Fingerprint,
    ) -> io::Result<impl Future<Output = io::Result<QuicLink>> + Send + 'static + use<>> {
        let local = conn.local_ip().ok_or(io::ErrorKind::Unsupported)?;
        let addr = conn.remote_address();
        let door = Arc::new(Door {
            endpoint: self.endpoint.apart(&self.id, self.server.clone(), local, addr)?,
            ..self.clone()
        });
        Ok(async move {
            // Late packets of the first connection are none of its.
            loop {
                let incoming = door.endpoint.quinn.accept().await.ok_or(io::ErrorKind::NotConnected)?;
                let link = door.clone().handshake(incoming, addr).await.map_err(io::Error::other)?;
                if link.peer().fingerprint == peer {
                    return Ok(link);
                }
            }
        })
    }

    async fn handshake(self: Arc<Self>, incoming: Incoming, addr: SocketAddr) -> Result<QuicLink, AcceptError> {
        let failed = |detail: String| AcceptError::Handshake { addr, detail };
        let mut server = self.server.clone();
        server.transport_config(self.endpoint.transport(&self.tuning, addr));
        let connecting = incoming.accept_with(Arc::new(server)).map_err(|e| failed(e.to_string()))?;
        let conn = connecting.await.map_err(|e| failed(e.to_string()))?;
        let fingerprint = tls::proven_peer(conn.peer_identity()).ok_or_else(|| failed("no client certificate".into()))?;
        let (mut send, mut recv) = conn.accept_bi().await.map_err(|e| failed(e.to_string()))?;
        match self.admit(&conn, addr, fingerprint, &mut recv).await {
            Ok(admission) => {
                let Admission {
                    version,
                    name,
                    enrolled_now,
                } = admission;
                let own_name = Some(self.id.name().clone());
                let answer = Answer {
                    verdict: Verdict::Welcome,
                    versions: self.tuning.versions,
                    version,
                    name: own_name,
                };
                send.write_all(&answer.encode()).await.map_err(|e| failed(e.to_string()))?;
                let peer = Peer {
                    fingerprint,
                    address: conn.remote_address(),
                    name: name.to_string(),
                    enrolled_now,
                    version,
                };
                Ok(QuicLink::new(
                    self.endpoint.clone(),
                    conn,
                    (send, recv),
                    peer,
                    &self.tuning,
                    End::Server(self.clone()),
                ))
            }
            Err(error) => {
                refuse(&conn, &mut send, &error).await;
                Err(error)
            }
        }
    }

    /// Trust first, versions second: only who is known, or holds a ticket, learns anything at all.
    async fn admit(
        &self,
        conn: &Connection,
        addr: SocketAddr,
        fingerprint: Fingerprint,
        recv: &mut RecvStream,
    ) -> Result<Admission, AcceptError> {
        let mut bytes = [0; HELLO];
        recv.read_exact(&mut bytes).await.map_err(|e| AcceptError::Handshake {
            addr,
            detail: e.to_string(),
        })?;
        let hello = Hello::decode(&bytes).map_err(|rule| AcceptError::Rule { addr, rule })?;

        let trust = |source| AcceptError::Trust { addr, source };
        let known = self.store.get(&fingerprint).map_err(trust)?;
        let verdict = match &hello.proof {
            Some(mac) => {
                let exporter = exporter(conn).ok_or_else(|| AcceptError::Handshake {
                    addr,
                    detail: "TLS exports no keys".into(),
                })?;
                let proof = Proof {
                    exporter: &exporter,
                    sender: fingerprint,
                    receiver: self.id.fingerprint(),
                };
                Some(self.tickets.check(addr.ip(), &proof, mac))
            }
            None => None,
        };
        // A peer that is trusted already needs no ticket, and a used one does not harm it: repeating a command line must work.
        let ticket = match (&known, verdict) {
            (_, Some(TicketVerdict::Good(number))) => Some(number),
            (Some(_), _) => None,
            (None, None) => return Err(AcceptError::Untrusted { addr, fingerprint }),
            (None, Some(TicketVerdict::Wrong)) => return Err(AcceptError::WrongTicket { addr, fingerprint }),
            (None, Some(TicketVerdict::TooMany)) => return Err(AcceptError::TooManyAttempts { addr, fingerprint }),
            (None, Some(TicketVerdict::Used)) => return Err(AcceptError::TicketUsed { addr, fingerprint }),
            (None, Some(TicketVerdict::Expired)) => return Err(AcceptError::TicketExpired { addr, fingerprint }),
        };

        let (ours, theirs) = (self.tuning.versions, hello.versions);
        let version = ours.newest_common(theirs).ok_or(AcceptError::Version {
            addr,
            fingerprint,
            ours,
            theirs,
        })?;

        // Last, so that a ticket is used up only by who gets in.
        if let Some(number) = ticket
            && !self.tickets.redeem(number)
            && known.is_none()
        {
            return Err(AcceptError::TicketUsed { addr, fingerprint });
        }
        match known {
            Some(peer) => Ok(Admission {
                version,
                name: peer.name,
                enrolled_now: false,
            }),
            None => {
                self.store
                    .add(fingerprint, &hello.name)
                    .map_err(|source| AcceptError::Enrol { addr, fingerprint, source })?;
                Ok(Admission {
                    version,
                    name: hello.name,
                    enrolled_now: true,
                })
            }
        }
    }
}

/// What the refused side is told. A stranger: that it is not accepted, and nothing else.
async fn refuse(conn: &Connection, send: &mut SendStream, error: &AcceptError) {
    let answer = match error {
        AcceptError::Version { ours, .. } => Answer {
            versions: *ours,
            ..Answer::refusal(Verdict::Version)
        },
        AcceptError::TicketUsed { .. } => Answer::refusal(Verdict::TicketUsed),
        AcceptError::TicketExpired { .. } => Answer::refusal(Verdict::TicketExpired),
        AcceptError::Enrol { .. } => Answer::refusal(Verdict::Failed),
        _ => Answer::refusal(Verdict::NotAccepted),
    };
    if send.write_all(&answer.encode()).await.is_ok() && send.finish().is_ok() {
        let _ = time::timeout(Duration::from_secs(1), send.stopped()).await; // until it has arrived, or nobody is there
    }
    conn.close(code::REFUSED.into(), b"");
}

/// A secret that only the two ends of this TLS session know.
pub(super) fn exporter(conn: &Connection) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    conn.export_keying_material(&mut out, b"EXPORTER-migrate-ticket", b"").ok()?;
    Some(out)
}

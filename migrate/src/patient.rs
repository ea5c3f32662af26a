//! A link on which nothing is waited for without an end: a peer that stalls, by a fault or on purpose, holds up nobody for longer than a limit.
//!
//! The network itself is watched by QUIC, which notices in seconds that nobody is there. This is for one that is there and does not go on.

use migrate_transport::{Encoding, Link, LinkError, PageFrame, PageReceiver, PageSender, Peer, Run, Section};
use std::{future::Future, time::Duration};

/// Bytes that have to leave in the time that a side waits for an answer: what it has sent may still be on its way over a slow link. More than what QUIC says to
/// keep a silent connection up.
const PROGRESS: u64 = 256 << 10;

/// See the module. What happens in the drain has no limit, and goes over [`Patient::into_inner`].
#[derive(Debug)]
pub struct Patient<L> {
    link: L,
    limit: Duration,
}

impl<L: Link> Patient<L> {
    /// Waits for at most so long.
    pub fn new(link: L, limit: Duration) -> Patient<L> {
        Patient { link, limit }
    }

    /// The link itself.
    pub fn into_inner(self) -> L {
        self.link
    }
}

fn stalled(peer: &str, limit: Duration) -> LinkError {
    LinkError::Closed {
        peer: peer.to_owned(),
        reason: format!(
            "it is there and has not gone on for {} s (--peer-timeout)",
            limit.as_secs_f64().round()
        ),
        clean: false,
        silent: false,
    }
}

async fn within<T>(limit: Duration, peer: &str, what: impl Future<Output = Result<T, LinkError>>) -> Result<T, LinkError> {
    match tokio::time::timeout(limit, what).await {
        Ok(r) => r,
        Err(_) => Err(stalled(peer, limit)),
    }
}

impl<L: Link> Link for Patient<L> {
    type Sender = Sender<L::Sender>;
    type Receiver = Receiver<L::Receiver>;

    async fn send(&mut self, section: Section) -> Result<(), LinkError> {
        let peer = self.link.peer().address.to_string();
        within(self.limit, &peer, self.link.send(section)).await
    }

    async fn recv(&mut self) -> Result<Section, LinkError> {
        let mut sent = self.link.bytes_sent();
        loop {
            if let Ok(r) = tokio::time::timeout(self.limit, self.link.recv()).await {
                return r;
            }
            let now = self.link.bytes_sent();
            if now < sent + PROGRESS {
                return Err(stalled(&self.link.peer().address.to_string(), self.limit));
            }
            sent = now;
        }
    }

    async fn open_pages(&mut self) -> Result<Self::Sender, LinkError> {
        let (peer, limit) = (self.link.peer().address.to_string(), self.limit);
        let pages = within(limit, &peer, self.link.open_pages()).await?;
        Ok(Sender { pages, peer, limit })
    }

    async fn accept_pages(&mut self) -> Result<Self::Receiver, LinkError> {
        let (peer, limit) = (self.link.peer().address.to_string(), self.limit);
        let pages = within(limit, &peer, self.link.accept_pages()).await?;
        Ok(Receiver { pages, peer, limit })
    }

    fn peer(&self) -> &Peer {
        self.link.peer()
    }

    fn bytes_sent(&self) -> u64 {
        self.link.bytes_sent()
    }

    fn rtt(&self) -> Duration {
        self.link.rtt()
    }

    fn close(&mut self, reason: &str) -> impl Future<Output = ()> + Send {
        self.link.close(reason)
    }
}

/// The sending half of a page stream: a frame is a MiB at most.
#[derive(Debug)]
pub struct Sender<P> {
    pages: P,
    peer: String,
    limit: Duration,
}

impl<P: PageSender> PageSender for Sender<P> {
    async fn send(&mut self, runs: &[Run], data: Vec<bytes::Bytes>) -> Result<(), LinkError> {
        within(self.limit, &self.peer, self.pages.send(runs, data)).await
    }

    async fn finish(self) -> Result<(), LinkError> {
        within(self.limit, &self.peer, self.pages.finish()).await
    }

    async fn end(self) -> Result<(), LinkError> {
        within(self.limit, &self.peer, self.pages.end()).await
    }

    fn set_encoding(&mut self, encoding: Encoding) {
        self.pages.set_encoding(encoding);
    }

    fn raw_and_wire_bytes(&self) -> (u64, u64) {
        self.pages.raw_and_wire_bytes()
    }
}

/// The receiving half of one.
#[derive(Debug)]
pub struct Receiver<P> {
    pages: P,
    peer: String,
    limit: Duration,
}

impl<P: PageReceiver> PageReceiver for Receiver<P> {
    async fn recv(&mut self) -> Result<Option<PageFrame>, LinkError> {
        within(self.limit, &self.peer, self.pages.recv()).await
    }
}

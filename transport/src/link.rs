//! What the engine sees of a connection: one ordered stream of opaque sections, and as many streams of pages as it likes.

use std::{
    future::{Future, Pending, ready},
    io,
    net::SocketAddr,
    time::Duration,
};

use bytes::Bytes;

use crate::{
    error::LinkError,
    frame::{FrameError, MAX_ADDRESS, MAX_RUN_PAGES, PAGE_SIZE},
    trust::Fingerprint,
};

/// One message of the control stream. The transport does not look inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What it is; the engine numbers them.
    pub kind: u16,
    /// Which revision of that kind.
    pub version: u16,
    /// Its bytes, at most [`MAX_SECTION`](crate::frame::MAX_SECTION).
    pub payload: Bytes,
}

impl Section {
    /// A section of this kind and version.
    pub fn new(kind: u16, version: u16, payload: impl Into<Bytes>) -> Self {
        Self {
            kind,
            version,
            payload: payload.into(),
        }
    }
}

/// Consecutive pages of one address space, either all with content or all zero. Made by [`Run::new`] only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Run {
    /// Which address space of the tree, by the engine's numbering.
    pub space: u32,
    /// The first byte's address, page aligned.
    pub start: u64,
    /// How many pages, at least one.
    pub pages: u32,
    /// Whether the pages are all zero, and so carry no data.
    pub zero: bool,
}

impl Run {
    /// A validated run: page aligned, not empty, below [`MAX_ADDRESS`], at most [`MAX_RUN_PAGES`] long.
    pub fn new(space: u32, start: u64, pages: u32, zero: bool) -> Result<Self, FrameError> {
        if !start.is_multiple_of(PAGE_SIZE as u64) {
            return Err(FrameError::Misaligned { start });
        }
        if pages == 0 {
            return Err(FrameError::EmptyRun { start });
        }
        if pages > MAX_RUN_PAGES {
            return Err(FrameError::TooLong {
                what: "a run's pages",
                len: pages.into(),
                limit: MAX_RUN_PAGES.into(),
            });
        }
        match start.checked_add(u64::from(pages) * PAGE_SIZE as u64) {
            Some(end) if end <= MAX_ADDRESS => Ok(Self { space, start, pages, zero }),
            _ => Err(FrameError::BeyondAddressSpace { start, pages }),
        }
    }

    /// The address after the last byte.
    pub fn end(&self) -> u64 {
        self.start + self.len()
    }

    /// How many bytes of address space.
    #[allow(clippy::len_without_is_empty)] // never empty, by construction
    pub fn len(&self) -> u64 {
        u64::from(self.pages) * PAGE_SIZE as u64
    }

    /// How many bytes of data follow for this run.
    pub fn data_len(&self) -> u64 {
        if self.zero { 0 } else { self.len() }
    }
}

/// One frame of pages as received.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageFrame {
    /// Which pages, in the sender's order. They do not overlap.
    pub runs: Vec<Run>,
    /// The content of the non-zero runs, one after the other, in chunks as they came off the network: chunk borders mean nothing. The
    /// total length is exactly that of the non-zero runs.
    pub data: Vec<Bytes>,
}

impl PageFrame {
    /// How many bytes of page data there are in all chunks.
    pub fn data_len(&self) -> usize {
        self.data.iter().map(Bytes::len).sum()
    }

    /// The data in one piece (copies; for tests and small frames).
    pub fn concat(&self) -> Vec<u8> {
        self.data.concat()
    }
}

/// How page data travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Encoding {
    /// As it is, without a copy.
    #[default]
    Raw,
    /// zstd level 1 for each frame that gets smaller by it; other frames go raw.
    Zstd,
}

/// Who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The identity that TLS proved.
    pub fingerprint: Fingerprint,
    /// Where its packets come from.
    pub address: SocketAddr,
    /// What it calls itself (its host name), or what the trust store calls it.
    pub name: String,
    /// Whether a ticket enrolled it just now.
    pub enrolled_now: bool,
    /// The protocol version agreed on.
    pub version: u16,
}

/// An authenticated connection to the other agent.
///
/// `recv`, `accept_pages` and `open_pages` are cancel-safe: dropping their future loses nothing. A dropped `send` may still be delivered,
/// whole and in order.
pub trait Link: Send + 'static {
    /// The sending half of a page stream.
    type Sender: PageSender;
    /// The receiving half of a page stream.
    type Receiver: PageReceiver;

    /// Sends a section on the control stream: ordered, reliable, ahead of page data, and not held back.
    fn send(&mut self, section: Section) -> impl Future<Output = Result<(), LinkError>> + Send;

    /// The next section, or [`LinkError::Closed`] when the peer is gone.
    fn recv(&mut self) -> impl Future<Output = Result<Section, LinkError>> + Send;

    /// Opens a page stream to the peer, who sees it once a frame has been sent on it.
    fn open_pages(&mut self) -> impl Future<Output = Result<Self::Sender, LinkError>> + Send;

    /// The next page stream that the peer opened.
    fn accept_pages(&mut self) -> impl Future<Output = Result<Self::Receiver, LinkError>> + Send;

    /// Who is at the other end.
    fn peer(&self) -> &Peer;

    /// Bytes put on the wire so far, headers and retransmissions included.
    fn bytes_sent(&self) -> u64;

    /// The round trip, as estimated now; it grows under load.
    fn rtt(&self) -> Duration;

    /// Opens a socket that hears this peer alone, for its next connection: read by threads of its own, what comes over that connection does not queue behind what
    /// comes over this one. It, and all that serves it, belongs to the runtime that this is called in. The peer has to come once more, by
    /// [`again`](Self::again); the future is that connection. This one ends then.
    fn apart(&self) -> io::Result<impl Future<Output = io::Result<Self>> + Send + 'static + use<Self>>
    where
        Self: Sized,
    {
        Err::<Pending<io::Result<Self>>, _>(io::ErrorKind::Unsupported.into())
    }

    /// Connects once more to the same peer, from the socket of this connection: see [`apart`](Self::apart).
    fn again(&self) -> impl Future<Output = io::Result<Self>> + Send
    where
        Self: Sized,
    {
        ready(Err(io::ErrorKind::Unsupported.into()))
    }

    /// Says goodbye with a reason that the peer will see, at once: what has not been delivered is lost. Waits briefly so that the goodbye
    /// leaves the host.
    fn close(&mut self, reason: &str) -> impl Future<Output = ()> + Send;
}

/// The sending half of a page stream. Dropped without [`finish`](PageSender::finish), it tells the peer that the stream was abandoned.
pub trait PageSender: Send + 'static {
    /// Sends one frame. `data` holds the content of the non-zero runs in order, cut anywhere. Returns once the bytes are queued within the
    /// window. Not cancel-safe in itself: after a dropped `send` the frame is completed by the next `send` or `finish`.
    fn send(&mut self, runs: &[Run], data: Vec<Bytes>) -> impl Future<Output = Result<(), LinkError>> + Send;

    /// Ends the stream and waits until the peer's host has acknowledged everything.
    fn finish(self) -> impl Future<Output = Result<(), LinkError>> + Send;

    /// Ends the stream without waiting: for when the peer answers on the control stream anyway, and a round trip counts.
    fn end(self) -> impl Future<Output = Result<(), LinkError>> + Send;

    /// How the frames from now on travel.
    fn set_encoding(&mut self, encoding: Encoding);

    /// Page data given to `send` so far, and the bytes it became (frame headers included): their quotient is the compression ratio.
    fn raw_and_wire_bytes(&self) -> (u64, u64);
}

/// The receiving half of a page stream.
pub trait PageReceiver: Send + 'static {
    /// The next frame; `None` at the clean end. Cancel-safe.
    fn recv(&mut self) -> impl Future<Output = Result<Option<PageFrame>, LinkError>> + Send;
}

//! An established connection.

use std::{
    fmt,
    future::Future,
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, StoppedError, WriteError};
use tokio::{task::AbortHandle, time};

use super::{
    Endpoints, Tuning, code,
    connect::Caller,
    listener::Door,
    watch::{self, Lost},
};
use crate::{
    error::LinkError,
    frame::{FrameError, PageDecoder, PageEncoder, SectionDecoder, section},
    link::{Encoding, Link, PageFrame, PageReceiver, PageSender, Peer, Run, Section},
};

/// Chunks taken off a stream at a time.
const BATCH: usize = 64;

/// The connection as the streams see it: how to name its failures.
#[derive(Debug, Clone)]
struct Shared {
    conn: Connection,
    peer: Arc<str>,
    /// Why the watch closed the connection, if it did.
    lost: Arc<OnceLock<Lost>>,
    idle_timeout: Duration,
}

impl Shared {
    fn closed(&self, error: &ConnectionError) -> LinkError {
        let lost = match error {
            ConnectionError::LocallyClosed => self.lost.get(),
            ConnectionError::TimedOut => Some(&Lost::Silent),
            _ => None,
        };
        let (reason, clean) = match error {
            ConnectionError::ApplicationClosed(close) => {
                let words = printable(&close.reason);
                match u32::try_from(close.error_code.into_inner()) {
                    Ok(code::BYE) => (words, true),
                    Ok(code::RULE) => (format!("it says that this side broke the protocol: {words}"), false),
                    Ok(code::DROPPED) => ("it gave up without a goodbye".into(), false),
                    _ => ("it closed the connection".into(), false),
                }
            }
            ConnectionError::LocallyClosed | ConnectionError::TimedOut => match lost {
                Some(Lost::Dead) => ("its host says that the agent's port is closed: the agent has died".into(), false),
                Some(Lost::Silent) => (format!("nothing was heard from it for {:.0?}", self.idle_timeout), false),
                None => ("closed by this side".into(), true),
            },
            ConnectionError::Reset => ("it has been restarted and knows nothing of this connection".into(), false),
            other => (other.to_string(), false),
        };
        LinkError::Closed {
            peer: self.peer.to_string(),
            reason,
            clean,
            silent: matches!(lost, Some(Lost::Silent)),
        }
    }

    /// For a stream that says it is closed: because of the connection, or on its own?
    fn abandoned(&self) -> LinkError {
        match self.conn.close_reason() {
            Some(error) => self.closed(&error),
            None => LinkError::Abandoned {
                peer: self.peer.to_string(),
            },
        }
    }

    fn read(&self, error: ReadError) -> LinkError {
        match error {
            ReadError::ConnectionLost(error) => self.closed(&error),
            _ => self.abandoned(),
        }
    }

    fn write(&self, error: WriteError) -> LinkError {
        match error {
            WriteError::ConnectionLost(error) => self.closed(&error),
            _ => self.abandoned(),
        }
    }

    /// The peer broke a rule: tell it which, and have no more to do with it.
    fn broken(&self, rule: FrameError) -> LinkError {
        self.conn.close(code::RULE.into(), rule.to_string().as_bytes());
        LinkError::Rule {
            peer: self.peer.to_string(),
            rule,
        }
    }
}

/// What a peer says, made safe for a terminal.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .filter(|c| !c.is_control())
        .take(500)
        .collect()
}

/// Writes everything, and keeps what is not written yet, so that a dropped future loses nothing.
async fn flush(stream: &mut SendStream, out: &mut Vec<Bytes>) -> Result<(), WriteError> {
    while !out.is_empty() {
        let written = stream.write_chunks(out).await?;
        out.drain(..written.chunks);
    }
    Ok(())
}

/// Which end of the connection this is, and what it takes to make another with the same peer.
pub(super) enum End {
    Client(Arc<Caller>),
    Server(Arc<Door>),
}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client(_) => "Client",
            Self::Server(_) => "Server",
        })
    }
}

/// An authenticated connection over QUIC. Dropped without [`close`](Link::close), it tells the peer that this side gave up.
#[derive(Debug)]
pub struct QuicLink {
    shared: Shared,
    control_out: SendStream,
    control_in: RecvStream,
    unsent: Vec<Bytes>,
    decoder: SectionDecoder,
    peer: Peer,
    watch: AbortHandle,
    end: End,
    /// The last handle to an endpoint must outlive its connections.
    endpoint: Endpoints,
}

impl QuicLink {
    pub(super) fn new(
        endpoint: Endpoints,
        conn: Connection,
        (control_out, control_in): (SendStream, RecvStream),
        peer: Peer,
        tuning: &Tuning,
        end: End,
    ) -> Self {
        let _ = control_out.set_priority(1); // only fails on a closed stream, which the first use will report
        let lost = Arc::new(OnceLock::new());
        let shared = Shared {
            conn: conn.clone(),
            peer: peer.address.to_string().into(),
            lost: lost.clone(),
            idle_timeout: tuning.idle_timeout,
        };
        let watch = tokio::spawn(watch::until_gone(conn, tuning.clone(), lost)).abort_handle();
        let (unsent, decoder) = (Vec::new(), SectionDecoder::default());
        Self {
            shared,
            control_out,
            control_in,
            unsent,
            decoder,
            peer,
            watch,
            end,
            endpoint,
        }
    }

    /// The largest datagram found to fit through the path so far.
    pub fn datagram_size(&self) -> u16 {
        self.shared.conn.stats().path.current_mtu
    }

    /// Bytes received on the wire so far.
    pub fn bytes_received(&self) -> u64 {
        self.shared.conn.stats().udp_rx.bytes
    }
}

impl Drop for QuicLink {
    fn drop(&mut self) {
        self.watch.abort();
        self.shared.conn.close(code::DROPPED.into(), b""); // changes nothing when it is closed already
    }
}

impl Link for QuicLink {
    type Sender = QuicPageSender;
    type Receiver = QuicPageReceiver;

    async fn send(&mut self, section: Section) -> Result<(), LinkError> {
        let header = section::header(&section).map_err(LinkError::Unsendable)?;
        self.unsent.push(header);
        if !section.payload.is_empty() {
            self.unsent.push(section.payload);
        }
        flush(&mut self.control_out, &mut self.unsent)
            .await
            .map_err(|e| self.shared.write(e))
    }

    async fn recv(&mut self) -> Result<Section, LinkError> {
        loop {
            if let Some(section) = self.decoder.next_section().map_err(|rule| self.shared.broken(rule))? {
                return Ok(section);
            }
            match self
                .control_in
                .read_chunk(usize::MAX, true)
                .await
                .map_err(|e| self.shared.read(e))?
            {
                Some(chunk) => self.decoder.push(chunk.bytes),
                None => {
                    let rule = self.decoder.end().err().unwrap_or(FrameError::Truncated {
                        what: "the control stream",
                        have: 0,
                    });
                    return Err(self.shared.broken(rule));
                }
            }
        }
    }

    async fn open_pages(&mut self) -> Result<QuicPageSender, LinkError> {
        let stream = self.shared.conn.open_uni().await.map_err(|e| self.shared.closed(&e))?;
        Ok(QuicPageSender {
            stream,
            shared: self.shared.clone(),
            encoder: PageEncoder::default(),
            unsent: Vec::new(),
            finished: false,
        })
    }

    async fn accept_pages(&mut self) -> Result<QuicPageReceiver, LinkError> {
        let stream = self.shared.conn.accept_uni().await.map_err(|e| self.shared.closed(&e))?;
        let batch = vec![Bytes::new(); BATCH];
        Ok(QuicPageReceiver {
            stream,
            shared: self.shared.clone(),
            decoder: PageDecoder::default(),
            batch,
            ended: false,
        })
    }

    fn peer(&self) -> &Peer {
        &self.peer
    }

    fn bytes_sent(&self) -> u64 {
        self.shared.conn.stats().udp_tx.bytes
    }

    fn rtt(&self) -> Duration {
        self.shared.conn.rtt()
    }

    fn apart(&self) -> io::Result<impl Future<Output = io::Result<Self>> + Send + 'static + use<>> {
        match &self.end {
            End::Server(door) => door.apart(&self.shared.conn, self.peer.fingerprint),
            End::Client(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    async fn again(&self) -> io::Result<Self> {
        match &self.end {
            End::Client(caller) => caller.again(&self.endpoint, &self.peer).await.map_err(io::Error::other),
            End::Server(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn close(&mut self, reason: &str) -> impl Future<Output = ()> + Send {
        self.watch.abort();
        let linger = (self.shared.conn.rtt() * 2).clamp(Duration::from_millis(10), Duration::from_millis(200));
        self.shared.conn.close(code::BYE.into(), reason.as_bytes());
        time::sleep(linger)
    }
}

/// The sending half of a page stream over QUIC.
#[derive(Debug)]
pub struct QuicPageSender {
    stream: SendStream,
    shared: Shared,
    encoder: PageEncoder,
    unsent: Vec<Bytes>,
    finished: bool,
}

impl PageSender for QuicPageSender {
    async fn send(&mut self, runs: &[Run], data: Vec<Bytes>) -> Result<(), LinkError> {
        let frame = self.encoder.encode(runs, data).map_err(LinkError::Unsendable)?;
        self.unsent.extend(frame);
        flush(&mut self.stream, &mut self.unsent).await.map_err(|e| self.shared.write(e))
    }

    async fn end(mut self) -> Result<(), LinkError> {
        self.close().await
    }

    async fn finish(mut self) -> Result<(), LinkError> {
        self.close().await?;
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Err(StoppedError::ConnectionLost(error)) => Err(self.shared.closed(&error)),
            Ok(Some(_)) | Err(StoppedError::ZeroRttRejected) => Err(self.shared.abandoned()),
        }
    }

    fn set_encoding(&mut self, encoding: Encoding) {
        self.encoder.set_encoding(encoding);
    }

    fn raw_and_wire_bytes(&self) -> (u64, u64) {
        self.encoder.raw_and_wire_bytes()
    }
}

impl QuicPageSender {
    async fn close(&mut self) -> Result<(), LinkError> {
        flush(&mut self.stream, &mut self.unsent).await.map_err(|e| self.shared.write(e))?;
        self.stream.finish().map_err(|_| self.shared.abandoned())?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for QuicPageSender {
    fn drop(&mut self) {
        // quinn alone would end the stream as if it were complete.
        if !self.finished {
            let _ = self.stream.reset(code::ABANDONED.into()); // only fails when it is closed already
        }
    }
}

/// The receiving half of a page stream over QUIC.
#[derive(Debug)]
pub struct QuicPageReceiver {
    stream: RecvStream,
    shared: Shared,
    decoder: PageDecoder,
    batch: Vec<Bytes>,
    ended: bool,
}

impl PageReceiver for QuicPageReceiver {
    async fn recv(&mut self) -> Result<Option<PageFrame>, LinkError> {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(|rule| self.shared.broken(rule))? {
                return Ok(Some(frame));
            }
            if self.ended {
                return self.decoder.end().map(|()| None).map_err(|rule| self.shared.broken(rule));
            }
            match self.stream.read_chunks(&mut self.batch).await.map_err(|e| self.shared.read(e))? {
                Some(count) => self
                    .batch
                    .iter_mut()
                    .take(count)
                    .for_each(|chunk| self.decoder.push(std::mem::take(chunk))),
                None => self.ended = true,
            }
        }
    }
}

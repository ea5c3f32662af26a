//! A link between two ends of one process, for tests: the same frames, no sockets, no keys.
//!
//! Delay and bandwidth are kept by tokio's clock. Under `tokio::time::pause` (or `#[tokio::test(start_paused = true)]`) they cost no real
//! time at all, and a migration over a slow continent is tested in milliseconds. The [`Wire`] between the ends can be cut, at once or after
//! a given number of bytes; each end then learns of it by its time-out, as it would in the world.

mod stream;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

use self::stream::{Arrival, Receiving, Sending, stream};
use crate::{
    error::LinkError,
    frame::{FrameError, PageDecoder, PageEncoder, SectionDecoder, section},
    link::{Encoding, Link, PageFrame, PageReceiver, PageSender, Peer, Run, Section},
    quic::VERSIONS,
    trust::Fingerprint,
};

/// How the wire behaves.
#[derive(Debug, Clone)]
pub struct Config {
    /// Time from one end to the other.
    pub delay: Duration,
    /// In each direction; `None` for no limit.
    pub bytes_per_second: Option<u64>,
    /// Bytes under way on one stream before its sender waits for the reader.
    pub window: usize,
    /// How long an end waits before it takes a cut wire for a dead peer.
    pub idle_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            bytes_per_second: None,
            window: 16 << 20,
            idle_timeout: Duration::from_secs(30),
        }
    }
}

/// Two ends joined by a wire.
pub fn pair(config: Config) -> (MemoryLink, MemoryLink, Wire) {
    let (ends, _) = watch::channel([None, None]);
    let state = State {
        config,
        free_at: [Instant::now(); 2],
        cut_at: None,
        cut_after: None,
        total: 0,
    };
    let wire = Wire(Arc::new(Cable {
        state: Mutex::new(state),
        sent: Default::default(),
        ends,
    }));
    let [a, b] = [0, 1].map(|side| {
        let (control, control_in) = stream(&wire, side);
        (control, control_in, mpsc::unbounded_channel())
    });
    let end = |side: usize, control_out, control_in, streams_out, streams_in| {
        let mark = if side == 0 { 0xb } else { 0xa };
        MemoryLink {
            wire: wire.clone(),
            side,
            control_out,
            control_in,
            decoder: SectionDecoder::default(),
            streams_out,
            streams_in,
            peer: Peer {
                fingerprint: Fingerprint([mark; 32]),
                address: ([127, 0, 0, 1], 1 + side as u16).into(),
                name: format!("memory-{}", if side == 0 { "b" } else { "a" }),
                enrolled_now: false,
                version: VERSIONS.max,
            },
        }
    };
    let link_a = end(0, a.0, b.1, a.2.0, b.2.1);
    let link_b = end(1, b.0, a.1, b.2.0, a.2.1);
    (link_a, link_b, wire)
}

/// The wire itself, for tests to meddle with. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Wire(Arc<Cable>);

#[derive(Debug)]
struct Cable {
    state: Mutex<State>,
    sent: [AtomicU64; 2],
    /// When, and how, each end learns that the link is over.
    ends: watch::Sender<[Option<(Instant, LinkError)>; 2]>,
}

#[derive(Debug)]
struct State {
    config: Config,
    /// When each direction has sent what it was given.
    free_at: [Instant; 2],
    cut_at: Option<Instant>,
    cut_after: Option<u64>,
    total: u64,
}

fn gone(reason: &str, clean: bool) -> LinkError {
    LinkError::Closed {
        peer: "the other end".into(),
        reason: reason.into(),
        clean,
        silent: false,
    }
}

/// As [`gone`], by a cut.
fn silent(idle_timeout: Duration) -> LinkError {
    LinkError::Closed {
        peer: "the other end".into(),
        reason: format!("nothing was heard from it for {idle_timeout:.0?}"),
        clean: false,
        silent: true,
    }
}

impl Wire {
    /// Cuts it now. What is under way is lost. Both ends notice after their idle time-out.
    pub fn cut(&self) {
        self.cut_locked(&mut self.lock());
    }

    /// Cuts it after this many more bytes, both directions counted.
    pub fn cut_after(&self, bytes: u64) {
        let mut state = self.lock();
        state.cut_after = Some(state.total + bytes);
    }

    /// Changes the delay, for what is sent from now on.
    pub fn set_delay(&self, delay: Duration) {
        self.lock().config.delay = delay;
    }

    /// Changes the bandwidth, for what is sent from now on.
    pub fn set_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.lock().config.bytes_per_second = bytes_per_second;
    }

    /// Bytes sent so far, both directions.
    pub fn bytes(&self) -> u64 {
        self.lock().total
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut_locked(&self, state: &mut State) {
        let now = Instant::now();
        if state.cut_at.is_some() {
            return;
        }
        state.cut_at = Some(now);
        let error = silent(state.config.idle_timeout);
        let at = now + state.config.idle_timeout;
        self.0.ends.send_modify(|ends| {
            for end in ends.iter_mut() {
                end.get_or_insert_with(|| (at, error.clone()));
            }
        });
    }

    /// One side ends the link, with the words that the other will see.
    fn close(&self, side: usize, reason: &str, clean: bool) {
        let state = self.lock();
        let now = Instant::now();
        let arrives = state.cut_at.is_none().then_some(now + state.config.delay);
        self.0.ends.send_modify(|ends| {
            if ends[side].as_ref().is_none_or(|(at, _)| *at > now) {
                ends[side] = Some((now, gone("closed by this side", true)));
            }
            if let Some(at) = arrives {
                ends[1 - side].get_or_insert_with(|| (at, gone(reason, clean)));
            }
        });
    }

    /// Puts bytes on the wire and says when they arrive.
    fn transmit(&self, side: usize, bytes: usize) -> Option<Instant> {
        let mut state = self.lock();
        let now = Instant::now();
        let bytes = bytes as u64;
        state.total += bytes;
        self.0.sent[side].fetch_add(bytes, Ordering::Relaxed);
        if state.cut_after.is_some_and(|limit| state.total > limit) {
            self.cut_locked(&mut state);
        }
        if state.cut_at.is_some() {
            return None;
        }
        let takes = state
            .config
            .bytes_per_second
            .map_or(Duration::ZERO, |rate| Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64));
        let done = state.free_at[side].max(now) + takes;
        state.free_at[side] = done;
        Some(done + state.config.delay)
    }

    /// Waits until this end has learnt that the link is over.
    async fn over(&self, side: usize) -> LinkError {
        let mut ends = self.0.ends.subscribe();
        loop {
            let end = ends.borrow_and_update()[side].clone();
            match end {
                None => {
                    if ends.changed().await.is_err() {
                        return gone("the wire is gone", false);
                    }
                }
                Some((at, error)) => {
                    tokio::select! {
                        () = sleep_until(at) => return error,
                        _ = ends.changed() => {} // a goodbye may overtake the time-out
                    }
                }
            }
        }
    }

    fn check(&self, side: usize) -> Result<(), LinkError> {
        match &self.0.ends.borrow()[side] {
            Some((at, error)) if *at <= Instant::now() => Err(error.clone()),
            _ => Ok(()),
        }
    }
}

/// One end of the wire.
#[derive(Debug)]
pub struct MemoryLink {
    wire: Wire,
    side: usize,
    control_out: Sending,
    control_in: Receiving,
    decoder: SectionDecoder,
    streams_out: mpsc::UnboundedSender<Receiving>,
    streams_in: mpsc::UnboundedReceiver<Receiving>,
    peer: Peer,
}

fn rule(wire: &Wire, side: usize, rule: FrameError) -> LinkError {
    wire.close(side, &format!("it says that this side broke the protocol: {rule}"), false);
    LinkError::Rule {
        peer: "the other end".into(),
        rule,
    }
}

impl Drop for MemoryLink {
    fn drop(&mut self) {
        if self.wire.check(self.side).is_ok() {
            self.wire.close(self.side, "it gave up without a goodbye", false);
        }
    }
}

impl Link for MemoryLink {
    type Sender = MemoryPageSender;
    type Receiver = MemoryPageReceiver;

    async fn send(&mut self, section: Section) -> Result<(), LinkError> {
        let header = section::header(&section).map_err(LinkError::Unsendable)?;
        self.control_out.send(vec![header, section.payload]).await
    }

    async fn recv(&mut self) -> Result<Section, LinkError> {
        loop {
            if let Some(section) = self.decoder.next_section().map_err(|error| rule(&self.wire, self.side, error))? {
                return Ok(section);
            }
            match self.control_in.recv().await? {
                Arrival::Bytes(bytes) => self.decoder.push(bytes),
                // The peer's end was dropped, which the goodbye under way tells better.
                Arrival::End | Arrival::Abandoned => return Err(self.wire.over(self.side).await),
            }
        }
    }

    async fn open_pages(&mut self) -> Result<MemoryPageSender, LinkError> {
        self.wire.check(self.side)?;
        let (out, receiving) = stream(&self.wire, self.side);
        Ok(MemoryPageSender {
            out,
            announce: Some((self.streams_out.clone(), receiving)),
            encoder: PageEncoder::default(),
        })
    }

    async fn accept_pages(&mut self) -> Result<MemoryPageReceiver, LinkError> {
        tokio::select! {
            biased;
            Some(input) = self.streams_in.recv() => Ok(MemoryPageReceiver { input, decoder: PageDecoder::default(), ended: false }),
            error = self.wire.over(self.side) => Err(error),
        }
    }

    fn peer(&self) -> &Peer {
        &self.peer
    }

    fn bytes_sent(&self) -> u64 {
        self.wire.0.sent[self.side].load(Ordering::Relaxed)
    }

    fn rtt(&self) -> Duration {
        self.wire.lock().config.delay * 2
    }

    async fn close(&mut self, reason: &str) {
        self.wire.close(self.side, reason, true);
    }
}

/// The sending half of a page stream in memory.
#[derive(Debug)]
pub struct MemoryPageSender {
    out: Sending,
    /// The other half, until the first frame shows it to the peer.
    announce: Option<(mpsc::UnboundedSender<Receiving>, Receiving)>,
    encoder: PageEncoder,
}

impl MemoryPageSender {
    fn announce(&mut self) -> Result<(), LinkError> {
        match self.announce.take() {
            Some((streams, receiving)) => streams.send(receiving).map_err(|_| self.out.abandoned()),
            None => Ok(()),
        }
    }
}

impl PageSender for MemoryPageSender {
    async fn send(&mut self, runs: &[Run], data: Vec<Bytes>) -> Result<(), LinkError> {
        let frame = self.encoder.encode(runs, data).map_err(LinkError::Unsendable)?;
        self.announce()?;
        self.out.send(frame).await
    }

    async fn finish(mut self) -> Result<(), LinkError> {
        self.announce()?;
        self.out.finish().await
    }

    async fn end(mut self) -> Result<(), LinkError> {
        self.announce()?;
        self.out.end().map(drop)
    }

    fn set_encoding(&mut self, encoding: Encoding) {
        self.encoder.set_encoding(encoding);
    }

    fn raw_and_wire_bytes(&self) -> (u64, u64) {
        self.encoder.raw_and_wire_bytes()
    }
}

/// The receiving half of a page stream in memory.
#[derive(Debug)]
pub struct MemoryPageReceiver {
    input: Receiving,
    decoder: PageDecoder,
    ended: bool,
}

impl PageReceiver for MemoryPageReceiver {
    async fn recv(&mut self) -> Result<Option<PageFrame>, LinkError> {
        loop {
            if let Some(frame) = self
                .decoder
                .next_frame()
                .map_err(|error| rule(&self.input.wire, self.input.side, error))?
            {
                return Ok(Some(frame));
            }
            if self.ended {
                return self
                    .decoder
                    .end()
                    .map(|()| None)
                    .map_err(|error| rule(&self.input.wire, self.input.side, error));
            }
            match self.input.recv().await? {
                Arrival::Bytes(bytes) => self.decoder.push(bytes),
                Arrival::End => self.ended = true,
                Arrival::Abandoned => {
                    return Err(LinkError::Abandoned {
                        peer: "the other end".into(),
                    });
                }
            }
        }
    }
}

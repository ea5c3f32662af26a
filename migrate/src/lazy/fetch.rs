//! The destination's half of the drain: pages go from the links to the keeper, faults and acknowledgements the other way.
//!
//! There are two links, and each may break and be replaced by a later one at any time ([`Hub`]); the program does not notice, but for the tasks that need
//! a page meanwhile. Nothing here knows what is missing: the keeper does.

use super::{
    ipc::{FrameRun, FromKeeper, SLOT, SLOTS, Stats, ToKeeper, decoded, encoded},
    keeper::Keeper,
    lane::Lane,
};
use crate::{
    image::PAGE,
    report::{Event, Events},
    sys::{awake::AwakeWhile, region::Region},
    wire::{self, Attached, Channel, Fault, Goodbye, Message, Ranges},
};
use migrate_transport::{Link, PageFrame, PageReceiver};
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    runtime::Handle,
    sync::{mpsc, watch},
    task::AbortHandle,
};
use tokio_util::sync::CancellationToken;

/// Slots of the ring that only answers to faults may use.
const URGENT: u32 = 4;

/// New connections of migrations that are under way, and which sources have asked what became of theirs.
#[derive(Debug)]
pub struct Hub<L> {
    open: Mutex<HashMap<String, Open<L>>>,
    /// Of migrations that are served: whether their source has heard what became of them.
    answered: watch::Sender<HashMap<String, bool>>,
}

#[derive(Debug)]
struct Open<L> {
    links: mpsc::UnboundedSender<(Channel, L)>,
    /// Its thread for faults, as long as it takes them.
    lane: Weak<Lane>,
}

/// Where the connections of a copy come.
#[derive(Debug)]
pub struct Links<L> {
    new: mpsc::UnboundedReceiver<(Channel, L)>,
    /// The thread for what tasks wait for. None: it could not be started, and all is done by one.
    lane: Option<Arc<Lane>>,
}

impl<L> Default for Hub<L> {
    fn default() -> Self {
        Hub {
            open: Mutex::default(),
            answered: watch::Sender::default(),
        }
    }
}

impl<L> Hub<L> {
    /// From now on connections of this migration come here. None: somebody takes them already.
    pub fn register(&self, id: &str) -> Option<Links<L>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.get(id).is_some_and(|o| !o.links.is_closed()) {
            return None;
        }
        let lane = Lane::start()
            .inspect_err(|e| tracing::warn!("no thread for faults: {e}"))
            .ok()
            .map(Arc::new);
        let (links, new) = mpsc::unbounded_channel();
        let there = lane.as_ref().map_or_else(Weak::new, Arc::downgrade);
        open.insert(id.to_owned(), Open { links, lane: there });
        Some(Links { new, lane })
    }

    /// The thread for faults of a migration whose connections somebody takes.
    pub fn lane(&self, id: &str) -> Option<Arc<Lane>> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.get(id)?.lane.upgrade()
    }

    /// From now on it is known whether the source of this migration has asked, and heard, what became of it.
    pub fn question(&self, id: &str) -> Question<'_, L> {
        self.answered.send_modify(|all| _ = all.insert(id.to_owned(), false));
        Question {
            hub: self,
            id: id.to_owned(),
        }
    }

    /// The source of this migration has heard what became of it.
    pub fn note_answered(&self, id: &str) {
        self.answered
            .send_if_modified(|all| all.get_mut(id).is_some_and(|answered| !std::mem::replace(answered, true)));
    }

    /// Whether somebody takes connections of this migration.
    pub fn knows(&self, id: &str) -> bool {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.get(id).is_some_and(|o| !o.links.is_closed())
    }

    /// Hands a connection over. Err: nobody knows of its migration.
    pub fn pass(&self, id: &str, channel: Channel, link: L) -> Result<(), L> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, o| !o.links.is_closed());
        match open.get(id) {
            Some(o) => o.links.send((channel, link)).map_err(|e| e.0.1),
            None => Err(link),
        }
    }
}

/// See [`Hub::question`].
pub struct Question<'h, L> {
    hub: &'h Hub<L>,
    id: String,
}

impl<L> Question<'_, L> {
    /// Waits until it was asked and answered.
    pub async fn answered(&self) {
        let mut all = self.hub.answered.subscribe();
        // The sender lives as long as the hub: there is no error.
        let _ = all.wait_for(|all| all.get(&self.id) == Some(&true)).await;
    }
}

impl<L> Drop for Question<'_, L> {
    fn drop(&mut self) {
        self.hub.answered.send_modify(|all| _ = all.remove(&self.id));
    }
}

/// What the tasks of a drain share.
struct Shared {
    ring: Region,
    keeper: tokio::sync::Mutex<OwnedWriteHalf>,
    /// Free slots: for the push, for answers to faults.
    free: [tokio::sync::Mutex<mpsc::UnboundedReceiver<u32>>; 2],
    give: [mpsc::UnboundedSender<u32>; 2],
    /// What goes out on each link, while there is one.
    out: Mutex<[Option<mpsc::UnboundedSender<Message>>; 2]>,
    /// Somebody wants this agent to end.
    cancel: CancellationToken,
}

impl Shared {
    async fn tell(&self, m: &ToKeeper) -> io::Result<()> {
        let bytes = encoded(m)?;
        self.keeper.lock().await.write_all(&bytes).await
    }

    fn send(&self, channel: Channel, m: Message) -> bool {
        let out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        out[channel as usize].as_ref().is_some_and(|tx| tx.send(m).is_ok())
    }

    fn linked(&self) -> bool {
        let out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        out.iter().all(|tx| tx.as_ref().is_some_and(|tx| !tx.is_closed()))
    }

    /// Puts a frame into the ring.
    async fn deliver(&self, frame: PageFrame, urgent: bool) -> io::Result<()> {
        // Pages without content take no room, but the keeper's time.
        let pages: u64 = frame.runs.iter().map(|r| u64::from(r.pages)).sum();
        if pages > SLOT as u64 / PAGE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame larger than a frame may be"));
        }
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let slot = self.free[usize::from(urgent)].lock().await.recv().await.ok_or_else(gone)?;
        let mut at = slot as usize * SLOT;
        for chunk in &frame.data {
            self.ring.write(at, chunk);
            at += chunk.len();
        }
        let runs: Vec<FrameRun> = frame.runs.iter().map(|r| (r.space, r.start, r.pages, r.zero)).collect();
        self.tell(&ToKeeper::Frame { slot, urgent, runs }).await
    }
}

/// The drain of one copy.
pub struct Drain<L> {
    shared: Arc<Shared>,
    reader: OwnedReadHalf,
    buf: Vec<u8>,
    links: Links<L>,
    /// Where the push is taken.
    main: Handle,
    /// What moves messages and pages on each connection. They end with the drain: a connection whose source is gone would be kept until it has been silent for long.
    pumps: Mutex<Vec<AbortHandle>>,
}

impl<L> Drop for Drain<L> {
    fn drop(&mut self) {
        let pumps = self.pumps.get_mut().unwrap_or_else(PoisonError::into_inner);
        pumps.iter().for_each(AbortHandle::abort);
    }
}

/// How it ended.
pub struct Drained {
    /// The keeper's figures.
    pub stats: Stats,
    /// Whether the source has heard of it.
    pub goodbye: Goodbye,
}

impl<L: Link> Drain<L> {
    /// With a keeper that has started. `links`: where the copy's connections come.
    pub fn new(keeper: Keeper, links: Links<L>, cancel: CancellationToken) -> io::Result<Drain<L>> {
        let Keeper { channel, ring } = keeper;
        let (stream, buf) = channel.into_parts();
        stream.set_nonblocking(true)?;
        let main = Handle::current();
        // Faults come over it.
        let lane = links.lane.clone();
        let _there = lane.as_ref().map(|l| l.enter());
        let (reader, writer) = tokio::net::UnixStream::from_std(stream)?.into_split();
        let ((bulk, free_bulk), (urgent, free_urgent)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        for slot in 0..SLOTS {
            let _ = if slot < URGENT { &urgent } else { &bulk }.send(slot);
        }
        Ok(Drain {
            shared: Arc::new(Shared {
                ring,
                keeper: tokio::sync::Mutex::new(writer),
                free: [tokio::sync::Mutex::new(free_bulk), tokio::sync::Mutex::new(free_urgent)],
                give: [bulk, urgent],
                out: Mutex::default(),
                cancel,
            }),
            reader,
            buf,
            links,
            main,
            pumps: Mutex::default(),
        })
    }

    /// The control stream of the migration itself goes on as the push's.
    pub fn attach(&self, channel: Channel, link: L) -> tokio::task::JoinHandle<Goodbye> {
        let (tx, rx) = mpsc::unbounded_channel();
        self.shared.out.lock().unwrap_or_else(PoisonError::into_inner)[channel as usize] = Some(tx);
        let pump = pump(link, rx, self.shared.clone(), channel == Channel::Faults);
        let pump = match channel {
            Channel::Bulk => self.main.spawn(pump),
            Channel::Faults => tokio::spawn(pump),
        };
        let mut pumps = self.pumps.lock().unwrap_or_else(PoisonError::into_inner);
        pumps.retain(|p| !p.is_finished());
        pumps.push(pump.abort_handle());
        pump
    }

    /// A new connection, in the place of an earlier one.
    async fn take(&self, channel: Channel, link: L, pump: &mut Option<tokio::task::JoinHandle<Goodbye>>) -> io::Result<()> {
        let handle = self.attach(channel, link);
        let m = if channel == Channel::Bulk {
            *pump = Some(handle);
            // Its answer is what the new connection begins with.
            ToKeeper::List
        } else {
            ToKeeper::Again
        };
        self.shared.tell(&m).await
    }

    /// Runs to the end of the drain. `bulk`: the control stream, when there is one yet.
    pub async fn run(self, bulk: Option<L>, events: &Events) -> Result<Drained, String> {
        match self.links.lane.clone() {
            None => self.work(bulk, events.clone()).await,
            Some(lane) => match lane.run(self.work(bulk, events.clone())).await {
                Ok(r) => r,
                Err(e) => Err(format!("internal error: {e}")),
            },
        }
    }

    async fn work(mut self, bulk: Option<L>, events: Events) -> Result<Drained, String> {
        let mut pump: Option<tokio::task::JoinHandle<Goodbye>> = bulk.map(|l| self.attach(Channel::Bulk, l));
        let mut asked = false;
        let start = Instant::now();
        let mut shown = start;
        let (mut done, mut total) = (0, None);
        let mut tick = tokio::time::interval(Duration::from_millis(500));
        let mut awake = AwakeWhile::default();
        let lost = |e: io::Error| format!("the keeper of the copy's memory cannot be reached any more: {e}");
        // The connection that asks for it is there before the answer that may be.
        while let Ok((channel, link)) = self.links.new.try_recv() {
            self.take(channel, link, &mut pump).await.map_err(lost)?;
        }
        loop {
            // Before anything is waited for: some may have been read along with the hello, and nothing need follow it.
            while let Some(m) = decoded::<FromKeeper>(&mut self.buf).map_err(lost)? {
                match m {
                    FromKeeper::Fault { name, at } => {
                        awake.touch();
                        self.shared.send(Channel::Faults, Message::Fault(Fault { space: name, at }));
                    }
                    FromKeeper::Free { slot, urgent, bytes, left } => {
                        let _ = self.shared.give[usize::from(urgent)].send(slot);
                        if !urgent {
                            self.shared.send(Channel::Bulk, Message::Credit(bytes));
                        }
                        done += bytes;
                        let total = *total.get_or_insert(left * PAGE + bytes);
                        if shown.elapsed() > Duration::from_millis(100) {
                            shown = Instant::now();
                            let rate = (done as f64 / start.elapsed().as_secs_f64()) as u64;
                            let bytes = total.saturating_sub(left * PAGE);
                            events(Event::Progress {
                                round: 0,
                                bytes,
                                total,
                                rate,
                            });
                        }
                    }
                    FromKeeper::Missing { missing } => {
                        let missing = packed(&missing);
                        self.shared
                            .send(Channel::Bulk, Message::Attached(Attached { missing, again: false }));
                    }
                    FromKeeper::Hello | FromKeeper::Ready => {}
                    FromKeeper::Drained(stats) => {
                        let heard = self.shared.send(Channel::Bulk, Message::Drained(stats.clone()));
                        self.shared.tell(&ToKeeper::Bye).await.map_err(lost)?;
                        // A connection that has ended tells how: one that fell silent will be made again.
                        let goodbye = match pump {
                            Some(p) if heard || p.is_finished() => p.await.unwrap_or(Goodbye::Not),
                            _ => Goodbye::Not,
                        };
                        return Ok(Drained { stats: *stats, goodbye });
                    }
                }
            }
            tokio::select! {
                n = awake.until(self.reader.read_buf(&mut self.buf)) => if n.map_err(lost)? == 0 {
                    return Err(lost(io::ErrorKind::UnexpectedEof.into()));
                },
                Some((channel, link)) = self.links.new.recv() => self.take(channel, link, &mut pump).await.map_err(lost)?,
                () = self.shared.cancel.cancelled(), if !asked => {
                    asked = true;
                    events(Event::Note { text: "the program runs here already, and pages it needs are still on their way: this goes on until they have arrived".into() });
                }
                _ = tick.tick() => {
                    if asked && !self.shared.linked() {
                        return Err("interrupted while the source cannot be reached: the program waits for pages; start `migrate receive` again with the same --state-dir".into());
                    }
                }
            }
        }
    }
}

/// Ranges by space.
fn packed(missing: &[(u32, u64, u64)]) -> Vec<Ranges> {
    let by_name = missing.chunk_by(|a, b| a.0 == b.0);
    by_name
        .map(|g| {
            let ranges: Vec<(u64, u64)> = g.iter().map(|r| (r.1, r.2)).collect();
            Ranges::pack(g[0].0, &ranges)
        })
        .collect()
}

/// Moves messages out and page streams in, until the link breaks or is replaced. How the source went.
async fn pump<L: Link>(mut link: L, mut out: mpsc::UnboundedReceiver<Message>, shared: Arc<Shared>, urgent: bool) -> Goodbye {
    loop {
        tokio::select! {
            m = out.recv() => {
                let Some(m) = m else { return Goodbye::Not };
                if let Err(e) = wire::send(&mut link, &m).await {
                    return Goodbye::lost(e.is_silence());
                }
                if matches!(m, Message::Drained(_)) {
                    return wire::goodbye(&mut link, &shared.cancel).await;
                }
            }
            s = link.accept_pages() => {
                let mut stream = match s {
                    Ok(stream) => stream,
                    Err(e) => return Goodbye::lost(e.is_silence()),
                };
                let shared = shared.clone();
                tokio::spawn(async move {
                    while let Ok(Some(frame)) = stream.recv().await {
                        if let Err(e) = shared.deliver(frame, urgent).await {
                            tracing::warn!(error = %e, "pages from the source are not taken");
                            break;
                        }
                    }
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::ipc::Channel as Socket, *};
    use migrate_transport::{Run, memory::MemoryLink};

    /// A drain with a keeper that is heard over this socket; the hub has to stay.
    fn drain(channel: Socket) -> (Hub<MemoryLink>, Drain<MemoryLink>) {
        let ring = tempfile::tempfile().unwrap();
        ring.set_len(super::super::ipc::RING as u64).unwrap();
        let ring = Region::map(&ring, super::super::ipc::RING, 0).unwrap();
        let hub = Hub::default();
        let links = hub.register("some").unwrap();
        let drain = Drain::new(Keeper { channel, ring }, links, CancellationToken::new());
        (hub, drain.unwrap())
    }

    /// The keeper would be busy with a run of zeros without an end, while the tasks that wait for a page wait.
    #[tokio::test]
    async fn the_keeper_is_given_no_more_pages_than_a_frame_has() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (_hub, drain) = drain(Socket::new(ours));
        let mut keeper = Socket::new(theirs);
        let of = |pages: &[u32]| PageFrame {
            runs: pages.iter().map(|n| Run::new(0, 0, *n, true).unwrap()).collect(),
            data: Vec::new(),
        };
        for pages in [&[257][..], &[1 << 28], &[200, 57], &[1 << 28; 2]] {
            assert!(drain.shared.deliver(of(pages), false).await.is_err(), "{pages:?}");
        }
        drain.shared.deliver(of(&[200, 56]), false).await.unwrap();
        let ToKeeper::Frame { runs, .. } = keeper.recv().unwrap() else {
            panic!("something else");
        };
        assert_eq!(runs.len(), 2);
    }

    /// A keeper that an agent finds again says two things at once, and nothing after them.
    #[tokio::test]
    async fn what_came_with_the_hello_is_heard() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut keeper = Socket::new(theirs);
        keeper.send(&FromKeeper::Hello, &[]).unwrap();
        let stats = Stats {
            pushed: 7,
            ..Stats::default()
        };
        keeper.send(&FromKeeper::Drained(Box::new(stats.clone())), &[]).unwrap();
        let mut channel = Socket::new(ours);
        assert!(matches!(channel.recv().unwrap(), FromKeeper::Hello));
        let (_hub, drain) = drain(channel);
        let events: Events = Arc::new(|_| {});
        let ran = tokio::time::timeout(Duration::from_secs(10), drain.run(None, &events)).await;
        assert_eq!(ran.expect("it goes on by itself").unwrap().stats, stats);
        assert!(matches!(keeper.recv().unwrap(), ToKeeper::Bye));
    }
}

//! The source's half of the drain: the originals stand still, and their pages are sent: those that tasks wait for at once, the others behind.
//!
//! Little of the push is under way at a time, twice what the path holds: a page that is asked for while it is under way is not sent again but arrives
//! within a millisecond, and what follows a fault does not queue behind megabytes that nobody waits for. The destination acknowledges what is in
//! place, not what has arrived, so a slow destination slows the push down as well.

use super::{
    ipc::Stats,
    lane::Lane,
    push::{Left, PIECE},
};
use crate::{
    door::Door,
    dump::pages::{self, Batch, Reader, SpacePlan},
    image::PAGE,
    pages::PageSet,
    procfs::{self, maps},
    report::{Event, Events},
    source::Connector,
    sys::{awake::AwakeWhile, mem::Mem},
    wire::{self, Attach, Attached, Channel, Message, WireError},
};
use migrate_transport::{Link, PageSender};
use std::{
    collections::HashMap,
    fs::File,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// Least bytes of the push that are under way, and most.
const WINDOW: (u64, u64) = (1 << 20, 16 << 20);
/// The least while tasks wait for pages, each of which queues behind them.
const RESPONSIVE: u64 = 512 << 10;
/// How long after a fault that lasts.
const AFTER_A_FAULT: Duration = Duration::from_millis(20);
/// How long an answer to an attachment may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The frozen originals' memory, by the names of their address spaces.
#[derive(Debug, Default)]
pub struct Originals {
    /// Where clients come to them.
    pub door: Door,
    /// What reads each of them.
    pub readers: HashMap<u32, Reader>,
    /// What may be missing of each of them.
    pub may_follow: HashMap<u32, PageSet>,
}

impl Originals {
    /// Of stopped processes: (name of the address space, pid), and of shared memory: (its name, a process that maps it, where).
    pub fn open(pids: Vec<i32>, spaces: &[(u32, i32)], objects: &[(u32, i32, u64, u64)]) -> io::Result<Originals> {
        let mut o = Originals {
            door: Door::unknown(pids),
            ..Originals::default()
        };
        for (space, pid) in spaces {
            o.readers.insert(*space, Reader::Process(Mem::open(*pid)?));
            let mapped = maps::maps(*pid)?.into_iter().map(|m| (m.start, m.end));
            o.may_follow.insert(*space, PageSet::from_ranges(mapped));
        }
        for (name, pid, start, end) in objects {
            let file = File::open(procfs::mapped(*pid, *start, *end))?;
            o.may_follow.insert(*name, PageSet::from_ranges([(0, file.metadata()?.len())]));
            o.readers.insert(*name, Reader::Object(file));
        }
        Ok(o)
    }

    /// All that may be missing.
    fn all(&self) -> Vec<(u32, u64, u64)> {
        let of = |(&space, set): (&u32, &PageSet)| set.ranges().iter().map(|r| (space, r.0, r.1)).collect::<Vec<_>>();
        self.may_follow.iter().flat_map(of).collect()
    }

    /// Of the pages that a destination says it misses those that may be missing: it is not to fill this host's memory with a list of others.
    fn missing(&self, claimed: &[wire::Ranges]) -> Option<Vec<(u32, u64, u64)>> {
        let mut out = Vec::new();
        for r in claimed {
            let list = PageSet::from_ranges(r.unpack()?);
            let known = self.may_follow.get(&r.space).map(|k| k.intersection(&list)).unwrap_or_default();
            out.extend(known.ranges().iter().map(|&(a, b)| (r.space, a, b)));
        }
        Some(out)
    }

    fn read(&self, space: u32, ranges: &[(u64, u64)]) -> io::Result<Vec<Batch>> {
        let reader = self
            .readers
            .get(&space)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no original has this address space"))?;
        let plan = SpacePlan {
            space,
            ranges: ranges.to_vec(),
        };
        let mut out = Vec::new();
        pages::read_plan(&plan, reader, &mut |b| {
            out.push(b);
            true
        })?;
        Ok(out)
    }
}

/// How the drain ended.
#[derive(Debug)]
pub struct Served<L> {
    /// The keeper's figures.
    pub stats: Stats,
    /// The link it was heard on, to say goodbye.
    pub link: L,
    /// What went over all links.
    pub totals: Totals,
}

/// What a drain took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    /// Pages sent with content.
    pub pages: u64,
    /// Pages sent as zeros.
    pub zero: u64,
    /// Bytes on the wire, of the links made here.
    pub bytes: u64,
    /// How often the connection was made anew.
    pub reconnects: u32,
    /// From each cut to the next page on its way, the longest.
    pub longest_cut: Duration,
}

/// Why it did not.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The destination knows nothing of it, or says that its copy is dead.
    #[error("the other host says: {0}")]
    Refused(String),
    /// They are all there is of what has not arrived.
    #[error("the stopped originals cannot be read: {0}")]
    Read(io::Error),
    /// While the destination could not be reached.
    #[error("interrupted")]
    Interrupted,
}

/// What one drain goes by.
pub struct Drain<'a, C> {
    /// Makes connections.
    pub connector: &'a C,
    /// Which migration.
    pub id: &'a str,
    /// Bytes a second at most on the wire.
    pub bandwidth: Option<u64>,
    /// Events.
    pub events: &'a Events,
    /// Ctrl-C.
    pub cancel: &'a CancellationToken,
}

/// What the tasks of a session share.
struct Session {
    left: Mutex<Left>,
    originals: Arc<Originals>,
    total: u64,
    started: Instant,
    /// Bytes of memory pushed and not acknowledged.
    under_way: AtomicU64,
    acknowledged: Notify,
    pages: AtomicU64,
    zero: AtomicU64,
    first: Mutex<Option<Instant>>,
    /// Microseconds after the start; 0: none yet.
    last_fault: AtomicU64,
    /// Bytes on the wire that answers to faults took.
    answered: AtomicU64,
}

impl Session {
    fn note(&self, b: &Batch) {
        self.pages.fetch_add(b.pages, Ordering::Relaxed);
        self.zero.fetch_add(b.zero, Ordering::Relaxed);
        self.first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert_with(Instant::now);
    }

    /// Bytes that may be under way; `path`: what the path holds, twice.
    fn window(&self, path: u64) -> u64 {
        let last = self.last_fault.load(Ordering::Relaxed);
        let faulting = last > 0 && (self.started.elapsed().as_micros() as u64).saturating_sub(last) < AFTER_A_FAULT.as_micros() as u64;
        path.clamp(if faulting { RESPONSIVE } else { WINDOW.0 }, WINDOW.1)
    }

    fn left(&self) -> std::sync::MutexGuard<'_, Left> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a reconnection came to.
enum Again<L> {
    Links(L, Faults<L>, Vec<(u32, u64, u64)>),
    Drained(L, Stats),
}

enum End {
    Done(Stats),
    Lost(String),
    Refused(String),
    Read(io::Error),
}

impl From<WireError> for End {
    fn from(e: WireError) -> End {
        End::Lost(e.to_string())
    }
}

impl From<migrate_transport::LinkError> for End {
    fn from(e: migrate_transport::LinkError) -> End {
        End::Lost(e.to_string())
    }
}

/// What a destination says to a connection for one of its copies.
#[derive(Debug)]
pub enum Welcome {
    /// It misses this, on [`Channel::Bulk`].
    Missing(Vec<wire::Ranges>),
    /// Nothing is missing any more.
    Drained(Stats),
}

async fn ask<L: Link>(link: &mut L, id: &str, channel: Channel, first: bool) -> Result<Message, Refusal> {
    let ask = async {
        let m = Message::Attach(Attach {
            id: id.to_owned(),
            channel,
            first,
        });
        wire::send(link, &m).await?;
        loop {
            // Acknowledgements of what came over the connection before.
            match wire::recv(link).await? {
                Message::Credit(_) => {}
                m => return Ok::<_, WireError>(m),
            }
        }
    };
    let answer = tokio::time::timeout(PATIENCE, ask).await;
    let answer = answer.map_err(|_| Refusal::Unreachable("it does not answer".into()))?;
    answer.map_err(|e| Refusal::Unreachable(e.to_string()))
}

/// A second connection of this migration, or either of them anew.
async fn attach<C: Connector>(connector: &C, id: &str, channel: Channel) -> Result<(C::Link, Welcome), Refusal> {
    let come = |first| async move {
        let mut link = connector.connect().await.map_err(|e| Refusal::Unreachable(e.to_string()))?;
        let answer = ask(&mut link, id, channel, first).await?;
        Ok::<_, Refusal>((link, answer))
    };
    let (mut link, mut answer) = come(true).await?;
    if let Message::Attached(Attached { again: true, .. }) = answer {
        let apart = async {
            let mut link = link.again().await.map_err(|e| Refusal::Unreachable(e.to_string()))?;
            let answer = ask(&mut link, id, channel, false).await?;
            Ok::<_, Refusal>((link, answer))
        };
        (link, answer) = match apart.await {
            Ok(there) => there,
            // Something between the hosts: without it, then.
            Err(why) => {
                tracing::debug!(?why, "no socket of its own for faults");
                come(false).await?
            }
        };
    }
    match answer {
        Message::Attached(a) => Ok((link, Welcome::Missing(a.missing))),
        Message::Drained(stats) => Ok((link, Welcome::Drained(*stats))),
        Message::Aborted(reason) => {
            link.close("refused").await;
            Err(Refusal::Refused(reason))
        }
        other => Err(Refusal::Unreachable(format!("{} instead of an answer", other.name()))),
    }
}

/// The connection that faults come on, and the thread it lives on.
#[derive(Debug)]
pub struct Faults<L> {
    link: L,
    lane: Lane,
}

impl<L: Link> Faults<L> {
    /// Starts the thread and connects there.
    pub async fn connect<C: Connector<Link = L>>(connector: &C, id: &str) -> Result<Faults<L>, Refusal> {
        let lane = Lane::start().map_err(|e| Refusal::Unreachable(format!("cannot start a thread: {e}")))?;
        let (link, _) = lane.around(attach(connector, id, Channel::Faults)).await?;
        Ok(Faults { link, lane })
    }
}

/// Why a connection could not be attached.
#[derive(Debug)]
pub enum Refusal {
    /// Perhaps later.
    Unreachable(String),
    /// The destination says no.
    Refused(String),
}

impl<C: Connector> Drain<'_, C> {
    /// Serves until the destination says that nothing is missing. `links`: the first two connections, when they are there; all
    /// that may be missing is missing then.
    pub async fn run(&self, originals: Originals, links: Option<(C::Link, Faults<C::Link>)>) -> Result<Served<C::Link>, ServeError> {
        let door = originals.door.clone();
        let door = tokio::task::spawn_blocking(move || door.shut());
        let _door = AbortOnDropHandle::new(door);
        let originals = Arc::new(originals);
        let mut first = links.map(|(bulk, faults)| Again::Links(bulk, faults, originals.all()));
        let mut totals = Totals::default();
        let mut cut: Option<Instant> = None;
        loop {
            let again = match first.take() {
                Some(f) => f,
                None => {
                    totals.reconnects += 1;
                    self.reconnect(&originals).await?
                }
            };
            let (mut bulk, faults, ranges) = match again {
                Again::Links(bulk, faults, ranges) => (bulk, faults, ranges),
                Again::Drained(link, stats) => return Ok(Served { stats, link, totals }),
            };
            let left = Left::new(ranges);
            let session = Arc::new(Session {
                total: left.pages() * PAGE,
                left: Mutex::new(left),
                originals: originals.clone(),
                started: Instant::now(),
                under_way: AtomicU64::new(0),
                acknowledged: Notify::new(),
                pages: AtomicU64::new(0),
                zero: AtomicU64::new(0),
                first: Mutex::new(None),
                // As if one had just been: the first steps of the copy are all faults.
                last_fault: AtomicU64::new(1),
                answered: AtomicU64::new(0),
            });
            let before = bulk.bytes_sent();
            let end = self.session(&session, &mut bulk, faults).await;
            totals.pages += session.pages.load(Ordering::Relaxed);
            totals.zero += session.zero.load(Ordering::Relaxed);
            totals.bytes += bulk.bytes_sent() - before + session.answered.load(Ordering::Relaxed);
            let served = *session.first.lock().unwrap_or_else(PoisonError::into_inner);
            if let (Some(cut), Some(served)) = (cut, served) {
                totals.longest_cut = totals.longest_cut.max(served - cut);
            }
            match end {
                End::Done(stats) => {
                    return Ok(Served { stats, link: bulk, totals });
                }
                End::Lost(why) => {
                    if cut.is_none() || served.is_some() {
                        cut = Some(Instant::now());
                    }
                    (self.events)(Event::Note {
                        text: format!(
                            "the connection is lost ({why}); the copy runs, and needs {} more MiB from here: connecting again",
                            (session.left().pages() * PAGE) >> 20
                        ),
                    });
                }
                End::Refused(why) => return Err(ServeError::Refused(why)),
                End::Read(e) => return Err(ServeError::Read(e)),
            }
        }
    }

    async fn reconnect(&self, originals: &Originals) -> Result<Again<C::Link>, ServeError> {
        let mut pause = Duration::from_millis(20);
        loop {
            let both = async {
                let (bulk, welcome) = attach(self.connector, self.id, Channel::Bulk).await?;
                let missing = match welcome {
                    Welcome::Drained(stats) => return Ok(Again::Drained(bulk, stats)),
                    Welcome::Missing(m) => m,
                };
                let faults = Faults::connect(self.connector, self.id).await?;
                let ranges = originals
                    .missing(&missing)
                    .ok_or_else(|| Refusal::Refused("these pages are missing, which are none".into()))?;
                Ok(Again::Links(bulk, faults, ranges))
            };
            match both.await {
                Ok(again) => return Ok(again),
                Err(Refusal::Refused(why)) => return Err(ServeError::Refused(why)),
                Err(Refusal::Unreachable(why)) => tracing::debug!(why, "not connected yet"),
            }
            if self.cancel.is_cancelled() {
                return Err(ServeError::Interrupted);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    async fn session(&self, s: &Arc<Session>, bulk: &mut C::Link, faults: Faults<C::Link>) -> End {
        let rtt = bulk.rtt();
        let pages = match bulk.open_pages().await {
            Ok(p) => p,
            Err(e) => return e.into(),
        };
        let push = push(s.clone(), pages, rtt, self.bandwidth, self.events);
        let answers = faults.lane.run(answer(s.clone(), faults.link));
        let hear = hear(s.clone(), bulk);
        tokio::pin!(push, answers, hear);
        let mut pushed = false;
        let mut asked = false;
        let broken = loop {
            tokio::select! {
                r = &mut push, if !pushed => match r {
                    Ok(()) => pushed = true,
                    Err(e) => break e,
                },
                e = &mut answers => break e.unwrap_or_else(|e| End::Lost(e.to_string())),
                e = &mut hear => return e,
                () = self.cancel.cancelled(), if !asked => {
                    asked = true;
                    (self.events)(Event::Note { text: "the program runs at the other host already and needs its pages from here: this goes on until it has them".into() });
                }
            }
        };
        // The control stream may know better why.
        let known = tokio::time::timeout(Duration::from_millis(50), &mut hear).await;
        known.ok().filter(|h| !matches!(h, End::Lost(_))).unwrap_or(broken)
    }
}

/// Hears acknowledgements, and the end.
async fn hear<L: Link>(s: Arc<Session>, bulk: &mut L) -> End {
    loop {
        match wire::recv(bulk).await {
            Ok(Message::Credit(bytes)) => {
                let _ = s
                    .under_way
                    .fetch_update(Ordering::AcqRel, Ordering::Acquire, |u| Some(u.saturating_sub(bytes)));
                s.acknowledged.notify_one();
            }
            Ok(Message::Drained(stats)) => return End::Done(*stats),
            Ok(Message::Aborted(why)) => return End::Refused(why),
            Ok(other) => return End::Lost(format!("{} in the drain", other.name())),
            Err(e) => return e.into(),
        }
    }
}

/// Answers faults.
async fn answer<L: Link>(s: Arc<Session>, mut faults: L) -> End {
    let mut pages = match faults.open_pages().await {
        Ok(p) => p,
        Err(e) => return e.into(),
    };
    let mut awake = AwakeWhile::default();
    loop {
        let f = match awake.until(wire::recv(&mut faults)).await {
            Ok(Message::Fault(f)) => f,
            Ok(other) => return End::Lost(format!("{} on the connection for faults", other.name())),
            Err(e) => return e.into(),
        };
        awake.touch();
        s.last_fault.store(s.started.elapsed().as_micros() as u64 + 1, Ordering::Relaxed);
        let ranges = s.left().fault(f.space, f.at);
        // The page itself leaves before the others are read.
        for ranges in page_first(ranges) {
            if ranges.is_empty() {
                continue;
            }
            let batches = match s.originals.read(f.space, &ranges) {
                Ok(b) => b,
                Err(e) => return End::Read(e),
            };
            for b in batches {
                s.note(&b);
                if let Err(e) = pages.send(&b.runs, b.data).await {
                    return e.into();
                }
            }
            tokio::task::yield_now().await;
        }
        s.answered.store(faults.bytes_sent(), Ordering::Relaxed);
    }
}

/// The first page, and what else there is.
fn page_first(mut ranges: Vec<(u64, u64)>) -> [Vec<(u64, u64)>; 2] {
    let page = ranges.first_mut().map(|(start, _)| {
        let at = *start;
        *start += PAGE;
        (at, *start)
    });
    ranges.retain(|(start, end)| start < end);
    [page.into_iter().collect(), ranges]
}

/// Sends what nobody has asked for yet.
async fn push<P: PageSender>(s: Arc<Session>, mut pages: P, rtt: Duration, bandwidth: Option<u64>, events: &Events) -> Result<(), End> {
    let mut shown = Instant::now();
    let mut done = 0u64;
    loop {
        let rate = done as f64 / s.started.elapsed().as_secs_f64().max(1e-3);
        let path = (rate * rtt.as_secs_f64() * 2.0) as u64;
        while s.under_way.load(Ordering::Acquire) + PIECE * PAGE > s.window(path) {
            s.acknowledged.notified().await;
        }
        let Some((space, ranges)) = s.left().take_piece() else { break };
        let bytes: u64 = ranges.iter().map(|r| r.1 - r.0).sum();
        s.under_way.fetch_add(bytes, Ordering::AcqRel);
        let reading = s.clone();
        let read = tokio::task::spawn_blocking(move || reading.originals.read(space, &ranges));
        let batches = read.await.map_err(|e| End::Read(io::Error::other(e)))?.map_err(End::Read)?;
        for b in batches {
            s.note(&b);
            pages.send(&b.runs, b.data).await?;
        }
        done += bytes;
        if shown.elapsed() > Duration::from_millis(100) {
            shown = Instant::now();
            let left = s.left().pages() * PAGE;
            events(Event::Progress {
                round: 0,
                bytes: s.total.saturating_sub(left),
                total: s.total,
                rate: rate as u64,
            });
        }
        if let Some(limit) = bandwidth {
            let due = Duration::from_secs_f64(pages.raw_and_wire_bytes().1 as f64 / limit as f64);
            if let Some(early) = due.checked_sub(s.started.elapsed()) {
                tokio::time::sleep(early).await;
            }
        }
    }
    pages.end().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Failure;
    use migrate_transport::memory::{self, MemoryLink};

    /// Hands out these.
    struct Prepared(Mutex<Vec<MemoryLink>>);

    impl Connector for Prepared {
        type Link = MemoryLink;
        async fn connect(&self) -> Result<MemoryLink, Failure> {
            let next = self.0.lock().unwrap().pop();
            next.ok_or_else(|| Failure::failed("connect", 0, "no more of them"))
        }
        fn name(&self) -> String {
            "prepared".into()
        }
    }

    /// A link in memory cannot come again from the same socket, as little as one whose path was changed in between.
    #[tokio::test]
    async fn a_source_that_cannot_come_again_does_without() {
        let (first, at_first, _a) = memory::pair(memory::Config::default());
        let (second, at_second, _b) = memory::pair(memory::Config::default());
        let connector = Prepared(Mutex::new(vec![second, first]));
        let answer = async |mut link: MemoryLink, again: bool| {
            let m = wire::recv(&mut link).await.unwrap();
            let a = Message::Attached(Attached {
                missing: Vec::new(),
                again,
            });
            wire::send(&mut link, &a).await.unwrap();
            match m {
                Message::Attach(a) => (a.first, link),
                other => panic!("{}", other.name()),
            }
        };
        let answers = async { (answer(at_first, true).await, answer(at_second, true).await) };
        let (taken, (one, two)) = tokio::join!(attach(&connector, "some", Channel::Faults), answers);
        assert!(matches!(taken, Ok((_, Welcome::Missing(m))) if m.is_empty()));
        assert_eq!((one.0, two.0), (true, false), "it is not to be asked for ever");
    }

    #[test]
    fn a_list_of_missing_pages_is_held_against_what_may_be_missing() {
        let mut originals = Originals::default();
        originals
            .may_follow
            .insert(3, PageSet::from_ranges([(0x10000, 0x20000), (0x30000, 0x31000)]));
        let claimed = [
            wire::Ranges::pack(3, &[(0x1f000, 0x30000 + PAGE), (1 << 40, 1 << 50)]),
            wire::Ranges::pack(4, &[(0, 1 << 50)]),
        ];
        assert_eq!(
            originals.missing(&claimed).unwrap(),
            [(3, 0x1f000, 0x20000), (3, 0x30000, 0x31000)],
            "neither the gap, nor a petabyte, nor a space that is none"
        );
    }
}

//! Pages on their way: read by a thread of its own, framed, compressed where that pays, held to the bandwidth limit.

use super::{
    freeze,
    freeze::Snapshot,
    objects::{self, Hash},
    rounds::Prepared,
};
use crate::{
    dump::pages::{self, Batch, OBJECT_SPACE, Reader, SpacePlan},
    image::PAGE,
    laps::Laps,
    pages::PageSet,
    plan,
    report::{Event, Events, Round},
    wire::{self, Applied, Memory, Message, Ranges, RoundStart, WireError},
};
use migrate_transport::{Encoding, Link, PageSender, sample_compression};
use std::{
    io,
    time::{Duration, Instant},
};
use tokio::{sync::mpsc, task::JoinHandle};

/// What a transfer goes by.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// Bytes a second at most.
    pub bandwidth: Option<u64>,
    /// Bytes a second that the link was seen to carry; 0: unknown.
    pub rate: f64,
}

/// What became of the pages of a round.
#[derive(Debug, Default)]
pub struct Fate {
    /// Pages that could not be read: (space or object, start, end).
    pub missed: Vec<(u32, u64, u64)>,
    /// Pages of objects as they were sent: (object, page, hash).
    pub objects: Vec<(u32, u64, Hash)>,
}

/// Bytes from which a round is worth a sample for compression.
const WORTH_SAMPLING: u64 = 4 << 20;
/// Bytes that are read at once, in less time than it takes to wake another thread twice.
const AT_ONCE: u64 = 256 << 10;
/// Batches that are read ahead of the network.
const AHEAD: usize = 16;
/// What a round's bytes are sampled with.
const SAMPLES: u64 = 16;

/// Sends a prepared round, and waits until the destination has it in place.
pub async fn round<L: Link>(
    link: &mut L,
    number: u32,
    p: Prepared,
    terms: Terms,
    events: &Events,
) -> Result<(Round, Applied, Fate), WireError> {
    let start = Instant::now();
    let before = link.bytes_sent();
    let total = p.bytes();
    let begin = RoundStart {
        number,
        tree: p.tree,
        names: p.names,
        drops: p.drops,
        expect: p.expect,
        bytes: total,
    };
    wire::send(link, &Message::Round(Box::new(begin))).await?;
    let planned: Vec<SpacePlan> = p.plans.iter().map(|(plan, _)| plan.clone()).collect();
    let (mut round, fate) = send_pages(link, p.plans, total, number, false, terms, events).await?;
    let applied = match wire::recv(link).await? {
        Message::Applied(a) if a.number == number => a,
        Message::Aborted(reason) => return Err(WireError::Protocol(format!("that it gave up: {reason}"))),
        other => {
            return Err(WireError::Protocol(format!(
                "{} instead of the end of round {number}",
                other.name()
            )));
        }
    };
    if (applied.pages, applied.zero) != (round.pages, round.zero_pages) {
        return Err(WireError::Protocol(format!(
            "that it has {} pages and {} zero pages of round {number}; {} and {} were sent",
            applied.pages, applied.zero, round.pages, round.zero_pages
        )));
    }
    if !within(&applied.missed, &planned) {
        return Err(WireError::Protocol(format!(
            "that it could not write pages of round {number} that were not in it"
        )));
    }
    round.bytes = link.bytes_sent() - before;
    round.ms = start.elapsed().as_secs_f64() * 1000.0;
    Ok((round, applied, fate))
}

/// Whether pages, (space or object, start, end), are of a round that was planned so.
fn within(pages: &[(u32, u64, u64)], planned: &[SpacePlan]) -> bool {
    if pages.is_empty() {
        return true;
    }
    let planned: Vec<(u32, PageSet)> = planned
        .iter()
        .map(|p| (p.space, PageSet::from_ranges(p.ranges.iter().copied())))
        .collect();
    let sent = |(name, a, b): &(u32, u64, u64)| {
        planned
            .iter()
            .any(|(space, set)| space == name && set.clip(*a, *b).bytes() == b.saturating_sub(*a))
    };
    pages.iter().all(|m| m.1 < m.2 && sent(m))
}

/// Sends every page of the frozen tree that is not at the destination yet.
pub async fn last<L: Link>(link: &mut L, snap: &mut Snapshot, number: u32, terms: Terms, events: &Events) -> Result<Round, WireError> {
    let start = Instant::now();
    let mut laps = Laps::start();
    let total: u64 = snap.plans.iter().map(SpacePlan::bytes).sum();
    let before = link.bytes_sent();
    let mut readers = Vec::new();
    for plan in &snap.plans {
        let reader = freeze::open_reader(plan.space, snap)
            .map_err(|e| WireError::Protocol(format!("nothing: cannot read the tree's memory: {e}")))?;
        readers.push((plan.clone(), reader));
    }
    laps.lap("open readers");
    let message = Message::Memory(Box::new(Memory {
        drops: std::mem::take(&mut snap.drops),
        guards: std::mem::take(&mut snap.guards),
        bytes: total,
        later: snap.later.iter().map(|p| Ranges::pack(p.space, &p.ranges)).collect(),
        narrowed: snap.finding.is_some(),
    }));
    wire::send(link, &message).await?;
    laps.lap("say what is to come");
    let (mut round, _) = send_pages(link, readers, total, number, true, terms, events).await?;
    round.bytes = link.bytes_sent() - before;
    laps.lap("send the pages");
    laps.log("transfer");
    round.ms = start.elapsed().as_secs_f64() * 1000.0;
    events(Event::Round(round));
    Ok(round)
}

/// Whether compressing takes the cores that encrypt and send. Under a bandwidth limit these have time.
pub fn cores_shared(bandwidth: Option<u64>) -> bool {
    std::thread::available_parallelism().is_ok_and(|n| n.get() <= 2) && bandwidth.is_none()
}

/// Hashes the pages of a batch, each run of which has a chunk of data of its own.
pub fn note(batch: &Batch, out: &mut Vec<(u32, u64, Hash)>) {
    let mut data = batch.data.iter();
    let zero = objects::hash(&[0; PAGE as usize]);
    for run in &batch.runs {
        let mut chunk = (!run.zero)
            .then(|| data.next())
            .flatten()
            .into_iter()
            .flat_map(|d| d.chunks(PAGE as usize));
        for k in 0..u64::from(run.pages) {
            out.push((run.space, run.start + k * PAGE, chunk.next().map_or(zero, objects::hash)));
        }
    }
}

/// Pages in the order in which they are sent.
enum Batches {
    /// All that there are.
    Read(std::vec::IntoIter<io::Result<Batch>>, Fate),
    /// Read by another thread, some batches ahead.
    Beside(mpsc::Receiver<io::Result<Batch>>, JoinHandle<Fate>),
}

impl Batches {
    fn of(readers: Vec<(SpacePlan, Reader)>, strict: bool, total: u64) -> Batches {
        if total <= AT_ONCE {
            let mut all = Vec::new();
            let fate = read(readers, strict, &mut |b| {
                all.push(b);
                true
            });
            return Batches::Read(all.into_iter(), fate);
        }
        let (tx, rx) = mpsc::channel(AHEAD);
        let thread = tokio::task::spawn_blocking(move || read(readers, strict, &mut |b| tx.blocking_send(b).is_ok()));
        Batches::Beside(rx, thread)
    }

    async fn next(&mut self) -> Option<io::Result<Batch>> {
        match self {
            Batches::Read(all, _) => all.next(),
            Batches::Beside(rx, _) => rx.recv().await,
        }
    }

    /// What became of them, when there are no more.
    async fn end(self) -> Fate {
        match self {
            Batches::Read(_, fate) => fate,
            Batches::Beside(_, thread) => thread.await.unwrap_or_default(),
        }
    }
}

/// Reads pages batch by batch, until `give` wants no more. `strict`: the tree is frozen, and every page can be read.
fn read(readers: Vec<(SpacePlan, Reader)>, strict: bool, give: &mut dyn FnMut(io::Result<Batch>) -> bool) -> Fate {
    let mut fate = Fate::default();
    for (plan, reader) in readers {
        let compared = !strict && plan.space >= OBJECT_SPACE;
        let mut sink = |b: Batch| {
            if compared {
                note(&b, &mut fate.objects);
            }
            give(Ok(b))
        };
        let r = if strict {
            pages::read_plan(&plan, &reader, &mut sink)
        } else {
            pages::read_running(&plan, &reader, &mut fate.missed, &mut sink)
        };
        if let Err(e) = r {
            give(Err(e));
            break;
        }
    }
    fate
}

/// `strict`: see [`read`].
async fn send_pages<L: Link>(
    link: &mut L,
    readers: Vec<(SpacePlan, Reader)>,
    total: u64,
    number: u32,
    strict: bool,
    terms: Terms,
    events: &Events,
) -> Result<(Round, Fate), WireError> {
    let start = Instant::now();
    let before = link.bytes_sent();
    let mut round = Round::default();
    if total == 0 {
        return Ok((round, Fate::default()));
    }
    let mut stream = link.open_pages().await?;
    let mut batches = Batches::of(readers, strict, total);
    let mut sampled = total < WORTH_SAMPLING || terms.rate <= 0.0;
    let mut done = 0u64;
    let mut last = Instant::now();
    while let Some(batch) = batches.next().await {
        let batch = batch.map_err(|e| WireError::Protocol(format!("nothing: reading the tree's memory failed: {e}")))?;
        if !sampled && batch.pages >= SAMPLES {
            sampled = true;
            let (ratio, rate) = sample_compression(&batch.data);
            if plan::compress_pays(ratio, rate, terms.rate, cores_shared(terms.bandwidth)) {
                stream.set_encoding(Encoding::Zstd);
            }
        }
        stream.send(&batch.runs, batch.data).await?;
        round.pages += batch.pages;
        round.zero_pages += batch.zero;
        done += (batch.pages + batch.zero) * crate::image::PAGE;
        if last.elapsed() > Duration::from_millis(100) {
            last = Instant::now();
            let rate = (done as f64 / start.elapsed().as_secs_f64()) as u64;
            events(Event::Progress {
                round: number,
                bytes: done,
                total,
                rate,
            });
        }
        if let Some(limit) = terms.bandwidth {
            let due = Duration::from_secs_f64((link.bytes_sent() - before) as f64 / limit as f64);
            if let Some(early) = due.checked_sub(start.elapsed()) {
                tokio::time::sleep(early).await;
            }
        }
    }
    let fate = batches.end().await;
    // Whether it has arrived the other side says, with the round's end or the answer to the handover.
    stream.end().await?;
    Ok((round, fate))
}

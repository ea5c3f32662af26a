//! The last look begun as soon as the tree stands still, by threads of its own, while the tracer still asks the tasks and reads /proc.
//!
//! What it looks at are large mappings as the last look at the running tree knew them. Of a mapping that is another one by now, or of which the destination holds
//! something else, the result is not used. Nobody waits for such a thread, which may be kept from its core: what is not done when the result is wanted, the one
//! who wants it does by itself.
//!
//! On two cores, where both hosts and the program share them: threads that waited for the stop spinning, not asleep, kept the tasks from stopping (0.15 ms became 0.6),
//! and at the lowest priority (SCHED_IDLE) they came too late to be of use. A task that is woken on the core of such a thread, to answer, would wait for the tick at
//! which that has had its slice: after each piece, 15 microseconds, the thread lets others go first. That took asking two threads beside 1 GiB from 0.68 ms to
//! 0.32 (median of twelve), and the freeze from 3.2 to 2.6; other priorities, and a short slice, had changed nothing.
//!
//! Between the stop and the last look the kernel writes one thing to the memory of a task that it lets answer, the area for restartable sequences (rseq(2));
//! see [`Seen::touched`]. A task that had to take a signal meanwhile has written anything: nothing of this is used then.

use super::TrackError;
use crate::{pages::PageSet, sys::pagemap::Pagemap};
use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    thread,
};

/// Smaller mappings are looked at when their turn comes.
pub const LARGE: u64 = 8 << 20;
/// Bytes that are looked at between two questions of who goes on.
const PIECE: u64 = 32 << 20;
/// Threads at most: the kernel looks at the page tables of one process from all of them at once.
const MOST: usize = 4;

const WAIT: u32 = 0;
const GO: u32 = 1;
const OVER: u32 = 2;

/// A mapping to be looked at.
#[derive(Debug)]
pub struct Task {
    /// The name of its address space.
    pub space: u32,
    /// Its borders.
    pub start: u64,
    /// One past its last byte.
    pub end: u64,
    /// In which of its blocks the destination holds pages.
    pub blocks: PageSet,
    /// Which of its pages are sent in any case: see [`Tracker::last`](super::Tracker::last).
    pub owed: PageSet,
    /// Of its process.
    pub pagemap: Arc<Pagemap>,
}

/// What was seen of it.
#[derive(Debug, Default)]
pub struct Seen {
    /// As in [`Task`].
    pub blocks: PageSet,
    /// Pages that are not armed, or owed.
    pub open: PageSet,
    /// Of these, those without content, guards among them: few where `open` is long, which is why the others are not kept.
    pub absent: PageSet,
    /// Of these, guards.
    pub guards: PageSet,
    /// Pages that may have been written since.
    pub touched: PageSet,
}

impl Seen {
    /// What was seen of another part.
    pub fn extend(&mut self, other: &Seen) {
        self.open.extend(&other.open);
        self.absent.extend(&other.absent);
        self.guards.extend(&other.guards);
    }
}

type Found = Result<Seen, TrackError>;

#[derive(Debug)]
struct Piece {
    task: usize,
    start: u64,
    end: u64,
    found: OnceLock<Found>,
}

#[derive(Debug)]
struct Work {
    state: AtomicU32,
    next: AtomicUsize,
    tasks: Vec<Task>,
    pieces: Vec<Piece>,
}

impl Work {
    /// Does what nobody has begun; `between`: after each piece.
    fn share(&self, between: impl Fn()) {
        while self.state.load(Ordering::Relaxed) == GO {
            let Some(piece) = self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            self.look(piece);
            between();
        }
    }

    fn look(&self, piece: &Piece) {
        let task = &self.tasks[piece.task];
        let found = super::wp_async::unarmed(&task.pagemap, piece.start, piece.end, &task.owed);
        // Somebody else may have done it meanwhile.
        let _ = piece.found.set(found);
    }
}

/// See the module. Dropped, it is given up.
#[derive(Debug)]
pub struct Ahead {
    work: Arc<Work>,
    parked: Vec<thread::Thread>,
}

impl Ahead {
    /// Gets ready. None: there is nothing worth it.
    pub fn ready(tasks: Vec<Task>) -> Option<Ahead> {
        let mut pieces = Vec::new();
        for (task, t) in tasks.iter().enumerate() {
            for &(a, b) in t.blocks.ranges() {
                let cut = (a..b).step_by(PIECE as usize).map(|start| Piece {
                    task,
                    start,
                    end: b.min(start + PIECE),
                    found: OnceLock::new(),
                });
                pieces.extend(cut);
            }
        }
        let others = thread::available_parallelism().map_or(0, |n| n.get() - 1);
        let threads = others.min(MOST).min(pieces.len());
        if threads == 0 {
            return None;
        }
        let work = Arc::new(Work {
            state: AtomicU32::new(WAIT),
            next: AtomicUsize::new(0),
            tasks,
            pieces,
        });
        let mut parked = Vec::new();
        for _ in 0..threads {
            let work = work.clone();
            let run = move || {
                while work.state.load(Ordering::Acquire) == WAIT {
                    thread::park();
                }
                work.share(thread::yield_now);
            };
            // Without it the others do its part.
            if let Ok(t) = thread::Builder::new().name("last look".into()).spawn(run) {
                parked.push(t.thread().clone());
            }
        }
        Some(Ahead { work, parked })
    }

    /// Everything stands still.
    pub fn go(&self) {
        self.work.state.store(GO, Ordering::Release);
        self.parked.iter().for_each(thread::Thread::unpark);
    }

    /// What was seen: (address space, start, end of the mapping). Does the rest.
    pub fn seen(self) -> Vec<(u32, u64, u64, Seen)> {
        self.work.share(|| ());
        let mut out: Vec<Option<Seen>> = self.work.tasks.iter().map(|_| Some(Seen::default())).collect();
        for piece in &self.work.pieces {
            if piece.found.get().is_none() {
                self.work.look(piece);
            }
            let all = &mut out[piece.task];
            match (all.as_mut(), piece.found.get()) {
                (Some(all), Some(Ok(found))) => all.extend(found),
                // It is another mapping by now, perhaps: the last look sees.
                _ => *all = None,
            }
        }
        let tasks = self.work.tasks.iter().zip(out);
        tasks
            .filter_map(|(t, seen)| {
                let seen = Seen {
                    blocks: t.blocks.clone(),
                    ..seen?
                };
                Some((t.space, t.start, t.end, seen))
            })
            .collect()
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.work.state.store(OVER, Ordering::Release);
        self.parked.iter().for_each(thread::Thread::unpark);
    }
}

//! The rounds of pre-copy, up to the frozen tree.

use super::{
    ended,
    fixed::Fixed,
    freeze::{Retry, Shared, Snapshot, Tell, Try, freeze_now},
    has_ended, interrupted,
    rounds::{Prepared, Rounds},
    transfer::{self, Terms},
};
use crate::{
    image::{Host, PAGE},
    plan::{Decision, Planner, RoundFacts, Why},
    report::{Event, Events, Failure, Mode, Round, SendOptions},
    sys::{awake::Awake, priority::Background},
    tracer::Tracer,
    wire::{self, WireError},
};
use migrate_transport::Link;
use std::{
    io,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Transfers of this length are not put off: with 1 ms, a GiB that writes 50 MB/s was frozen for 5.5 to 8.6 ms, of which registering and starting the
/// keeper were more than what it saved; sent within the freeze the same pages make it 4 to 5.5.
const WORTH_WAITING: Duration = Duration::from_millis(3);

/// What a look found last is sent once more if the link carries it in this time, and an answer takes no longer: the freeze follows without another look, and has to send only what
/// was written since. Of a GiB that writes 50 MB/s these are 37 pages, and 77 with those that the look had found; the freeze became shorter by a tenth to a sixth. Not
/// to wait for the answer left 26 pages, but what was under way then kept the cores from those that stop the tree (0.5 ms instead of 0.2).
const SOON: Duration = Duration::from_millis(1);

/// Rounds that only drop pages, at most.
const LETTING_GO: u32 = 4;
/// Ranges that are dropped within the freeze as well as before it.
const FEW_DROPS: usize = 400;

/// Most rounds before the freeze of post-copy, for memory that cannot follow: shared memory above all.
const BEFORE_POST_COPY: u32 = 4;
/// Bytes of a round after which another one is not worth its while there.
const LITTLE: u64 = 4 << 20;

/// One `send` between the preflight and the frozen tree.
pub struct Job<'a> {
    pub pid: i32,
    pub host: Host,
    pub tracer: &'a Tracer,
    pub options: &'a SendOptions,
    pub events: &'a Events,
    pub cancel: &'a CancellationToken,
    /// Rounds so far.
    pub rounds: Vec<Round>,
    /// Bytes a second that the destination has acknowledged; 0 before the first round.
    pub rate: f64,
    /// Keeps long rounds out of the program's way.
    pub background: Background,
    /// In the freeze.
    pub awake: Option<Awake>,
    /// What a freeze costs beside what it has to send.
    pub fixed: Fixed,
    /// The destination can let shared memory follow.
    pub shared_follows: bool,
    /// Hashes of all pages are going to be compared.
    pub verify: bool,
    /// Bytes that were dirty at the last look, and of these those that cannot follow.
    pub left: (u64, u64),
}

impl Job<'_> {
    /// What pages are sent by.
    pub fn terms(&self) -> Terms {
        Terms {
            bandwidth: self.options.bandwidth,
            rate: self
                .options
                .bandwidth
                .map_or(self.rate, |b| if self.rate > 0.0 { self.rate.min(b as f64) } else { b as f64 }),
        }
    }

    /// Bytes of pages that could follow after the resume, and are sent within the freeze all the same: what the link carries in the time that it
    /// would take to get ready for more.
    pub fn budget(&self) -> u64 {
        match self.options.mode {
            Mode::Stop | Mode::PreCopy => u64::MAX,
            Mode::PostCopy => 0,
            Mode::Hybrid => self.carried_in(WORTH_WAITING),
        }
    }

    /// Bytes that the link carries in this time.
    fn carried_in(&self, time: Duration) -> u64 {
        (self.terms().rate * time.as_secs_f64()) as u64
    }

    /// Pre-copies, with `tracked`, until the planner says to freeze; then freezes.
    pub async fn until_frozen<L: Link>(&mut self, link: &mut L, tracked: Option<&Shared>) -> Result<Snapshot, Failure> {
        if let Some(t) = tracked {
            (self.events)(Event::Phase { phase: "pre-copy" });
            if self.options.mode == Mode::PostCopy {
                // The shape, so that the freeze finds the skeleton built, and what cannot follow.
                for _ in 0..BEFORE_POST_COPY {
                    let p = self.look(t).await?;
                    let (_, raw) = self.round(link, t, p).await?;
                    if raw < LITTLE {
                        break;
                    }
                }
            } else {
                self.precopy(link, t).await?;
            }
        }
        self.background.raise();
        (self.events)(Event::Phase { phase: "freeze" });
        let mut retry = Retry::new(self.pid);
        loop {
            self.awake = Some(Awake::hold());
            match self.freeze_and_tell(link, tracked).await? {
                Ok(mut s) => {
                    if self.budget() < u64::MAX {
                        s.put_off(self.budget(), self.shared_follows)
                            .map_err(|e| Failure::failed("freeze", self.pid, format!("cannot read the page tables: {e}")))?;
                    }
                    return Ok(s);
                }
                Err(blockers) => {
                    self.awake = None;
                    if let Some(b) = blockers.iter().find(|b| b.transient) {
                        (self.events)(Event::Note {
                            text: format!("the freeze is tried again ({}: {})", b.place, b.reason),
                        });
                    }
                    retry.pause(blockers, self.cancel).await?;
                }
            }
            // What was written while waiting for a better moment would lengthen the freeze.
            if let Some(t) = tracked {
                let p = self.look(t).await?;
                if self.follows(p.dirty) {
                    self.leave(link, t, &p).await?;
                } else {
                    self.round(link, t, p).await?;
                }
            }
        }
    }

    /// One try to freeze the tree. What was read of it leaves while its memory is looked at.
    async fn freeze_and_tell<L: Link>(&self, link: &mut L, tracked: Option<&Shared>) -> Result<Try, Failure> {
        let (to, told) = oneshot::channel();
        let tell = Tell {
            to,
            expected: self.expected(),
            verify: self.verify,
        };
        let tell_it = async {
            // There is nothing to tell of a try that failed.
            let Ok(state) = told.await else { return Ok(()) };
            tokio::select! {
                sent = async { wire::send_encoded(link, state?).await } => sent.map_err(|e: WireError| self.lost("transfer", &e)),
                () = self.cancel.cancelled() => Err(interrupted(self.pid)),
            }
        };
        let (tried, told) = tokio::join!(freeze_now(self.tracer, self.pid, &self.host, tracked.cloned(), Some(tell)), tell_it);
        let tried = tried?;
        told?;
        Ok(tried)
    }

    /// Bytes that the freeze is going to send, by what the last look found.
    fn expected(&self) -> u64 {
        let (dirty, stays) = self.left;
        match self.options.mode {
            Mode::Stop => u64::MAX,
            Mode::PreCopy => dirty,
            Mode::Hybrid | Mode::PostCopy => dirty.min(stays.saturating_add(self.budget())),
        }
    }

    fn lost(&self, phase: &'static str, e: &WireError) -> Failure {
        Failure::failed(phase, self.pid, format!("{e}; the program runs on here"))
    }

    async fn precopy<L: Link>(&mut self, link: &mut L, tracked: &Shared) -> Result<(), Failure> {
        let mut planner = Planner::new(self.options.limits(), self.options.mode, self.fixed.now());
        let start = Instant::now();
        let mut prepared = self.look(tracked).await?;
        let once_more = loop {
            let began = Instant::now();
            let (round, raw) = self.round(link, tracked, prepared).await?;
            prepared = self.look(tracked).await?;
            let took = began.elapsed();
            let decision = planner.round(RoundFacts {
                dirty: prepared.dirty,
                held: prepared.hot,
                raw,
                wire: round.bytes,
                took,
                rate: None,
                dirtied: prepared.dirtied,
                fixed: Some(self.fixed.now()),
                elapsed: start.elapsed(),
            });
            self.rate = planner.rate();
            (self.events)(Event::Plan {
                round: self.rounds.len() as u32,
                dirty_bytes: prepared.dirty,
                dirty_rate: planner.dirty_rate() as u64,
                rate: planner.rate() as u64,
                predicted_downtime_ms: planner.predicted().as_secs_f64() * 1000.0,
            });
            match decision {
                Decision::Another => {}
                Decision::Freeze { why, misses_by, predicted } => {
                    if let Some(by) = misses_by {
                        (self.events)(Event::Note {
                            text: format!(
                                "the freeze will take about {:.0} ms, {:.0} ms more than the limit ({})",
                                predicted.as_secs_f64() * 1e3,
                                by.as_secs_f64() * 1e3,
                                why.name()
                            ),
                        });
                    }
                    break !matches!(why, Why::RoundCap | Why::TimeCap) && self.soon(link, &prepared);
                }
                Decision::GoLazy { lazy, why, .. } => {
                    (self.events)(Event::Note {
                        text: format!(
                            "about {} MiB follow after the resume: more rounds would not help ({})",
                            (lazy >> 20).max(1),
                            why.name()
                        ),
                    });
                    break false;
                }
            }
        };
        if once_more {
            return self.round(link, tracked, prepared).await.map(drop);
        }
        self.leave(link, tracked, &prepared).await
    }

    /// See [`SOON`].
    fn soon<L: Link>(&self, link: &L, p: &Prepared) -> bool {
        let bytes = p.bytes();
        let something = bytes > 0 || p.tree.is_some() || !p.drops.is_empty();
        something && bytes <= self.carried_in(SOON) && link.rtt() <= SOON && !self.follows(p.dirty)
    }

    /// This much is left for after the resume rather than sent before it.
    fn follows(&self, dirty: u64) -> bool {
        self.options.mode == Mode::Hybrid && dirty > self.budget()
    }

    /// Does not send what a look found: it is owed, and the freeze sends it, or what follows.
    async fn leave<L: Link>(&mut self, link: &mut L, tracked: &Shared, p: &Prepared) -> Result<(), Failure> {
        self.tracks(tracked)?.unsent(p);
        if self.follows(p.dirty) {
            self.let_go(link, tracked).await?;
        }
        Ok(())
    }

    /// Has the destination drop what it holds of pages that are going to follow, which would otherwise lengthen the freeze by a microsecond a piece. That
    /// takes its time too, in which the program writes others: what is left shrinks from one turn to the next.
    async fn let_go<L: Link>(&mut self, link: &mut L, tracked: &Shared) -> Result<(), Failure> {
        for turn in 1..=LETTING_GO {
            let Some(p) = self.tracks(tracked)?.let_go() else { break };
            let few = p.drops.len() < FEW_DROPS;
            self.round(link, tracked, p).await?;
            if few || turn == LETTING_GO {
                break;
            }
            let prepared = self.look(tracked).await?;
            self.tracks(tracked)?.unsent(&prepared);
        }
        Ok(())
    }

    fn tracks<'t>(&self, tracked: &'t Shared) -> Result<std::sync::MutexGuard<'t, Rounds>, Failure> {
        let failed = |_| Failure::failed("pre-copy", self.pid, "an earlier look at the tree failed; it runs on here");
        tracked.lock().map_err(failed)
    }

    /// Looks at the tree on the tracer thread.
    async fn look(&mut self, tracked: &Shared) -> Result<Prepared, Failure> {
        let shared = tracked.clone();
        let pid = self.pid;
        let fail = |e: io::Error| match has_ended(pid) {
            true => ended("pre-copy", pid),
            false => Failure::failed("pre-copy", pid, format!("cannot look at the tree: {e}; it runs on here")),
        };
        let p = self
            .tracer
            .call(move || match shared.lock() {
                Ok(mut r) => r.look(),
                Err(_) => Err(io::Error::other("an earlier look failed")),
            })
            .await
            .and_then(|looked| looked)
            .map_err(fail)?;
        for u in &p.untracked {
            tracing::debug!("{u}");
        }
        self.fixed.look(&p);
        self.left = (p.dirty, p.stays);
        Ok(p)
    }

    /// Sends a round; returns it with the bytes of memory in it.
    async fn round<L: Link>(&mut self, link: &mut L, tracked: &Shared, p: Prepared) -> Result<(Round, u64), Failure> {
        let number = self.rounds.len() as u32 + 1;
        let (stopped, compared) = (p.stopped, p.compared);
        self.background.round(p.bytes());
        let sent = tokio::select! {
            r = transfer::round(link, number, p, self.terms(), self.events) => r,
            () = self.cancel.cancelled() => return Err(interrupted(self.pid)),
        };
        let (mut round, applied, fate) = sent.map_err(|e: WireError| self.lost("pre-copy", &e))?;
        if let Ok(took) = Duration::try_from_secs_f64(applied.shape_ms / 1000.0) {
            self.fixed.shape(took);
        }
        round.stopped_ms = stopped.as_secs_f64() * 1000.0;
        round.compared = compared;
        let mut t = self.tracks(tracked)?;
        t.sent(&fate.objects);
        t.missed(&fate.missed);
        t.missed(&applied.missed);
        drop(t);
        (self.events)(Event::Round(round));
        self.rounds.push(round);
        let raw = (round.pages + round.zero_pages) * PAGE;
        Ok((round, raw))
    }
}

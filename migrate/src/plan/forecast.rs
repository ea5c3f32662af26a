//! What a migration would be like, by a simulation of its rounds. Pure.

use super::{Decision, LEAST_OVERHEAD, Limits, Planner, RoundFacts, UNKNOWN_RATE, Why, duration, usable};
use crate::report::Mode;
use std::time::Duration;

/// How a program writes: pages drawn at random from a working set.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Activity {
    /// D: bytes of pages that its writes hit a second, repeated hits included.
    pub rate: f64,
    /// W_max: bytes it would have written after a long time.
    pub working_set: f64,
}

impl Activity {
    /// Bytes dirty after so many seconds, `W_max (1 - exp(-D t / W_max))`: at first every write hits a clean page, in the end none does.
    pub fn dirtied(&self, seconds: f64) -> f64 {
        if !usable(self.rate) || !usable(self.working_set) || seconds <= 0.0 {
            return 0.0;
        }
        self.working_set * -(-self.rate * seconds / self.working_set).exp_m1()
    }

    /// From the bytes dirtied in two windows of time, a short one and a long one, each clean at its start; of a program with `total` bytes.
    ///
    /// In the short one hardly a page is hit twice, so it gives D; the long one then gives W_max. Tried before: both from one window and its half, which
    /// takes a program that goes through its memory in order, without hitting a page twice, for one that writes twice as fast.
    pub fn from_samples(short: (Duration, u64), long: (Duration, u64), total: u64) -> Activity {
        let speed = |w: (Duration, u64)| w.1 as f64 / w.0.as_secs_f64().max(1e-9);
        let (time, dirtied, total) = (long.0.as_secs_f64(), long.1 as f64, total.max(short.1).max(long.1) as f64);
        // Writes come in bursts: the short window may have missed them.
        let rate = speed(short).max(speed(long));
        if !usable(rate) || time <= 0.0 {
            return Activity::default();
        }
        let with = |working_set| Activity { rate, working_set };
        if dirtied >= with(total).dirtied(time) {
            return with(total);
        }
        // W_max grows with what it gives: halved until it fits.
        let (mut least, mut most) = (dirtied.max(short.1 as f64), total);
        for _ in 0..60 {
            let middle = (least + most) / 2.0;
            if with(middle).dirtied(time) < dirtied {
                least = middle;
            } else {
                most = middle;
            }
        }
        with(most)
    }
}

/// What [`forecast`] goes by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    /// Bytes of memory with content.
    pub total: u64,
    /// How the program writes.
    pub activity: Activity,
    /// c, bytes on the wire for a byte of memory.
    pub ratio: f64,
    /// B, bytes a second on the wire.
    pub rate: f64,
    /// F.
    pub fixed: Duration,
    /// o, what a round costs beside its bytes: about 0.3 ms for each GiB that is scanned, a round trip, and a fraction of a millisecond. Less than
    /// half a millisecond counts as that.
    pub overhead: Duration,
    /// What the first round costs beside that: everything is tracked from then on, the copy is made, the congestion window grows.
    pub first: Duration,
}

/// What a migration would be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forecast {
    /// Rounds before the freeze.
    pub rounds: u32,
    /// Bytes of memory that each of them would send, and its time; then what the freeze would send.
    pub sent: Vec<(u64, Duration)>,
    /// From the start of the first round to the resume.
    pub total: Duration,
    /// The freeze.
    pub downtime: Duration,
    /// Bytes of memory that follow on demand.
    pub lazy: u64,
    /// Why the rounds would end; `None` in modes without rounds.
    pub why: Option<Why>,
    /// By how much the downtime is over the limit.
    pub misses_by: Option<Duration>,
}

/// Simulates a migration with the same planner that will lead it.
pub fn forecast(limits: Limits, mode: Mode, outlook: &Outlook) -> Forecast {
    let rate = if usable(outlook.rate) { outlook.rate } else { UNKNOWN_RATE };
    let ratio = if usable(outlook.ratio) { outlook.ratio } else { 1.0 };
    let fixed = outlook.fixed;
    let overhead = outlook.overhead.as_secs_f64().max(LEAST_OVERHEAD);
    if matches!(mode, Mode::Stop | Mode::PostCopy) {
        let (downtime, lazy) = match mode {
            Mode::Stop => (duration(fixed.as_secs_f64() + ratio * outlook.total as f64 / rate), 0),
            _ => (fixed, outlook.total),
        };
        return Forecast {
            rounds: 0,
            sent: vec![(outlook.total - lazy, downtime)],
            total: downtime,
            downtime,
            lazy,
            why: None,
            misses_by: downtime.checked_sub(limits.downtime).filter(|d| !d.is_zero()),
        };
    }
    let mut planner = Planner::new(limits, mode, fixed);
    let (mut waiting, mut elapsed) = (outlook.total as f64, 0.0);
    let mut sent = Vec::new();
    let mut first = outlook.first.as_secs_f64();
    loop {
        let took = ratio * waiting / rate + overhead + std::mem::take(&mut first);
        let dirtied = outlook.activity.dirtied(took).min(outlook.total as f64);
        elapsed += took;
        sent.push((waiting as u64, duration(took)));
        let decision = planner.round(RoundFacts {
            dirty: dirtied as u64,
            raw: waiting as u64,
            wire: (ratio * waiting) as u64,
            took: duration(took),
            rate: Some(rate),
            dirtied: dirtied as u64,
            elapsed: duration(elapsed),
            ..RoundFacts::default()
        });
        waiting = dirtied;
        let (downtime, lazy, why, misses_by) = match decision {
            Decision::Another => continue,
            Decision::Freeze { predicted, why, misses_by } => (predicted, 0, why, misses_by),
            Decision::GoLazy {
                predicted,
                lazy,
                why,
                misses_by,
            } => (predicted, lazy, why, misses_by),
        };
        sent.push((waiting as u64 - lazy.min(waiting as u64), downtime));
        return Forecast {
            rounds: planner.rounds(),
            sent,
            total: duration(elapsed + downtime.as_secs_f64()),
            downtime,
            lazy,
            why: Some(why),
            misses_by,
        };
    }
}

//! When to freeze: after each round, whether another one pays. Pure: no clock, no I/O, numbers in and a [`Decision`] out.
//!
//! # The quantities
//!
//! | sign | meaning | where it comes from |
//! |---|---|---|
//! | W | bytes dirty now, which a freeze would have to send | the scan at the end of the round |
//! | c | bytes on the wire for a byte of memory | wire / raw of the last rounds, newer ones count more |
//! | B | acknowledged bytes a second on the wire | median of the last rounds, each by its weight (below) |
//! | D | bytes of memory dirtied a second | dirtied / time, smoothed |
//! | F | what every freeze costs: stop, state, restore, one round trip | rehearsed in every round ([`crate::source`], `fixed.rs`) |
//! | o | what every round costs beside its bytes: scan, acknowledgement | the least that was seen |
//! | T | the downtime limit | the user |
//!
//! A freeze now is predicted to last `p = F + cW/B`. Another round takes `t = cW/B + o` and leaves about `Dt`; `rho = cD/B` is the factor by which W
//! shrinks a round, as long as o does not matter. W settles at `Do / (1 - rho)`, which is why a program that writes little can be frozen for
//! hardly more than F, whatever its size.
//!
//! # The rules, in this order
//!
//! 1. **p ≤ T.** Freeze ([`Why::LimitMet`]), unless another round is cheap and expected to lower p clearly: the limit is what the user bears, not what
//!    is wanted, and a few rounds of milliseconds are a low price for 4 ms in place of 19.
//! 2. **F ≥ T.** No round can help to keep the limit. The same rule says when W has stopped mattering; then freeze ([`Why::FixedCostAlone`]).
//! 3. **A cap is reached**: as many rounds as allowed, or the next one would end after the time allowed. Hybrid goes lazy, pre-copy freezes.
//! 4. **Stalled**: rho ≥ 0.9; or W > 0.9 of the round before, twice running; or the rounds left, `ln((T-F)B / cW) / ln(rho)`, are more than the caps
//!    leave. Hybrid goes lazy at a local minimum of W. Pre-copy goes on to the cap, unless W does not shrink at all: then it freezes at
//!    a local minimum ([`Why::Stalled`]).
//! 5. Else another round.
//!
//! Whatever is over the limit says by how much.
//!
//! # What did not do
//!
//! - *Freeze as soon as p ≤ T*: with T = 20 ms a program that writes 50 MB/s froze for 15 ms where one round of 15 ms more made it 4.
//! - *The rate of the last round as B*: the last rounds are small, so that they measure the round trip. 200 KB in 1.5 ms is no link of 133 MB/s.
//! - *The tenth percentile of the rates*: of eight rounds that is the slowest one, and a single hiccup held the freeze back for eight rounds. The
//!   mean lets one hiccup in as well. So it is the median, in which a round weighs as many bytes as it sent, up to `FULL_WEIGHT`.
//! - *Stop at the first round in which p does not fall*: writes come in bursts, and the burst is then what is frozen. Two such rounds in a row.
//! - *A fixed floor for W*: 32 pages are nothing at 500 MB/s and 130 ms at 1 MB/s. What counts is the part of p that W makes up.

mod forecast;
#[cfg(test)]
mod tests;

pub use forecast::{Activity, Forecast, Outlook, forecast};

use crate::report::Mode;
use std::{collections::VecDeque, time::Duration};

/// Share of the predicted downtime that another round must be expected to take off. Less drowns in what F itself varies by from freeze to freeze.
const CLEARLY: f64 = 0.1;
/// Nobody notices less than this (seconds), however large a share of a very short freeze it is.
const NOTICEABLE: f64 = 100e-6;
/// Below the limit a round is cheap up to this many seconds ...
const CHEAP: f64 = 0.1;
/// ... or up to this share of the time already spent.
const CHEAP_SHARE: f64 = 0.1;
/// Rounds in a row that may fail to lower p before it counts as having settled.
const BARREN: u32 = 2;
/// rho and the ratio of two W from which it counts as stalled: at 0.9 halving W takes seven rounds.
const STALLED: f64 = 0.9;
/// A new lowest W must be lower by this share; the same tolerance says that W is at a local minimum.
const SHRINKS: f64 = 0.05;
/// Rounds without a new lowest W after which pre-copy takes it that W does not shrink at all.
const FLAT: u32 = 3;
/// Rounds that a local minimum of W is waited for.
const PATIENCE: u32 = 3;
/// Rounds that are looked back on for B and o.
const WINDOW: usize = 8;
/// A round that sent as many bytes on the wire says as much about B as any larger one: 8 MiB are 16 ms at 500 MB/s, many round trips.
const FULL_WEIGHT: f64 = (8 << 20) as f64;
/// B until something was sent, bytes a second: Gigabit Ethernet.
const UNKNOWN_RATE: f64 = 125e6;
/// Least o, seconds: a scan and an acknowledgement have never been seen to take less.
const LEAST_OVERHEAD: f64 = 0.5e-3;
/// How much a new value counts against the smoothed older ones (D, c).
const NEWEST: f64 = 0.5;
/// Times are kept below this many seconds (30 years), so that no rate however small makes one that [`Duration`] cannot hold.
const FOREVER: f64 = 1e9;
/// Compressing must make a round shorter by this share, since the rates it is decided on are only estimates.
const COMPRESSION_GAIN: f64 = 0.1;

/// What the user allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// T: the longest freeze that is acceptable (`--downtime-limit`).
    pub downtime: Duration,
    /// Most rounds (`--max-rounds`); 0 counts as 1.
    pub rounds: u32,
    /// Longest time from the start of the first round to the freeze (`--max-time`).
    pub time: Duration,
}

/// One finished round.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RoundFacts {
    /// W: bytes of memory that are dirty after the round, those held back included.
    pub dirty: u64,
    /// Of these, bytes that the next round would hold back for the freeze (hot pages).
    pub held: u64,
    /// Bytes of memory that the round sent, zero pages included.
    pub raw: u64,
    /// Bytes on the wire for them.
    pub wire: u64,
    /// From the start of the round's scan to the acknowledgement of its last byte.
    pub took: Duration,
    /// Bytes per second on the wire, when the link knows better than `wire / took` (it knows when it stood idle).
    pub rate: Option<f64>,
    /// Bytes of memory that became dirty during the round.
    pub dirtied: u64,
    /// F, when it is now known better than before.
    pub fixed: Option<Duration>,
    /// From the start of the first round to the end of this one.
    pub elapsed: Duration,
}

/// Why the rounds end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// The predicted downtime is within the limit, and another round would not clearly lower it.
    LimitMet,
    /// F alone is over the limit, and what is dirty makes up little of the rest.
    FixedCostAlone,
    /// It is dirtied as fast as it can be sent.
    Stalled,
    /// As many rounds as allowed.
    RoundCap,
    /// As much time as allowed.
    TimeCap,
}

impl Why {
    /// For reports and `--json`: a stable name.
    pub fn name(self) -> &'static str {
        match self {
            Why::LimitMet => "limit-met",
            Why::FixedCostAlone => "fixed-cost",
            Why::Stalled => "stalled",
            Why::RoundCap => "round-cap",
            Why::TimeCap => "time-cap",
        }
    }
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Send what is dirty now, while the tree runs.
    Another,
    /// Freeze, and send everything that is left inside the freeze.
    Freeze {
        /// Predicted downtime.
        predicted: Duration,
        /// Why now.
        why: Why,
        /// By how much the prediction is over the limit; `None` when it is not.
        misses_by: Option<Duration>,
    },
    /// Freeze, resume at once, and let what is left follow on demand.
    GoLazy {
        /// Predicted downtime: F.
        predicted: Duration,
        /// Bytes of memory that are left to follow.
        lazy: u64,
        /// Why now.
        why: Why,
        /// By how much F is over the limit; `None` when it is not.
        misses_by: Option<Duration>,
    },
}

/// Decides after each round; see the module.
#[derive(Debug, Clone)]
pub struct Planner {
    limits: Limits,
    may_go_lazy: bool,
    /// F, seconds.
    fixed: f64,
    /// What the last rounds say of B and o, oldest first.
    samples: VecDeque<Sample>,
    ratio: Option<f64>,
    dirty_rate: Option<f64>,
    /// W of the last rounds, oldest first.
    waiting: VecDeque<u64>,
    held: u64,
    rounds: u32,
    elapsed: f64,
    /// Lowest p so far, and rounds since it fell clearly.
    best: f64,
    barren: u32,
    /// Lowest W so far, and rounds since it fell clearly.
    lowest: f64,
    since_lowest: u32,
    /// Rounds in a row that were stalled.
    stalled_for: u32,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    rate: f64,
    weight: f64,
    took: f64,
    wire: f64,
}

/// A time that [`Duration`] can hold, whatever the arithmetic gave.
fn duration(seconds: f64) -> Duration {
    let within = if seconds.is_nan() { FOREVER } else { seconds.clamp(0.0, FOREVER) };
    Duration::from_secs_f64(within)
}

/// A rate or ratio that can be divided by.
fn usable(x: f64) -> bool {
    x.is_finite() && x > 0.0
}

fn smooth(old: Option<f64>, new: f64) -> f64 {
    old.map_or(new, |old| old + NEWEST * (new - old))
}

impl Planner {
    /// `fixed`: F as rehearsed. Of the modes only [`Mode::Hybrid`] may go lazy.
    pub fn new(limits: Limits, mode: Mode, fixed: Duration) -> Planner {
        Planner {
            limits,
            may_go_lazy: mode == Mode::Hybrid,
            fixed: fixed.as_secs_f64(),
            samples: VecDeque::with_capacity(WINDOW),
            ratio: None,
            dirty_rate: None,
            waiting: VecDeque::with_capacity(WINDOW),
            held: 0,
            rounds: 0,
            elapsed: 0.0,
            best: f64::INFINITY,
            barren: 0,
            lowest: f64::INFINITY,
            since_lowest: 0,
            stalled_for: 0,
        }
    }

    /// Takes a finished round in and says what comes next.
    pub fn round(&mut self, facts: RoundFacts) -> Decision {
        self.learn(&facts);
        let (p, limit) = (self.prediction(), self.limits.downtime.as_secs_f64());
        let pays = self.another_round_pays(p);
        let cap = self.cap();
        // As durations: what is reported must agree with what was decided, to the nanosecond.
        if duration(p) <= self.limits.downtime {
            let next = self.next_round();
            let cheap = next <= CHEAP.max(CHEAP_SHARE * self.elapsed);
            return if pays && cheap && cap.is_none() {
                Decision::Another
            } else {
                self.freeze(Why::LimitMet)
            };
        }
        if !pays && self.fixed >= limit && self.settled(p) {
            return self.freeze(Why::FixedCostAlone);
        }
        if let Some(cap) = cap {
            return if self.may_go_lazy { self.go_lazy(cap) } else { self.freeze(cap) };
        }
        if !self.stalled(limit) {
            self.stalled_for = 0;
            return Decision::Another;
        }
        self.stalled_for += 1;
        if self.may_go_lazy {
            // With one W nobody can tell whether it is a minimum.
            if self.rounds > 1 && (self.at_local_minimum() || self.stalled_for > PATIENCE) {
                return self.go_lazy(Why::Stalled);
            }
        } else if self.since_lowest >= FLAT && (self.at_local_minimum() || self.since_lowest >= FLAT + PATIENCE) {
            return self.freeze(Why::Stalled);
        }
        Decision::Another
    }

    /// p: how long a freeze now would last.
    pub fn predicted(&self) -> Duration {
        duration(self.prediction())
    }

    /// F, as known now.
    pub fn fixed(&self) -> Duration {
        duration(self.fixed)
    }

    /// D: bytes of memory dirtied a second; 0 before the first round.
    pub fn dirty_rate(&self) -> f64 {
        self.dirty_rate.unwrap_or(0.0)
    }

    /// B: acknowledged bytes a second on the wire; an assumption until something was sent.
    pub fn rate(&self) -> f64 {
        let mut all: Vec<_> = self.samples.iter().filter(|s| s.weight > 0.0).map(|s| (s.rate, s.weight)).collect();
        all.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let half = all.iter().map(|s| s.1).sum::<f64>() / 2.0;
        let mut sum = 0.0;
        for (rate, weight) in all {
            sum += weight;
            if sum >= half {
                return rate;
            }
        }
        UNKNOWN_RATE
    }

    /// c: bytes on the wire for a byte of memory; 1 until something was sent.
    pub fn ratio(&self) -> f64 {
        self.ratio.unwrap_or(1.0)
    }

    /// cD/B: 1 and more means that it is dirtied faster than it can be sent.
    pub fn rho(&self) -> f64 {
        self.ratio() * self.dirty_rate() / self.rate()
    }

    /// Rounds taken in.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    fn learn(&mut self, facts: &RoundFacts) {
        self.rounds = self.rounds.saturating_add(1);
        self.elapsed = facts.elapsed.as_secs_f64();
        if let Some(fixed) = facts.fixed {
            self.fixed = fixed.as_secs_f64();
        }
        let (took, wire, raw) = (facts.took.as_secs_f64(), facts.wire as f64, facts.raw as f64);
        let rate = facts.rate.filter(|r| usable(*r)).unwrap_or(wire / took);
        let known = usable(rate) && wire > 0.0;
        if self.samples.len() == WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back(Sample {
            rate: if known { rate } else { 0.0 },
            weight: if known { wire.min(FULL_WEIGHT) } else { 0.0 },
            took,
            wire,
        });
        if raw > 0.0 {
            self.ratio = Some(smooth(self.ratio, wire / raw));
        }
        if took > 0.0 {
            self.dirty_rate = Some(smooth(self.dirty_rate, facts.dirtied as f64 / took));
        }
        if self.waiting.len() == WINDOW {
            self.waiting.pop_front();
        }
        self.waiting.push_back(facts.dirty);
        self.held = facts.held.min(facts.dirty);

        let w = facts.dirty as f64;
        if w < self.lowest * (1.0 - SHRINKS) {
            self.since_lowest = 0;
            self.lowest = w;
        } else {
            self.since_lowest += 1;
        }
        let p = self.prediction();
        if p < self.best * (1.0 - CLEARLY) {
            self.barren = 0;
            self.best = p;
        } else {
            self.barren += 1;
        }
    }

    fn dirty(&self) -> f64 {
        self.waiting.back().copied().unwrap_or(0) as f64
    }

    /// Seconds that so many bytes of memory take on the wire.
    fn transfer(&self, bytes: f64) -> f64 {
        self.ratio() * bytes / self.rate()
    }

    fn prediction(&self) -> f64 {
        self.fixed + self.transfer(self.dirty())
    }

    /// o, seconds.
    fn overhead(&self) -> f64 {
        let rate = self.rate();
        let least = self.samples.iter().map(|s| s.took - s.wire / rate).fold(f64::INFINITY, f64::min);
        if least.is_finite() {
            least.max(LEAST_OVERHEAD)
        } else {
            LEAST_OVERHEAD
        }
    }

    /// Seconds that the next round would take.
    fn next_round(&self) -> f64 {
        self.transfer(self.dirty() - self.held as f64) + self.overhead()
    }

    /// p still falls, and another round is expected to leave clearly less; or it was clearly less a moment ago, and this is a burst.
    fn another_round_pays(&self, p: f64) -> bool {
        let left = self.held as f64 + self.dirty_rate() * self.next_round();
        let expected = self.fixed + self.transfer(left);
        self.barren < BARREN && p - expected.min(self.best) > NOTICEABLE.max(CLEARLY * p)
    }

    /// With F over the limit: what W adds to it is small, or it fell before and falls no more. A W that never fell is a stall, not this.
    fn settled(&self, p: f64) -> bool {
        let by_dirty = p - self.fixed;
        by_dirty <= NOTICEABLE.max(CLEARLY * p) || (self.rho() < STALLED && by_dirty <= self.fixed)
    }

    fn cap(&self) -> Option<Why> {
        if self.rounds >= self.limits.rounds {
            Some(Why::RoundCap)
        } else if self.elapsed + self.next_round() > self.limits.time.as_secs_f64() {
            Some(Why::TimeCap)
        } else {
            None
        }
    }

    fn stalled(&self, limit: f64) -> bool {
        let rho = self.rho();
        let slow = |newer: u64, older: u64| newer as f64 > STALLED * older as f64;
        let mut last = self.waiting.iter().rev();
        let twice = match (last.next(), last.next(), last.next()) {
            (Some(&a), Some(&b), Some(&c)) => slow(a, b) && slow(b, c),
            _ => false,
        };
        rho >= STALLED || twice || self.out_of_reach(rho, limit)
    }

    /// The rounds left, and the time they take, are more than the caps leave. With F over the limit nothing is in reach, and W decides.
    fn out_of_reach(&self, rho: f64, limit: f64) -> bool {
        let (now, goal) = (self.transfer(self.dirty()), limit - self.fixed);
        if goal <= 0.0 || rho <= 0.0 || rho >= 1.0 {
            return rho >= 1.0;
        }
        let left = ((goal / now).ln() / rho.ln()).ceil().max(1.0);
        let time = now * (1.0 - rho.powf(left)) / (1.0 - rho) + left * self.overhead();
        left > f64::from(self.limits.rounds.saturating_sub(self.rounds)) || self.elapsed + time > self.limits.time.as_secs_f64()
    }

    fn at_local_minimum(&self) -> bool {
        let least = self.waiting.iter().rev().take(3).min().copied().unwrap_or(0);
        self.dirty() <= least as f64 * (1.0 + SHRINKS)
    }

    fn misses_by(&self, seconds: f64) -> Option<Duration> {
        duration(seconds).checked_sub(self.limits.downtime).filter(|d| !d.is_zero())
    }

    fn freeze(&self, why: Why) -> Decision {
        let p = self.prediction();
        Decision::Freeze {
            predicted: duration(p),
            why,
            misses_by: self.misses_by(p),
        }
    }

    fn go_lazy(&self, why: Why) -> Decision {
        Decision::GoLazy {
            predicted: self.fixed(),
            lazy: self.waiting.back().copied().unwrap_or(0),
            why,
            misses_by: self.misses_by(self.fixed),
        }
    }
}

/// Whether compressing makes a round shorter.
///
/// `ratio`: compressed size of a byte, from a sample. `compress_rate`: bytes of memory compressed a second on the cores that do it. `link_rate`: bytes a
/// second on the wire. With cores to spare compression and sending overlap, and the slower of the two counts; when `cores_shared`, the cores that
/// compress are those that encrypt and send, and the times add up. Pure, and decided anew each round, since all three change.
pub fn compress_pays(ratio: f64, compress_rate: f64, link_rate: f64, cores_shared: bool) -> bool {
    if !usable(ratio) || !usable(compress_rate) || !usable(link_rate) {
        return false;
    }
    let (compress, wire, plain) = (1.0 / compress_rate, ratio / link_rate, 1.0 / link_rate);
    let with = if cores_shared { compress + wire } else { compress.max(wire) };
    with < plain * (1.0 - COMPRESSION_GAIN)
}

//! F: what a freeze costs whatever is left to send. Rehearsed in every round, since most of its work is done there too while the program runs: the
//! tree is read, its memory is scanned, the copy takes the tree's shape.
//!
//! What a round does not do (stopping the tasks, asking them, the last steps of the copy, the release) is estimated by the piece. The
//! least of each that was seen counts: a look that reads smaps again, or the first one, which arms everything, says nothing of the freeze.

use super::{predict::Counts, rounds::Prepared};
use std::time::Duration;

/// What was rehearsed so far.
#[derive(Debug, Clone, Copy)]
pub struct Fixed {
    /// Estimated: what only a freeze does, and one round trip.
    alone: Duration,
    /// Reading the tree; the scan of its memory; the shape of the copy.
    read: Duration,
    scan: Duration,
    shape: Duration,
    looked: bool,
    shaped: bool,
}

fn ms(x: f64) -> Duration {
    Duration::from_secs_f64(x / 1000.0)
}

impl Fixed {
    /// Before anything was rehearsed: by the numbers of processes and threads (measured, docs/benchmarks.md).
    pub fn new(counts: &Counts, rtt: Duration) -> Fixed {
        let (more, threads) = (f64::from(counts.processes.saturating_sub(1)), f64::from(counts.threads));
        Fixed {
            alone: ms(1.4 + 0.35 * more + 0.09 * threads) + rtt,
            read: ms(0.6 + 0.1 * more + 0.01 * threads),
            scan: ms(0.2),
            shape: ms(0.3 + 0.1 * more + 0.01 * threads),
            looked: false,
            shaped: false,
        }
    }

    /// The first time that the copy gets a shape: its processes are made.
    pub fn skeleton(counts: &Counts) -> Duration {
        ms(2.0 + f64::from(counts.processes) + 0.1 * f64::from(counts.threads))
    }

    /// A look at the tree.
    pub fn look(&mut self, p: &Prepared) {
        self.read = if self.looked { self.read.min(p.read) } else { p.read };
        // It grows with what the tree has in memory.
        self.scan = p.last_scan;
        self.looked = true;
    }

    /// The destination has given the copy its shape.
    pub fn shape(&mut self, took: Duration) {
        // The first time it is made from nothing.
        if std::mem::replace(&mut self.shaped, true) {
            self.shape = self.shape.min(took);
        }
    }

    /// What every round takes beside its bytes: the look.
    pub fn round(&self) -> Duration {
        self.read + self.scan + self.shape
    }

    /// F, as known now.
    pub fn now(&self) -> Duration {
        self.alone + self.round()
    }
}

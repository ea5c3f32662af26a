//! What the time of a phase goes to, for the log (`-v -v`): freezes are short enough that it cannot be seen from outside.

use std::{
    fmt::Write,
    time::{Duration, Instant},
};

/// A phase being timed.
#[derive(Debug)]
pub struct Laps {
    began: Instant,
    last: Instant,
    text: String,
}

impl Laps {
    /// From now on.
    pub fn start() -> Laps {
        let now = Instant::now();
        Laps {
            began: now,
            last: now,
            text: String::new(),
        }
    }

    /// The time since the last lap went to this.
    pub fn lap(&mut self, what: &str) {
        let now = Instant::now();
        let _ = write!(self.text, "{what} {}, ", us(now - self.last));
        self.last = now;
        crate::steps::reached(what);
    }

    /// Logs it.
    pub fn log(self, phase: &str) {
        tracing::debug!("{phase}: {}{} us in all", self.text, us(self.began.elapsed()));
    }
}

fn us(d: Duration) -> u128 {
    d.as_micros()
}

//! Waiting, always with an end.

use crate::tools::patience;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(2);
/// As much as one attempt and the pause after it count for at most. Longer ones are this machine standing still, with all that is waited for.
const COUNTS: Duration = Duration::from_millis(250);

static ABANDONED: AtomicBool = AtomicBool::new(false);

/// From now on nothing is waited for: this process is about to end.
pub fn abandon() {
    ABANDONED.store(true, Ordering::SeqCst);
}

/// Tries until it gives a value; panics with the name when it does not in time.
pub fn within<T>(what: &str, limit: Duration, attempt: impl FnMut() -> Option<T>) -> T {
    tried(limit, PAUSE, attempt).unwrap_or_else(|limit| panic!("{what}: not within {limit:?}"))
}

/// Does it become true in time?
pub fn eventually(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    tried(limit, PAUSE, || holds().then_some(())).is_ok()
}

/// The same for what is measured with its wait: the pauses between the looks are a twentieth.
pub fn soon(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    tried(limit, PAUSE / 20, || holds().then_some(())).is_ok()
}

fn tried<T>(limit: Duration, pause: Duration, mut attempt: impl FnMut() -> Option<T>) -> Result<T, Duration> {
    let limit = limit * patience();
    let mut waited = Duration::ZERO;
    while waited < limit && !ABANDONED.load(Ordering::SeqCst) {
        let since = Instant::now();
        if let Some(value) = attempt() {
            return Ok(value);
        }
        thread::sleep(pause);
        waited += since.elapsed().min(COUNTS);
    }
    attempt().ok_or(limit)
}

/// Watches how long this machine stands still, with all that runs on it: what a program waited beyond that was somebody's doing.
#[derive(Debug)]
pub struct Standstill {
    longest_us: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Standstill {
    /// From now on.
    pub fn watch() -> Standstill {
        let (longest_us, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (longest, end) = (longest_us.clone(), stop.clone());
        thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                let since = Instant::now();
                thread::sleep(PAUSE);
                longest.fetch_max(since.elapsed().as_micros() as u64, Ordering::Relaxed);
            }
        });
        Standstill { longest_us, stop }
    }

    /// The longest so far.
    pub fn longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.load(Ordering::Relaxed))
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

//! Waiting, always with an end.

use crate::tools::patience;
use std::{
    thread,
    time::{Duration, Instant},
};

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(2);
/// As much as one attempt and the pause after it count for at most. Longer ones are this machine standing still, with all that is waited for.
const COUNTS: Duration = Duration::from_millis(250);

/// Tries until it gives a value; panics with the name when it does not in time.
pub fn within<T>(what: &str, limit: Duration, attempt: impl FnMut() -> Option<T>) -> T {
    tried(limit, attempt).unwrap_or_else(|limit| panic!("{what}: not within {limit:?}"))
}

/// Does it become true in time?
pub fn eventually(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    tried(limit, || holds().then_some(())).is_ok()
}

fn tried<T>(limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> Result<T, Duration> {
    let limit = limit * patience();
    let mut waited = Duration::ZERO;
    while waited < limit {
        let since = Instant::now();
        if let Some(value) = attempt() {
            return Ok(value);
        }
        thread::sleep(PAUSE);
        waited += since.elapsed().min(COUNTS);
    }
    attempt().ok_or(limit)
}

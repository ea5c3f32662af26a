//! Waiting, always with an end.

use crate::tools::patience;
use std::{
    thread,
    time::{Duration, Instant},
};

/// Tries until it gives a value; panics with the name when it does not in time.
pub fn within<T>(what: &str, limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> T {
    let limit = limit * patience();
    let since = Instant::now();
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(since.elapsed() < limit, "{what}: not within {limit:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Does it become true in time?
pub fn eventually(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let limit = limit * patience();
    let since = Instant::now();
    while since.elapsed() < limit {
        if holds() {
            return true;
        }
        thread::sleep(Duration::from_millis(2));
    }
    false
}

//! Reasons why a tree cannot move, for the person at the terminal.

use serde::{Deserialize, Serialize};

/// One thing that stands in the way, found by preflight or at the freeze.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// Where: "pid 42 (redis-server) fd 7", "pid 42 (node) mapping 7f00-7f10".
    pub place: String,
    /// What is there and why it cannot move.
    pub reason: String,
    /// What to do about it.
    pub fix: String,
    /// It is likely to go away by itself within milliseconds (a connection being served, unread events): the freeze is tried again.
    pub transient: bool,
}

impl Blocker {
    /// A lasting blocker.
    pub fn new(place: impl Into<String>, reason: impl Into<String>, fix: impl Into<String>) -> Self {
        Blocker {
            place: place.into(),
            reason: reason.into(),
            fix: fix.into(),
            transient: false,
        }
    }
    /// The same, likely to pass by itself.
    pub fn transient(mut self) -> Self {
        self.transient = true;
        self
    }
}

impl std::fmt::Display for Blocker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}; {}", self.place, self.reason, self.fix)
    }
}

//! Steps at which a test ends an agent, or interrupts it: every message before it is sent, when it was, and when one has come; and every part of a look,
//! a freeze, a restore that is timed ([`crate::laps`]).
//!
//! Only builds with debug assertions look: `MIGRATE_STEPS` names a file to which each step is written when it is reached, as `NAME#1` the first time,
//! `NAME#2` the second. `MIGRATE_AT` is such a line, and the agent gets signal `MIGRATE_AT_SIGNAL` from itself there (a number; 9 if there is none).

/// This step was reached.
#[cfg(not(debug_assertions))]
pub fn reached(_what: impl std::fmt::Display) {}

/// This step was reached.
#[cfg(debug_assertions)]
pub fn reached(what: impl std::fmt::Display) {
    use std::{
        collections::HashMap,
        io::Write,
        sync::{Mutex, OnceLock, PoisonError},
    };
    struct Watch {
        log: Option<std::path::PathBuf>,
        at: Option<String>,
        signal: i32,
        counts: Mutex<HashMap<String, u32>>,
    }
    static WATCH: OnceLock<Option<Watch>> = OnceLock::new();
    let watch = WATCH.get_or_init(|| {
        let (log, at) = (std::env::var_os("MIGRATE_STEPS"), std::env::var("MIGRATE_AT").ok());
        let signal = std::env::var("MIGRATE_AT_SIGNAL").ok().and_then(|s| s.parse().ok());
        (log.is_some() || at.is_some()).then(|| Watch {
            log: log.map(Into::into),
            at,
            signal: signal.unwrap_or(libc::SIGKILL),
            counts: Mutex::default(),
        })
    });
    let Some(w) = watch else { return };
    let what = what.to_string();
    let mut counts = w.counts.lock().unwrap_or_else(PoisonError::into_inner);
    let n = counts.entry(what.clone()).or_default();
    *n += 1;
    let step = format!("{what}#{n}");
    if let Some(path) = &w.log
        && let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = file.write_all(format!("{step}\n").as_bytes());
    }
    if w.at.as_ref() == Some(&step) {
        let _ = crate::sys::misc::kill(std::process::id() as i32, w.signal);
    }
}

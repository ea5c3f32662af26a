//! Ctrl-C, SIGTERM and SIGHUP: they ask the engine to undo, and never end this command while a tree may be frozen.

use crate::{context::Context, engine::Program};
use migrate_engine::report::{Event, Events};
use std::{
    fs,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

const SIGTSTP: i32 = 20;
const SUSPEND: &str = "not suspended: a program may be frozen at this moment";
const AGAIN: &str =
    "still undoing: a program may be frozen at this moment, so this command does not stop half-way; wait, it ends by itself";

/// Signals are handled from its making on.
pub struct Interrupts {
    program: Arc<Mutex<Option<Program>>>,
}

/// Takes over the signals that would end this command; `first` is said at the first of them.
pub fn watch(context: &Context, first: &'static str) -> anyhow::Result<Interrupts> {
    let program = Arc::new(Mutex::new(None));
    let again = Arc::new(AtomicBool::new(false));
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        if is_ignored(kind) {
            continue;
        }
        let handler = Handler {
            number: kind.as_raw_value(),
            program: program.clone(),
            first,
            again: again.clone(),
            cancel: context.cancel.clone(),
            events: context.progress.events(),
        };
        tokio::spawn(handler.run(signal(kind)?));
    }
    // Suspended, this command would leave a frozen program frozen.
    let (events, mut suspends) = (context.progress.events(), signal(SignalKind::from_raw(SIGTSTP))?);
    tokio::spawn(async move {
        while suspends.recv().await.is_some() {
            (events)(Event::Note { text: SUSPEND.into() });
        }
    });
    Ok(Interrupts { program })
}

impl Interrupts {
    /// The program runs now: signals are for it from here on.
    pub fn pass_to(&self, program: Program) {
        *self.program.lock().unwrap_or_else(PoisonError::into_inner) = Some(program);
    }
}

struct Handler {
    number: i32,
    program: Arc<Mutex<Option<Program>>>,
    first: &'static str,
    again: Arc<AtomicBool>,
    cancel: CancellationToken,
    events: Events,
}

impl Handler {
    async fn run(self, mut signals: Signal) {
        while signals.recv().await.is_some() {
            let program = self.program.lock().unwrap_or_else(PoisonError::into_inner).clone();
            match program {
                Some(program) => {
                    if let Err(failure) = program.signal(self.number) {
                        self.say(failure.to_string());
                    }
                }
                None => {
                    let first = !self.again.swap(true, Ordering::Relaxed);
                    self.say(if first { self.first } else { AGAIN }.to_owned());
                    self.cancel.cancel();
                }
            }
        }
    }

    fn say(&self, text: String) {
        (self.events)(Event::Note { text });
    }
}

/// Whoever started us wants us to live through it: nohup, or `&` in a script.
fn is_ignored(kind: SignalKind) -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| ignores(&status, kind.as_raw_value()))
}

fn ignores(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    u32::try_from(signal - 1).is_ok_and(|bit| mask.checked_shr(bit).unwrap_or(0) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals() {
        let status = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n";
        assert!(ignores(status, 1));
        assert!(!ignores(status, 2));
        assert!(ignores(status, 13));
        assert!(!ignores(status, 0));
        assert!(!ignores("", 1));
    }
}

//! Idle cpus that do not sleep, while somebody waits for every step of ours.
//!
//! A freeze is a dozen threads that wake each other in turn, and a missing page half a dozen. A cpu that has nothing to do in between sleeps, and waking it costs
//! tens of microseconds, in a virtual machine with an exit to its host each time. Who asks for a latency of 0 (Documentation/power/pm_qos_interface.rst) has idle
//! cpus poll instead, for as long as the file is open. It is given back when this process ends, however it ends.

use std::{
    fs::{File, OpenOptions},
    future::Future,
    io::Write,
    pin::pin,
    time::Duration,
};
use tokio::time::Instant;

/// Takes what is asked for as 32 bits, in microseconds.
const LATENCY: &str = "/dev/cpu_dma_latency";

/// Keeps the cpus of this host awake until it is dropped. Without the file, or the right to it, it does nothing.
#[derive(Debug)]
pub struct Awake {
    _asked: Option<File>,
}

impl Awake {
    /// From now on.
    pub fn hold() -> Awake {
        let ask = || {
            let mut file = OpenOptions::new().write(true).open(LATENCY)?;
            file.write_all(&0_i32.to_ne_bytes()).map(|()| file)
        };
        let asked = ask()
            .inspect_err(|e| tracing::debug!(error = %e, "idle cpus of this host may sleep"))
            .ok();
        Awake { _asked: asked }
    }
}

/// Keeps them awake while something keeps coming.
#[derive(Debug, Default)]
pub struct AwakeWhile {
    held: Option<(Awake, Instant)>,
}

/// How long after the last one.
const LINGER: Duration = Duration::from_millis(20);

impl AwakeWhile {
    /// One has come.
    pub fn touch(&mut self) {
        let awake = self.held.take().map_or_else(Awake::hold, |(awake, _)| awake);
        self.held = Some((awake, Instant::now()));
    }

    /// Waits for what may be the next, or anything else; with sleeping cpus when the last one is a while ago.
    pub async fn until<T>(&mut self, next: impl Future<Output = T>) -> T {
        let mut next = pin!(next);
        if let Some((_, last)) = &self.held {
            let enough = *last + LINGER;
            tokio::select! {
                biased;
                n = &mut next => return n,
                () = tokio::time::sleep_until(enough) => self.held = None,
            }
        }
        next.await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_let_go_a_while_after_the_last_one() {
        let mut awake = AwakeWhile::default();
        awake.touch();
        // What comes in between does not count.
        for _ in 0..3 {
            assert_eq!(awake.until(async { 7 }).await, 7);
        }
        assert!(awake.held.is_some());
        awake.until(tokio::time::sleep(LINGER * 2)).await;
        assert!(awake.held.is_none());
        awake.touch();
        assert_eq!(awake.until(async { 7 }).await, 7);
        assert!(awake.held.is_some());
    }
}

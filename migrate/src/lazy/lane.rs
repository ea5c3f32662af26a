//! A thread for what tasks of the program wait for: the connection that faults come on, its packets and its answers.
//!
//! A connection of its own keeps an answer from queueing behind the push on the wire; a thread of its own at both ends keeps it from queueing behind the push's
//! reading, encryption and decryption; a socket of its own at both ends ([`migrate_transport::Link::apart`]) from queueing behind the push's packets. With both
//! connections on one thread a request for a page lay 750 µs, the median on two cores at full push, before the source looked at it. With a thread at the
//! source alone all of a fault took 720 µs (p99 2.6 ms), with one at the destination and its socket 250 (1.3 ms).

use crate::sys::priority;
use std::{future::Future, io};
use tokio::{
    runtime::{Builder, EnterGuard, Handle},
    sync::oneshot,
};
use tokio_util::{context::TokioContext, task::AbortOnDropHandle};

/// The thread; it ends when this is dropped, with everything on it.
#[derive(Debug)]
pub struct Lane {
    handle: Handle,
    _open: oneshot::Sender<()>,
}

impl Lane {
    /// Starts it.
    pub fn start() -> io::Result<Lane> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (open, ended) = oneshot::channel();
        std::thread::Builder::new().name("faults".into()).spawn(move || {
            let _ = runtime.block_on(ended);
            runtime.shutdown_background();
        })?;
        Ok(Lane { handle, _open: open })
    }

    /// What is started until the guard is dropped lives on the thread.
    pub fn enter(&self) -> EnterGuard<'_> {
        self.handle.enter()
    }

    /// What this future starts (sockets, timers, tasks) lives on the thread; the future itself stays with its caller.
    pub fn around<F: Future>(&self, f: F) -> impl Future<Output = F::Output> + use<F> {
        TokioContext::new(f, self.handle.clone())
    }

    /// Runs a future on the thread, ahead of the process's other threads, until the handle is dropped.
    pub fn run<T: Send + 'static>(&self, f: impl Future<Output = T> + Send + 'static) -> AbortOnDropHandle<T> {
        AbortOnDropHandle::new(self.handle.spawn(async {
            priority::thread_ahead();
            f.await
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn runs_on_its_thread_and_ends_with_it() {
        let lane = Lane::start().unwrap();
        let name = || std::thread::current().name().map(str::to_owned);
        assert_eq!(lane.run(async move { name() }).await.unwrap().as_deref(), Some("faults"));
        let started = async { tokio::spawn(async move { name() }).await.unwrap() };
        assert_eq!(lane.around(started).await.as_deref(), Some("faults"));
        let waits = lane.run(tokio::time::sleep(Duration::from_secs(60)));
        drop(lane);
        assert!(waits.await.unwrap_err().is_cancelled());
    }
}

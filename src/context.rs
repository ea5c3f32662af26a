//! What every command is given.

use crate::progress::{Kept, Progress};
use std::path::PathBuf;
use tokio_util::sync::CancellationToken;

/// The same for all commands of a run.
pub struct Context {
    /// The caller is a program.
    pub json: bool,
    /// Identity, trust, journals.
    pub state_dir: PathBuf,
    /// Ends the engine's work; set by the first signal.
    pub cancel: CancellationToken,
    /// Where events go.
    pub progress: Progress,
    /// The events of a command that draws them.
    pub kept: Option<Kept>,
}

/// Runs a blocking part of the engine beside the runtime. A panic in it goes on here.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => Ok(value),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(error.into()),
        },
    }
}

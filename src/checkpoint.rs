//! `migrate checkpoint`.

use crate::{
    cli::Checkpoint,
    context::{Context, blocking},
    engine::{self, CheckpointOptions},
    interrupt, pid,
    report::{self, Deed},
};

/// Saves a tree.
pub async fn run(arguments: Checkpoint, context: &Context) -> anyhow::Result<u8> {
    pid::preflight(arguments.pid)?;
    let dir = arguments.dir.dir;
    let leave_running = arguments.leave_running;
    let options = CheckpointOptions {
        pid: arguments.pid,
        dir: dir.clone(),
        name: arguments.name,
        leave_running,
        parent: arguments.parent,
    };
    let _interrupts = interrupt::watch(context, "interrupted: the program goes on; wait")?;
    let (events, cancel) = (context.progress.events(), context.cancel.clone());
    let report = blocking(move || engine::checkpoint(options, events, cancel)).await??;
    let deed = Deed::Saved { dir: &dir, leave_running };
    report::success(context, &report, &deed, false, report::DONE);
    Ok(report::DONE)
}

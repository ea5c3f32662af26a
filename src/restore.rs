//! `migrate restore`.

use crate::{
    cli::Restore,
    context::{Context, blocking},
    engine::{self, RestoreOptions},
    interrupt,
    receive::checked,
    report::{self, Deed, Stake},
};

const SIGTERM: i32 = 15;

/// Starts a saved tree and, unless detached, is its shell until it ends.
pub async fn run(arguments: Restore, context: &Context) -> anyhow::Result<u8> {
    let options = RestoreOptions {
        dir: arguments.dir.dir,
        name: arguments.name,
        pid_file: arguments.pid_file,
        stdio: checked(arguments.stdio)?,
    };
    let interrupts = interrupt::watch(context, "interrupted: ending what was started; wait")?;
    let (events, cancel) = (context.progress.events(), context.cancel.clone());
    let restored = blocking(move || engine::restore(options, events, cancel)).await??;
    if arguments.detach {
        report::success(context, &restored.report, &Deed::Restored, false, report::DONE);
        return Ok(report::DONE);
    }
    interrupts.pass_to(restored.program.clone());
    if context.cancel.is_cancelled() {
        // The signal came too late for the engine: it was meant for what runs now.
        restored.program.signal(SIGTERM)?;
    }
    if !context.json {
        report::success(context, &restored.report, &Deed::Restored, true, report::DONE);
    }
    let pid = restored.program.pid;
    let program = restored.program;
    let status = match blocking(move || program.wait()).await? {
        Ok(status) => status,
        Err(failure) => return Ok(report::failure(context, &failure, Stake::Here(pid))),
    };
    if context.json {
        report::success(context, &restored.report, &Deed::Restored, false, status);
    }
    Ok(status)
}

//! `migrate send`.

use crate::{
    cli::Send,
    context::Context,
    engine, interrupt, pid,
    report::{self, Deed},
};
use migrate_engine::report::SendOptions;

/// Moves a tree.
pub async fn run(arguments: Send, context: &Context) -> anyhow::Result<u8> {
    pid::preflight(arguments.pid)?;
    let options = SendOptions {
        pid: arguments.pid,
        mode: arguments.mode.into(),
        tracker: arguments.tracker.into(),
        downtime_limit: arguments.downtime_limit,
        max_rounds: arguments.max_rounds,
        max_time: arguments.max_time,
        bandwidth: arguments.bandwidth,
        leave_running: arguments.leave_running,
        dry_run: arguments.dry_run,
        peer_timeout: arguments.peer_timeout,
    };
    let _interrupts = interrupt::watch(
        context,
        "interrupted: the program goes on here, unless it is at the other host already; wait",
    )?;
    let (events, cancel) = (context.progress.events(), context.cancel.clone());
    let report = engine::send(options, &arguments.to, arguments.ticket, &context.state_dir, events, cancel).await?;
    let deed = Deed::Sent {
        to: &arguments.to,
        leave_running: arguments.leave_running,
    };
    report::success(context, &report, &deed, false, report::DONE);
    Ok(report::DONE)
}

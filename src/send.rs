//! `migrate send`.

use crate::{
    bench::{self, results::Measured},
    cli::Send,
    context::Context,
    engine, interrupt, page, pid,
    report::{self, Deed},
};
use migrate_engine::report::{Report, SendOptions};
use std::{fs, path::Path, sync::PoisonError};

/// Moves a tree.
pub async fn run(mut arguments: Send, context: &Context) -> anyhow::Result<u8> {
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
    let ticket = arguments.ticket.take();
    let report = engine::send(options, &arguments.to, ticket, &context.state_dir, events, cancel).await?;
    let deed = Deed::Sent {
        to: &arguments.to,
        leave_running: arguments.leave_running,
    };
    report::success(context, &report, &deed, false, report::DONE);
    if let Some(file) = &arguments.report {
        // It is done, whatever becomes of the page.
        if let Err(error) = draw(file, &arguments, &report, context) {
            context.progress.say(format!(
                "migrate: {}, but {} was not written: {error}",
                report.outcome,
                file.display()
            ));
            context.progress.flush();
        }
    }
    Ok(report::DONE)
}

/// Writes the page with charts of this migration.
fn draw(file: &Path, arguments: &Send, report: &Report, context: &Context) -> anyhow::Result<()> {
    let mut events = Vec::new();
    if let Some(kept) = &context.kept {
        for (at, event) in kept.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            events.push((at.as_secs_f64() * 1e3, serde_json::to_value(event)?));
        }
    }
    let one = Measured {
        report: serde_json::to_value(report)?,
        events,
        ..Measured::default()
    };
    let about = bench::machine(arguments.tracker, &format!("to {}", arguments.to));
    let title = format!("migration of process {} to {}", arguments.pid, arguments.to);
    Ok(fs::write(file, page::migration(&one, &about, &title))?)
}

//! `migrate recover`.

use crate::{cli::Recover, context::Context, engine, human, interrupt, out, report};
use serde_json::json;

/// Lists hand-overs that a crash left open, or resolves one.
pub async fn run(arguments: Recover, context: &Context) -> anyhow::Result<u8> {
    let Some(id) = arguments.id else {
        return list(context);
    };
    let _interrupts = interrupt::watch(context, "interrupted: wait")?;
    let (events, cancel) = (context.progress.events(), context.cancel.clone());
    let result = engine::recover(&context.state_dir, &id, arguments.abort, events, cancel).await?;
    context.progress.flush();
    if context.json {
        out::json(&json!({ "outcome": "resolved", "id": id, "result": result, "exit_code": report::DONE }))?;
    } else {
        out::stdout(&format!("{id}: {}\n", human::printable(&result)))?;
    }
    Ok(report::DONE)
}

fn list(context: &Context) -> anyhow::Result<u8> {
    let open = engine::recover_list(&context.state_dir)?;
    if context.json {
        out::json(&json!({ "handovers": open }))?;
        return Ok(report::DONE);
    }
    if open.is_empty() {
        out::stdout("nothing to recover\n")?;
        return Ok(report::DONE);
    }
    let mut rows = vec![["ID", "SIDE", "PID", "PEER", "SINCE", "STATE"].map(String::from).to_vec()];
    rows.extend(open.into_iter().map(|handover| {
        vec![
            handover.id,
            handover.side,
            handover.pid.to_string(),
            human::printable(&handover.peer),
            human::ago(handover.since),
            human::printable(&handover.state),
        ]
    }));
    out::stdout(&human::table(&rows))?;
    Ok(report::DONE)
}

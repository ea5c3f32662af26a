//! `migrate list`.

use crate::{cli::List, context::Context, engine, human, out, report};
use serde_json::json;

/// Prints the checkpoints in a directory.
pub fn run(arguments: &List, context: &Context) -> anyhow::Result<u8> {
    let mut images = engine::list(&arguments.dir.dir)?;
    images.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    if context.json {
        out::json(&json!({ "images": images }))?;
        return Ok(report::DONE);
    }
    let heading = ["NAME", "TAKEN", "PID", "PROCESSES", "THREADS", "SIZE", "PARENT", "COMMAND"];
    let mut rows = vec![heading.map(String::from).to_vec()];
    rows.extend(images.into_iter().map(|image| {
        vec![
            image.name,
            human::ago(image.created),
            image.pid.to_string(),
            image.processes.to_string(),
            image.threads.to_string(),
            human::bytes(image.bytes),
            image.parent.unwrap_or_else(|| "-".into()),
            human::printable(&image.command),
        ]
    }));
    out::stdout(&human::table(&rows))?;
    Ok(report::DONE)
}

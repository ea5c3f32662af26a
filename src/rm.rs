//! `migrate rm`.

use crate::{cli::Rm, context::Context, engine, out, report};
use serde_json::json;

/// Removes a checkpoint.
pub fn run(arguments: &Rm, context: &Context) -> anyhow::Result<u8> {
    let name = &arguments.name;
    engine::remove(&arguments.dir.dir, name)?;
    if context.json {
        out::json(&json!({ "outcome": "removed", "name": name, "exit_code": report::DONE }))?;
    } else {
        out::stdout(&format!("removed {name}\n"))?;
    }
    Ok(report::DONE)
}

//! `migrate completions`.

use crate::{
    cli::{Cli, Completions},
    out, report,
};
use clap::CommandFactory;

/// Prints the script.
pub fn run(arguments: &Completions) -> anyhow::Result<u8> {
    let mut script = Vec::new(); // The generator panics when a write fails.
    clap_complete::generate(arguments.shell, &mut Cli::command(), "migrate", &mut script);
    out::stdout(&String::from_utf8(script)?)?;
    Ok(report::DONE)
}

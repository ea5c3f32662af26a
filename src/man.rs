//! `migrate man`.

use crate::{
    cli::{Cli, Man},
    out, report,
};
use anyhow::Context as _;
use clap::CommandFactory;

/// Prints the manual page, or writes one for every command.
pub fn run(arguments: &Man) -> anyhow::Result<u8> {
    match &arguments.dir {
        Some(dir) => {
            let write = || {
                std::fs::create_dir_all(dir)?;
                clap_mangen::generate_to(Cli::command(), dir)
            };
            write().with_context(|| format!("manual pages in {}", dir.display()))?;
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page)?;
            out::stdout(&String::from_utf8(page)?)?;
        }
    }
    Ok(report::DONE)
}

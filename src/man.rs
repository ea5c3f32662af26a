//! `migrate man`.

use crate::{
    cli::{Cli, Man},
    out, report,
};
use anyhow::Context as _;
use clap::{Command, CommandFactory};
use std::{fs, io, path::Path};

/// Prints the manual page, or writes one for every command.
pub fn run(arguments: &Man) -> anyhow::Result<u8> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    match &arguments.dir {
        Some(dir) => {
            let written = fs::create_dir_all(dir).and_then(|()| write(&command, dir));
            written.with_context(|| format!("manual pages in {}", dir.display()))?;
        }
        None => out::stdout(&page(&command)?)?,
    }
    Ok(report::DONE)
}

fn write(command: &Command, dir: &Path) -> io::Result<()> {
    for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
        write(subcommand, dir)?;
    }
    let name = clap_mangen::Man::new(command.clone()).get_filename();
    fs::write(dir.join(name), page(command)?)
}

fn page(command: &Command) -> io::Result<String> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    Ok(keep_lines(&String::from_utf8_lossy(&page)))
}

/// Examples are indented lines: man(1) would fill and justify them.
fn keep_lines(page: &str) -> String {
    let mut kept = String::with_capacity(page.len() + 256);
    let mut inside = false;
    for line in page.lines() {
        let example = line.starts_with(' ');
        if example != inside {
            kept.push_str(if example { ".nf\n" } else { ".fi\n" });
            inside = example;
        }
        kept.push_str(line);
        kept.push('\n');
    }
    if inside {
        kept.push_str(".fi\n");
    }
    kept
}

#[cfg(test)]
mod tests {
    #[test]
    fn examples_stay_as_they_are() {
        let page = "text\n  # one\n  # two\ntext\n";
        assert_eq!(super::keep_lines(page), "text\n.nf\n  # one\n  # two\n.fi\ntext\n");
    }
}

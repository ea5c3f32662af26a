//! `migrate`: live migration of a running Linux process tree from one host to another.
//!
//! The command line and nothing else: it parses (`cli`, `parse`), asks the engine (`engine`, one file a command) and tells the result
//! (`report`, `progress`). What moves a process lives in the `migrate-engine` package.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)] // they panic when nobody reads: `out` does not

mod bench;
mod ceiling;
mod check;
mod checkpoint;
mod cli;
mod completions;
mod context;
mod demo;
mod engine;
mod help;
mod human;
mod interrupt;
mod list;
mod log;
mod man;
mod out;

mod page;
mod parse;
mod pid;
mod progress;
mod receive;
mod recover;
mod report;
mod restore;
mod rm;
mod run;
mod send;
mod show;
mod trust;

use clap::Parser;

fn main() -> std::process::ExitCode {
    run::run(cli::Cli::parse())
}

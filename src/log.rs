//! `-v`: what the agent does, to stderr.

use tracing_subscriber::{EnvFilter, fmt};

/// Starts logging; with `json` each record is a line of JSON, as events are.
pub fn start(verbose: u8, json: bool) {
    let level = match verbose {
        0 => "warn",
        1 => "warn,migrate=info,migrate_engine=info,migrate_transport=info",
        2 => "info,migrate=debug,migrate_engine=debug,migrate_transport=debug",
        _ => "trace",
    };
    // A failed write must not be reported with eprintln!, which panics when stderr is gone.
    let builder = fmt()
        .with_env_filter(EnvFilter::new(level))
        .with_writer(std::io::stderr)
        .log_internal_errors(false);
    let started = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_ansi(false).with_target(verbose > 1).try_init()
    };
    if let Err(error) = started {
        crate::out::stderr(&format!("migrate: no log: {error}\n"));
    }
}

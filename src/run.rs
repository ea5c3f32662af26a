//! From a parsed command line to an exit code.

use crate::{
    bench, ceiling, check, checkpoint,
    cli::{Cli, Command, Trust},
    completions,
    context::Context,
    demo, engine, list, log, man, out,
    progress::{Progress, Style},
    receive, recover,
    report::{self, Stake},
    restore, rm, send, show, trust,
};
use migrate_engine::report::{Class, Failure, Stdio};
use std::{panic::AssertUnwindSafe, process::ExitCode, time::Duration};
use tokio_util::sync::CancellationToken;

/// Where the connections live. One connection is the work of one thread at a time in the main, and with two cores for everything a pool of threads costs
/// more than it gives: on one thread the rounds carried 340 MiB/s instead of 240, the drain 340 instead of 210. A receiver of several trees has use
/// for the cores that are there.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let few = std::thread::available_parallelism().is_ok_and(|n| n.get() <= 2);
    let mut builder = if few {
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    builder.enable_all().build()
}

/// Runs the command.
pub fn run(cli: Cli) -> ExitCode {
    if matches!(cli.command, Command::Keeper) {
        // No runtime, no other thread, nothing on a terminal.
        return ExitCode::from(if engine::keeper().is_ok() { report::DONE } else { report::FAILED });
    }
    if let Command::Guest(guest) = &cli.command {
        return migrate_guests::main(&guest.arguments);
    }
    let json = cli.command.json();
    log::start(cli.verbose, json);
    let progress = Progress::start(Style::choose(json, cli.verbose), shares_terminal(&cli.command));
    let runtime = runtime();
    let (mut progress, runtime) = match (progress, runtime) {
        (Ok(progress), Ok(runtime)) => (progress, runtime),
        (Err(error), _) | (_, Err(error)) => {
            out::stderr(&format!("migrate: no thread could be started: {error}\n"));
            return ExitCode::from(report::FAILED);
        }
    };
    let kept = cli.command.draws().then(|| progress.keep());
    let context = Context {
        json,
        kept,
        state_dir: cli.state_dir,
        cancel: CancellationToken::new(),
        progress,
    };
    let (stake, harmless) = (stake(&cli.command), harmless(&cli.command));
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(dispatch(cli.command, &context))));
    let code = match result {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => report::failure(&context, &to_failure(error, stake), stake),
        Err(_) => report::failure(&context, &panicked(stake, harmless), stake),
    };
    context.progress.flush();
    runtime.shutdown_timeout(Duration::from_secs(1));
    ExitCode::from(code)
}

async fn dispatch(command: Command, context: &Context) -> anyhow::Result<u8> {
    match command {
        Command::Receive(arguments) => receive::run(arguments, context).await,
        Command::Send(arguments) => send::run(arguments, context).await,
        Command::Checkpoint(arguments) => checkpoint::run(arguments, context).await,
        Command::Restore(arguments) => restore::run(arguments, context).await,
        Command::List(arguments) => list::run(&arguments, context),
        Command::Rm(arguments) => rm::run(&arguments, context),
        Command::Show(arguments) => show::run(&arguments, context),
        Command::Check(arguments) => check::run(arguments, context).await,
        Command::Recover(arguments) => recover::run(arguments, context).await,
        Command::Trust { command } => match command {
            Trust::List { .. } => trust::list(context),
            Trust::Add { fingerprint, name, .. } => trust::add(&fingerprint, name.as_deref(), context),
            Trust::Remove { peer, .. } => trust::remove(&peer, context),
        },
        Command::Bench(arguments) => bench::run(*arguments, context).await,
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Ceiling { command } => ceiling::run(command).await,
        Command::Keeper | Command::Guest(_) => Ok(report::FAILED),
        Command::Completions(arguments) => completions::run(&arguments),
        Command::Man(arguments) => man::run(&arguments),
    }
}

fn stake(command: &Command) -> Stake {
    match command {
        Command::Send(arguments) => Stake::Here(arguments.pid),
        Command::Checkpoint(arguments) => Stake::Here(arguments.pid),
        Command::Restore(_) => Stake::Image,
        _ => Stake::Nothing,
    }
}

/// Nothing is stopped, started or moved by these, however they end.
fn harmless(command: &Command) -> bool {
    !matches!(
        command,
        Command::Receive(_) | Command::Send(_) | Command::Checkpoint(_) | Command::Restore(_) | Command::Recover(_)
    )
}

/// The program that arrives prints where our progress line is.
fn shares_terminal(command: &Command) -> bool {
    match command {
        Command::Receive(arguments) => arguments.stdio == Stdio::Inherit,
        Command::Restore(arguments) => arguments.stdio == Stdio::Inherit,
        _ => false,
    }
}

/// The engine's own failures as they are; anything else happened around it and touched nothing.
fn to_failure(error: anyhow::Error, stake: Stake) -> Failure {
    let pid = if let Stake::Here(pid) = stake { pid } else { 0 };
    error
        .downcast::<Failure>()
        .unwrap_or_else(|error| Failure::failed("command line", pid, format!("{error:#}")))
}

/// A bug. Where a program was at stake nobody knows how far it came.
fn panicked(stake: Stake, harmless: bool) -> Failure {
    let mut failure = Failure::failed("internal", 0, "an internal error, described above");
    if let Stake::Here(pid) = stake {
        failure.pid = pid;
    }
    if !harmless {
        failure.class = Class::Unknown;
    }
    failure
}

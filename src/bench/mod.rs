//! `migrate bench`: how long programs stand still when they are moved, measured by themselves and by their clients.
//!
//! It measures with the hosts and the guests of the tests (`migrate_harness`, `migrate_guests`): what is measured is what is tested, and there is one of each. The
//! agents are this very program, started as anybody starts it.

mod bed;
mod ceilings;
mod criu;
mod machine;
mod plan;
pub mod results;
mod run;
mod table;

use crate::{
    cli::Bench,
    context::{self, Context},
    human, interrupt, out, page, report,
};
use anyhow::Context as _;
use migrate_engine::report::{Event, Events, Failure};
use results::{Case, Results};
use std::{fs, path::Path, time::Instant};
use tokio_util::sync::CancellationToken;

pub use machine::machine;

/// Measures, and prints what came of it.
pub async fn run(arguments: Bench, context: &Context) -> anyhow::Result<u8> {
    if let Some(file) = &arguments.report {
        // Found out now, not after an hour.
        let dir = file.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
        tempfile::tempfile_in(dir).with_context(|| format!("--report {}", file.display()))?;
    }
    let _interrupts = interrupt::watch(context, "interrupted: ends what it has started; what was measured is shown")?;
    let (events, cancel) = (context.progress.events(), context.cancel.clone());
    let (state_dir, file) = (context.state_dir.clone(), arguments.report.clone());
    let waiting = cancel.clone();
    tokio::spawn(async move {
        waiting.cancelled().await;
        migrate_harness::abandon();
    });
    let results = context::blocking(move || measure(&arguments, &state_dir, &events, &cancel)).await??;
    context.progress.flush();
    if let Some(file) = &file {
        fs::write(file, page::bench(&results)).with_context(|| format!("--report {}", file.display()))?;
    }
    if context.json {
        out::json(&results)?;
    } else {
        out::stdout(&table::text(&results))?;
    }
    let well = results.cases.iter().any(|c| !c.runs.is_empty()) && results.cases.iter().all(|c| c.failed.is_empty());
    Ok(if well { report::DONE } else { report::FAILED })
}

fn measure(arguments: &Bench, state_dir: &Path, events: &Events, cancel: &CancellationToken) -> Result<Results, Failure> {
    let began = Instant::now();
    let note = |text: String| (events)(Event::Note { text });
    let program = std::env::current_exe().map_err(|e| Failure::failed("bench", 0, e))?;
    migrate_harness::carried_by(program);
    migrate_harness::without_oracle();
    let mut plan = plan::plan(arguments)?;
    let bed = bed::Bed::new(arguments, state_dir)?;
    let asked = arguments.criu.as_deref().map(criu::asked).transpose()?;
    let mut machine = machine(arguments.tracker, &bed.link());
    let ceilings = ceilings::measure(&bed, &note);
    let criu = criu::Criu::find(&bed, asked.as_deref());
    plan.retain(|item| match item.how {
        plan::How::Criu(way) => criu.as_ref().is_ok_and(|c| c.can(way)),
        plan::How::Mode(_) => true,
    });
    if plan.iter().any(|item| matches!(item.how, plan::How::Criu(_))) {
        machine.criu = criu.as_ref().ok().map(|c| c.version().to_owned());
    }
    let mut cases: Vec<Case> = Vec::new();
    let count = plan.len();
    for (number, item) in plan.into_iter().enumerate() {
        if cancel.is_cancelled() {
            break;
        }
        note(format!("{} of {count}: {}, {}", number + 1, item.workload.name(), item.how));
        let mut case = item.case();
        for _ in 0..item.repeat {
            if cancel.is_cancelled() {
                break;
            }
            match run::once(&bed, &item, criu.as_ref().ok(), cancel) {
                Ok(measured) => case.runs.push(measured),
                Err(_) if cancel.is_cancelled() => break,
                Err(why) => {
                    note(format!("{}, {}: {}", item.workload.name(), item.how, human::printable(&why)));
                    case.failed.push(why);
                    // What did not work once is not tried ten times.
                    break;
                }
            }
        }
        cases.push(case);
    }
    Ok(Results {
        machine,
        ceilings,
        command: command(std::env::args().skip(1)),
        took_s: began.elapsed().as_secs_f64(),
        cases,
        without_criu: criu.map_or_else(Some, |c| c.cannot()),
    })
}

/// A command line without the ticket, which is a secret until it is used.
fn command(arguments: impl Iterator<Item = String>) -> String {
    let mut words = Vec::new();
    let mut hide = false;
    for word in arguments {
        words.push(if hide {
            "...".to_owned()
        } else if word.starts_with("--ticket=") {
            "--ticket=...".to_owned()
        } else {
            word.clone()
        });
        hide = word == "--ticket";
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn tickets_are_not_told() {
        let said = |line: &str| super::command(line.split(' ').map(str::to_owned));
        assert_eq!(said("bench --to b:1 --ticket mig1x --json"), "bench --to b:1 --ticket ... --json");
        assert_eq!(said("bench --ticket=mig1x --to b:1"), "bench --ticket=... --to b:1");
    }
}

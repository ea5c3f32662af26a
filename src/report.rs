//! How it ended: one object of JSON on stdout for a program, a few lines for a person, and the exit code for both.

use crate::{context::Context, human, out, pid};
use migrate_engine::{
    blocker::Blocker,
    report::{Class, Failure, Report},
};
use serde::Serialize;

/// Exit codes, a contract.
pub const DONE: u8 = 0;
/// It still runs where it was.
pub const FAILED: u8 = 1;
/// Refused by preflight, nothing touched.
pub const REFUSED: u8 = 3;
/// Frozen; `migrate recover`.
pub const UNKNOWN: u8 = 4;

/// What was at risk, for the last line of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stake {
    /// A program on this host.
    Here(i32),
    /// A program on the sending host.
    AtSender,
    /// A checkpoint.
    Image,
    /// Nothing that runs.
    Nothing,
}

/// Which half of the work this command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deed<'a> {
    /// Sent to this address.
    Sent { to: &'a str, leave_running: bool },
    /// Received.
    Received,
    /// Saved.
    Saved { dir: &'a std::path::Path, leave_running: bool },
    /// Started again.
    Restored,
}

/// A report as `--json` prints it.
#[derive(Serialize)]
struct Success<'a> {
    #[serde(flatten)]
    report: &'a Report,
    exit_code: u8,
}

/// A failure as `--json` prints it.
#[derive(Serialize)]
struct Failed<'a> {
    outcome: Class,
    error: &'a str,
    phase: &'a str,
    pid: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<pid::State>,
    fix: &'a Option<String>,
    blockers: &'a [Blocker],
    exit_code: u8,
}

/// Exit code of a failure.
pub fn exit_code(class: Class) -> u8 {
    match class {
        Class::Failed => FAILED,
        Class::Refused => REFUSED,
        Class::Unknown => UNKNOWN,
    }
}

/// Prints a report; to stderr when stdout is a program's. What was done stays done when it cannot be printed.
pub fn success(context: &Context, report: &Report, deed: &Deed, to_stderr: bool, exit_code: u8) {
    context.progress.flush();
    let printed = if context.json {
        out::json(&Success { report, exit_code })
    } else if to_stderr {
        out::stderr(&summary(report, deed));
        Ok(())
    } else {
        out::stdout(&summary(report, deed))
    };
    if let Err(error) = printed {
        out::stderr(&format!("migrate: {}, but the report was not written: {error}\n", report.outcome));
    }
}

/// Prints a failure and gives its exit code.
pub fn failure(context: &Context, failure: &Failure, stake: Stake) -> u8 {
    context.progress.flush();
    let code = exit_code(failure.class);
    let process = match stake {
        Stake::Here(pid) => Some(pid::state(pid)),
        _ => None,
    };
    if context.json {
        let object = Failed {
            outcome: failure.class,
            error: &failure.message,
            phase: failure.phase,
            pid: failure.pid,
            process,
            fix: &failure.fix,
            blockers: &failure.blockers,
            exit_code: code,
        };
        if let Err(error) = out::json(&object) {
            out::stderr(&format!("migrate: {failure}; the report was not written: {error}\n"));
        }
    } else {
        let mut text = format!("migrate: {}\n", human::printable_lines(&failure.to_string()));
        if let Some(line) = aftermath(failure.class, stake, process) {
            text.push_str(&line);
            text.push('\n');
        }
        out::stderr(&text);
    }
    code
}

/// What a failure means for the program.
fn aftermath(class: Class, stake: Stake, process: Option<pid::State>) -> Option<String> {
    let untouched = if class == Class::Refused { "nothing was touched: " } else { "" };
    Some(match (class, stake) {
        (Class::Unknown, Stake::Here(pid)) => {
            let here = match process? {
                pid::State::Running => "runs here",
                pid::State::Stopped => "is frozen here",
                pid::State::Gone => "is gone from here",
            };
            format!("process {pid} {here}, and whether a copy runs elsewhere is not known: run `migrate recover`")
        }
        (Class::Unknown, _) => "what became of the program is not known, and it may be frozen: run `migrate recover`".into(),
        (_, Stake::Here(pid)) => match process? {
            pid::State::Running => format!("{untouched}process {pid} still runs here"),
            pid::State::Stopped => format!("{untouched}process {pid} is still here, and is stopped (by a signal or a debugger)"),
            pid::State::Gone => return None,
        },
        (_, Stake::AtSender) => format!("{untouched}the program still runs where it was, at the sender"),
        (_, Stake::Image) => "nothing was started".into(),
        (_, Stake::Nothing) => return None,
    })
}

/// From this factor between the least and the most predicted freeze on the prediction is said to be uncertain.
const UNCERTAIN: f64 = 4.0;

/// What moved, how long it stood still, how much was sent.
fn summary(report: &Report, deed: &Deed) -> String {
    let tree = format!(
        "{}, {}",
        human::plural(report.processes.into(), "process", "processes"),
        human::plural(report.threads.into(), "thread", "threads")
    );
    let (pid, restored) = (report.pid, report.restored_pid);
    let mut rows = vec![match deed {
        _ if report.outcome == "predicted" => row("predicted", format!("pid {pid} ({tree}) can move; nothing was touched")),
        Deed::Sent { to, leave_running } => {
            let end = if *leave_running { "; the original goes on here" } else { "" };
            row(&report.outcome, format!("pid {pid} ({tree}) runs at {to} as pid {restored}{end}"))
        }
        Deed::Received => row("received", format!("pid {pid} ({tree}) runs here as pid {restored}")),
        Deed::Saved { dir, leave_running } => {
            let end = if *leave_running { "goes on here" } else { "ended here" };
            row(&report.outcome, format!("pid {pid} ({tree}) is in {}; it {end}", dir.display()))
        }
        Deed::Restored => row(&report.outcome, format!("pid {pid} ({tree}) runs as pid {restored}")),
    }];
    let parts = report.downtime;
    let parts = [
        ("interrupt", parts.interrupt_ms),
        ("collect", parts.collect_ms),
        ("transfer", parts.transfer_ms),
        ("restore", parts.restore_ms),
        ("handover", parts.handover_ms),
    ];
    let parts: Vec<String> = parts
        .iter()
        .filter(|(_, ms)| *ms > 0.0)
        .map(|(name, ms)| format!("{name} {}", human::millis(*ms)))
        .collect();
    if report.downtime_ms > 0.0 {
        let parts = if parts.is_empty() {
            String::new()
        } else {
            format!(" ({})", parts.join(", "))
        };
        rows.push(row("frozen", format!("{:.1} ms{parts}", report.downtime_ms)));
    }
    let rounds = match report.rounds.len() {
        0 => String::new(),
        rounds => format!(" in {}", human::plural(rounds as u64, "round", "rounds")),
    };
    rows.push(row("total", format!("{}{rounds}", human::millis(report.total_ms))));
    if let Some(range) = report.range.filter(|r| r.downtime_ms[1] > UNCERTAIN * r.downtime_ms[0]) {
        let between = |[least, most]: [f64; 2]| format!("{} to {}", human::millis(least), human::millis(most));
        let text = format!(
            "it writes about as fast as pages can be carried: frozen {}, total {}",
            between(range.downtime_ms),
            between(range.total_ms)
        );
        rows.push(row("uncertain", text));
    }
    if report.bytes_sent + report.pages_sent + report.pages_zero > 0 {
        let pages = human::plural(report.pages_sent, "page", "pages");
        let zero = human::plural(report.pages_zero, "zero page", "zero pages");
        // A receiver counts only what it has answered.
        let bytes = match deed {
            Deed::Received => String::new(),
            _ => format!("{}: ", human::bytes(report.bytes_sent)),
        };
        rows.push(row("memory", format!("{bytes}{pages}, {zero}")));
    }
    if report.pages_lazy > 0 {
        let latency = &report.fault_latency_us;
        let waits = format!(
            "a fault waited {} us (median), {} us (p99), {} us (longest)",
            latency.p50, latency.p99, latency.max
        );
        rows.push(row(
            "late",
            format!("{} after the resume; {waits}", human::plural(report.pages_lazy, "page", "pages")),
        ));
    }
    rows.concat()
}

fn row(name: &str, text: String) -> String {
    format!("{name:<12} {text}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate_engine::report::{Downtime, FaultLatency, Range, Round};

    fn report() -> Report {
        Report {
            outcome: "migrated".into(),
            id: "5f3a".into(),
            pid: 4242,
            restored_pid: 77,
            processes: 1,
            threads: 12,
            rounds: vec![Round::default()],
            downtime_ms: 12.34,
            downtime: Downtime {
                collect_ms: 2.0,
                ..Downtime::default()
            },
            total_ms: 1340.0,
            bytes_sent: 268_435_456,
            pages_sent: 65_536,
            pages_zero: 1,
            pages_lazy: 0,
            fault_latency_us: FaultLatency::default(),
            drain: None,
            agent_peak_rss: 0,
            range: None,
        }
    }

    #[test]
    fn summaries() {
        let deed = Deed::Sent {
            to: "b:7878",
            leave_running: false,
        };
        let text = summary(&report(), &deed);
        assert_eq!(
            text,
            "migrated     pid 4242 (1 process, 12 threads) runs at b:7878 as pid 77\n\
             frozen       12.3 ms (collect 2.00 ms)\n\
             total        1.34 s in 1 round\n\
             memory       268 MB: 65,536 pages, 1 zero page\n"
        );
    }

    #[test]
    fn a_prediction_that_could_be_anything_says_so() {
        let predicted = |most: f64| {
            let report = Report {
                outcome: "predicted".into(),
                range: Some(Range {
                    downtime_ms: [4.0, most],
                    total_ms: [1340.0, 9000.0],
                }),
                ..report()
            };
            summary(&report, &Deed::Received)
        };
        let said = "uncertain    it writes about as fast as pages can be carried: frozen 4.00 ms to 700 ms, total 1.34 s to 9.00 s\n";
        assert!(predicted(700.0).contains(said), "{}", predicted(700.0));
        assert!(!predicted(5.0).contains("uncertain"));
    }

    #[test]
    fn aftermaths() {
        let running = Some(pid::State::Running);
        let says = |class, stake, process| aftermath(class, stake, process).unwrap_or_default();
        assert_eq!(says(Class::Failed, Stake::Here(7), running), "process 7 still runs here");
        assert_eq!(
            says(Class::Refused, Stake::Here(7), running),
            "nothing was touched: process 7 still runs here"
        );
        assert_eq!(says(Class::Failed, Stake::Here(7), Some(pid::State::Gone)), "");
        assert!(says(Class::Unknown, Stake::Here(7), running).contains("migrate recover"));
        assert!(says(Class::Unknown, Stake::Nothing, None).contains("migrate recover"));
    }
}

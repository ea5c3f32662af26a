//! `migrate check`.

use crate::{
    cli::{self, Check},
    context::{Context, blocking},
    engine::{self, CheckItem, CheckOk, HostReport, PairReport, ProcessReport},
    human::printable,
    interrupt, out,
    parse::Target,
    pid, report,
};
use clap::{CommandFactory, error::ErrorKind};
use migrate_engine::blocker::Blocker;
use serde::Serialize;

/// Everything that was looked at, as `--json` prints it.
#[derive(Serialize)]
struct Findings {
    /// "movable" or "blocked".
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<HostReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<ProcessReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pair: Option<PairReport>,
    exit_code: u8,
}

/// Looks at this host, or a process, or a receiver, or at a process for a receiver.
pub async fn run(arguments: Check, context: &Context) -> anyhow::Result<u8> {
    let (pid, to) = match (arguments.target, arguments.to) {
        (Some(Target::Peer(_)), Some(_)) => usage("two receivers and no PID: write `migrate check PID HOST:PORT`"),
        (Some(Target::Peer(to)), None) => (None, Some(to)),
        (Some(Target::Pid(pid)), to) => (Some(pid), to),
        (None, to) => (None, to),
    };
    let mut findings = Findings {
        outcome: "movable",
        host: None,
        process: None,
        pair: None,
        exit_code: report::DONE,
    };
    if pid.is_none() && to.is_none() {
        findings.host = Some(blocking(engine::check_host).await??);
    }
    if let Some(pid) = pid {
        pid::preflight(pid)?;
        findings.process = Some(blocking(move || engine::check_process(pid)).await??);
    }
    if let Some(to) = to {
        let _interrupts = interrupt::watch(context, "interrupted: wait")?;
        let cancel = context.cancel.clone();
        findings.pair = Some(engine::check_pair(pid, &to, arguments.ticket, &context.state_dir, cancel).await?);
    }
    if findings.blocked() {
        findings.outcome = "blocked";
        findings.exit_code = report::REFUSED;
    }
    context.progress.flush();
    if context.json {
        out::json(&findings)?;
    } else {
        out::stdout(&findings.text())?;
    }
    Ok(findings.exit_code)
}

fn usage(message: &str) -> ! {
    let mut command = cli::Cli::command();
    command.build();
    match command.find_subcommand_mut("check") {
        Some(check) => check.error(ErrorKind::ArgumentConflict, message).exit(),
        None => command.error(ErrorKind::ArgumentConflict, message).exit(),
    }
}

impl Findings {
    fn blocked(&self) -> bool {
        let missing = |items: &[CheckItem]| items.iter().any(|item| item.ok == CheckOk::No);
        self.host.as_ref().is_some_and(|host| missing(&host.items))
            || self.process.as_ref().is_some_and(|process| !process.blockers.is_empty())
            || self
                .pair
                .as_ref()
                .is_some_and(|pair| missing(&pair.items) || !pair.blockers.is_empty())
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if let Some(host) = &self.host {
            items(&mut text, "This host", &host.items);
        }
        if let Some(process) = &self.process {
            for task in &process.items {
                text.push_str(&format!("{}\n", printable(&task.task)));
                for holding in &task.holdings {
                    let (mark, reason) = if holding.movable {
                        ("yes", "")
                    } else {
                        ("NO", holding.reason.as_str())
                    };
                    text.push_str(&format!("  {mark:<9}{}: {}", printable(&holding.place), printable(&holding.what)));
                    text.push_str(&if reason.is_empty() {
                        "\n".into()
                    } else {
                        format!("; {}\n", printable(reason))
                    });
                }
            }
            blockers(&mut text, &process.blockers);
        }
        if let Some(pair) = &self.pair {
            items(&mut text, &format!("With {}", printable(&pair.peer)), &pair.items);
            blockers(&mut text, &pair.blockers);
        }
        text.push_str(match (self.blocked(), self.host.is_some()) {
            (false, true) => "Processes can be moved from and to this host.\n",
            (true, true) => "Processes cannot be moved from or to this host until what is marked NO is there.\n",
            (false, false) => "Nothing stands in the way.\n",
            (true, false) => "It cannot be moved as it is.\n",
        });
        text
    }
}

fn items(text: &mut String, heading: &str, items: &[CheckItem]) {
    text.push_str(&format!("{heading}\n"));
    for item in items {
        let mark = match item.ok {
            CheckOk::Yes => "yes",
            CheckOk::No => "NO",
            CheckOk::Degraded => "limited",
        };
        text.push_str(&format!("  {mark:<9}{}: {}\n", item.name, printable(&item.detail)));
        for (name, what) in [("effect", &item.effect), ("fix", &item.fix)] {
            if !what.is_empty() {
                text.push_str(&format!("           {name}: {}\n", printable(what)));
            }
        }
    }
}

fn blockers(text: &mut String, blockers: &[Blocker]) {
    if blockers.is_empty() {
        return;
    }
    text.push_str("In the way\n");
    for blocker in blockers {
        let passing = if blocker.transient { " (likely to pass by itself)" } else { "" };
        text.push_str(&format!(
            "  {}: {}{passing}\n",
            printable(&blocker.place),
            printable(&blocker.reason)
        ));
        text.push_str(&format!("           fix: {}\n", printable(&blocker.fix)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate_engine::check::{Holding, TaskHoldings};

    fn findings(items: Vec<CheckItem>, blockers: Vec<Blocker>) -> Findings {
        let holdings = vec![Holding {
            place: "fd 7".into(),
            what: "/dev/kvm".into(),
            movable: false,
            reason: "a device".into(),
        }];
        Findings {
            outcome: "movable",
            host: None,
            process: Some(ProcessReport {
                pid: 42,
                items: vec![TaskHoldings {
                    task: "pid 42 (vm)".into(),
                    holdings,
                }],
                blockers,
            }),
            pair: Some(PairReport {
                peer: "node2".into(),
                items,
                blockers: vec![],
            }),
            exit_code: 0,
        }
    }

    fn item(ok: CheckOk) -> CheckItem {
        CheckItem {
            name: "avx512f".into(),
            ok,
            detail: "there only".into(),
            effect: "refused".into(),
            fix: String::new(),
        }
    }

    #[test]
    fn verdicts() {
        assert!(!findings(vec![item(CheckOk::Yes), item(CheckOk::Degraded)], vec![]).blocked());
        assert!(findings(vec![item(CheckOk::No)], vec![]).blocked());
        let text = findings(vec![item(CheckOk::No)], vec![Blocker::new("pid 42 fd 7", "a device", "close it")]).text();
        for part in [
            "NO       fd 7: /dev/kvm; a device\n",
            "fix: close it",
            "With node2",
            "NO       avx512f",
            "effect: refused",
            "cannot be moved",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }
}

//! Bad input: a clear error, the exit code of the contract, and the program still running.

use migrate_harness::{Guest, Stdio, two_hosts, within};
use std::{
    fs,
    time::{Duration, Instant},
};

#[test]
fn a_pid_that_is_gone() {
    let hosts = two_hosts!();
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(29_999, &receiver, &[]);
    assert!([1, 2, 3].contains(&sent.code), "exit code {}", sent.code);
    sent.expect_says(&["no such process", "no process", "not found", "does not exist", "gone"])
        .expect_says(&["29999"]);
    for bad in ["0", "-5", "x", "99999999999"] {
        let sent = hosts
            .a
            .run(&["send", bad, &receiver.target, "--ticket", &receiver.ticket, "--mode", "stop"]);
        assert!([1, 2, 3].contains(&sent.code), "pid {bad:?}: exit code {}", sent.code);
    }
}

/// In the first pid namespace, where kernel threads are to be seen.
#[test]
fn a_kernel_thread() {
    let _hosts = two_hosts!();
    let kthread = std::fs::read_to_string("/proc/2/comm").unwrap_or_default();
    if kthread.trim() != "kthreadd" {
        migrate_harness::skip("no kernel thread is visible here");
        return;
    }
    let out = std::process::Command::new(migrate_harness::migrate_binary())
        .args(["checkpoint", "2", "--dir"])
        .arg(_hosts.file("images"))
        .arg("--state-dir")
        .arg(_hosts.a.dir().join("state"))
        .output()
        .unwrap();
    let all = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(3), "{all}");
    assert!(all.to_lowercase().contains("kernel thread"), "{all}");
}

#[test]
fn the_agent_itself_or_its_ancestor() {
    let hosts = two_hosts!();
    let receiver = hosts.b.receive(&Stdio::Null);
    let binary = migrate_harness::migrate_binary().display().to_string();
    // $$ is the shell, which waits for the agent.
    let line = format!(
        "{binary} send $$ {} --ticket {} --mode stop; echo code $?",
        receiver.target, receiver.ticket
    );
    let state = hosts.a.dir().join("state").display().to_string();
    let shell = hosts.a.command(["sh", "-c", &line]).env("MIGRATE_STATE_DIR", &state).start();
    shell.wait_for(Duration::from_secs(60));
    let said = || shell.stdout();
    within("exit code", Duration::from_secs(2), || said().contains("code ").then_some(()));
    assert!(said().contains("code 3"), "{} {}", said(), shell.stderr());
    let all = (said() + &shell.stderr()).to_lowercase();
    assert!(["ancestor", "itself", "parent"].iter().any(|w| all.contains(w)), "{all}");
    // The first process of the host is an ancestor too.
    let sent = hosts.a.send(1, &receiver, &[]);
    assert!([1, 3].contains(&sent.code), "exit code {}", sent.code);
}

#[test]
fn a_process_of_another_user_without_the_rights() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let state = hosts.file("state-of-nobody");
    std::fs::create_dir(&state).unwrap();
    std::os::unix::fs::chown(&state, Some(65534), Some(65534)).unwrap();
    // Where a user who is not root may execute it.
    let binary = hosts.file("migrate-copy");
    std::fs::copy(migrate_harness::migrate_binary(), &binary).unwrap();
    let pid = guest.pid.to_string();
    let mut argv = vec![binary.display().to_string()];
    argv.extend(hosts.a.send_args(&pid, &receiver).iter().map(|a| (*a).to_string()));
    let process = hosts
        .a
        .command(argv)
        .uid(65534)
        .cwd(std::path::Path::new("/"))
        .env("MIGRATE_STATE_DIR", &state.display().to_string())
        .start();
    let ended = process.wait_for(Duration::from_secs(60));
    assert!(
        matches!(ended, migrate_harness::Ended::Code(1 | 3)),
        "{ended:?} {} {}",
        process.stdout(),
        process.stderr()
    );
    let all = (process.stdout() + &process.stderr()).to_lowercase();
    assert!(
        ["permission", "not permitted", "root", "capabil", "rights"]
            .iter()
            .any(|w| all.contains(w)),
        "{all}"
    );
    assert!(guest.beats());
}

#[test]
fn a_task_that_is_traced_already() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let pid = guest.pid.to_string();
    let tracer = hosts
        .a
        .command([migrate_harness::guest_binary().to_str().unwrap(), "trace", &pid])
        .start();
    within("tracing", Duration::from_secs(5), || {
        tracer.stdout().contains("tracing").then_some(())
    });
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(guest.pid, &receiver, &[]);
    assert!(tracer.ended().is_none(), "the tracer was harmed");
    tracer.signal(nix::sys::signal::Signal::SIGKILL);
    sent.expect_code(3).expect_says(&["trace"]);
    assert!(guest.beats());
}

#[test]
fn a_port_nobody_listens_on_and_a_name_that_does_not_resolve() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let pid = guest.pid.to_string();
    // A ticket is needed to get that far; it may be of any receiver.
    let receiver = hosts.b.receive(&Stdio::Null);
    for (target, says) in [
        ("10.77.0.2:9", &["refused", "no answer", "unreachable", "timed out", "listen"][..]),
        ("10.77.0.99:7878", &["no answer", "unreachable", "timed out", "no route"][..]),
        ("no-such-host.invalid:7878", &["resolve", "lookup", "name", "address"][..]),
    ] {
        let since = Instant::now();
        let sent = hosts
            .a
            .run(&["send", &pid, target, "--ticket", &receiver.ticket, "--mode", "stop", "--json"]);
        sent.expect_code(1).expect_says(says);
        assert!(
            since.elapsed() < Duration::from_secs(30) * migrate_harness::patience(),
            "{target}: {:?}",
            since.elapsed()
        );
        assert!(guest.beats(), "{target}");
    }
    for target in ["10.77.0.2:x", "10.77.0.2:70000", "", ":7878"] {
        let sent = hosts.a.run(&["send", &pid, target, "--mode", "stop"]);
        assert!([1, 2].contains(&sent.code), "target {target:?}: exit code {}", sent.code);
    }
    assert!(guest.beats());
    guest.verify("after all that");
}

#[test]
fn a_wrong_or_used_ticket() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let pid = guest.pid.to_string();
    let receiver = hosts.b.receive(&Stdio::Null);
    let refused = |ticket: Option<&str>, what: &str| {
        let mut args = vec!["send", pid.as_str(), receiver.target.as_str(), "--mode", "stop", "--json"];
        if let Some(ticket) = ticket {
            args.extend(["--ticket", ticket]);
        }
        let sent = hosts.a.run(&args);
        assert!([1, 2, 3].contains(&sent.code), "{what}: exit code {}\n{}", sent.code, sent.all());
        sent.expect_says(&["ticket", "trust", "unknown", "fingerprint", "identity"]);
        assert!(guest.beats(), "{what}");
    };
    refused(None, "no ticket, a stranger");
    refused(Some("nonsense"), "no ticket at all");
    // One character of the secret, wherever that is, is another one.
    let mut wrong: Vec<char> = receiver.ticket.chars().collect();
    let last = wrong.len() - 2;
    wrong[last] = if wrong[last] == 'a' { 'b' } else { 'a' };
    refused(Some(&wrong.into_iter().collect::<String>()), "a wrong secret");
    assert!(receiver.process.ended().is_none(), "a stranger ended the receiver");

    // Another state directory is another identity: the ticket that A has used is of no use to it.
    let used = receiver.ticket.clone();
    hosts.a.send(guest.pid, &receiver, &[]).expect_code(0);
    receiver.wait().expect_code(0);
    let second = Guest::start(&hosts.a, "counter", &[]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let stranger = hosts.file("stranger").display().to_string();
    let id = second.pid.to_string();
    let sent = hosts.a.run(&[
        "send",
        &id,
        &receiver.target,
        "--ticket",
        &used,
        "--mode",
        "stop",
        "--json",
        "--state-dir",
        &stranger,
    ]);
    assert!(
        [1, 2, 3].contains(&sent.code),
        "a used ticket: exit code {}\n{}",
        sent.code,
        sent.all()
    );
    sent.expect_says(&["ticket"]);
    assert!(second.beats());
    guest.verify("moved");
    second.verify("not moved");
}

#[test]
fn the_ticket_file_is_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let hosts = two_hosts!();
    let receiver = hosts.b.receive(&Stdio::Null);
    let mode = std::fs::metadata(&receiver.ticket_file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let state = hosts.b.dir().join("state");
    let mut keys = 0;
    for entry in std::fs::read_dir(state).unwrap().flatten() {
        let meta = entry.metadata().unwrap();
        if meta.is_file() {
            keys += 1;
            assert_eq!(
                meta.permissions().mode() & 0o077,
                0,
                "{} can be read by others",
                entry.path().display()
            );
        }
    }
    assert!(keys > 0, "no identity in the state directory");
}

#[test]
fn check_says_what_this_host_and_this_pair_can_do() {
    let hosts = two_hosts!();
    let host = hosts.a.run(&["check"]);
    assert!([0, 3].contains(&host.code), "{}", host.all());
    for word in ["soft-dirty", "userfaultfd", "set_tid"] {
        host.expect_says(&[word]);
    }
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let pid = guest.pid.to_string();
    hosts.a.run(&["check", &pid]).expect_code(0);
    let receiver = hosts.b.receive(&Stdio::Null);
    let pair = hosts.a.run(&["check", &pid, &receiver.target, "--ticket", &receiver.ticket]);
    pair.expect_code(0);
    assert!(guest.beats());
    assert!(hosts.b.running("migrate-guest").is_empty(), "a check made something on B");
    guest.verify("after three checks");
}

#[test]
fn a_dry_run_moves_nothing() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "32")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(guest.pid, &receiver, &["--dry-run"]);
    sent.expect_code(0);
    assert_eq!(sent.json()["outcome"], "predicted");
    assert!(sent.json()["downtime_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{}", sent.stdout);
    assert!(guest.beats());
    assert!(hosts.b.running("migrate-guest").is_empty());
    guest.verify("after a dry run");
}

/// What is predicted of pre-copy is made of a sample of the program's writes.
#[test]
fn a_dry_run_of_pre_copy_predicts_its_rounds() {
    let hosts = two_hosts!();
    let predicted = |rate: &str| {
        let guest = Guest::start(&hosts.a, "ballast", &[("mib", "64"), ("rate", rate), ("rest-us", "50")]);
        let receiver = hosts.b.receive(&Stdio::Null);
        let sent = hosts.a.send(guest.pid, &receiver, &["--mode", "pre-copy", "--dry-run"]);
        sent.expect_code(0);
        guest.verify("after a dry run");
        let maps = fs::read_to_string(format!("/proc/{}/smaps", hosts.a.outer(guest.pid).unwrap())).unwrap();
        assert!(!maps.contains(" uw"), "its memory is still watched");
        receiver.process.signal(nix::sys::signal::Signal::SIGKILL);
        receiver.process.wait_for(Duration::from_secs(5));
        hosts.a.signal(guest.pid, nix::sys::signal::Signal::SIGKILL);
        sent.json()
    };
    let bytes = |report: &serde_json::Value, round: usize| report["rounds"][round]["bytes"].as_f64().unwrap_or(0.0);
    let (idle, busy) = (predicted("0"), predicted("40"));
    for report in [&idle, &busy] {
        assert_eq!(report["outcome"], "predicted");
        let rounds = report["rounds"].as_array().map_or(0, Vec::len);
        assert!(rounds >= 2, "a round, and what the freeze sends: {report}");
        let all = (50e6..120e6).contains(&bytes(report, 0));
        assert!(all, "the first round sends everything: {report}");
        assert!(report["total_ms"].as_f64() > report["downtime_ms"].as_f64(), "{report}");
    }
    assert!(
        bytes(&busy, 1) > 4.0 * bytes(&idle, 1),
        "what is written meanwhile: {idle} and {busy}"
    );
}

//! `migrate bench` and `migrate send --report`: small runs, and what they say.

use migrate_harness::{Dice, Guest, Receiver, Run, Stdio, eventually, migrate_binary, need, newer_criu, skip, tool, two_hosts};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio as ChildStdio},
    time::Duration,
};

fn bench(arguments: &[&str]) -> Command {
    let mut command = Command::new(migrate_binary());
    command.arg("bench").args(arguments).stdin(ChildStdio::null());
    command
}

fn measured(output: &Output) -> Value {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{error}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stdout)))
}

#[track_caller]
fn figure(value: &Value, path: &str) -> f64 {
    value
        .pointer(path)
        .and_then(Value::as_f64)
        .unwrap_or_else(|| panic!("no {path} in {value}"))
}

/// The parts fit each other: what the program saw is what the agents say, but for what the machine adds, and the client waited as long at least.
#[track_caller]
fn believable(run: &Value) {
    let (program, agents, client) = (
        figure(run, "/program_ms"),
        figure(run, "/report/downtime_ms"),
        figure(run, "/client_ms"),
    );
    assert!(program > 0.2 && agents > 0.2, "{run}");
    // The agent's clock runs from before the first task stops to after the last one runs; the program may be kept from its cpu before and after.
    let most = agents + figure(run, "/program_noise_ms").max(50.0);
    assert!(program < most, "the program stood still for {program} ms, the agents say {agents}");
    assert!(
        client > program / 2.0,
        "the client waited {client} ms, the program stood still for {program}"
    );
    assert!(figure(run, "/program_longest_ms") >= program, "{run}");
    let phases: Vec<&str> = run["events"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|e| e[1]["phase"].as_str())
        .collect();
    assert!(phases.contains(&"freeze") && phases.contains(&"handover"), "{phases:?}");
    let times: Vec<f64> = run["events"].as_array().unwrap().iter().map(|e| e[0].as_f64().unwrap()).collect();
    assert!(times.is_sorted(), "{times:?}");
}

/// What a run leaves if it does not clean up.
fn traces() -> BTreeSet<String> {
    let in_dir = |dir: &str, prefix: &str| {
        let names = fs::read_dir(dir).into_iter().flatten().flatten();
        let names = names.filter_map(|e| e.file_name().into_string().ok());
        names
            .filter(|n| n.starts_with(prefix))
            .map(|n| format!("{dir}/{n}"))
            .collect::<Vec<_>>()
    };
    [in_dir("/tmp", "migrate-test-"), in_dir("/dev/shm", "migrate-bench-")]
        .concat()
        .into_iter()
        .collect()
}

/// Guests and hosts that this program carried.
fn carried() -> Vec<i32> {
    let guest = format!("{}\0guest\0", migrate_binary().display());
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(|p| fs::read(format!("/proc/{p}/cmdline")).is_ok_and(|c| c.starts_with(guest.as_bytes())))
        .collect()
}

#[test]
fn a_short_bench_of_the_built_in_workload() {
    drop(two_hosts!());
    let before = traces();
    let page = tempfile::tempdir().unwrap();
    let page = page.path().join("bench.html");
    let options = [
        "--size",
        "16MiB",
        "--rate",
        "0,20MB/s",
        "--mode",
        "hybrid,post-copy",
        "--repeat",
        "1",
        "--json",
        "--report",
    ];
    let results = measured(&bench(&options).arg(&page).output().unwrap());
    let cases = results["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4, "{results}");
    for case in cases {
        believable(&case["runs"][0]);
        let speed = case["runs"][0]["speed"].as_array().unwrap();
        assert!(speed.len() > 20 && speed.iter().any(|s| s[0].as_f64().unwrap() < 0.0), "{speed:?}");
    }
    for ceiling in ["quic", "tcp", "memcpy"] {
        assert!(figure(&results, &format!("/ceilings/{ceiling}")) > 1e7, "{results}");
    }
    for (path, at_least) in [("/machine/cpus", 1.0), ("/machine/memory", 1e8), ("/took_s", 1.0)] {
        assert!(figure(&results, path) >= at_least, "{path} in {results}");
    }
    let text = fs::read_to_string(page).unwrap();
    assert!(text.contains("<svg") && text.contains("16 MiB, 20 MB/s") && text.trim_end().ends_with("</html>"));
    assert_eq!(traces(), before);
    assert_eq!(carried(), [0_i32; 0]);
}

#[test]
fn bench_of_everything_that_a_tree_can_have() {
    drop(two_hosts!());
    let options =
        "--size 8MiB --rate max --pattern zipf --shared --forked 2 --threads 20 --processes 5 --vmas 300 --fds 200 --repeat 1 --json";
    let results = measured(&bench(&options.split(' ').collect::<Vec<_>>()).output().unwrap());
    let run = &results["cases"][0]["runs"][0];
    assert!(figure(run, "/program_ms") > 0.2, "{run}");
    // The root, five that wait and two that write; the writer, the server's thread, twenty that wait, and one thread for each child.
    assert_eq!(figure(run, "/report/processes"), 8.0, "{run}");
    assert_eq!(figure(run, "/report/threads"), 29.0, "{run}");
}

#[test]
fn bench_of_other_programs() {
    drop(two_hosts!());
    need!("busybox");
    let command = "busybox sh -c 'while true; do echo .; busybox usleep 2000; done'";
    let run = |arguments: &[&str]| measured(&bench(&[arguments, &["--repeat", "1", "--json"]].concat()).output().unwrap());
    let results = run(&["--workload", command, "--workload", "shell"]);
    for case in results["cases"].as_array().unwrap() {
        let run = &case["runs"][0];
        assert!(figure(run, "/program_ms") > 1.0, "{run}");
        assert!(figure(run, "/program_noise_ms") > 0.0, "{run}");
    }
    need!("redis-server");
    let results = run(&["--workload", "redis"]);
    assert!(figure(&results, "/cases/0/runs/0/client_ms") > 1.0, "{results}");
}

/// What CRIU cannot do on this kernel is named. What fails says why.
#[test]
fn bench_beside_criu() {
    drop(two_hosts!());
    let newer = newer_criu();
    let Some(criu) = newer.clone().or_else(|| tool("criu")) else {
        skip("criu is not installed");
        return;
    };
    if !Command::new(&criu).arg("check").output().unwrap().status.success() {
        skip("criu check says that it does not work with this kernel");
        return;
    }
    let own = tempfile::tempdir().unwrap();
    let traces = || {
        let temporary = fs::read_dir(own.path()).unwrap().flatten().map(|e| e.path()).collect::<Vec<_>>();
        let memory = traces().into_iter().filter(|t| t.starts_with("/dev/shm/")).collect::<Vec<_>>();
        (temporary, memory, fs::read_to_string("/proc/self/mounts").unwrap())
    };
    let before = traces();
    let run = |criu: &Path, size: &str| {
        let options = [
            "--size", size, "--rate", "20MB/s", "--mode", "stop", "--repeat", "1", "--json", "--criu",
        ];
        let output = bench(&options).arg(criu).env("TMPDIR", own.path()).output().unwrap();
        assert_eq!(traces(), before);
        assert_eq!(carried(), [0_i32; 0]);
        output
    };
    let of = |results: &Value, mode: &str| results["cases"].as_array().unwrap().iter().find(|c| c["mode"] == mode).cloned();

    let output = run(&criu, "16MiB");
    if newer.is_none() && String::from_utf8_lossy(&output.stderr).contains("criu dump: code 1") {
        skip("the installed criu does not work with this kernel, though criu check says so (tests/criu.sh)");
        return;
    }
    let results = measured(&output);
    assert!(
        results["machine"]["criu"]
            .as_str()
            .unwrap()
            .starts_with(|c: char| c.is_ascii_digit()),
        "{results}"
    );
    assert!(of(&results, "criu").is_some(), "{results}");
    for mode in ["criu", "criu pre-dump", "criu lazy-pages"] {
        let Some(case) = of(&results, mode) else {
            assert!(results["without_criu"].as_str().unwrap().contains(mode), "{results}");
            continue;
        };
        let run = &case["runs"][0];
        println!("{mode}: program {} ms, client {} ms", run["program_ms"], run["client_ms"]);
        assert!(figure(run, "/program_ms") > 1.0 && figure(run, "/client_ms") > 1.0, "{case}");
        assert_eq!(run["report"]["images"], "memory", "{case}");
    }

    // One that saves, and does not restore.
    let dir = tempfile::tempdir().unwrap();
    let half = dir.path().join("criu");
    let script = format!(
        "#!/bin/sh\n[ $1 != restore ] || {{ echo Error: no >&2; exit 7; }}\nexec {} \"$@\"\n",
        criu.display()
    );
    fs::write(&half, script).unwrap();
    fs::set_permissions(&half, fs::Permissions::from_mode(0o755)).unwrap();
    let output = run(&half, "2MiB");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let results: Value = serde_json::from_slice(&output.stdout).unwrap();
    let said = of(&results, "criu").unwrap()["failed"][0].as_str().unwrap().to_owned();
    assert_eq!(said, "criu restore: code 7: Error: no");
    assert_eq!(of(&results, "stop").unwrap()["runs"].as_array().unwrap().len(), 1, "{results}");
}

#[test]
fn bench_over_a_slow_link() {
    drop(two_hosts!());
    let options = [
        "--size",
        "4MiB",
        "--rate",
        "0",
        "--round-trip",
        "60ms",
        "--link",
        "50Mbit/s",
        "--repeat",
        "1",
        "--json",
    ];
    let results = measured(&bench(&options).output().unwrap());
    let run = &results["cases"][0]["runs"][0];
    // The order to go on is under way for half of the round trip.
    assert!((29.0..600.0).contains(&figure(run, "/program_ms")), "{run}");
    assert!(figure(run, "/report/downtime_ms") > 59.0, "{run}");
    assert!(figure(run, "/report/total_ms") > 4.2e6 / 6.25e6 * 1e3, "{run}");
}

/// As between two machines: only the network is shared, though here it leads to another namespace.
#[test]
fn bench_to_a_waiting_receiver() {
    let hosts = two_hosts!();
    let receiver = Receiver::that_stays(&hosts.b, &[]);
    let options = ["--size", "8MiB", "--rate", "10MB/s", "--repeat", "2", "--json"];
    let arguments = [&["bench", "--to", &receiver.target, "--ticket", &receiver.ticket], &options[..]].concat();
    let run: Run = hosts.a.run(&arguments);
    run.expect_code(0);
    let results = run.json();
    assert!(!run.all().contains(&receiver.ticket), "the ticket is a secret");
    let runs = results["cases"][0]["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2, "{results}");
    runs.iter().for_each(believable);
    assert!(
        results["without_criu"].is_string() && results["ceilings"]["quic"].is_null(),
        "{results}"
    );
    let left = || [hosts.a.running(" load "), hosts.b.running(" load ")].concat();
    assert!(eventually(Duration::from_secs(10), || left().is_empty()), "{:?}", left());
    receiver.process.signal(Signal::SIGKILL);
}

#[test]
fn ctrl_c_ends_a_bench_and_all_that_it_started() {
    drop(two_hosts!());
    let before = traces();
    let mut child = bench(&["--size", "64MiB", "--repeat", "1000"])
        .stdout(ChildStdio::piped())
        .stderr(ChildStdio::piped())
        .spawn()
        .unwrap();
    // While the hosts are made, the ceilings measured, a program set up, watched, or moved.
    std::thread::sleep(Duration::from_millis(300) + Dice::new().below(Duration::from_secs(6)));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    assert!(
        eventually(Duration::from_secs(30), || matches!(child.try_wait(), Ok(Some(_)))),
        "it goes on"
    );
    let output = child.wait_with_output().unwrap();
    assert!(output.status.code().is_some(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("interrupted"), "{output:?}");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
    assert!(eventually(Duration::from_secs(10), || carried().is_empty()), "{:?}", carried());
    assert_eq!(traces(), before);
}

#[test]
fn what_cannot_be_measured_is_said() {
    drop(two_hosts!());
    let run = |arguments: &[&str]| {
        let output = bench(arguments).output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        )
    };
    let says = |arguments: &[&str], code: i32, what: &str| {
        let (ended, text) = run(arguments);
        assert_eq!(ended, Some(code), "{arguments:?}: {text}");
        assert!(text.contains(what) && !text.contains("panicked"), "{arguments:?}: {text}");
    };
    says(&["--workload", "no-such-program-anywhere"], 1, "ended by itself");
    says(&["--workload", "true"], 1, "ended by itself");
    says(&["--report", "/no/such/directory/x.html"], 1, "/no/such/directory");
    says(&["--size", "4kB"], 1, "at least 1MiB");
    says(&["--criu", "/no/such/criu"], 1, "no such program");
    says(&["--size", "4"], 2, "unit");
    says(&["--rate", "fast"], 2, "max");
    says(&["--to", "127.0.0.1:9", "--round-trip", "5ms"], 2, "cannot be used with");
    says(
        &["--to", "127.0.0.1:9", "--size", "4MiB", "--repeat", "1"],
        1,
        "migrate send: code 1",
    );
    assert_eq!(carried(), [0_i32; 0]);
}

#[test]
fn send_writes_a_report() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "16"), ("rate", "20")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let page = hosts.file("send.html");
    let sent = hosts.a.send(guest.pid, &receiver, &["--report", page.to_str().unwrap()]);
    sent.expect_code(0);
    let text = fs::read_to_string(&page).unwrap();
    assert!(text.contains(&format!("process {}", guest.pid)), "{text}");
    assert!(text.matches("<svg").count() >= 2, "{text}");
    assert!(text.contains(&receiver.target));
    guest.verify("after the move");

    // It cannot be written: the program is moved all the same.
    let back = hosts.a.receive(&Stdio::Null);
    let pid = sent.json()["restored_pid"].as_i64().unwrap() as i32;
    let sent = hosts.b.send(pid, &back, &["--report", "/no/such/directory/x.html"]);
    sent.expect_code(0).expect_says(&["was not written"]);
    assert!(!Path::new("/no/such/directory").exists());
    guest.verify("after the move back");
}

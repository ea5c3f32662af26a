//! The figures of the README, as a table: freeze as a program sees it, throughput against a plain QUIC connection, memory of the agents,
//! scale.
//!
//! `cargo bench --bench downtime [-- PART...]`, with parts `freeze`, `throughput`, `memory`, `scale`; all of them without any. Rows are
//! printed as they come, so that a later failure loses nothing. `MIGRATE_BENCH_RUNS` (10) is how often each is measured; the middle
//! counts.

use migrate_harness::{Guest, Hosts, Run, Stdio, programs, within};
use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

fn main() {
    migrate_harness::without_oracle();
    let asked: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |part: &str| asked.is_empty() || asked.iter().any(|a| a == part);
    println!("| what | median | all |");
    println!("|---|---|---|");
    if wanted("freeze") {
        freeze();
    }
    if wanted("throughput") {
        throughput();
    }
    if wanted("memory") {
        memory();
    }
    if wanted("scale") {
        scale();
    }
}

fn runs() -> usize {
    std::env::var("MIGRATE_BENCH_RUNS").ok().and_then(|r| r.parse().ok()).unwrap_or(10)
}

fn hosts() -> Hosts {
    Hosts::new().expect("two hosts: root and iproute2 are needed")
}

fn row(what: &str, unit: &str, mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let median = values.get(values.len() / 2).copied().unwrap_or(f64::NAN);
    let all: Vec<String> = values.iter().map(|v| format!("{v:.1}")).collect();
    println!("| {what} | {median:.1} {unit} | {} |", all.join(", "));
    median
}

/// The longest time that a file did not grow, while `act` runs.
fn longest_pause(file: &Path, act: impl FnOnce()) -> Duration {
    let stop = Arc::new(AtomicBool::new(false));
    let watcher = {
        let (stop, file) = (Arc::clone(&stop), file.to_path_buf());
        thread::spawn(move || {
            let size = || fs::metadata(&file).map_or(0, |m| m.len());
            let (mut last, mut grew, mut longest) = (size(), Instant::now(), Duration::ZERO);
            while !stop.load(Ordering::Relaxed) {
                let now = size();
                if now != last {
                    longest = longest.max(grew.elapsed());
                    (last, grew) = (now, Instant::now());
                }
                thread::sleep(Duration::from_micros(20));
            }
            longest
        })
    };
    act();
    // It must have gone on before the pause counts.
    let size = fs::metadata(file).map_or(0, |m| m.len());
    within("growth of the file", Duration::from_secs(10), || {
        (fs::metadata(file).ok()?.len() > size).then_some(())
    });
    thread::sleep(Duration::from_millis(5));
    stop.store(true, Ordering::Relaxed);
    watcher.join().unwrap_or_default()
}

fn freeze() {
    let (mut seen, mut by_agent, mut counter) = (Vec::new(), Vec::new(), Vec::new());
    let (mut guest_seen, mut guest_agent) = (Vec::new(), Vec::new());
    for _ in 0..runs() {
        let hosts = hosts();
        // A shell that only counts: any pause of its file is a pause of the shell.
        let out = hosts.file("counts");
        let script = "i=0; while true; do echo $i; i=$((i+1)); done";
        let shell = hosts
            .a
            .command(["busybox", "sh", "-c", script])
            .stdio(Stdio::File(out.clone()))
            .start();
        within("the shell counts", Duration::from_secs(10), || {
            (fs::metadata(&out).ok()?.len() > 10_000).then_some(())
        });
        let mut agent = f64::NAN;
        let pause = longest_pause(&out, || {
            agent = hosts.move_tree(&hosts.a, shell.pid, &Stdio::Null).number("downtime_ms")
        });
        seen.push(pause.as_secs_f64() * 1e3);
        by_agent.push(agent);
        drop(hosts);

        let hosts = self::hosts();
        let out = hosts.file("counts");
        let shell = hosts.a.command(programs::counter("0.01")).stdio(Stdio::File(out.clone())).start();
        within("the shell counts", Duration::from_secs(10), || {
            (programs::numbers(&hosts.read(&out)).len() > 20).then_some(())
        });
        counter.push(hosts.move_tree(&hosts.a, shell.pid, &Stdio::Null).number("downtime_ms"));
        drop(hosts);

        let hosts = self::hosts();
        let guest = Guest::start(&hosts.a, "counter", &[("every-us", "50"), ("rest-us", "0")]);
        guest.reset_gap();
        let moved = hosts.move_tree(&hosts.a, guest.pid, &Stdio::Null);
        guest_seen.push(guest.gap().as_secs_f64() * 1e3);
        guest_agent.push(moved.number("downtime_ms"));
        guest.verify("after the move");
    }
    row("freeze of a busybox shell, as its output shows it", "ms", seen);
    row("the same, as the agent says", "ms", by_agent);
    row("freeze of the shell counter (sleep 0.01), as the agent says", "ms", counter);
    row("freeze of a small program, as it sees it itself", "ms", guest_seen);
    row("the same, as the agent says", "ms", guest_agent);
}

/// The number that `migrate ceiling measure` prints, bytes a second.
fn ceiling(hosts: &Hosts, bytes: u64) -> Option<f64> {
    let address = format!("{}:7900", hosts.b.address());
    let server = hosts.b.migrate(&["ceiling", "serve", &address]).start();
    thread::sleep(Duration::from_millis(300));
    if server.ended().is_some() {
        eprintln!("migrate ceiling serve: {}", server.stderr());
        return None;
    }
    let run: Run = hosts.a.run(&["ceiling", "measure", &address, &bytes.to_string()]);
    server.signal(nix::sys::signal::Signal::SIGKILL);
    let json = run.json();
    let direct = json.get("bytes_per_second").and_then(|v| v.as_f64());
    let rate = direct.or_else(|| run.stdout.split_whitespace().find_map(|w| w.parse().ok()));
    if rate.is_none() {
        eprintln!("migrate ceiling measure: code {} {}", run.code, run.all());
    }
    rate
}

fn throughput() {
    const MIB: f64 = (1 << 20) as f64;
    let (mut ours, mut theirs, mut ratio) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs() {
        let hosts = hosts();
        let guest = Guest::start(&hosts.a, "ballast", &[("mib", "1024"), ("rest-us", "100000")]);
        let most = ceiling(&hosts, 1 << 30);
        let moved = hosts.move_tree(&hosts.a, guest.pid, &Stdio::Null);
        let rounds = moved.report["rounds"].as_array().cloned().unwrap_or_default();
        let sum = |key: &str| rounds.iter().filter_map(|r| r[key].as_f64()).sum::<f64>();
        let rate = sum("pages") * 4096.0 / (sum("ms") / 1e3);
        ours.push(rate / MIB);
        if let Some(most) = most {
            theirs.push(most / MIB);
            ratio.push(rate / most);
        }
    }
    row("1 GiB of random data, --mode stop", "MiB/s", ours);
    if !theirs.is_empty() {
        row("plain QUIC between the same hosts", "MiB/s", theirs);
        ratio.sort_by(f64::total_cmp);
        println!("| the first over the second, run by run | {:.2} | |", ratio[ratio.len() / 2]);
    }
}

fn memory() {
    const MIB: f64 = (1 << 20) as f64;
    let hosts = hosts();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "4096"), ("rest-us", "100000")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(guest.pid, &receiver, &[]);
    sent.expect_code(0);
    let received = receiver.wait();
    let peak = |run: &Run| run.json()["agent_peak_rss"].as_f64().unwrap_or(f64::NAN) / MIB;
    row("peak memory of the sender, 4 GiB tree", "MiB", vec![peak(&sent)]);
    row("peak memory of the receiver, 4 GiB tree", "MiB", vec![peak(&received)]);
    row(
        "freeze of the 4 GiB tree, --mode stop",
        "ms",
        vec![sent.json()["downtime_ms"].as_f64().unwrap_or(f64::NAN)],
    );
}

fn scale() {
    for (what, name, options, units) in [
        ("1,000 threads", "threads", &[("count", "1000"), ("spinning", "0")][..], 1000.0),
        ("200 processes", "tree", &[("count", "200")], 200.0),
        ("20,000 mappings", "vmas", &[("count", "20000")], 20_000.0),
        ("10,000 open files", "files", &[("count", "10000")], 10_000.0),
    ] {
        let mut freezes = Vec::new();
        for _ in 0..runs().min(5) {
            let hosts = hosts();
            let guest = Guest::start_with(&hosts.a, name, options, |c| c.open_files(20_000));
            freezes.push(hosts.move_tree(&hosts.a, guest.pid, &Stdio::Null).number("downtime_ms"));
        }
        let median = row(&format!("freeze with {what}"), "ms", freezes);
        println!("| the same, each | {:.2} us | |", median * 1e3 / units);
    }
}

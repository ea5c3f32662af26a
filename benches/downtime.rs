//! The figures of the README, as a table: freeze as a program sees it, throughput against a plain QUIC connection, memory of the agents,
//! scale.
//!
//! `cargo bench --bench downtime [-- PART...]`, with parts `freeze`, `precopy`, `lazy` (of it the `walk` alone), `predict`, `growth`, `cost`, `redis` (of it the `clients` alone),
//! `throughput`, `parallel`, `memory`, `scale`; all of them without any. `MIB@RATE` is a part as well: pre-copy of so much memory, written at so many megabytes a
//! second; and so is `MODE:MIB@RATE`, `MODE/shared:MIB@RATE` with anonymous shared memory, and `MODE/rest:MIB@RATE` of a program that looks at a page every 100 ms.
//! Rows are printed as they come, so that a later failure loses nothing. `MIGRATE_BENCH_RUNS` (10) is how often each is measured; the middle counts.

use migrate_harness::{Client, Guest, Hosts, Pauses, Process, Receiver, Redis, Run, Stdio, programs, within};
use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// The port it listens on unless it is told.
const REDIS: u16 = 6379;
const MIB: f64 = (1 << 20) as f64;

fn main() {
    // `cargo test --benches` runs this as well, and has no use for figures.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    migrate_harness::without_oracle();
    let asked: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |part: &str| asked.is_empty() || asked.iter().any(|a| a == part);
    println!("| what | median | all |");
    println!("|---|---|---|");
    if wanted("freeze") {
        freeze();
    }
    if wanted("precopy") {
        precopy();
    }
    for (what, rate) in asked.iter().filter_map(|a| a.split_once('@')) {
        let (mode, mib) = what.split_once(':').unwrap_or(("pre-copy", what));
        workload(mode, mib, rate, runs());
    }
    if wanted("lazy") {
        lazy();
    }
    if wanted("predict") {
        predict();
    }
    if wanted("growth") {
        growth();
    }
    if wanted("cost") {
        cost();
    }
    if wanted("redis") {
        redis();
    }
    if asked.iter().any(|a| a == "clients") {
        redis_clients();
    }
    if asked.iter().any(|a| a == "walk") {
        walk();
    }
    if wanted("throughput") {
        throughput();
    }
    if wanted("parallel") {
        parallel();
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
    let pauses = Pauses::watch(file, Duration::from_micros(20));
    act();
    // It must have gone on before the pause counts.
    let size = pauses.size();
    within("growth of the file", Duration::from_secs(10), || {
        (pauses.size() > size).then_some(())
    });
    thread::sleep(Duration::from_millis(5));
    pauses.longest()
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

/// One migration of a program of `mib` MiB of random data that writes `rate` MB/s at random addresses: (its own gap at the freeze, its longest in the
/// whole migration, its longest in the same time before, the report).
fn moved(hosts: &Hosts, mode: &str, mib: &str, rate: &str) -> (f64, f64, f64, serde_json::Value) {
    let (mode, kind) = mode.split_once('/').unwrap_or((mode, ""));
    let shared = if kind == "shared" { "1" } else { "0" };
    let rest = if kind == "rest" { "100000" } else { "50" };
    let guest = Guest::start(
        &hosts.a,
        "ballast",
        &[("mib", mib), ("rate", rate), ("shared", shared), ("rest-us", rest)],
    );
    guest.reset_gap();
    thread::sleep(Duration::from_millis(1500));
    let idle = guest.gap().as_secs_f64() * 1e3;
    guest.reset_gap();
    let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &["--mode", mode]);
    thread::sleep(Duration::from_millis(200));
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    (ms(guest.gap_at_move()), ms(guest.gap()), idle, moved.report)
}

fn number(report: &serde_json::Value, path: &str) -> f64 {
    report.pointer(path).and_then(serde_json::Value::as_f64).unwrap_or(f64::NAN)
}

const PARTS: [&str; 6] = ["interrupt_ms", "collect_ms", "scan_ms", "transfer_ms", "restore_ms", "handover_ms"];

/// Prints rows for a workload, the first of them the program's own gap at the freeze; returns its median.
fn workload(mode: &str, mib: &str, rate: &str, runs: usize) -> f64 {
    let mut drains = Drains::default();
    let (mut freezes, mut gaps, mut idle, mut agent, mut rounds, mut total, mut sent) =
        (vec![], vec![], vec![], vec![], vec![], vec![], vec![]);
    let mut parts = vec![vec![]; PARTS.len()];
    for _ in 0..runs {
        let hosts = hosts();
        let plain = mode.starts_with("post-copy").then(|| hosts.ceiling(1 << 30)).flatten();
        let (freeze, gap, before, report) = moved(&hosts, mode, mib, rate);
        drains.add(&report, plain);
        freezes.push(freeze);
        gaps.push(gap);
        idle.push(before);
        agent.push(number(&report, "/downtime_ms"));
        rounds.push(report["rounds"].as_array().map_or(0.0, |r| r.len() as f64));
        total.push(number(&report, "/total_ms"));
        sent.push(number(&report, "/bytes_sent") / 1e6);
        for (part, name) in parts.iter_mut().zip(PARTS) {
            part.push(number(&report, &format!("/downtime/{name}")));
        }
    }
    let name = match mode {
        "pre-copy" => format!("{mib} MiB, {rate} MB/s"),
        _ => format!("{mode}, {mib} MiB, {rate} MB/s"),
    };
    let freeze = row(&format!("{name}: gap of the program at the freeze"), "ms", freezes);
    row(&format!("{name}: its longest gap in all"), "ms", gaps);
    row(&format!("{name}: the same without a migration"), "ms", idle);
    row(&format!("{name}: freeze as the agent says"), "ms", agent);
    for (part, what) in parts.into_iter().zip(PARTS) {
        row(&format!("{name}: {what}"), "ms", part);
    }
    row(&format!("{name}: rounds"), "", rounds);
    row(&format!("{name}: total"), "ms", total);
    row(&format!("{name}: sent"), "MB", sent);
    drains.print(&name);
    freeze
}

fn precopy() {
    for (mib, rate) in [("16", "50"), ("1024", "50"), ("4096", "50"), ("1024", "200")] {
        workload("pre-copy", mib, rate, runs());
    }
}

/// What followed the resume, run by run.
#[derive(Default)]
struct Drains {
    p50: Vec<f64>,
    p99: Vec<f64>,
    faults: Vec<f64>,
    lazy: Vec<f64>,
    ms: Vec<f64>,
    rate: Vec<f64>,
    plain: Vec<f64>,
}

impl Drains {
    fn add(&mut self, report: &serde_json::Value, plain: Option<f64>) {
        let pages = number(report, "/pages_lazy");
        if pages.is_nan() || pages == 0.0 {
            return;
        }
        let ms = number(report, "/drain/ms");
        let rate = pages * 4096.0 / (ms / 1e3);
        self.p50.push(number(report, "/fault_latency_us/p50"));
        self.p99.push(number(report, "/fault_latency_us/p99"));
        self.faults.push(number(report, "/fault_latency_us/count"));
        self.lazy.push(pages / 256.0);
        self.ms.push(ms);
        self.rate.push(rate / MIB);
        self.plain.extend(plain.map(|p| 100.0 * rate / p));
    }

    fn print(self, name: &str) {
        if self.lazy.is_empty() {
            return;
        }
        row(&format!("{name}: followed the resume"), "MiB", self.lazy);
        row(&format!("{name}: faults"), "", self.faults);
        row(&format!("{name}: latency of half of them"), "us", self.p50);
        row(&format!("{name}: of 99 in a hundred"), "us", self.p99);
        row(&format!("{name}: drain"), "ms", self.ms);
        row(&format!("{name}: drain"), "MiB/s", self.rate);
        if !self.plain.is_empty() {
            row(&format!("{name}: drain by plain QUIC just before"), "%", self.plain);
        }
    }
}

fn lazy() {
    for mib in ["16", "1024", "4096"] {
        workload("post-copy", mib, "0", runs());
    }
    workload("post-copy/shared", "1024", "0", runs());
    workload("post-copy/rest", "1024", "0", runs());
    for rate in ["50", "200", "1000"] {
        workload("hybrid", "1024", rate, runs());
    }
    walk();
}

/// What a walk at random through 1 GiB loses by a migration, of the program's own speed before it.
fn walk() {
    for mode in ["post-copy", "hybrid", "pre-copy"] {
        let mut lost = vec![];
        for _ in 0..runs() {
            let hosts = hosts();
            let guest = Guest::start(&hosts.a, "ballast", &[("mib", "1024"), ("rest-us", "0")]);
            let beats = || guest.pulse().beats as f64;
            let (first, since) = (beats(), Instant::now());
            thread::sleep(Duration::from_secs(1));
            let speed = (beats() - first) / since.elapsed().as_secs_f64();
            let (first, since) = (beats(), Instant::now());
            hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &["--mode", mode]);
            let (done, time) = (beats() - first, since.elapsed().as_secs_f64());
            lost.push(time - done / speed);
        }
        row(&format!("walk through 1 GiB, {mode}: lost in the whole migration"), "s", lost);
    }
}

/// What `--dry-run` says against what the migration right after it shows: predicted by measured.
fn predict() {
    for (mib, rate) in [("16", "50"), ("256", "20"), ("1024", "50"), ("1024", "200")] {
        let (mut freeze, mut total, mut rounds, mut between) = (vec![], vec![], vec![], vec![]);
        for _ in 0..runs() {
            let hosts = hosts();
            let guest = Guest::start(&hosts.a, "ballast", &[("mib", mib), ("rate", rate), ("rest-us", "50")]);
            thread::sleep(Duration::from_millis(500));
            let receiver = hosts.b.receive(&Stdio::Null);
            let said = hosts.a.send(guest.pid, &receiver, &["--mode", "pre-copy", "--dry-run"]);
            if said.code != 0 {
                eprintln!("dry run: {}", said.all());
                continue;
            }
            let said = said.json();
            receiver.process.signal(nix::sys::signal::Signal::SIGKILL);
            receiver.process.wait_for(Duration::from_secs(5));
            let shown = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &["--mode", "pre-copy"]).report;
            let ratio = |path: &str| number(&said, path) / number(&shown, path);
            freeze.push(ratio("/downtime_ms"));
            total.push(ratio("/total_ms"));
            let bound = |which: usize| number(&said, &format!("/range/downtime_ms/{which}"));
            let inside = (bound(0) / 2.0..=bound(1) * 2.0).contains(&number(&shown, "/downtime_ms"));
            between.push(f64::from(u8::from(inside)));
            let count = |r: &serde_json::Value| r["rounds"].as_array().map_or(0.0, |r| r.len() as f64);
            rounds.push(count(&said) - count(&shown));
        }
        let name = format!("{mib} MiB, {rate} MB/s: predicted by measured");
        let percent = |v: Vec<f64>| v.into_iter().map(|x| x * 100.0).collect();
        row(&format!("{name}, freeze"), "%", percent(freeze));
        row(&format!("{name}, total time"), "%", percent(total));
        row(&format!("{name}, rounds, difference"), "", rounds);
        row(&format!("{name}, freeze within a factor of two of the range (1: yes)"), "", between);
    }
}

/// The freeze against the size, at 50 MB/s.
fn growth() {
    let sizes = ["256", "512", "1024", "2048", "4096", "8192"];
    let gaps: Vec<f64> = sizes.iter().map(|mib| workload("pre-copy", mib, "50", runs().min(5))).collect();
    let slope = (gaps[gaps.len() - 1] - gaps[0]) / (8192.0 - 256.0) * 1024.0 * 1000.0;
    println!("| growth from 256 MiB to 8 GiB | {slope:.0} us a GiB | |");
}

/// What the rounds cost the program: its own speed before, while the rounds run, and beside a process that only keeps one core busy.
fn cost() {
    let (mut alone, mut shared, mut during) = (vec![], vec![], vec![]);
    for _ in 0..runs() {
        let hosts = hosts();
        let guest = Guest::start(&hosts.a, "ballast", &[("mib", "1024"), ("dirty", "10"), ("rest-us", "0")]);
        let speed = |time: Duration| {
            let (beats, since) = (guest.pulse().beats, Instant::now());
            thread::sleep(time);
            (guest.pulse().beats - beats) as f64 / since.elapsed().as_secs_f64()
        };
        alone.push(speed(Duration::from_secs(1)));
        let spinner = hosts.b.command(["busybox", "sh", "-c", "while true; do :; done"]).start();
        let second = hosts.b.command(["busybox", "sh", "-c", "while true; do :; done"]).start();
        shared.push(speed(Duration::from_secs(1)));
        for s in [&spinner, &second] {
            s.signal(nix::sys::signal::Signal::SIGKILL);
        }
        let receiver = hosts.b.receive(&Stdio::Null);
        let pid = guest.pid.to_string();
        let mut args = hosts.a.send_args(&pid, &receiver);
        args.retain(|a| *a != "--mode" && *a != migrate_harness::mode());
        args.extend(["--mode", "pre-copy"]);
        let sender = hosts.a.migrate(&args).start();
        within("the rounds", Duration::from_secs(20), || {
            sender.stderr().contains("\"pre-copy\"").then_some(())
        });
        during.push(speed(Duration::from_millis(800)));
        sender.wait_for(Duration::from_secs(120));
    }
    row("speed of a program that only writes, beats a second", "", alone);
    row("the same beside two busy processes of another host", "", shared);
    row("the same during the rounds", "", during);
}

/// redis-server with a million keys of 1000 bytes.
fn filled_redis<'h>(hosts: &'h Hosts) -> Process<'h> {
    let server = Redis::start(hosts, &hosts.a, REDIS, &["--save", ""]);
    let redis = Redis::of(&hosts.a, REDIS);
    redis
        .ask(&["DEBUG", "POPULATE", "1000000", "key", "1000"])
        .expect("redis was not filled");
    server
}

/// Clients of a redis-server, each with a new connection for every request: the longest that any of them waited for its answer, and what 99 in a hundred did
/// not wait longer than, in a second and a half without a migration and in all of it with one.
fn redis_clients() {
    const CLIENTS: usize = 4;
    for mode in ["pre-copy", "hybrid", "post-copy"] {
        let mut waits = [vec![], vec![], vec![], vec![]];
        for _ in 0..runs().min(5) {
            let hosts = hosts();
            let server = filled_redis(&hosts);
            let asked = || {
                (0..CLIENTS)
                    .map(|_| Client::redis(&hosts, REDIS, Duration::from_millis(1)))
                    .collect::<Vec<_>>()
            };
            let mut note = |clients: Vec<Client>, to: usize| {
                let mut all: Vec<f64> = clients
                    .iter()
                    .flat_map(Client::answers)
                    .map(|a| (a.came - a.asked).as_secs_f64() * 1e3)
                    .collect();
                all.sort_by(f64::total_cmp);
                waits[to].push(all.last().copied().unwrap_or(f64::NAN));
                waits[to + 1].push(all.get(all.len() * 99 / 100).copied().unwrap_or(f64::NAN));
            };
            let clients = asked();
            thread::sleep(Duration::from_millis(1500));
            note(clients, 0);
            let clients = asked();
            thread::sleep(Duration::from_millis(200));
            let receiver = hosts.b.receive(&Stdio::Null);
            let run = hosts.a.send(server.pid, &receiver, &["--mode", mode]);
            if run.code != 0 {
                eprintln!("redis: {}", run.all());
                continue;
            }
            thread::sleep(Duration::from_millis(200));
            note(clients, 2);
        }
        let names = ["longest wait alone", "99 in a hundred alone", "longest wait", "99 in a hundred"];
        for (name, waits) in names.iter().zip(waits) {
            row(
                &format!("redis-server, 1 GiB, {CLIENTS} clients that reconnect, {mode}: {name}"),
                "ms",
                waits,
            );
        }
    }
}

/// redis-server with 1 GiB of keys under writes.
fn redis() {
    let (mut freeze, mut rounds, mut total, mut sent) = (vec![], vec![], vec![], vec![]);
    for _ in 0..runs().min(5) {
        let hosts = hosts();
        let server = filled_redis(&hosts);
        let load = "i=0; while true; do i=$((i+1)); for k in 1 2 3 4 5 6 7 8; do echo SET w:$(( (i*8+k) % 100000 )) v$i; done | redis-cli >/dev/null; done";
        let writer = hosts.a.command(["busybox", "sh", "-c", load]).start();
        thread::sleep(Duration::from_millis(500));
        let receiver = hosts.b.receive(&Stdio::Null);
        let run = hosts.a.send(server.pid, &receiver, &["--mode", "pre-copy"]);
        writer.signal(nix::sys::signal::Signal::SIGKILL);
        if run.code != 0 {
            eprintln!("redis: {}", run.all());
            continue;
        }
        let report = run.json();
        freeze.push(number(&report, "/downtime_ms"));
        rounds.push(report["rounds"].as_array().map_or(0.0, |r| r.len() as f64));
        total.push(number(&report, "/total_ms"));
        sent.push(number(&report, "/bytes_sent") / 1e6);
    }
    row("redis-server with 1 GiB under writes: freeze", "ms", freeze);
    row("redis-server: rounds", "", rounds);
    row("redis-server: total", "ms", total);
    row("redis-server: sent", "MB", sent);
    redis_clients();
}

fn throughput() {
    let (mut ours, mut theirs, mut ratio) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs() {
        let hosts = hosts();
        let guest = Guest::start(&hosts.a, "ballast", &[("mib", "1024"), ("rest-us", "100000")]);
        let most = hosts.ceiling(1 << 30);
        let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &["--mode", "stop"]);
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

/// A GiB of random data in one program, and in sixteen that are moved to one receiver at once: what all of them together carry, from the start of the first
/// sender to the end of the last.
fn parallel() {
    for (count, mib) in [(1_usize, "1024"), (16, "64")] {
        let (mut rate, mut freeze) = (vec![], vec![]);
        for _ in 0..runs().min(5) {
            let hosts = hosts();
            let guests: Vec<Guest> = (0..count)
                .map(|_| Guest::start(&hosts.a, "ballast", &[("mib", mib), ("rest-us", "100000")]))
                .collect();
            let receiver = Receiver::that_stays(&hosts.b, &[]);
            hosts.a.send(guests[0].pid, &receiver, &["--dry-run"]);
            let began = Instant::now();
            let senders: Vec<Process<'_>> = guests
                .iter()
                .map(|g| {
                    let pid = g.pid.to_string();
                    hosts
                        .a
                        .migrate(&["send", &pid, &receiver.target, "--json", "--mode", "pre-copy"])
                        .start()
                })
                .collect();
            for sender in &senders {
                let run = Run::of(sender, Duration::from_secs(120));
                if run.code == 0 {
                    freeze.push(number(&run.json(), "/downtime_ms"));
                } else {
                    eprintln!("parallel: {}", run.all());
                }
            }
            rate.push(1024.0 / began.elapsed().as_secs_f64());
        }
        row(
            &format!("{count} at once, {mib} MiB each, into one receiver: all together"),
            "MiB/s",
            rate,
        );
        row(&format!("{count} at once: freeze of each"), "ms", freeze);
    }
}

fn memory() {
    let hosts = hosts();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "4096"), ("rest-us", "100000")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(guest.pid, &receiver, &["--mode", "stop"]);
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

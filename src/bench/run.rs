//! One migration, measured.

use super::{
    bed::{Bed, There},
    criu::{self, Criu},
    plan::{How, Item, Link, Memory, Workload},
    results::Measured,
};
use clap::ValueEnum;
use migrate_harness::{Client, Guest, Hosts, Pauses, Process, Redis, Relay, Run, Stdio, Weather, eventually, programs};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    cell::Cell,
    fs,
    net::SocketAddr,
    panic::{self, AssertUnwindSafe},
    path::Path,
    process::{Child, Command, Stdio as ChildStdio},
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// Before anything is measured: what a start stirs up has settled.
const SETTLE: Duration = Duration::from_millis(200);
/// How long it is watched without a migration.
const QUIET: Duration = Duration::from_millis(700);
/// After the migration: long enough for the first answers, and for the speed to be seen.
const AFTER: Duration = Duration::from_millis(400);
/// Between two looks at how much a program has done.
const SAMPLE: Duration = Duration::from_millis(10);
/// Between two looks at whether its output grew.
const LOOK: Duration = Duration::from_micros(50);
/// Between two requests of the client.
const ASK: Duration = Duration::from_millis(1);
/// The longest that a migration may take.
const LONGEST: Duration = Duration::from_secs(1800);
const HTTP: u16 = 8080;
const REDIS: u16 = 6379;

thread_local! {
    static QUIETLY: Cell<bool> = const { Cell::new(false) };
}

/// What the harness cannot do it panics about, in words: they become the error.
pub fn caught<T>(act: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIETLY.get() {
                usual(info);
            }
        }));
    });
    QUIETLY.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(act));
    QUIETLY.set(false);
    match result {
        Ok(result) => result,
        Err(panic) => Err(match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
            (Some(text), _) => text.clone(),
            (_, Some(text)) => (*text).to_owned(),
            _ => "an internal error".to_owned(),
        }),
    }
}

/// Moves the workload once. Err: why it was not moved, or what was wrong with it afterwards.
pub fn once(bed: &Bed, item: &Item, criu: Option<&Criu>, cancel: &CancellationToken) -> Result<Measured, String> {
    match (bed, &item.workload) {
        (Bed::There(there), Workload::Memory(memory)) => to_there(there, item, memory, cancel),
        (Bed::There(_), other) => Err(format!(
            "{} is measured between two hosts on this machine only: start it by hand, and move it with `migrate send --report`",
            other.name()
        )),
        (Bed::Here { .. }, _) => caught(|| {
            let memory = matches!(item.how, How::Criu(_)).then(criu::memory).flatten();
            let hosts = Hosts::that_see(memory.as_ref().map(TempDir::path)).ok_or_else(|| "two hosts could not be made".to_owned())?;
            let over = AtomicBool::new(false);
            let measured = thread::scope(|scope| {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        thread::sleep(Duration::from_millis(50));
                        if cancel.is_cancelled() {
                            // What is not waited for any more ends with its host.
                            for host in [&hosts.a, &hosts.b] {
                                let _ = kill(Pid::from_raw(host.init()), Signal::SIGKILL);
                            }
                            return;
                        }
                    }
                });
                let result = panic::catch_unwind(AssertUnwindSafe(|| here(&hosts, item, criu)));
                over.store(true, Ordering::Relaxed);
                result
            });
            measured.unwrap_or_else(|p| panic::resume_unwind(p))
        }),
    }
}

/// What can be seen of a program from outside.
enum Eyes {
    /// It says so itself.
    Guest(Guest),
    /// Its output grows, or does not.
    Output(Pauses),
    /// Only its client tells.
    Closed,
}

impl Eyes {
    fn reset(&self) {
        match self {
            Eyes::Guest(g) => g.reset_gap(),
            Eyes::Output(p) => p.reset(),
            Eyes::Closed => {}
        }
    }
    fn longest(&self) -> Option<f64> {
        match self {
            Eyes::Guest(g) => Some(ms(g.gap())),
            Eyes::Output(p) => Some(ms(p.longest())),
            Eyes::Closed => None,
        }
    }
    /// How much it has done.
    fn done(&self) -> Option<u64> {
        match self {
            Eyes::Guest(g) => Some(g.pulse().beats),
            Eyes::Output(p) => Some(p.size()),
            Eyes::Closed => None,
        }
    }
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// A workload that runs.
struct Program {
    pid: i32,
    eyes: Eyes,
    client: Option<Client>,
}

fn start(hosts: &Hosts, item: &Item) -> Result<Program, String> {
    let program = |process: &Process<'_>, eyes| Program {
        pid: process.pid,
        eyes,
        client: None,
    };
    let nowhere = Path::new("/dev/null");
    let printing = |argv: &[String]| {
        let out = hosts.file("output");
        let process = hosts.a.command(argv.to_vec()).says_to(&out).start();
        let grows = eventually(Duration::from_secs(10), || fs::metadata(&out).is_ok_and(|m| m.len() > 0));
        if let Some(ended) = process.ended() {
            return Err(format!(
                "{} ended by itself: {ended:?}\n{}",
                argv.join(" "),
                hosts.read("output").lines().take(5).collect::<Vec<_>>().join("\n")
            ));
        }
        let eyes = if grows {
            Eyes::Output(Pauses::watch(&out, LOOK))
        } else {
            Eyes::Closed
        };
        Ok(program(&process, eyes))
    };
    Ok(match &item.workload {
        Workload::Memory(memory) => {
            let options = memory.options(item.port);
            let options: Vec<(&str, &str)> = options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            let guest = Guest::start_with(&hosts.a, "load", &options, |c| c.says_to(nowhere));
            Program {
                pid: guest.pid,
                eyes: Eyes::Guest(guest),
                client: Some(Client::http(hosts, item.port, ASK)),
            }
        }
        Workload::Shell => printing(&programs::counter("0.01"))?,
        Workload::Command(command) => printing(&["sh".into(), "-c".into(), format!("exec {command}")])?,
        Workload::Http => {
            let port = HTTP.to_string();
            let argv = if let Some(python) = migrate_harness::python() {
                vec![python.display().to_string(), "-c".into(), programs::PYTHON_COUNTER.into(), port]
            } else if migrate_harness::tool("node").is_some() {
                vec!["node".into(), "-e".into(), programs::NODE_COUNTER.into(), port]
            } else {
                return Err("neither python3 nor node is installed".into());
            };
            let server = hosts.a.command(argv).says_to(nowhere).start();
            let client = Client::http(hosts, HTTP, ASK);
            client.wait_for(0, 10);
            Program {
                client: Some(client),
                ..program(&server, Eyes::Closed)
            }
        }
        Workload::Redis => {
            if migrate_harness::tool("redis-server").is_none() {
                return Err("redis-server is not installed".into());
            }
            let server = Redis::start_with(hosts, &hosts.a, REDIS, &["--save", ""], |c| c.says_to(nowhere));
            let filled = Redis::of(&hosts.a, REDIS).ask(&["DEBUG", "POPULATE", "250000", "key", "1000"]);
            filled.map_err(|e| format!("redis was not filled: {e}"))?;
            Program {
                client: Some(Client::redis(hosts, REDIS, ASK)),
                ..program(&server, Eyes::Closed)
            }
        }
    })
}

/// The longest that the client waited for an answer that it asked for since then.
fn longest_wait(client: &Client, since: Instant) -> Option<f64> {
    client.longest_wait_since(since).map(ms)
}

fn here(hosts: &Hosts, item: &Item, criu: Option<&Criu>) -> Result<Measured, String> {
    let Program { pid, eyes, client } = start(hosts, item)?;
    thread::sleep(SETTLE);
    eyes.reset();
    let since = Instant::now();
    thread::sleep(QUIET);
    let mut measured = Measured {
        program_noise_ms: eyes.longest(),
        client_noise_ms: client.as_ref().and_then(|c| longest_wait(c, since)),
        ..Measured::default()
    };
    eyes.reset();
    let since = Instant::now();
    let over = AtomicBool::new(false);
    let samples: Mutex<Vec<(Instant, u64)>> = Mutex::default();
    let moved = thread::scope(|scope| {
        scope.spawn(|| {
            while let Some(done) = eyes.done().filter(|_| !over.load(Ordering::Relaxed)) {
                samples.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), done));
                thread::sleep(SAMPLE);
            }
        });
        thread::sleep(SETTLE);
        let begun = Instant::now();
        let moved = panic::catch_unwind(AssertUnwindSafe(|| match item.how {
            How::Mode(_) => by_migrate(hosts, item, pid),
            How::Criu(way) => criu.ok_or("CRIU does not work here")?.moved(way, hosts, pid),
        }));
        thread::sleep(AFTER);
        over.store(true, Ordering::Relaxed);
        (begun, moved)
    });
    let (begun, moved) = moved;
    let (report, events) = moved.unwrap_or_else(|p| panic::resume_unwind(p))?;
    measured.report = report;
    measured.events = events;
    measured.speed = speed(&samples.into_inner().unwrap_or_else(PoisonError::into_inner), begun);
    if let Some(client) = &client {
        client.wait_for(1, 3);
        measured.client_ms = longest_wait(client, since);
    }
    if let Eyes::Output(pauses) = &eyes {
        let size = pauses.size();
        if !eventually(Duration::from_secs(10), || pauses.size() > size) {
            return Err("its output does not go on after the migration".into());
        }
        // There is only one pause to see: the longest.
        measured.program_ms = eyes.longest();
    }
    measured.program_longest_ms = eyes.longest();
    drop(client);
    if let Eyes::Guest(guest) = &eyes {
        measured.program_ms = Some(ms(guest.gap_at_move()));
        let differences = guest.differences();
        if !differences.is_empty() {
            return Err(format!("the program is not what it was: {}", differences.join("; ")));
        }
    }
    Ok(measured)
}

/// Steps a second between the samples.
fn speed(samples: &[(Instant, u64)], begun: Instant) -> Vec<(f64, f64)> {
    let at = |t: Instant| if t >= begun { ms(t - begun) } else { -ms(begun - t) };
    let rate = |pair: &[(Instant, u64)]| {
        let ((t0, n0), (t1, n1)) = (pair[0], pair[1]);
        (at(t1), n1.saturating_sub(n0) as f64 / (t1 - t0).as_secs_f64().max(1e-6))
    };
    samples.windows(2).map(rate).collect()
}

type Told = (Value, Vec<(f64, Value)>);

fn arguments(item: &Item) -> Vec<String> {
    let tracker = item
        .tracker
        .to_possible_value()
        .map_or("auto".to_owned(), |v| v.get_name().to_owned());
    vec!["--mode".into(), item.how.name().into(), "--tracker".into(), tracker]
}

fn by_migrate(hosts: &Hosts, item: &Item, pid: i32) -> Result<Told, String> {
    let mut receiver = hosts.b.receive(&Stdio::Null);
    let _relay = slow(hosts, item.link, &mut receiver.target);
    let pid = pid.to_string();
    let more = arguments(item);
    let mut args = hosts.a.send_args_any(&pid, &receiver);
    args.extend(more.iter().map(String::as_str));
    let run = Run::of(&hosts.a.migrate(&args).start(), LONGEST);
    let told = told(run.code, &run.stdout, &run.stderr)?;
    let received = receiver.wait();
    if received.code != 0 {
        return Err(format!("migrate receive: code {}: {}", received.code, received.stderr.trim()));
    }
    Ok(told)
}

fn slow(hosts: &Hosts, link: Link, target: &mut String) -> Option<Relay> {
    link.is_slow().then(|| {
        let weather = Weather {
            delay: link.round_trip.unwrap_or_default() / 2,
            rate: link.rate.unwrap_or(0),
            ..Weather::default()
        };
        let relay = Relay::start(hosts, target, weather);
        target.clone_from(&relay.address);
        relay
    })
}

/// What `send --json` said.
fn told(code: i32, stdout: &str, stderr: &str) -> Result<Told, String> {
    let report: Value = serde_json::from_str(stdout.trim()).unwrap_or_default();
    if code != 0 {
        let why = report["error"].as_str().unwrap_or(stderr.trim());
        let blockers = report["blockers"].as_array().map_or(String::new(), |b| {
            let texts = b.iter().map(|b| b["what"].as_str().map_or_else(|| b.to_string(), str::to_owned));
            texts.map(|t| format!("; {t}")).collect()
        });
        return Err(format!("migrate send: code {code}: {why}{blockers}"));
    }
    let lines = stderr.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    let events = lines.filter_map(|e| Some((e["at_ms"].as_f64()?, e))).collect();
    Ok((report, events))
}

/// The built-in workload on this machine, as a child of this process; it ends with this value.
struct Local(Child);

impl Drop for Local {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What it says of itself.
struct Pulse {
    well: bool,
    done: u64,
    longest: f64,
    at_move: f64,
}

fn pulse(at: SocketAddr) -> Option<Pulse> {
    let text = Client::get(at, "/pulse").ok()?;
    let mut words = text.split_whitespace();
    let well = words.next()? == "well";
    let numbers: Vec<u64> = words.filter_map(|w| w.parse().ok()).collect();
    let [done, longest, at_move, _beats] = numbers[..] else {
        return None;
    };
    Some(Pulse {
        well,
        done,
        longest: longest as f64 / 1e6,
        at_move: at_move as f64 / 1e6,
    })
}

/// Asks it for something, and waits until it is done.
fn ask(at: SocketAddr, what: &str) -> Result<(), String> {
    let answer = Client::get(at, what).map_err(|e| format!("http://{at}{what}: {e}"))?;
    let number: u64 = answer.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    let done = || pulse(at).is_some_and(|p| p.done >= number);
    if eventually(Duration::from_secs(60), done) {
        Ok(())
    } else {
        Err(format!("http://{at}{what}: not done within a minute"))
    }
}

fn to_there(there: &There, item: &Item, memory: &Memory, cancel: &CancellationToken) -> Result<Measured, String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut argv = vec!["guest".to_owned(), "load".into(), "--alone".into(), "1".into()];
    for (key, value) in memory.options(item.port) {
        argv.extend([format!("--{key}"), value]);
    }
    let mut command = Command::new(&program);
    command
        .args(argv)
        .current_dir("/")
        .stdin(ChildStdio::null())
        .stdout(ChildStdio::null());
    let local = command.stderr(ChildStdio::null()).spawn().map_err(|e| e.to_string())?;
    let mut local = Local(local);
    let at = SocketAddr::from(([127, 0, 0, 1], item.port));
    let up = eventually(Duration::from_secs(120), || {
        pulse(at).is_some() || !matches!(local.0.try_wait(), Ok(None)) || cancel.is_cancelled()
    });
    if !up || !matches!(local.0.try_wait(), Ok(None)) {
        return Err(format!(
            "the workload did not come up; is port {} of this machine free? --port names another",
            item.port
        ));
    }
    let client = Client::between([at, there.address], ASK);
    thread::sleep(SETTLE);
    ask(at, "/reset")?;
    let since = Instant::now();
    thread::sleep(QUIET);
    let mut measured = Measured {
        program_noise_ms: pulse(at).map(|p| p.longest),
        client_noise_ms: longest_wait(&client, since),
        ..Measured::default()
    };
    ask(at, "/reset")?;
    let since = Instant::now();
    let mut send = Command::new(&program);
    send.args(["send", &local.0.id().to_string(), &there.to, "--json", "--state-dir"])
        .arg(&there.state_dir);
    send.args(arguments(item)).stdin(ChildStdio::null());
    if let Some(ticket) = &there.ticket {
        send.env("MIGRATE_TICKET", ticket);
    }
    let sent = send.output().map_err(|e| e.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (measured.report, measured.events) = told(sent.status.code().unwrap_or(-1), &text(&sent.stdout), &text(&sent.stderr))?;
    thread::sleep(AFTER);
    let answers = || client.answers().iter().filter(|a| a.host == 1).count();
    if !eventually(Duration::from_secs(10), || answers() > 3) {
        return Err(format!(
            "it was moved, but {} does not answer: is TCP port {} open there? It is still running there as pid {}",
            there.address, item.port, measured.report["restored_pid"]
        ));
    }
    measured.client_ms = longest_wait(&client, since);
    drop(client);
    let end = pulse(there.address).ok_or("the copy does not answer any more")?;
    (measured.program_ms, measured.program_longest_ms) = (Some(end.at_move), Some(end.longest));
    ask(there.address, "/verify")?;
    let well = pulse(there.address).is_some_and(|p| p.well);
    let verdict = Client::get(there.address, "/verdict").unwrap_or_default();
    let _ = Client::get(there.address, "/quit");
    if well {
        Ok(measured)
    } else {
        Err(format!("the program is not what it was: {}", verdict.trim()))
    }
}

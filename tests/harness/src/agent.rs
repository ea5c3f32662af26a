//! The program under test: both agents, and what they report.

use crate::{
    host::{Ended, Host, Process, Stdio},
    hosts::Hosts,
    tools::{is_carried, migrate_binary},
    wait::{eventually, within},
};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

/// Port that receivers listen on; every test has a network of its own.
pub const PORT: u16 = 7878;
/// The one for plain QUIC.
const CEILING: u16 = 7900;

/// What became of one run of the binary.
#[derive(Debug, Clone)]
pub struct Run {
    /// Exit code; 128 and the signal's number when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Run {
    /// Waits for the end of one that was started.
    pub fn of(process: &Process<'_>, limit: Duration) -> Run {
        let ended = process.wait_for(limit);
        // The last bytes may still be in the pipe, for long on a machine with much to do. A tree that inherited it never closes it.
        eventually(Duration::from_millis(500), || process.all_read());
        Run {
            code: match ended {
                Ended::Code(code) => code,
                Ended::Signal(signal) => 128 + signal,
            },
            stdout: process.stdout(),
            stderr: process.stderr(),
        }
    }

    /// The object that `--json` prints at the end.
    pub fn json(&self) -> Value {
        // The last line that is an object, or the whole output when it is printed over several lines.
        let whole = serde_json::from_str(self.stdout.trim());
        whole
            .or_else(|_| serde_json::from_str(self.stdout.lines().rev().find(|l| l.starts_with('{')).unwrap_or("")))
            .unwrap_or(Value::Null)
    }

    /// Both outputs, to search in.
    pub fn all(&self) -> String {
        format!("{}\n{}", self.stdout, self.stderr)
    }

    /// Fails the test unless the exit code is this.
    #[track_caller]
    pub fn expect_code(&self, code: i32) -> &Run {
        assert_eq!(self.code, code, "exit code\nstdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// Fails the test unless the output says this, whatever its case.
    #[track_caller]
    pub fn expect_says(&self, any_of: &[&str]) -> &Run {
        let all = self.all().to_lowercase();
        assert!(
            any_of.iter().any(|text| all.contains(&text.to_lowercase())),
            "none of {any_of:?} in\nstdout: {}\nstderr: {}",
            self.stdout,
            self.stderr
        );
        self
    }
}

/// A tree to be moved: a guest or a process.
pub trait Tree {
    /// Its root's pid in the host where it was started.
    fn root(&self) -> i32;
}
impl Tree for i32 {
    fn root(&self) -> i32 {
        *self
    }
}
impl Tree for crate::Guest {
    fn root(&self) -> i32 {
        self.pid
    }
}
impl Tree for Process<'_> {
    fn root(&self) -> i32 {
        self.pid
    }
}

/// How trees are moved where a test does not say: `MIGRATE_TEST_MODE`, else as `send` does by itself.
pub fn mode() -> &'static str {
    static MODE: OnceLock<String> = OnceLock::new();
    MODE.get_or_init(|| std::env::var("MIGRATE_TEST_MODE").unwrap_or_else(|_| "hybrid".into()))
}

/// Whether the memory oracle watches: `MIGRATE_TEST_VERIFY=0` turns it off, for figures.
fn oracle() -> bool {
    !WITHOUT_ORACLE.load(Ordering::SeqCst) && std::env::var("MIGRATE_TEST_VERIFY").map_or(true, |v| v != "0")
}

static WITHOUT_ORACLE: AtomicBool = AtomicBool::new(false);

/// Turns the memory oracle off for the tests of this file: they print figures.
pub fn without_oracle() {
    WITHOUT_ORACLE.store(true, Ordering::SeqCst);
}

impl Host {
    /// `migrate ARGS... --state-dir` of this host, not yet started.
    pub fn migrate(&self, args: &[&str]) -> crate::Command<'_> {
        let mut argv = vec![migrate_binary().display().to_string()];
        argv.extend(args.iter().map(|a| (*a).to_string()));
        let state = self.dir().join("state").display().to_string();
        self.command(argv)
            .env("MIGRATE_STATE_DIR", &state)
            // The memory oracle: both sides hash every page at the freeze, and the destination refuses what differs.
            .env("MIGRATE_VERIFY", if oracle() { "1" } else { "0" })
            .env("RUST_BACKTRACE", "1")
            .env("MIGRATE_FOREIGN_VDSO", if self.takes_vdsos_for_foreign() { "1" } else { "0" })
            .label(&format!("migrate {}", args.join(" ")))
    }

    /// Runs it to the end.
    pub fn run(&self, args: &[&str]) -> Run {
        Run::of(&self.migrate(args).start(), Duration::from_secs(180))
    }

    /// `migrate receive --once` with a fresh ticket; the tree's output goes to `out`.
    pub fn receive(&self, out: &Stdio) -> Receiver<'_> {
        self.receive_with(out, &[])
    }

    /// The same with more options.
    pub fn receive_with(&self, out: &Stdio, more: &[&str]) -> Receiver<'_> {
        self.receive_as(out, more, |c| c)
    }

    /// The same, started in some other way.
    pub fn receive_as<'a>(
        &'a self,
        out: &Stdio,
        more: &[&str],
        how: impl FnOnce(crate::Command<'a>) -> crate::Command<'a>,
    ) -> Receiver<'a> {
        self.receive_by(out, more, true, how)
    }

    fn receive_by<'a>(
        &'a self,
        out: &Stdio,
        more: &[&str],
        once: bool,
        how: impl FnOnce(crate::Command<'a>) -> crate::Command<'a>,
    ) -> Receiver<'a> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let ticket_file = self.dir().join(format!("ticket-{}", NUMBER.fetch_add(1, Ordering::SeqCst)));
        let listen = format!("{}:{PORT}", self.address());
        let ticket_name = ticket_file.display().to_string();
        let mut args = vec!["receive", "--listen", &listen, "--ticket-file", &ticket_name];
        if once {
            args.push("--once");
        }
        args.push("--stdio");
        let path;
        match out {
            Stdio::Terminal => args.push("inherit"),
            Stdio::File(to) => {
                path = to.display().to_string();
                args.extend([path.as_str(), "--json"]);
            }
            Stdio::Null | Stdio::Pipe => args.extend(["null", "--json"]),
        }
        args.extend(more);
        let on = if *out == Stdio::Terminal { Stdio::Terminal } else { Stdio::Pipe };
        let process = how(self.migrate(&args).stdio(on)).start();
        let ticket = within("ticket of the receiver", Duration::from_secs(60), || {
            if let Some(ended) = process.ended() {
                panic!("migrate receive ended: {ended:?}\n{}\n{}", process.stdout(), process.stderr());
            }
            let ticket = fs::read_to_string(&ticket_file).ok()?;
            (!ticket.trim().is_empty()).then(|| ticket.trim().to_string())
        });
        Receiver {
            process,
            ticket,
            ticket_file,
            target: listen,
        }
    }

    /// The arguments of `migrate send` for a receiver, in the mode of [`mode`].
    pub fn send_args<'s>(&self, pid: &'s str, receiver: &'s Receiver<'_>) -> Vec<&'s str> {
        let mut args = self.send_args_any(pid, receiver);
        args.extend(["--mode", mode()]);
        args
    }

    /// The same without a mode.
    pub fn send_args_any<'s>(&self, pid: &'s str, receiver: &'s Receiver<'_>) -> Vec<&'s str> {
        vec!["send", pid, &receiver.target, "--ticket", &receiver.ticket, "--json"]
    }

    /// Runs `migrate send` to the end, in the mode of [`mode`] unless `more` names one.
    pub fn send(&self, pid: i32, receiver: &Receiver<'_>, more: &[&str]) -> Run {
        let pid = pid.to_string();
        let mut args = self.send_args_any(&pid, receiver);
        if !more.contains(&"--mode") {
            args.extend(["--mode", mode()]);
        }
        args.extend(more);
        self.run(&args)
    }
}

/// A waiting `migrate receive`.
pub struct Receiver<'a> {
    /// The agent.
    pub process: Process<'a>,
    /// Its one-time ticket.
    pub ticket: String,
    /// Where that was written.
    pub ticket_file: PathBuf,
    /// What to type after the pid.
    pub target: String,
}

impl<'a> Receiver<'a> {
    /// `migrate receive` without `--once`, its tree's streams on /dev/null.
    pub fn that_stays(host: &'a Host, more: &[&str]) -> Receiver<'a> {
        host.receive_by(&Stdio::Null, more, false, |c| c)
    }
}

impl Receiver<'_> {
    /// Waits for its end.
    pub fn wait(&self) -> Run {
        Run::of(&self.process, Duration::from_secs(60))
    }
}

/// A tree that was moved.
#[derive(Debug, Clone)]
pub struct Moved {
    /// Its root's pid on the other host.
    pub pid: i32,
    /// The sender's report.
    pub report: Value,
}

impl Moved {
    /// A number of the report.
    pub fn number(&self, key: &str) -> f64 {
        self.report.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN)
    }

    /// Bytes of shared memory that each round compared by content, the freeze's last.
    #[track_caller]
    pub fn compared(&self) -> Vec<u64> {
        let rounds = self.report["rounds"].as_array().expect("rounds");
        rounds.iter().map(|r| r["compared"].as_u64().expect("compared")).collect()
    }
}

impl Hosts {
    /// Moves a tree from a host to the other with `--mode stop`, and fails the test unless both agents are content and only the copy is
    /// left.
    #[track_caller]
    pub fn move_tree(&self, from: &Host, pid: i32, out: &Stdio) -> Moved {
        self.move_with(from, pid, out, &[])
    }

    /// The same with more options for `send`.
    #[track_caller]
    pub fn move_with(&self, from: &Host, pid: i32, out: &Stdio, more: &[&str]) -> Moved {
        let to = self.other(from);
        let original = from
            .outer(pid)
            .unwrap_or_else(|| panic!("no process {pid} on host {}", from.name()));
        let receiver = to.receive(out);
        let sent = from.send(pid, &receiver, more);
        sent.expect_code(0);
        let report = sent.json();
        assert_eq!(report["outcome"], "migrated", "report: {report}\nstderr: {}", sent.stderr);
        assert_eq!(report["pid"], pid, "report: {report}");
        let restored = report["restored_pid"].as_i64().unwrap_or(0) as i32;
        assert!(restored > 0, "report: {report}");
        let downtime = report["downtime_ms"].as_f64().unwrap_or(-1.0);
        assert!(downtime > 0.0, "report: {report}");
        for never in ["anomalies", "different"] {
            assert_eq!(report["drain"][never].as_u64().unwrap_or(0), 0, "report: {report}");
        }
        let received = receiver.wait();
        received.expect_code(0);
        let copy = to
            .process(restored)
            .unwrap_or_else(|| panic!("no process {restored} on host {}", to.name()));
        assert!(!"Zt".contains(copy.state), "the copy is not running: {copy:?}");
        within("end of the original", Duration::from_secs(10), || {
            let state = fs::read_to_string(format!("/proc/{original}/stat")).unwrap_or_default();
            let gone = state.is_empty() || state.rsplit_once(") ").is_some_and(|(_, r)| r.starts_with('Z'));
            gone.then_some(())
        });
        Moved { pid: restored, report }
    }

    /// What one plain QUIC stream carries from A to B, bytes a second, by sending so many.
    pub fn ceiling(&self, bytes: u64) -> Option<f64> {
        let address = format!("{}:{CEILING}", self.b.address());
        let server = self.b.migrate(&["ceiling", "serve", &address]).start();
        std::thread::sleep(Duration::from_millis(300));
        let run = self.a.run(&["ceiling", "measure", &address, &bytes.to_string()]);
        server.signal(Signal::SIGKILL);
        let rate = run.json()["bytes_per_second"].as_f64();
        if rate.is_none() && !is_carried() {
            eprintln!("migrate ceiling: code {} {} {}", run.code, run.all(), server.stderr());
        }
        rate
    }

    /// A file in the directory that both hosts see.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// Reads one of them.
    pub fn read(&self, name: impl AsRef<Path>) -> String {
        fs::read_to_string(self.dir().join(name)).unwrap_or_default()
    }
}

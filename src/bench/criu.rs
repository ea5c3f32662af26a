//! The same workload through CRIU, where it is installed: `criu dump` on one host, `criu restore` on the other, the images in a directory that both see. Nothing crosses a
//! network but the pages of `criu lazy-pages`: what is measured is less than what a user of it would have to wait for.
//!
//! What its user would count stands where the agents' figures do: from the start of the (last) dump to the end of the restore. With lazy pages that is when the program runs again, and
//! the total is until all pages have come.

use super::{
    bed::Bed,
    plan::{Criu as Way, How},
};
use migrate_harness::{Host, Hosts, Process, Run, eventually};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// Why there is nothing of it.
const MISSING: &str = "CRIU (apt-get install criu)";
/// `criu pre-dump` before the dump: the second has only what the first took long to write. Where the images of each are, and how the next one finds them.
const PRE_DUMPS: [(&str, &str); 2] = [("criu-0", "../criu-0"), ("criu-1", "../criu-1")];
/// A port that only these hosts have: of the server of lazy pages.
const PAGES: &str = "7902";
/// The longest that any of its commands may take.
const LIMIT: Duration = Duration::from_secs(600);

/// An installed CRIU.
pub struct Criu {
    program: PathBuf,
    /// What does not work on this kernel, and what it said.
    cannot: Vec<(Way, String)>,
}

impl Criu {
    /// Looks for it. Err: why it is not measured.
    pub fn find(bed: &Bed) -> Result<Criu, String> {
        if let Bed::There(_) = bed {
            return Err("CRIU, which is measured between two hosts on this machine only".into());
        }
        let program = migrate_harness::tool("criu").ok_or(MISSING)?;
        // It knows best whether it can do anything with this kernel.
        check(&program, &[]).map_err(|said| format!("CRIU, since `criu check` says that it does not work on this kernel: {said}"))?;
        let cannot = [(Way::PreDump, "mem_dirty_track"), (Way::LazyPages, "uffd-noncoop")]
            .into_iter()
            .filter_map(|(way, feature)| Some((way, check(&program, &["--feature", feature]).err()?)))
            .collect();
        Ok(Criu { program, cannot })
    }

    /// Whether this kernel has what this takes.
    pub fn can(&self, way: Way) -> bool {
        self.cannot.iter().all(|(w, _)| *w != way)
    }

    /// What it cannot do on this kernel, if anything.
    pub fn cannot(&self) -> Option<String> {
        let all: Vec<String> = self
            .cannot
            .iter()
            .map(|(way, said)| format!("{} ({said})", How::Criu(*way)))
            .collect();
        (!all.is_empty()).then(|| all.join(", "))
    }

    /// Moves a tree from A to B.
    pub fn moved(&self, way: Way, hosts: &Hosts, pid: i32) -> Result<(Value, Vec<(f64, Value)>), String> {
        let pid = pid.to_string();
        let begun = Instant::now();
        let tree = ["--tree", pid.as_str()];
        let mut track = Vec::new();
        if way == Way::PreDump {
            track = vec!["--track-mem"];
            for (name, from_the_next) in PRE_DUMPS {
                self.run(&hosts.a, "pre-dump", &directory(hosts, name)?, &[&tree, &track[..]].concat())?;
                track = vec!["--track-mem", "--prev-images-dir", from_the_next];
            }
        }
        let images = directory(hosts, "criu")?;
        let frozen = Instant::now();
        let dump = [&["--skip-in-flight"], &tree[..], &track].concat();
        let (dumped, back);
        if way == Way::LazyPages {
            let address = ["--address", hosts.a.address(), "--port", PAGES];
            let source = self.ready(&hosts.a, "dump", &images, &[&dump[..], &["--lazy-pages"], &address].concat())?;
            dumped = frozen.elapsed();
            let pages = self.ready(&hosts.b, "lazy-pages", &images, &[&["--page-server"], &address[..]].concat())?;
            self.run(&hosts.b, "restore", &images, &["--restore-detached", "--lazy-pages"])?;
            back = frozen.elapsed();
            ended("lazy-pages", &pages)?;
            ended("dump", &source)?;
        } else {
            self.run(&hosts.a, "dump", &images, &dump)?;
            dumped = frozen.elapsed();
            self.run(&hosts.b, "restore", &images, &["--restore-detached"])?;
            back = frozen.elapsed();
        }
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        let report = json!({ "outcome": "migrated", "downtime_ms": ms(back), "total_ms": ms(begun.elapsed()), "dump_ms": ms(dumped) });
        Ok((report, Vec::new()))
    }

    fn argv(&self, command: &str, images: &Path, more: &[&str]) -> Vec<String> {
        let (program, images) = (self.program.display().to_string(), images.display().to_string());
        let mut argv = vec![program, command.into(), "--images-dir".into(), images, "--tcp-close".into()];
        argv.extend(more.iter().map(|a| (*a).to_owned()));
        argv
    }

    /// Runs a command to its end.
    fn run(&self, host: &Host, command: &str, images: &Path, more: &[&str]) -> Result<(), String> {
        ended(command, &host.command(self.argv(command, images, more)).start())
    }

    /// Starts one that serves, and waits until it says that it does.
    fn ready<'a>(&self, host: &'a Host, command: &str, images: &Path, more: &[&str]) -> Result<Process<'a>, String> {
        let status = images.join(format!("{command}.ready"));
        let argv = self.argv(command, images, &[more, &["--status-fd", "3"]].concat());
        let shell = ["sh", "-c", "exec 3>\"$0\"; exec \"$@\"", &status.display().to_string()].map(str::to_owned);
        let process = host.command(shell.into_iter().chain(argv).collect::<Vec<_>>()).start();
        let said = || fs::metadata(&status).is_ok_and(|m| m.len() > 0);
        eventually(LIMIT, || said() || process.ended().is_some());
        if !said() {
            ended(command, &process)?;
            return Err(format!("criu {command}: it never said that it was ready"));
        }
        Ok(process)
    }
}

/// Waits for the end of a command.
fn ended(command: &str, process: &Process<'_>) -> Result<(), String> {
    let run = Run::of(process, LIMIT);
    match run.code {
        0 => Ok(()),
        code => Err(format!("criu {command}: code {code}: {}", last_errors(&run.all()))),
    }
}

fn directory(hosts: &Hosts, name: &str) -> Result<PathBuf, String> {
    let dir = hosts.file(name);
    fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    Ok(dir)
}

/// `criu check`; Err: what it said.
fn check(program: &Path, more: &[&str]) -> Result<(), String> {
    let out = Command::new(program).arg("check").args(more).output();
    let out = out.map_err(|e| format!("{}: {e}", program.display()))?;
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    if out.status.success() { Ok(()) } else { Err(last_errors(&said)) }
}

fn last_errors(text: &str) -> String {
    let errors: Vec<&str> = text.lines().filter(|l| l.contains("Error")).collect();
    if errors.is_empty() {
        return text.lines().last().unwrap_or_default().trim().to_owned();
    }
    errors[errors.len().saturating_sub(3)..].join("; ")
}

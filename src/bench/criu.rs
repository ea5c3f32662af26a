//! The same workload through CRIU, where it is installed: `criu dump` on one host, `criu restore` on the other, the images in a directory that both see. Nothing crosses a
//! network but the pages of `criu lazy-pages`: what is measured is less than what a user of it would have to wait for.
//!
//! What its user would count stands where the agents' figures do: from the start of the (last) dump to the end of the restore. With lazy pages that is when the program runs again, and
//! the total is until all pages have come.
//!
//! It gets the best there is: images in memory (on this project's machine a disk made the gap two and a half times as long with 1 GiB), and what it finds out about a kernel, 60 ms, is
//! known to it beforehand, as on any machine where it was used since the boot.

use super::{
    bed::Bed,
    plan::{Criu as Way, How},
};
use migrate_engine::report::Failure;
use migrate_harness::{Ended, Host, Hosts, Process, Run, eventually, soon};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::{
        statfs::{TMPFS_MAGIC, statfs},
        statvfs::statvfs,
    },
    unistd::pipe,
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{self, Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Why there is nothing of it.
const MISSING: &str = "CRIU (apt-get install criu, or --criu PROGRAM)";
/// `criu pre-dump` before the dump: the second has only what the first took long to write. Where the images of each are, and how the next one finds them.
const PRE_DUMPS: [(&str, &str); 2] = [("criu-0", "../criu-0"), ("criu-1", "../criu-1")];
/// A port that only these hosts have: of the server of lazy pages.
const PAGES: &str = "7902";
/// Of the pipe through which that server takes pages out of those that it keeps them in. It does not look whether it got one of this size, and fails with the first page behind 64 KiB.
const PIPE: i32 = 4 << 20;
/// The longest that any of its commands may take.
const LIMIT: Duration = Duration::from_secs(600);
/// After one of them has failed the others have as long to say why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The program that `--criu` names, as hosts find it too. Err: there is none.
pub fn asked(name: &Path) -> Result<PathBuf, Failure> {
    let found = migrate_harness::tool(&name.to_string_lossy()).filter(|p| p.is_file());
    let absolute = found.and_then(|p| path::absolute(p).ok());
    absolute.ok_or_else(|| Failure::failed("bench", 0, format!("--criu {}: there is no such program", name.display())))
}

/// An installed CRIU.
pub struct Criu {
    program: PathBuf,
    version: String,
    /// What does not work on this kernel, and what it said.
    cannot: Vec<(Way, String)>,
}

impl Criu {
    /// Looks for it, or takes the one that was asked for. Err: why it is not measured.
    pub fn find(bed: &Bed, asked: Option<&Path>) -> Result<Criu, String> {
        if let Bed::There(_) = bed {
            return Err("CRIU, which is measured between two hosts on this machine only".into());
        }
        let program = match asked {
            Some(program) => program.to_owned(),
            None => migrate_harness::tool("criu").ok_or(MISSING)?,
        };
        // It knows best whether it can do anything with this kernel.
        said(&program, &["check"]).map_err(|said| {
            let program = program.display();
            format!("CRIU, since `{program} check` says that it does not work on this kernel ({said}); --criu names another one")
        })?;
        let feature = |name| said(&program, &["check", "--feature", name]).map(drop);
        let needs = [
            (Way::PreDump, feature("mem_dirty_track")),
            (Way::LazyPages, feature("uffd-noncoop").and_then(|()| large_pipe())),
        ];
        let version = said(&program, &["--version"]).unwrap_or_default();
        let version = version.lines().find_map(|l| l.strip_prefix("Version:")).map(str::trim);
        Ok(Criu {
            version: version.unwrap_or("unknown").to_owned(),
            cannot: needs.into_iter().filter_map(|(way, need)| Some((way, need.err()?))).collect(),
            program,
        })
    }

    /// As it names its own.
    pub fn version(&self) -> &str {
        &self.version
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

    /// Moves a tree from A to B. The images are in the directory that the hosts were made with, if there is room for them.
    pub fn moved(&self, way: Way, hosts: &Hosts, pid: i32) -> Result<(Value, Vec<(f64, Value)>), String> {
        for host in [&hosts.a, &hosts.b] {
            // What it finds out about the kernel it keeps in /run, which is new in each host.
            host.command([&self.program.display().to_string(), "check"]).start().wait_for(LIMIT);
        }
        let copies = if way == Way::PreDump { 1 + PRE_DUMPS.len() } else { 1 };
        let roomy = |dir: &&Path| room(dir) > resident(&hosts.a) * copies as u64;
        let place = hosts.kept().filter(roomy).unwrap_or(hosts.dir());
        let pid = pid.to_string();
        let begun = Instant::now();
        let tree = ["--tree", pid.as_str()];
        let mut track = Vec::new();
        if way == Way::PreDump {
            track = vec!["--track-mem"];
            for (name, from_the_next) in PRE_DUMPS {
                self.run(&hosts.a, "pre-dump", &directory(place, name)?, &[&tree, &track[..]].concat())?;
                track = vec!["--track-mem", "--prev-images-dir", from_the_next];
            }
        }
        let images = directory(place, "criu")?;
        let frozen = Instant::now();
        let dump = [&["--skip-in-flight"], &tree[..], &track].concat();
        let (dumped, back);
        if way == Way::LazyPages {
            let address = ["--address", hosts.a.address(), "--port", PAGES];
            let source = self.ready(&hosts.a, "dump", &images, &[&dump[..], &["--lazy-pages"], &address].concat())?;
            dumped = frozen.elapsed();
            let pages = self.ready(&hosts.b, "lazy-pages", &images, &[&["--page-server"], &address[..]].concat());
            let pages = pages.map_err(|why| and_others(why, &[("dump", &source)]))?;
            let restored = self.run(&hosts.b, "restore", &images, &["--restore-detached", "--lazy-pages"]);
            back = frozen.elapsed();
            let served = restored
                .and_then(|()| ended("lazy-pages", &pages))
                .and_then(|()| ended("dump", &source));
            served.map_err(|why| and_others(why, &[("lazy-pages", &pages), ("dump", &source)]))?;
        } else {
            self.run(&hosts.a, "dump", &images, &dump)?;
            dumped = frozen.elapsed();
            self.run(&hosts.b, "restore", &images, &["--restore-detached"])?;
            back = frozen.elapsed();
        }
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        let report = json!({
            "outcome": "migrated", "downtime_ms": ms(back), "total_ms": ms(begun.elapsed()), "dump_ms": ms(dumped),
            "images": if in_memory(place) { "memory" } else { "disk" },
        });
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
        soon(LIMIT, || said() || process.ended().is_some());
        if !said() {
            ended(command, &process)?;
            return Err(format!("criu {command}: it never said that it was ready"));
        }
        Ok(process)
    }
}

/// Waits for the end of a command; not for what it said, unless that is an error: the program stands still.
fn ended(command: &str, process: &Process<'_>) -> Result<(), String> {
    match process.wait_for(LIMIT) {
        Ended::Code(0) => Ok(()),
        _ => {
            let run = Run::of(process, LIMIT);
            Err(format!("criu {command}: code {}: {}", run.code, last_errors(&run.all())))
        }
    }
}

/// The error with what those say who have ended because of it, or whose end is why.
fn and_others(why: String, others: &[(&str, &Process<'_>)]) -> String {
    let mut all = vec![why];
    for (command, process) in others {
        if eventually(LAST_WORDS, || process.ended().is_some())
            && let Err(said) = ended(command, process)
            && !all.contains(&said)
        {
            all.push(said);
        }
    }
    all.join("; ")
}

/// A directory in memory for images, gone with the value; none where /dev/shm is no such place.
pub fn memory() -> Option<TempDir> {
    let dir = || tempfile::Builder::new().prefix("migrate-bench-").tempdir_in("/dev/shm").ok();
    in_memory(Path::new("/dev/shm")).then(dir).flatten()
}

fn in_memory(dir: &Path) -> bool {
    statfs(dir).is_ok_and(|s| s.filesystem_type() == TMPFS_MAGIC)
}

/// Bytes that images in memory may have: what the file system takes, and half a GiB less than the machine has left.
fn room(dir: &Path) -> u64 {
    let free = statvfs(dir).map_or(0, |s| s.blocks_available() * s.fragment_size());
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let available: u64 = line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    free.min((available << 10).saturating_sub(512 << 20))
}

/// Bytes that its processes have in memory.
fn resident(host: &Host) -> u64 {
    let pages = |outer: i32| {
        let text = fs::read_to_string(format!("/proc/{outer}/statm")).unwrap_or_default();
        text.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    host.processes().iter().map(|p| pages(p.outer) * 4096).sum()
}

fn directory(place: &Path, name: &str) -> Result<PathBuf, String> {
    let dir = place.join(name);
    fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    Ok(dir)
}

/// Runs it here, to its end; what it said. Err: its errors.
fn said(program: &Path, arguments: &[&str]) -> Result<String, String> {
    let out = Command::new(program).args(arguments).output();
    let out = out.map_err(|e| format!("{}: {e}", program.display()))?;
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    if out.status.success() { Ok(said) } else { Err(last_errors(&said)) }
}

/// Err: why its server of lazy pages would not get its pipe.
fn large_pipe() -> Result<(), String> {
    let pipe = pipe().map_err(|e| e.to_string())?;
    let got = fcntl(&pipe.0, FcntlArg::F_SETPIPE_SZ(PIPE));
    got.map(drop)
        .map_err(|e| format!("its server needs a pipe of 4 MiB and gets {e}: sysctl fs.pipe-max-size={PIPE}, or CAP_SYS_RESOURCE"))
}

fn last_errors(text: &str) -> String {
    let errors: Vec<&str> = text.lines().filter(|l| l.contains("Error")).collect();
    if errors.is_empty() {
        return text.lines().last().unwrap_or_default().trim().to_owned();
    }
    errors[errors.len().saturating_sub(3)..].join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn found(script: &str) -> Result<Criu, String> {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("criu");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Criu::find(&Bed::Here { link: "veth".into() }, Some(&asked(&program).unwrap()))
    }

    #[test]
    fn what_it_says_of_itself() {
        let why = found("echo 'Warn: x'; echo 'Error (vdso.c:1): unknown'; echo later; exit 1")
            .err()
            .unwrap();
        assert!(
            why.contains("criu check` says") && why.contains("(Error (vdso.c:1): unknown)") && why.contains("--criu"),
            "{why}"
        );
        let criu =
            found("case $* in *track) echo 'Dirty tracking is OFF'; exit 1 ;; --version) echo 'Version: 4.2.1'; echo 'GitID: v4' ;; esac")
                .unwrap();
        assert_eq!(criu.version(), "4.2.1");
        assert!(!criu.can(Way::PreDump) && criu.can(Way::Dump));
        assert!(criu.cannot().unwrap().contains("criu pre-dump (Dirty tracking is OFF)"));
        assert_eq!(found("exit 0").unwrap().version(), "unknown");
        assert!(asked(Path::new("/no/such/criu")).is_err());
    }
}

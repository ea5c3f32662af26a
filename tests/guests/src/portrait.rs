//! Everything `/proc/self` says of a process that must be the same after it was moved, as lines with names.
//!
//! Left out, because it may change: inode and device numbers, counters of use, the parent of the root, the standard streams (the receiver
//! gives its own), the end of the heap and the start of the stack, and accounting flags of mappings that no program can notice.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
};

/// One picture.
pub struct Portrait(BTreeMap<String, String>);

const STATUS: &[&str] = &[
    "Name",
    "Umask",
    "Tgid",
    "Pid",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "Threads",
    "ShdPnd",
    "SigPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "Speculation_Store_Bypass",
    "SpeculationIndirectBranch",
    "Cpus_allowed",
    "Mems_allowed",
    "THP_enabled",
    "VmLck",
    "x86_Thread_features",
];

/// Fields of stat(5) after the name, from "state" as 3, with their names.
const STAT: &[(usize, &str)] = &[
    (5, "pgrp"),
    (6, "session"),
    (18, "priority"),
    (19, "nice"),
    (26, "startcode"),
    (27, "endcode"),
    (28, "startstack"),
    (38, "exit_signal"),
    (40, "rt_priority"),
    (41, "policy"),
    (45, "start_data"),
    (46, "end_data"),
    (47, "start_brk"),
    (48, "arg_start"),
    (49, "arg_end"),
    (50, "env_start"),
    (51, "env_end"),
];

/// Flags of VmFlags that say nothing a program can notice: soft-dirty, userfaultfd tracking, accounting.
const QUIET_FLAGS: &[&str] = &["sd", "uw", "um", "ui", "ac", "??"];

impl Portrait {
    /// Takes one of this process.
    pub fn take() -> Portrait {
        let mut p = Portrait(BTreeMap::new());
        for name in [
            "cmdline",
            "environ",
            "comm",
            "personality",
            "oom_score_adj",
            "coredump_filter",
            "timers",
            "limits",
        ] {
            p.file(name, Path::new("/proc/self").join(name).as_path());
        }
        p.put(
            "auxv",
            fs::read("/proc/self/auxv").map(|b| hex(&b)).unwrap_or_else(|e| e.to_string()),
        );
        for link in ["cwd", "root", "exe"] {
            let to = fs::read_link(format!("/proc/self/{link}"));
            p.put(link, to.map(|t| t.display().to_string()).unwrap_or_else(|e| e.to_string()));
        }
        p.status("process", "/proc/self");
        p.tasks();
        p.descriptors();
        p.mappings();
        p
    }

    fn put(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.0.insert(key.into(), value.into());
    }

    fn file(&mut self, key: &str, path: &Path) {
        let text = match fs::read(path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) => format!("unreadable: {e}"),
        };
        self.put(key, text);
    }

    fn status(&mut self, key: &str, dir: &str) {
        let text = fs::read_to_string(format!("{dir}/status")).unwrap_or_default();
        for line in text.lines() {
            if let Some((name, value)) = line.split_once(':')
                && STATUS.contains(&name)
                // A line that only newer kernels have, with nothing in it.
                && !(name == "x86_Thread_features" && value.trim().is_empty())
            {
                self.put(format!("{key} status {name}"), value.trim());
            }
        }
        let stat = fs::read_to_string(format!("{dir}/stat")).unwrap_or_default();
        let fields: Vec<&str> = stat
            .rsplit_once(") ")
            .map(|(_, rest)| rest.split(' ').collect())
            .unwrap_or_default();
        for (number, name) in STAT {
            self.put(format!("{key} stat {name}"), fields.get(number - 3).copied().unwrap_or("?").trim());
        }
    }

    fn tasks(&mut self) {
        let Ok(list) = fs::read_dir("/proc/self/task") else { return };
        for entry in list.flatten() {
            let tid = entry.file_name().to_string_lossy().into_owned();
            let dir = entry.path();
            self.file(&format!("task {tid} comm"), &dir.join("comm"));
            self.file(&format!("task {tid} children"), &dir.join("children"));
            self.status(&format!("task {tid}"), &dir.to_string_lossy());
        }
    }

    fn descriptors(&mut self) {
        let mut numbers = HashMap::new();
        let Ok(list) = fs::read_dir("/proc/self/fd") else { return };
        let mut fds: Vec<u32> = list.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        fds.sort_unstable();
        for fd in fds.into_iter().filter(|fd| *fd > 2) {
            let Ok(to) = fs::read_link(format!("/proc/self/fd/{fd}")) else {
                continue;
            };
            let mut to = to.display().to_string();
            if to.starts_with("/proc/") {
                continue;
            }
            // pipe:[123] becomes the number of its first appearance: who shares with whom stays visible.
            if let Some((kind @ ("pipe" | "socket"), _)) = to.split_once(":[") {
                let next = numbers.len();
                let number = *numbers.entry(to.clone()).or_insert(next);
                to = format!("{kind} number {number}");
            }
            self.put(format!("fd {fd}"), to);
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
            let mut kept = String::new();
            // In the order of kernel addresses, which means nothing.
            let mut watched = Vec::new();
            for line in info.lines() {
                let name = line.split([':', ' ']).next().unwrap_or("");
                match name {
                    "mnt_id" | "ino" | "it_value" | "ticks" | "eventfd-id" | "scm_fds" => {}
                    "tfd" | "inotify" => {
                        let words: Vec<&str> = line.split_whitespace().collect();
                        let line: Vec<&str> = words
                            .into_iter()
                            .filter(|w| !["ino:", "sdev:", "fhandle", "f_handle:"].iter().any(|p| w.starts_with(p)))
                            .take(if name == "tfd" { 6 } else { 4 })
                            .collect();
                        watched.push(normal_events(&line.join(" ")));
                    }
                    _ => {
                        kept.push_str(line);
                        kept.push('\n');
                    }
                }
            }
            watched.sort();
            self.put(format!("fdinfo {fd}"), kept + &watched.join("\n"));
        }
    }

    fn mappings(&mut self) {
        let text = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let mut all: Vec<Mapping> = Vec::new();
        let mut open: Option<Mapping> = None;
        for line in text.lines() {
            if let Some(flags) = line.strip_prefix("VmFlags:") {
                if let Some(mut m) = open.take() {
                    let kept: Vec<&str> = flags.split_whitespace().filter(|f| !QUIET_FLAGS.contains(f)).collect();
                    m.flags = kept.join(" ");
                    match all.last_mut() {
                        Some(last) if last.continues_with(&m) => last.end = m.end,
                        _ => all.push(m),
                    }
                }
            } else if let Some(m) = Mapping::parse(line) {
                open = Some(m);
            }
        }
        // What a killed agent left mapped is no part of the program; the next migration leaves it behind.
        let left_behind = |m: &Mapping| {
            use std::os::unix::fs::FileExt;
            let mut head = [0_u8; 16];
            let read = fs::File::open("/proc/self/mem").and_then(|f| f.read_exact_at(&mut head, m.start));
            m.name == "/dev/zero (deleted)" && read.is_ok() && &head == b"migrate-table-1\0"
        };
        // The kernel's own mappings, or what stands for another kernel's, with this kernel's own beside it: one line for the range.
        let vdso = crate::kit::sys0!(getauxval(libc::AT_SYSINFO_EHDR));
        let native = |m: &Mapping| ["[vvar]", "[vvar_vclock]", "[vdso]"].contains(&m.name.as_str());
        let proxied = !all.iter().any(|m| m.start == vdso && native(m));
        let (range, all): (Vec<Mapping>, Vec<Mapping>) = all
            .into_iter()
            .partition(|m| if proxied { (m.start..m.end).contains(&vdso) } else { native(m) });
        if let (Some(first), Some(last)) = (range.first(), range.last()) {
            self.put("mapping of the vdso", format!("{:x} to {:x}", first.start, last.end));
        }
        for m in all.into_iter().filter(|m| !left_behind(m) && !native(m)) {
            match m.name.as_str() {
                "[heap]" => self.put(format!("mapping [heap] at {:x}", m.start), format!("{} {}", m.perms, m.flags)),
                "[stack]" => self.put(format!("mapping [stack] up to {:x}", m.end), format!("{} {}", m.perms, m.flags)),
                _ => self.put(
                    format!("mapping {:016x}", m.start),
                    format!("up to {:x} {} offset {:x} {} ({})", m.end, m.perms, m.offset, m.name, m.flags),
                ),
            }
        }
    }

    /// One line for everything that is not as before.
    pub fn differences(&self, now: &Portrait) -> Vec<String> {
        let mut out = Vec::new();
        for (key, before) in &self.0 {
            match now.0.get(key) {
                None => out.push(format!("{key}: gone; before {before:?}")),
                Some(after) if after != before => out.push(format!("{key}: now {after:?}, before {before:?}")),
                Some(_) => {}
            }
        }
        for (key, after) in &now.0 {
            if !self.0.contains_key(key) {
                out.push(format!("{key}: new: {after:?}"));
            }
        }
        out
    }
}

struct Mapping {
    start: u64,
    end: u64,
    perms: String,
    offset: u64,
    name: String,
    flags: String,
}

impl Mapping {
    fn parse(line: &str) -> Option<Mapping> {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        let perms = words.next()?.to_string();
        let offset = u64::from_str_radix(words.next()?, 16).ok()?;
        let name = words.skip(2).collect::<Vec<_>>().join(" ");
        Some(Mapping {
            start,
            end,
            perms,
            offset,
            name,
            flags: String::new(),
        })
    }

    /// Where the kernel draws the line between two equal neighbours is its own affair.
    fn continues_with(&self, next: &Mapping) -> bool {
        let follows = self.name.is_empty() || !self.name.starts_with('/') || self.offset + (self.end - self.start) == next.offset;
        self.end == next.start && self.perms == next.perms && self.name == next.name && self.flags == next.flags && follows
    }
}

/// A used-up one-shot watch has no events left; one that is added anew always has error and hang-up (0x18).
fn normal_events(line: &str) -> String {
    let Some((before, rest)) = line.split_once("events: ") else {
        return line.to_string();
    };
    let (events, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let events = u32::from_str_radix(events, 16).unwrap_or(0) & !0x18;
    format!("{before}events: {events:x} {rest}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

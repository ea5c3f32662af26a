//! What is measured: workloads, modes and links, in order.

use super::results::Case;
use crate::{
    cli::{Bench, BenchMemory, ModeArg, PatternArg, TrackerArg},
    human,
    parse::DirtyRate,
};
use migrate_engine::report::Failure;
use std::{fmt, time::Duration};

const MIB: u64 = 1 << 20;

/// A program to be moved.
#[derive(Debug, Clone, PartialEq)]
pub enum Workload {
    /// The built-in one.
    Memory(Memory),
    /// A busybox shell that counts.
    Shell,
    /// An HTTP server, python3 or node, with a client that asks it all the time.
    Http,
    /// redis-server with 256 MB of keys, with a client that writes all the time.
    Redis,
    /// Anything, by the pauses in its output.
    Command(String),
}

/// The built-in workload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    pub mib: u64,
    pub rate: DirtyRate,
    pub pattern: PatternArg,
    pub shared: bool,
    pub forked: u32,
    pub threads: u32,
    pub processes: u32,
    pub vmas: u32,
    pub fds: u32,
}

impl Memory {
    const fn of(mib: u64, rate: DirtyRate) -> Memory {
        Memory {
            mib,
            rate,
            pattern: PatternArg::Uniform,
            shared: false,
            forked: 0,
            threads: 0,
            processes: 0,
            vmas: 0,
            fds: 0,
        }
    }

    /// Its options, for the guest `load`.
    pub fn options(&self, port: u16) -> Vec<(String, String)> {
        let rate = match self.rate {
            DirtyRate::Megabytes(n) => n.to_string(),
            DirtyRate::Max => "max".into(),
        };
        let pattern = match self.pattern {
            PatternArg::Uniform => "uniform",
            PatternArg::Zipf => "zipf",
            PatternArg::Sequential => "sequential",
        };
        let mut options = vec![("mib", self.mib.to_string()), ("rate", rate), ("pattern", pattern.into())];
        let counts = [
            ("shared", u32::from(self.shared)),
            ("forked", self.forked),
            ("threads", self.threads),
            ("processes", self.processes),
            ("vmas", self.vmas),
            ("fds", self.fds),
        ];
        options.extend(counts.iter().filter(|(_, n)| *n > 0).map(|(name, n)| (*name, n.to_string())));
        options.push(("port", port.to_string()));
        options.push(("rest-us", "50".into()));
        options.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
    }
}

impl Workload {
    /// As the table names it.
    pub fn name(&self) -> String {
        let m = match self {
            Workload::Memory(m) => m,
            Workload::Shell => return "shell counter".into(),
            Workload::Http => return "HTTP server".into(),
            Workload::Redis => return "redis, 256 MB".into(),
            Workload::Command(c) => return c.clone(),
        };
        let size = if m.mib % 1024 == 0 {
            format!("{} GiB", m.mib / 1024)
        } else {
            format!("{} MiB", m.mib)
        };
        let mut name = match m.rate {
            DirtyRate::Megabytes(0) => size,
            DirtyRate::Megabytes(n) => format!("{size}, {n} MB/s"),
            DirtyRate::Max => format!("{size}, written at full speed"),
        };
        match m.pattern {
            PatternArg::Uniform => {}
            PatternArg::Zipf => name += ", zipf",
            PatternArg::Sequential => name += ", sequential",
        }
        if m.shared {
            name += ", shared";
        }
        for (count, one, many) in [
            (m.forked, "forked writer", "forked writers"),
            (m.threads, "thread", "threads"),
            (m.processes, "process", "processes"),
            (m.vmas, "mapping", "mappings"),
            (m.fds, "open file", "open files"),
        ] {
            if count > 0 {
                name += &format!(", {}", human::plural(count.into(), one, many));
            }
        }
        name
    }
}

/// What moves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// This program.
    Mode(ModeArg),
    /// CRIU.
    Criu(Criu),
}

/// In which of its ways CRIU moves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Criu {
    /// `criu dump` and `criu restore`.
    Dump,
    /// `criu pre-dump`, twice, before that.
    PreDump,
    /// `criu dump --lazy-pages`, `criu lazy-pages` and `criu restore --lazy-pages`: pages follow.
    LazyPages,
}

impl Criu {
    /// All there are.
    pub const ALL: [Criu; 3] = [Criu::Dump, Criu::PreDump, Criu::LazyPages];
}

impl How {
    /// As `--mode` has it.
    pub fn name(self) -> &'static str {
        match self {
            How::Mode(ModeArg::Hybrid) => "hybrid",
            How::Mode(ModeArg::PreCopy) => "pre-copy",
            How::Mode(ModeArg::PostCopy) => "post-copy",
            How::Mode(ModeArg::Stop) => "stop",
            How::Criu(Criu::Dump) => "criu",
            How::Criu(Criu::PreDump) => "criu pre-dump",
            How::Criu(Criu::LazyPages) => "criu lazy-pages",
        }
    }
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the link between the two hosts does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Link {
    /// The round trip takes so much longer.
    pub round_trip: Option<Duration>,
    /// Bytes a second.
    pub rate: Option<u64>,
}

impl Link {
    /// Whether it is any other than a plain one.
    pub fn is_slow(self) -> bool {
        self != Link::default()
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("veth")?;
        if let Some(time) = self.round_trip {
            write!(f, ", {} there and back", human::millis(time.as_secs_f64() * 1e3))?;
        }
        if let Some(rate) = self.rate {
            write!(f, ", {} Mbit/s", rate / 125_000)?;
        }
        Ok(())
    }
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    pub workload: Workload,
    pub how: How,
    pub tracker: TrackerArg,
    pub repeat: u32,
    pub link: Link,
    /// TCP port of the measured program.
    pub port: u16,
}

impl Item {
    /// Its results, none yet.
    pub fn case(&self) -> Case {
        let memory = match &self.workload {
            Workload::Memory(m) => Some(m),
            _ => None,
        };
        let mut workload = self.workload.name();
        if self.link.is_slow() {
            workload += &format!(" ({})", self.link);
        }
        Case {
            workload,
            mib: memory.map(|m| m.mib),
            rate: memory.and_then(|m| match m.rate {
                DirtyRate::Megabytes(n) => Some(n),
                DirtyRate::Max => None,
            }),
            mode: self.how.name().into(),
            runs: Vec::new(),
            failed: Vec::new(),
        }
    }
}

/// What these options ask for. Err: nothing that can be measured.
pub fn plan(arguments: &Bench) -> Result<Vec<Item>, Failure> {
    let link = Link {
        round_trip: arguments.round_trip,
        rate: arguments.link,
    };
    let item = |workload: Workload, mode: ModeArg| Item {
        workload,
        how: How::Mode(mode),
        tracker: arguments.tracker,
        repeat: arguments.repeat,
        link,
        port: arguments.port,
    };
    if arguments.full {
        return Ok(full(&item));
    }
    let modes = if arguments.mode.is_empty() {
        vec![ModeArg::Hybrid]
    } else {
        arguments.mode.clone()
    };
    let m = &arguments.memory;
    let given = [m.size.is_empty(), m.rate.is_empty(), m.threads.is_empty(), m.processes.is_empty()].contains(&false)
        || [m.vmas.is_empty(), m.fds.is_empty(), !m.shared, m.forked == 0].contains(&false)
        || m.pattern != [PatternArg::Uniform];
    let mut workloads = Vec::new();
    for name in &arguments.workload {
        match name.as_str() {
            "memory" => workloads.extend(memories(m)?),
            "shell" => workloads.push(Workload::Shell),
            "http" => workloads.push(Workload::Http),
            "redis" => workloads.push(Workload::Redis),
            command if command.trim().is_empty() => return Err(Failure::failed("bench", 0, "--workload '' names nothing")),
            command => workloads.push(Workload::Command(command.to_owned())),
        }
    }
    if given && !arguments.workload.iter().any(|w| w == "memory") {
        workloads.extend(memories(m)?);
    }
    if !workloads.is_empty() || !arguments.mode.is_empty() {
        if workloads.is_empty() {
            workloads = memories(m)?;
        }
        let mut plan = Vec::new();
        for workload in &workloads {
            plan.extend(modes.iter().map(|mode| item(workload.clone(), *mode)));
            // It takes no notice of the link.
            if !link.is_slow() {
                plan.extend(by_criu(item(workload.clone(), ModeArg::Stop)));
            }
        }
        return Ok(plan);
    }
    Ok(short(&item, arguments.to.is_some()))
}

/// The same workload through CRIU, in each of its ways.
fn by_criu(item: Item) -> [Item; 3] {
    Criu::ALL.map(|way| Item {
        how: How::Criu(way),
        ..item.clone()
    })
}

/// Every combination of what the options list.
fn memories(m: &BenchMemory) -> Result<Vec<Workload>, Failure> {
    fn or<T: Copy>(list: &[T], otherwise: T) -> Vec<T> {
        if list.is_empty() { vec![otherwise] } else { list.to_vec() }
    }
    let mut all = Vec::new();
    for size in or(&m.size, 256 * MIB) {
        if size < MIB {
            return Err(Failure::failed("bench", 0, "--size: at least 1MiB"));
        }
        for rate in or(&m.rate, DirtyRate::Megabytes(50)) {
            for pattern in &m.pattern {
                for threads in or(&m.threads, 0) {
                    for processes in or(&m.processes, 0) {
                        for vmas in or(&m.vmas, 0) {
                            for fds in or(&m.fds, 0) {
                                all.push(Workload::Memory(Memory {
                                    mib: size / MIB,
                                    rate,
                                    pattern: *pattern,
                                    shared: m.shared,
                                    forked: m.forked,
                                    threads,
                                    processes,
                                    vmas,
                                    fds,
                                }));
                            }
                        }
                    }
                }
            }
        }
    }
    Ok(all)
}

/// About a minute.
fn short(item: &impl Fn(Workload, ModeArg) -> Item, there: bool) -> Vec<Item> {
    let memory = |mib, rate| Workload::Memory(Memory::of(mib, DirtyRate::Megabytes(rate)));
    let mut plan = vec![
        item(memory(16, 0), ModeArg::Hybrid),
        item(memory(16, 50), ModeArg::Hybrid),
        item(memory(256, 0), ModeArg::Hybrid),
        item(memory(256, 50), ModeArg::Hybrid),
        item(memory(256, 50), ModeArg::PreCopy),
        item(memory(256, 50), ModeArg::PostCopy),
        item(memory(256, 50), ModeArg::Stop),
    ];
    if !there {
        plan.extend(by_criu(item(memory(256, 50), ModeArg::Stop)));
        if migrate_harness::tool("busybox").is_some() {
            plan.push(item(Workload::Shell, ModeArg::Hybrid));
        }
    }
    plan
}

/// All of it.
fn full(item: &impl Fn(Workload, ModeArg) -> Item) -> Vec<Item> {
    let modes = [ModeArg::Stop, ModeArg::PreCopy, ModeArg::Hybrid, ModeArg::PostCopy];
    let rates = [0, 50, 200].map(DirtyRate::Megabytes).into_iter().chain([DirtyRate::Max]);
    let mut plan = Vec::new();
    for mib in [16, 256, 1024, 4096, 8192] {
        for rate in rates.clone() {
            plan.extend(modes.map(|mode| item(Workload::Memory(Memory::of(mib, rate)), mode)));
        }
        let written = Memory::of(mib, DirtyRate::Megabytes(50));
        plan.extend(by_criu(item(Workload::Memory(written), ModeArg::Stop)));
    }
    let base = Memory::of(256, DirtyRate::Megabytes(50));
    let hybrid = |m: Memory| item(Workload::Memory(m), ModeArg::Hybrid);
    for pattern in [PatternArg::Zipf, PatternArg::Sequential] {
        plan.push(hybrid(Memory { pattern, ..base }));
    }
    plan.push(hybrid(Memory { shared: true, ..base }));
    plan.push(hybrid(Memory { forked: 4, ..base }));
    let small = Memory::of(16, DirtyRate::Megabytes(0));
    plan.extend([1, 10, 100, 1000].map(|threads| hybrid(Memory { threads, ..small })));
    plan.extend([1, 10, 100, 200].map(|processes| hybrid(Memory { processes, ..small })));
    plan.extend([100, 1000, 20_000].map(|vmas| hybrid(Memory { vmas, ..small })));
    plan.extend([100, 1000, 10_000].map(|fds| hybrid(Memory { fds, ..small })));
    for workload in [Workload::Shell, Workload::Http, Workload::Redis] {
        plan.extend(modes.map(|mode| item(workload.clone(), mode)));
        plan.extend(by_criu(item(workload, ModeArg::Stop)));
    }
    for (time, rate) in [(10, 12_500_000), (10, 125_000_000), (80, 12_500_000), (80, 125_000_000)] {
        let link = Link {
            round_trip: Some(Duration::from_millis(time)),
            rate: Some(rate),
        };
        for megabytes in [0, 5] {
            plan.push(Item {
                link,
                ..hybrid(Memory::of(64, DirtyRate::Megabytes(megabytes)))
            });
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn of(line: &str) -> Result<Vec<Item>, Failure> {
        let cli = Cli::parse_from(["migrate", "bench"].into_iter().chain(line.split_whitespace()));
        match cli.command {
            Command::Bench(arguments) => plan(&arguments),
            other => panic!("{other:?}"),
        }
    }

    /// Those that are not CRIU's.
    fn names(line: &str) -> Vec<String> {
        let name = |i: &Item| format!("{}: {}", i.case().workload, i.how);
        let (criu, ours): (Vec<_>, Vec<_>) = of(line).unwrap().into_iter().partition(|i| matches!(i.how, How::Criu(_)));
        assert!(criu.len() <= 3 * ours.len());
        ours.iter().map(name).collect()
    }

    #[test]
    fn lists_are_combined() {
        assert_eq!(
            names("--size 16MiB,1GiB --rate 0,max --mode stop,hybrid").len(),
            8,
            "sizes by rates by modes"
        );
        assert_eq!(names("--mode stop"), ["256 MiB, 50 MB/s: stop"]);
        assert_eq!(names("--threads 5"), ["256 MiB, 50 MB/s, 5 threads: hybrid"]);
        assert_eq!(names("--workload redis --mode post-copy"), ["redis, 256 MB: post-copy"]);
        assert_eq!(
            names("--workload redis --size 16MiB --pattern zipf"),
            ["redis, 256 MB: hybrid", "16 MiB, 50 MB/s, zipf: hybrid"]
        );
        assert_eq!(
            names("--workload true --round-trip 80ms --link 100Mbit/s"),
            ["true (veth, 80.0 ms there and back, 100 Mbit/s): hybrid"]
        );
        assert!(of("--size 4kB").is_err());
    }

    #[test]
    fn the_whole_matrix() {
        let all = of("--full").unwrap();
        for mode in ["stop", "pre-copy", "hybrid", "post-copy"] {
            let name = |mib: u64| {
                all.iter()
                    .filter(move |i| i.case().mib == Some(mib) && i.how.name() == mode)
                    .count()
            };
            assert!([16, 256, 1024, 4096, 8192].into_iter().all(|mib| name(mib) >= 4), "{mode}");
        }
        assert!(of("").unwrap().len() < 12, "about a minute");
    }
}

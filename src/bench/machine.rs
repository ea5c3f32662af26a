//! What it was measured on.

use super::results::Machine;
use crate::cli::TrackerArg;
use migrate_engine::track;
use std::fs;

/// This machine, before a run.
pub fn machine(tracker: TrackerArg, link: &str) -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or("");
        line.split_once(':').map_or("", |(_, value)| value.trim()).to_owned()
    };
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let kib: u64 = memory.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
    Machine {
        cpu: field(&read("/proc/cpuinfo"), "model name"),
        cpus: std::thread::available_parallelism().map_or(0, |n| n.get() as u32),
        memory: kib << 10,
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        tracker: match track::choose(tracker.into()) {
            Ok(track::Kind::SoftDirty) => "soft-dirty".into(),
            Ok(_) => "wp-async".into(),
            Err(why) => why,
        },
        version: env!("CARGO_PKG_VERSION").to_owned(),
        criu: None,
        link: link.to_owned(),
        load: load(),
        since: std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs()),
    }
}

/// Load average over a minute (proc_loadavg(5)).
fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(f64::NAN)
}

//! How long the destination takes to rebuild a program, by its own clock (`restore_ms` of a migration with `--mode stop`), with few and with many threads,
//! mappings and open files. What one of them takes is in the difference.
//!
//! `cargo bench --bench restore [-- NAME]`; takes root.

use criterion::{Criterion, SamplingMode, Throughput};
use migrate_harness::{Guest, Hosts, Stdio};
use std::time::Duration;

/// A guest, and how many it has of what it is named after.
const GUESTS: [(&str, [u32; 2]); 3] = [("threads", [100, 1000]), ("vmas", [2000, 20_000]), ("files", [1000, 10_000])];

fn main() {
    // Under `cargo test` a run would take as long as a measurement.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    migrate_harness::without_oracle();
    if Hosts::new().is_none() {
        return eprintln!("SKIP restore: no two hosts on this machine");
    }
    let mut c = Criterion::default().configure_from_args();
    for (guest, counts) in GUESTS {
        let mut group = c.benchmark_group(guest);
        // One migration each.
        group.sampling_mode(SamplingMode::Flat).sample_size(10);
        group
            .warm_up_time(Duration::from_millis(1))
            .measurement_time(Duration::from_millis(1));
        for count in counts {
            group.throughput(Throughput::Elements(count.into()));
            group.bench_function(count.to_string(), |b| {
                b.iter_custom(|times| (0..times).map(|_| restore(guest, count)).sum());
            });
        }
    }
    c.final_summary();
}

fn restore(guest: &str, count: u32) -> Duration {
    let hosts = Hosts::new().expect("two hosts");
    let count = count.to_string();
    // Only the threads know of spinning, and would by themselves.
    let options = [("count", count.as_str()), ("spinning", "0")];
    let guest = Guest::start_with(&hosts.a, guest, &options, |c| c.open_files(20_000));
    let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &["--mode", "stop"]);
    let ms = moved.report["downtime"]["restore_ms"].as_f64().expect("restore_ms");
    Duration::from_secs_f64(ms / 1e3)
}

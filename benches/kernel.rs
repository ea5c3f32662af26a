//! What the engine asks of the kernel, by the engine's own ways: stopping a process, running calls inside it, putting pages in place.
//!
//! `cargo bench --bench kernel [-- NAME]`

#[path = "common/random.rs"]
mod random;
#[path = "common/target.rs"]
mod target;

use crate::random::random;
use criterion::{Criterion, SamplingMode, Throughput};
use migrate_engine::{
    arch::pilot::Record,
    inject::Injector,
    procfs::maps,
    sys::uffd::{self, Userfault},
    tracer::Frozen,
};
use std::time::{Duration, Instant};
use target::Target;

/// Longer than any task takes to stop.
const LIMIT: Duration = Duration::from_secs(5);
/// Bytes put in place at a time.
const STEPS: [(&str, usize); 3] = [("4 KiB", 4 << 10), ("64 KiB", 64 << 10), ("1 MiB", 1 << 20)];
const PAGE: usize = 4096;
/// Bytes put in place in all.
const MEMORY: usize = 256 << 20;

fn main() {
    if Target::play() {
        return;
    }
    let mut c = Criterion::default().configure_from_args();
    stop(&mut c);
    inject(&mut c);
    fill(&mut c);
    c.final_summary();
}

fn stop(c: &mut Criterion) {
    let target = Target::start(1);
    let freeze = || Frozen::freeze(target.pid(), LIMIT).expect("a stop");
    let mut group = c.benchmark_group("stop");
    group.bench_function("freeze", |b| {
        b.iter_custom(|times| {
            let mut total = Duration::ZERO;
            for _ in 0..times {
                let began = Instant::now();
                let mut frozen = freeze();
                total += began.elapsed();
                frozen.thaw();
            }
            total
        });
    });
    group.bench_function("freeze, 10 calls, thaw", |b| {
        b.iter(|| {
            let mut frozen = freeze();
            let injector = attach(&frozen);
            run(&injector, &frozen, 10);
            injector.leave(&mut frozen).expect("the table is unmapped");
        });
    });
}

fn inject(c: &mut Criterion) {
    let target = Target::start(1);
    let mut frozen = Frozen::freeze(target.pid(), LIMIT).expect("a stop");
    let injector = attach(&frozen);
    let mut group = c.benchmark_group("inject");
    for calls in [1, 10, 100] {
        group.bench_function(format!("{calls} calls"), |b| b.iter(|| run(&injector, &frozen, calls)));
    }
    injector.leave(&mut frozen).expect("the table is unmapped");
}

fn attach(frozen: &Frozen) -> Injector {
    let p = &frozen.procs[0];
    let maps = maps::maps(p.pid).expect("/proc/PID/maps");
    let states = p.states().expect("/proc/PID/status");
    Injector::attach(p, &maps, &states).expect("an injector")
}

/// Runs a batch of so many calls.
fn run(injector: &Injector, frozen: &Frozen, calls: usize) {
    let p = &frozen.procs[0];
    let batch = vec![Record::new(libc::SYS_getppid, &[]); calls];
    let results = injector.run(&p.tasks, &[batch]).expect("a batch");
    assert!(results[0].ret.iter().all(|parent| *parent > 1));
}

/// UFFDIO_COPY, and memcpy to memory that is as new.
fn fill(c: &mut Criterion) {
    let source = random(STEPS[2].1);
    let mut group = c.benchmark_group("fill");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.throughput(Throughput::Bytes(MEMORY as u64));
    group.bench_function("memcpy", |b| {
        b.iter_custom(|times| {
            let mut total = Duration::ZERO;
            for _ in 0..times {
                let mut memory = Vec::<u8>::with_capacity(MEMORY);
                let began = Instant::now();
                while memory.len() < MEMORY {
                    memory.extend_from_slice(&source);
                }
                total += began.elapsed();
            }
            total
        });
    });
    if let Err(e) = uffd::features() {
        return eprintln!("SKIP fill with UFFDIO_COPY: userfaultfd(2): {e}");
    }
    for (name, step) in STEPS {
        group.bench_function(format!("UFFDIO_COPY of {name}"), |b| {
            b.iter_custom(|times| (0..times).map(|_| copy(&source[..step])).sum());
        });
    }
}

/// How long it takes to put this in place again and again, in memory that nobody has touched.
fn copy(source: &[u8]) -> Duration {
    let memory = Vec::<u8>::with_capacity(MEMORY + PAGE);
    let start = (memory.as_ptr() as u64).next_multiple_of(PAGE as u64);
    let end = start + MEMORY as u64;
    let uffd = Userfault::refusing(start, end).expect("a userfaultfd");
    let began = Instant::now();
    for at in (start..end).step_by(source.len()) {
        let (done, failed) = uffd.copy(at, source.as_ptr() as u64, source.len() as u64, false);
        assert_eq!(done, source.len() as u64, "{failed:?}");
    }
    began.elapsed()
}

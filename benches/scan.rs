//! Finding out what a running program has written, a GiB of it: by the tracker alone, by a whole look as a pre-copy round begins with one, and reading it.
//!
//! `cargo bench --bench scan [-- NAME]`

#[path = "common/random.rs"]
mod random;
#[path = "common/target.rs"]
mod target;

use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput, measurement::WallTime};
use migrate_engine::{
    dump::pages::{Reader, SpacePlan, read_plan},
    pages::PageSet,
    source::{self, attach, rounds::Rounds},
    sys::mem::Mem,
    tracer::Frozen,
    track::{self, Kind, Tracker},
};
use std::time::{Duration, Instant};
use target::Target;

/// Pages in a hundred written between two looks.
const SHARES: [usize; 3] = [0, 1, 100];

fn main() {
    if Target::play() {
        return;
    }
    let mut c = Criterion::default().configure_from_args();
    tracker(&mut c);
    looks(&mut c);
    read(&mut c);
    c.final_summary();
}

/// `cargo test` only looks whether it works.
fn mib() -> usize {
    if std::env::args().any(|a| a == "--bench") { 1024 } else { 16 }
}

/// Criterion counts what is measured only: here most of the time goes by while the program writes.
fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sampling_mode(SamplingMode::Flat).sample_size(20);
    group
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(100));
    group.throughput(Throughput::Bytes((mib() as u64) << 20));
    group
}

/// Runs `look` so often, each time after that share was written, and counts `look` alone.
fn after_writes(target: &mut Target, percent: usize, times: u64, mut look: impl FnMut()) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..times {
        target.dirty(percent);
        let began = Instant::now();
        look();
        total += began.elapsed();
    }
    total
}

/// What one look of the tracker costs in a mapping, during the rounds and at the freeze.
fn tracker(c: &mut Criterion) {
    if let Err(why) = track::choose(Kind::WpAsync) {
        return eprintln!("SKIP scan: {why}");
    }
    let mut target = Target::start(mib());
    let vma = target.memory();
    let mut frozen = Frozen::freeze(target.pid(), Duration::from_secs(5)).expect("a stop");
    let mut tracker = attach::track(&mut frozen, target.pid()).expect("a tracker");
    drop(frozen);
    let held = tracker.scan(&vma, &PageSet::new(), false).expect("a first look").dirty;
    let mut group = group(c, "scan");
    for percent in SHARES {
        group.bench_function(format!("{percent}% written"), |b| {
            b.iter_custom(|times| {
                after_writes(&mut target, percent, times, || {
                    tracker.scan(&vma, &held, false).expect("a look");
                })
            });
        });
    }
    group.bench_function("last look, 0% written", |b| {
        // Nothing runs at the last look, and it arms nothing: it can be had again and again.
        tracker.scan(&vma, &held, false).expect("a look");
        b.iter(|| tracker.scan(&vma, &held, true).expect("the last look"));
    });
}

/// A look at the whole program, as each round begins with one.
fn looks(c: &mut Criterion) {
    for (kind, name) in [(Kind::WpAsync, "look"), (Kind::SoftDirty, "look, soft-dirty")] {
        if let Err(why) = track::choose(kind) {
            eprintln!("SKIP {name}: {why}");
            continue;
        }
        let mut target = Target::start(mib());
        let dumped = source::inventory(target.pid()).expect("an inventory");
        let mut rounds = Rounds::new(target.pid(), Some(kind), None, &dumped, Default::default()).expect("rounds");
        let mut look = || {
            let round = rounds.look().expect("a look");
            rounds.pretend_sent(&round).expect("a round");
        };
        // The first sends everything; the second settles what was registered in the first.
        look();
        look();
        let mut group = group(c, name);
        for percent in SHARES {
            group.bench_function(format!("{percent}% written"), |b| {
                b.iter_custom(|times| after_writes(&mut target, percent, times, &mut look));
            });
        }
    }
}

/// Reading the memory into frames, zero pages told apart.
fn read(c: &mut Criterion) {
    let target = Target::start(mib());
    let vma = target.memory();
    let plan = SpacePlan {
        space: 0,
        ranges: vec![(vma.start, vma.end)],
    };
    let reader = Reader::Process(Mem::open(target.pid()).expect("/proc/PID/mem"));
    let mut group = group(c, "read");
    group.bench_function("random data", |b| {
        b.iter(|| {
            let mut pages = 0;
            read_plan(&plan, &reader, &mut |batch| {
                pages += batch.pages;
                true
            })
            .expect("the memory");
            pages
        });
    });
}

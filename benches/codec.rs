//! Bytes to values and back: what the peer is told of a tree, page frames, zero pages, compression.
//!
//! `cargo bench --bench codec [-- NAME]`

#[path = "common/random.rs"]
mod random;
#[path = "common/target.rs"]
mod target;

use crate::random::random;
use bytes::Bytes;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use migrate_engine::{
    dump::pages::is_zero,
    image::{PAGE, Tree, Vma},
    source,
};
use migrate_transport::{
    Encoding, Run, codec,
    frame::{PageDecoder, PageEncoder},
};
use std::{fs, hint::black_box, time::Duration};
use target::Target;

/// A full frame.
const FRAME: usize = 256 * PAGE as usize;
/// More than the processor's caches hold.
const MEMORY: usize = 256 << 20;
/// Mappings of a large program.
const VMAS: usize = 20_000;

fn main() {
    if Target::play() {
        return;
    }
    let mut c = Criterion::default().configure_from_args();
    tree(&mut c);
    zero(&mut c);
    frames(&mut c);
    c.final_summary();
}

/// The state of a program with many mappings.
fn tree(c: &mut Criterion) {
    let target = Target::start(1);
    let mut tree: Tree = source::inventory(target.pid()).expect("an inventory").tree;
    let one = target.memory();
    tree.mms[0].vmas = (0..VMAS as u64)
        .map(|i| Vma {
            start: one.start + 2 * i * PAGE,
            end: one.start + (2 * i + 1) * PAGE,
            ..one.clone()
        })
        .collect();
    let bytes = codec::encode(&tree).expect("bytes");
    let mut group = c.benchmark_group("tree");
    group.throughput(Throughput::Elements(VMAS as u64));
    group.bench_function("encode", |b| b.iter(|| codec::encode(&tree)));
    group.bench_function("decode", |b| b.iter(|| codec::decode::<Tree>(&bytes)));
}

/// Telling zero pages apart: all of each has to be read, or next to nothing.
fn zero(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero");
    group.sample_size(20).throughput(Throughput::Bytes(MEMORY as u64));
    for (name, memory) in [("zero pages", vec![0; MEMORY]), ("random data", random(MEMORY))] {
        // Written, or all pages would be the kernel's one page of zeros.
        let mut memory = memory;
        memory.iter_mut().step_by(PAGE as usize).for_each(|b| *b = black_box(*b));
        group.bench_function(name, |b| {
            b.iter(|| memory.chunks_exact(PAGE as usize).filter(|page| is_zero(page)).count());
        });
    }
}

fn frames(c: &mut Criterion) {
    let random = Bytes::from(random(FRAME));
    // What programs hold most of has about as much order as a program.
    let program = fs::read(std::env::current_exe().expect("this program")).expect("this program");
    let program = Bytes::from(program.into_iter().cycle().take(FRAME).collect::<Vec<u8>>());
    let whole = [Run::new(0, 0, 256, false).expect("a run")];
    let pages: Vec<Run> = (0..256).map(|i| Run::new(0, 2 * i * PAGE, 1, false).expect("a run")).collect();

    let mut group = c.benchmark_group("frame");
    group.throughput(Throughput::Bytes(FRAME as u64));
    coder(&mut group, "raw, 1 run", Encoding::Raw, &whole, &random);
    coder(&mut group, "raw, 256 runs", Encoding::Raw, &pages, &random);
    coder(&mut group, "zstd, random data", Encoding::Zstd, &whole, &random);
    coder(&mut group, "zstd, a program", Encoding::Zstd, &whole, &program);
}

/// Encodes a frame and decodes it.
fn coder(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, encoding: Encoding, runs: &[Run], data: &Bytes) {
    let mut encoder = PageEncoder::default();
    encoder.set_encoding(encoding);
    let mut encode = || encoder.encode(runs, vec![data.clone()]).expect("a frame");
    let coded = encode();
    group.measurement_time(Duration::from_secs(2));
    group.bench_function(format!("encode {name}"), |b| b.iter(&mut encode));
    let mut decoder = PageDecoder::default();
    group.bench_function(format!("decode {name}"), |b| {
        b.iter_batched(
            || coded.clone(),
            |chunks| {
                chunks.into_iter().for_each(|c| decoder.push(c));
                decoder.next_frame().expect("a frame")
            },
            BatchSize::SmallInput,
        );
    });
}

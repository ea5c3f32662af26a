//! Puts what the benches have measured into docs/benchmarks.md, between its marks.
//!
//! `cargo run --example figures [-- TABLE]`. The parts come from criterion's own records. TABLE is what the downtime bench has printed.

use serde_json::Value;
use std::{env, error::Error, fs, path::PathBuf, process::ExitCode};

type Failure = Box<dyn Error>;

/// What is shown of a benchmark.
struct Part {
    what: &'static str,
    /// The bench, and the benchmark in it.
    bench: &'static str,
    id: &'static str,
    /// The same with less of everything: what one more takes is in the difference.
    less: Option<&'static str>,
    floor: Floor,
}

/// What a part is held against.
enum Floor {
    /// Nothing that was measured.
    None,
    /// Nanoseconds, of the same amount.
    Ns(f64),
    /// For a GiB, from bytes a second.
    Rate(f64),
    /// Another benchmark of the same run.
    Run(&'static str),
}

const fn part(what: &'static str, bench: &'static str, id: &'static str, floor: Floor) -> Part {
    Part {
        what,
        bench,
        id,
        less: None,
        floor,
    }
}

const fn slope(what: &'static str, id: &'static str, less: &'static str) -> Part {
    Part {
        what,
        bench: "restore",
        id,
        less: Some(less),
        floor: Floor::None,
    }
}

const MS: f64 = 1e6;
const US: f64 = 1e3;
const GIB: f64 = (1 << 30) as f64;
/// A part that takes more than this by its floor stands out.
const MUCH: f64 = 1.5;

/// The floors were measured once, with small programs that do nothing else, on a machine as the one of docs/benchmarks.md.
const PARTS: [Part; 34] = [
    part("round scan, nothing written", "scan", "scan/0% written", Floor::Ns(0.28 * MS)),
    part(
        "round scan, 1 % of the pages written",
        "scan",
        "scan/1% written",
        Floor::Ns(0.4 * MS),
    ),
    part("round scan, all written", "scan", "scan/100% written", Floor::Ns(4.5 * MS)),
    part(
        "scan at the freeze, nothing written",
        "scan",
        "scan/last look, 0% written",
        Floor::Ns(0.28 * MS),
    ),
    part(
        "a round's whole look, nothing written",
        "scan",
        "look/0% written",
        Floor::Ns(0.28 * MS),
    ),
    part("a round's whole look, 1 % written", "scan", "look/1% written", Floor::Ns(0.4 * MS)),
    part(
        "a round's whole look, all written",
        "scan",
        "look/100% written",
        Floor::Ns(4.5 * MS),
    ),
    part("reading random data into frames", "scan", "read/random data", Floor::None),
    part("zero detection, zero pages", "codec", "zero/zero pages", Floor::None),
    part("zero detection, random data", "codec", "zero/random data", Floor::None),
    part("state of a tree: encode", "codec", "tree/encode", Floor::None),
    part("state of a tree: decode", "codec", "tree/decode", Floor::None),
    part("frame of one run: encode", "codec", "frame/encode raw, 1 run", Floor::None),
    part("frame of one run: decode", "codec", "frame/decode raw, 1 run", Floor::None),
    part("frame of 256 runs: encode", "codec", "frame/encode raw, 256 runs", Floor::None),
    part("frame of 256 runs: decode", "codec", "frame/decode raw, 256 runs", Floor::None),
    part(
        "zstd, random data: compress",
        "codec",
        "frame/encode zstd, random data",
        Floor::None,
    ),
    part(
        "zstd, a program's code: compress",
        "codec",
        "frame/encode zstd, a program",
        Floor::None,
    ),
    part(
        "zstd, a program's code: decompress",
        "codec",
        "frame/decode zstd, a program",
        Floor::None,
    ),
    part(
        "section there and back",
        "wire",
        "wire/section there and back",
        Floor::Ns(75.0 * US),
    ),
    part("plain QUIC", "wire", "wire/plain QUIC", Floor::Rate(1144e6)),
    part("pages", "wire", "wire/pages", Floor::Run("wire/plain QUIC")),
    part("freeze of one thread", "kernel", "stop/freeze", Floor::Ns(28.0 * US)),
    part(
        "freeze, 10 calls inside, thaw",
        "kernel",
        "stop/freeze, 10 calls, thaw",
        Floor::Ns(140.0 * US),
    ),
    part("inject 1 call", "kernel", "inject/1 calls", Floor::Ns(4.9 * US)),
    part("inject 10 calls", "kernel", "inject/10 calls", Floor::Ns(5.4 * US)),
    part("inject 100 calls", "kernel", "inject/100 calls", Floor::Ns(15.0 * US)),
    part("memcpy to fresh memory", "kernel", "fill/memcpy", Floor::None),
    part(
        "UFFDIO_COPY, 4 KiB at a time",
        "kernel",
        "fill/UFFDIO_COPY of 4 KiB",
        Floor::Rate(1.8e9),
    ),
    part(
        "UFFDIO_COPY, 64 KiB at a time",
        "kernel",
        "fill/UFFDIO_COPY of 64 KiB",
        Floor::Rate(3.2e9),
    ),
    part(
        "UFFDIO_COPY, 1 MiB at a time",
        "kernel",
        "fill/UFFDIO_COPY of 1 MiB",
        Floor::Rate(2.8e9),
    ),
    slope("restore, of 1,000 threads each", "threads/1000", "threads/100"),
    slope("restore, of 20,000 mappings each", "vmas/20000", "vmas/2000"),
    slope("restore, of 10,000 open files each", "files/10000", "files/1000"),
];

fn main() -> ExitCode {
    match write() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("figures: {e}");
            ExitCode::FAILURE
        }
    }
}

fn write() -> Result<(), Failure> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/benchmarks.md");
    let mut text = fs::read_to_string(&path)?;
    text = between(&text, "parts", &parts()?)?;
    if let Some(table) = env::args().nth(1) {
        text = between(&text, "downtime", &fs::read_to_string(table)?)?;
    }
    Ok(fs::write(path, text)?)
}

/// The text with other words between the two marks of this name.
fn between(text: &str, name: &str, new: &str) -> Result<String, Failure> {
    let (begin, end) = (format!("<!-- {name}: begin -->"), format!("<!-- {name}: end -->"));
    let parts = text
        .split_once(&begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let (before, after) = parts.ok_or_else(|| format!("docs/benchmarks.md has no {begin} before {end}"))?;
    Ok(format!("{before}{begin}\n{}\n{end}{after}", new.trim_end()))
}

fn parts() -> Result<String, Failure> {
    let mut text = "| part | median | of | floor | ratio | again: `cargo bench --bench ...` |\n|---|---|---|---|---|---|\n".to_owned();
    let (rows, missing): (Vec<_>, Vec<_>) = PARTS.iter().map(row).partition(Result::is_ok);
    let missing: Vec<String> = missing.into_iter().filter_map(|r| Some(r.err()?.to_string())).collect();
    if !missing.is_empty() {
        return Err(format!("nothing was measured of\n  {}", missing.join("\n  ")).into());
    }
    text.extend(rows.into_iter().flatten());
    Ok(text)
}

fn row(part: &Part) -> Result<String, Failure> {
    let mut figure = Figure::read(part.id)?;
    if let Some(less) = part.less {
        figure = figure.each_more_than(&Figure::read(less)?);
    }
    let floor = match part.floor {
        Floor::None => None,
        Floor::Ns(ns) => Some(ns),
        Floor::Rate(rate) => Some(GIB / rate * 1e9),
        Floor::Run(id) => Some(Figure::read(id)?.ns),
    };
    let ratio = floor.map(|f| figure.ns / f);
    let ratio = match ratio {
        None => String::new(),
        Some(r) if r > MUCH => format!("**{r:.2}**"),
        Some(r) => format!("{r:.2}"),
    };
    // Criterion takes a part of a name: what is before it belongs to its group.
    let again = match part.less {
        Some(_) => part.id.split('/').next().unwrap_or_default(),
        None => part.id,
    };
    Ok(format!(
        "| {} | {} | {} | {} | {ratio} | `{} -- '{again}'` |\n",
        part.what,
        time(figure.ns),
        figure.of,
        floor.map(time).unwrap_or_default(),
        part.bench,
    ))
}

/// A benchmark's median.
struct Figure {
    /// Of one GiB, of one thing, or of the whole.
    ns: f64,
    of: &'static str,
    /// How many of them there were.
    amount: f64,
}

impl Figure {
    fn read(id: &str) -> Result<Figure, Failure> {
        // Only what cannot be in a file's name is another there.
        let target =
            env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target"), PathBuf::from);
        let dir = target.join("criterion").join(id).join("new");
        let record = |name: &str| -> Result<Value, Failure> {
            let text = fs::read_to_string(dir.join(name)).map_err(|_| id)?;
            Ok(serde_json::from_str(&text)?)
        };
        let ns = record("estimates.json")?
            .pointer("/median/point_estimate")
            .and_then(Value::as_f64)
            .ok_or(id)?;
        let record = record("benchmark.json")?;
        let throughput = |kind: &str| record.pointer(&format!("/throughput/{kind}")).and_then(Value::as_f64);
        let (of, amount) = match (throughput("Bytes"), throughput("Elements")) {
            (Some(bytes), _) => ("GiB", bytes / GIB),
            (_, Some(count)) => ("each", count),
            _ => ("all", 1.0),
        };
        Ok(Figure {
            ns: ns / amount,
            of,
            amount,
        })
    }

    /// What each of those takes that there are more of.
    fn each_more_than(&self, less: &Figure) -> Figure {
        let amount = self.amount - less.amount;
        Figure {
            ns: (self.ns * self.amount - less.ns * less.amount) / amount,
            of: self.of,
            amount,
        }
    }
}

fn time(ns: f64) -> String {
    let (value, unit) = match ns {
        ns if ns < US => (ns, "ns"),
        ns if ns < MS => (ns / US, "µs"),
        ns => (ns / MS, "ms"),
    };
    // Three digits: there are no more in it.
    let digits = (2 - value.abs().log10().floor() as i32).clamp(0, 2) as usize;
    format!("{value:.digits$} {unit}")
}

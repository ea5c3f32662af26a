//! What a run of `migrate bench` measured: what `--json` prints and the page of `--report` draws.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Everything of one run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Results {
    /// Where it was measured.
    pub machine: Machine,
    /// What plain means carry here, measured in the same run.
    pub ceilings: Ceilings,
    /// What was asked for, as typed.
    pub command: String,
    /// How long the whole of it took, seconds.
    pub took_s: f64,
    /// One workload in one mode each, in the order measured.
    pub cases: Vec<Case>,
    /// Why there is nothing of CRIU; none if it was measured.
    pub without_criu: Option<String>,
}

/// The machine and its software.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Machine {
    /// As /proc/cpuinfo names it.
    pub cpu: String,
    /// Logical ones that may be used.
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    /// As uname(2) says.
    pub kernel: String,
    /// How written pages are found: "wp-async", "soft-dirty".
    pub tracker: String,
    /// Of this program.
    pub version: String,
    /// Of CRIU; none if it is not measured.
    pub criu: Option<String>,
    /// Between the two hosts: "veth", "veth, 80 ms, 100 Mbit/s", or the address of the other machine.
    pub link: String,
    /// Load average over a minute before the run.
    pub load: f64,
    /// Seconds since 1970 at the start.
    pub since: u64,
}

/// Rates in bytes a second; none where it was not measured.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Ceilings {
    /// One plain QUIC stream between the two hosts, encrypted.
    pub quic: Option<f64>,
    /// One plain TCP connection between them.
    pub tcp: Option<f64>,
    /// Copying memory on one core.
    pub memcpy: Option<f64>,
}

/// One workload in one mode.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Case {
    /// "256 MiB, 50 MB/s", "redis", as the table names it.
    pub workload: String,
    /// MiB of memory of the built-in workload.
    pub mib: Option<u64>,
    /// MB/s that it writes; none: as fast as a core can, or not a built-in one.
    pub rate: Option<u64>,
    /// "hybrid", "pre-copy", "post-copy", "stop"; "criu" and the like for other tools.
    pub mode: String,
    /// One migration each.
    pub runs: Vec<Measured>,
    /// Why there are fewer than were asked for.
    pub failed: Vec<String>,
}

/// One migration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Measured {
    /// The program's own gap between its last step on one host and its first on the other, ms.
    pub program_ms: Option<f64>,
    /// Its longest gap from the start of the migration to its end, ms.
    pub program_longest_ms: Option<f64>,
    /// Its longest gap in the same time before, without a migration, ms.
    pub program_noise_ms: Option<f64>,
    /// The longest that a client waited for an answer, from the start of the migration to its end, ms.
    pub client_ms: Option<f64>,
    /// The same in the same time before, without a migration, ms.
    pub client_noise_ms: Option<f64>,
    /// What the agents say: the object of `send --json`.
    pub report: Value,
    /// The sender's events, ms after its start: the lines of `send --json` on stderr.
    pub events: Vec<(f64, Value)>,
    /// Steps a second that the program did: (ms after the sender's start, negative before it; rate).
    pub speed: Vec<(f64, f64)>,
}

impl Measured {
    /// A number of the agents' report, by JSON pointer.
    pub fn number(&self, path: &str) -> Option<f64> {
        self.report.pointer(path).and_then(Value::as_f64)
    }
}

/// Median, the 99th percentile (nearest rank) and the worst of some figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// Middle; of an even number the upper one of the two.
    pub median: f64,
    /// Of a hundred one is worse: with fewer than a hundred this is the worst.
    pub p99: f64,
    /// Worst.
    pub worst: f64,
}

impl Spread {
    /// Of these; none of nothing.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (count, worst) = (values.len(), *values.last()?);
        // Nearest rank.
        let p99 = values[(count * 99).div_ceil(100) - 1];
        Some(Spread {
            median: values[count / 2],
            p99,
            worst,
        })
    }
}

impl Case {
    /// The spread of one figure of all runs.
    pub fn spread(&self, figure: impl Fn(&Measured) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.runs.iter().filter_map(figure))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of([]), None);
        let one = Spread::of([3.0]).unwrap();
        assert_eq!((one.median, one.p99, one.worst), (3.0, 3.0, 3.0));
        let hundred = Spread::of((1..=100).map(f64::from)).unwrap();
        assert_eq!((hundred.median, hundred.p99, hundred.worst), (51.0, 99.0, 100.0));
        let few = Spread::of([5.0, f64::NAN, 1.0, 2.0]).unwrap();
        assert_eq!((few.median, few.p99, few.worst), (2.0, 5.0, 5.0));
    }
}

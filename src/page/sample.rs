//! Made-up measurements of a likely shape, for the tests of the pages.

use crate::bench::results::{Case, Ceilings, Machine, Measured, Results};
use serde_json::{Value, json};

/// Numbers that look like chance and are the same every time.
fn dice(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// A machine.
pub fn machine() -> Machine {
    Machine {
        cpu: "AMD EPYC 7763 64-Core Processor".into(),
        cpus: 2,
        memory: 25_000_000_000,
        kernel: "Linux 6.18.5 #1 SMP PREEMPT_DYNAMIC x86_64".into(),
        tracker: "wp-async".into(),
        version: "0.1.0".into(),
        criu: Some("4.2".into()),
        link: "veth, 80 ms, 100 Mbit/s".into(),
        load: 0.31,
        since: 1_795_469_400,
    }
}

/// One migration in this mode of so many MiB, written to at so many MB/s.
pub fn measured(mode: &str, mib: u64, rate: u64, seed: u64) -> Measured {
    let mut dice = dice(seed + mib);
    let pages = mib * 256;
    let (mut rounds, mut events): (Vec<Value>, Vec<(f64, Value)>) = (Vec::new(), Vec::new());
    let mut at = 1.5;
    let mut event = |at: f64, event: Value| events.push((at, event));
    for (phase, takes) in [("inventory", 14.0), ("connect", 21.0), ("preflight", 9.0)] {
        event(at, json!({"event": "phase", "phase": phase}));
        at += takes * (0.5 + dice());
    }
    let mut left = pages;
    let lazy = matches!(mode, "hybrid" | "post-copy");
    if mode != "stop" {
        event(at, json!({"event": "phase", "phase": "pre-copy"}));
        let first = if mode == "post-copy" { 40 } else { pages };
        let mut sends = first;
        for round in 1..=10_u64 {
            let ms = sends as f64 * 4096.0 / 460e3 * (0.9 + 0.2 * dice()) + 1.0;
            at += ms;
            rounds.push(json!({"pages": sends, "zero_pages": 12, "bytes": sends * 4100 + 900, "ms": ms, "stopped_ms": 0.0, "compared": 0}));
            event(
                at,
                json!({"event": "round", "pages": sends, "zero_pages": 12, "bytes": sends * 4100, "ms": ms}),
            );
            left = ((rate as f64 * 1000.0 * ms / 4096.0) as u64).min(pages);
            if mode == "post-copy" {
                break;
            }
            let freeze = 4.0 + left as f64 * 4096.0 / 460e3;
            event(
                at,
                json!({"event": "plan", "round": round, "dirty_bytes": left * 4096, "dirty_rate": rate * 1_000_000, "rate": 460_000_000, "predicted_downtime_ms": freeze}),
            );
            sends = left;
            if left < 60 {
                break;
            }
        }
    }
    let late = if mode == "post-copy" { pages } else { 0 };
    let last = if mode == "post-copy" { 20 } else { left };
    let transfer = 0.6 + last as f64 * 4096.0 / 460e3;
    let (interrupt, collect, scan, handover) = (0.2, 0.7 + dice(), 0.1 + mib as f64 / 2000.0, 0.8 + dice());
    let downtime = interrupt + collect + scan + transfer + handover + 0.35;
    if mode == "hybrid" {
        event(at, json!({"event": "note", "text": "the freeze will take about 6 ms <not more>"}));
    }
    event(at, json!({"event": "phase", "phase": "freeze"}));
    let frozen = at;
    at += downtime - handover;
    rounds.push(json!({"pages": last, "zero_pages": 0, "bytes": last * 4100 + 22_000, "ms": transfer}));
    event(
        at,
        json!({"event": "round", "pages": last, "zero_pages": 0, "bytes": last * 4100, "ms": transfer}),
    );
    event(at, json!({"event": "phase", "phase": "handover"}));
    at += handover;
    let mut histogram = vec![0_u64; 5];
    if lazy && late > 0 {
        event(at, json!({"event": "phase", "phase": "drain"}));
        at += late as f64 * 4096.0 / 400e3;
        histogram.extend([3, 41, 390, 2210, 1104, 310, 88, 20, 4, 1]);
    }
    event(at, json!({"event": "phase", "phase": "end"}));
    at += 6.0;
    let full = 182_000.0;
    let speed = (-40..=(at / 25.0) as i32 + 40)
        .map(|step| {
            let ms = f64::from(step) * 25.0;
            let slow = match ms {
                ms if ms < 0.0 => 1.0,
                ms if (ms - frozen).abs() < 25.0 => 0.3,
                ms if ms < frozen => 0.72,
                ms if ms < at && late > 0 => 0.35,
                _ => 0.98,
            };
            (ms, full * slow * (0.95 + 0.08 * dice()))
        })
        .collect();
    let faults: u64 = histogram.iter().sum();
    Measured {
        program_ms: Some(downtime * (1.0 + 0.1 * dice())),
        program_longest_ms: Some(downtime * 1.6),
        program_noise_ms: Some(1.0 + 3.0 * dice()),
        client_ms: None,
        client_noise_ms: None,
        report: json!({
            "outcome": "migrated", "id": "5f3a", "pid": 4242, "restored_pid": 4242, "processes": 1, "threads": 4,
            "rounds": rounds, "downtime_ms": downtime,
            "downtime": {"interrupt_ms": interrupt, "collect_ms": collect, "scan_ms": scan, "transfer_ms": transfer,
                "restore_ms": (transfer + handover) * 0.85, "handover_ms": handover},
            "total_ms": at - 1.5, "bytes_sent": pages * 4100, "pages_sent": pages, "pages_zero": 240, "pages_lazy": late,
            "fault_latency_us": if faults > 0 {
                json!({"p50": 190, "p99": 1900, "max": 12_345, "count": faults, "histogram": histogram})
            } else {
                json!({"p50": 0, "p99": 0, "max": 0, "count": 0, "histogram": []})
            },
            "agent_peak_rss": 51_000_000,
        }),
        events,
        speed,
    }
}

/// One migration as `send --report` has it: nothing of the program.
pub fn sent() -> Measured {
    Measured {
        program_ms: None,
        program_longest_ms: None,
        program_noise_ms: None,
        speed: Vec::new(),
        ..measured("post-copy", 512, 80, 3)
    }
}

/// A bench run.
pub fn results() -> Results {
    let mut cases = Vec::new();
    for (mode, sizes, rates) in [
        ("hybrid", &[16, 64, 256, 1024, 4096][..], &[50, 200][..]),
        ("pre-copy", &[16, 256, 1024], &[50]),
        ("post-copy", &[16, 256, 1024], &[50]),
        ("stop", &[16, 256, 1024], &[50]),
    ] {
        for (mib, rate) in sizes.iter().flat_map(|m| rates.iter().map(move |r| (*m, *r))) {
            cases.push(Case {
                workload: format!("{mib} MiB, {rate} MB/s"),
                mib: Some(mib),
                rate: Some(rate),
                mode: mode.into(),
                runs: (0..5).map(|seed| measured(mode, mib, rate, seed)).collect(),
                failed: Vec::new(),
            });
        }
    }
    let redis = |seed| Measured {
        program_ms: None,
        program_longest_ms: None,
        program_noise_ms: None,
        client_ms: Some(21.0 + seed as f64),
        client_noise_ms: Some(2.5),
        speed: Vec::new(),
        ..measured("hybrid", 1024, 30, seed)
    };
    cases.push(Case {
        workload: "redis <1 GiB of keys>".into(),
        mib: None,
        rate: None,
        mode: "hybrid".into(),
        runs: (0..3).map(redis).collect(),
        failed: vec!["freeze (pid 4242): it opened \"/dev/<script>alert(1)</script>\" meanwhile".into()],
    });
    Results {
        machine: machine(),
        ceilings: Ceilings {
            quic: Some(532e6),
            tcp: Some(1.9e9),
            memcpy: Some(9.3e9),
        },
        command: "bench --memory 16MiB,64MiB,256MiB,1GiB,4GiB --report bench.html".into(),
        took_s: 412.0,
        cases,
        without_criu: Some("CRIU (apt-get install criu)".into()),
    }
}

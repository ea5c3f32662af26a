use super::{sample, *};
use crate::bench::results::Ceilings;
use proptest::prelude::*;
use serde_json::{Value, json};

/// Elements without an end tag.
const VOID: [&str; 2] = ["meta", "!DOCTYPE"];

/// What is wrong with a page: a tag not closed, a number that is none, something from elsewhere.
fn fault(page: &str) -> Option<String> {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page;
    while let Some(start) = rest.find('<') {
        rest = &rest[start + 1..];
        let end = rest.find('>')?;
        let tag = &rest[..end];
        rest = &rest[end + 1..];
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap_or_default();
        if tag.matches('"').count() % 2 == 1 {
            return Some(format!("an open quote in <{tag}>"));
        }
        if tag.starts_with('/') {
            if open.pop() != Some(name) {
                return Some(format!("</{name}> closes what is not open"));
            }
        } else if !tag.ends_with('/') && !VOID.contains(&name) {
            open.push(name);
        }
        let value = tag.contains("=\"NaN") || tag.contains("=\"inf") || tag.contains("=\"-inf") || tag.contains("=\"-0\"");
        let drawn = ["points=\"", "d=\""].iter().any(|a| {
            let numbers = tag.split_once(a).and_then(|(_, v)| v.split_once('"')).map(|(v, _)| v);
            numbers.is_some_and(|v| v.contains("NaN") || v.contains("inf"))
        });
        if value || drawn || tag.contains("width=\"-") || tag.contains("height=\"-") {
            return Some(format!("a number in <{tag}>"));
        }
        if ["script", "link", "img", "iframe", "object", "a"].contains(&name) || tag.contains(" src=") || tag.contains("href=") {
            return Some(format!("<{tag}> loads or leads elsewhere"));
        }
    }
    if let Some(left) = open.pop() {
        return Some(format!("<{left}> is not closed"));
    }
    ["http://", "https://", "url(", "@import", "@font-face"]
        .into_iter()
        .find(|w| page.contains(w))
        .map(|w| format!("{w} is in it"))
}

fn assert_fine(page: &str) {
    if let Some(fault) = fault(page) {
        panic!("{fault}");
    }
    assert!(page.contains("content=\"default-src 'none'; style-src 'unsafe-inline'\""));
    assert_eq!(page.matches("<figure>").count(), page.matches("class=\"chart wide\"").count());
    assert_eq!(page.matches("<figure>").count(), page.matches("class=\"chart narrow\"").count());
    assert_eq!(
        page.matches("class=\"chart ").count(),
        page.matches("role=\"img\" aria-label=\"").count()
    );
}

#[test]
fn the_check_itself() {
    assert_eq!(fault("<p>x</p>"), None);
    for bad in [
        "<p>",
        "</p>",
        "<b><i></b></i>",
        "<line x1=\"NaN\"/>",
        "<path d=\"M1 inf\"/>",
        "<p>http://x</p>",
        "<rect width=\"-1\"/>",
    ] {
        assert!(fault(bad).is_some(), "{bad}");
    }
}

#[test]
fn a_bench_page() {
    let page = bench(&sample::results());
    assert_fine(&page);
    for heading in [
        "All cases",
        "What failed",
        "Freeze against memory",
        "Throughput",
        "Timeline",
        "The freeze, magnified",
        "Rounds",
        "Speed of the program",
        "Waiting for pages after the resume",
        "2026-11-23 21:30 UTC",
        "Not in the table: CRIU (apt-get install criu).",
        "4096 MiB, 200 MB/s, hybrid, run ",
        "redis &lt;1 GiB of keys&gt;",
    ] {
        assert!(page.contains(heading), "{heading}");
    }
    assert!(!page.contains("<script"));
}

#[test]
fn a_page_of_one_migration() {
    let page = migration(&sample::sent(), &sample::machine(), "migration of process 4242 to <b>");
    assert_fine(&page);
    assert!(page.contains("to &lt;b&gt;") && page.contains("Timeline") && page.contains("Waiting for pages"));
    assert!(!page.contains("Speed of the program"), "nothing was measured of it");
}

#[test]
fn pages_of_nothing() {
    let nothing = Results {
        machine: Machine::default(),
        ceilings: Ceilings::default(),
        command: String::new(),
        took_s: 0.0,
        cases: Vec::new(),
        without_criu: None,
    };
    for page in [bench(&nothing), migration(&Measured::default(), &Machine::default(), "")] {
        assert_fine(&page);
        assert!(!page.contains("<figure>"));
    }
}

#[test]
fn the_middle_run_is_shown() {
    let mut results = sample::results();
    let case = results.cases.iter_mut().find(|c| c.workload == "4096 MiB, 50 MB/s").unwrap();
    for (run, ms) in case.runs.iter_mut().zip([9.0, 1.0, 3.0, 2.0, 7.0]) {
        run.program_ms = Some(ms);
    }
    // Of two cases with as much memory the last is taken.
    results.cases.retain(|c| c.rate == Some(50));
    let (case, index) = closest(&results).unwrap();
    assert_eq!((case.mode.as_str(), case.mib, index), ("hybrid", Some(4096), 2));
    let (case, _) = faultiest(&results).unwrap();
    assert_eq!(case.mode, "post-copy");
}

/// Numbers as a report may hold them, the odd ones more often than not.
fn odd() -> impl Strategy<Value = f64> {
    prop_oneof![
        Just(0.0),
        Just(1.0),
        Just(f64::NAN),
        Just(f64::INFINITY),
        Just(-1.0),
        Just(1e300),
        0.0..1e6,
        any::<f64>()
    ]
}

fn any_measured() -> impl Strategy<Value = Measured> {
    let some = || prop::collection::vec(odd(), 0..6);
    (some(), some(), some(), prop::collection::vec((odd(), odd()), 0..4), "\\PC{0,9}").prop_map(|(a, b, c, speed, text)| {
        let pick = |i: usize| a.get(i).copied().unwrap_or(0.0);
        let mut events = Vec::new();
        for (index, at) in b.iter().enumerate() {
            let phase = ["inventory", "pre-copy", "freeze", "handover", "drain", text.as_str()][index];
            events.push((*at, json!({"event": "phase", "phase": phase})));
            events.push((*at, json!({"event": "round", "ms": pick(index)})));
            events.push((
                *at,
                json!({"event": "plan", "round": index, "dirty_bytes": pick(0), "predicted_downtime_ms": pick(1)}),
            ));
            events.push((*at, json!({"event": "note", "text": text})));
        }
        let rounds: Vec<Value> = c
            .iter()
            .map(|v| json!({"pages": v, "zero_pages": v, "bytes": v, "ms": pick(2)}))
            .collect();
        Measured {
            program_ms: a.first().copied(),
            program_longest_ms: a.get(1).copied(),
            program_noise_ms: a.get(2).copied(),
            client_ms: a.get(3).copied(),
            client_noise_ms: a.get(4).copied(),
            report: json!({
                "outcome": text, "downtime_ms": pick(0), "total_ms": pick(1), "rounds": rounds, "bytes_sent": pick(3),
                "downtime": {"interrupt_ms": pick(1), "collect_ms": pick(2), "restore_ms": pick(3), "transfer_ms": pick(4)},
                "fault_latency_us": {"p50": pick(0), "p99": pick(1), "max": pick(2), "histogram": c},
            }),
            events,
            speed,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_was_measured(runs in prop::collection::vec(any_measured(), 0..4), mib in 0_u64..9000, rate: Option<u64>, text in "\\PC{0,9}") {
        let machine = Machine { cpu: text.clone(), load: f64::NAN, ..sample::machine() };
        let page = migration(&runs.first().cloned().unwrap_or_default(), &machine, &text);
        prop_assert_eq!(fault(&page), None);
        let case = |mib| Case { workload: text.clone(), mib, rate, mode: "hybrid".into(), runs: runs.clone(), failed: vec![text.clone()] };
        let results = Results {
            machine,
            ceilings: Ceilings { quic: runs.first().and_then(|r| r.program_ms), tcp: Some(0.0), memcpy: None },
            command: text.clone(),
            took_s: f64::INFINITY,
            cases: vec![case(Some(mib)), case(None), case(Some(1))],
            without_criu: Some(text.clone()),
        };
        let page = bench(&results);
        prop_assert_eq!(fault(&page), None);
    }
}

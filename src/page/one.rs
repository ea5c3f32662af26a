//! One migration as the charts want it: read out of the agents' report and events.

use crate::bench::results::Measured;
use serde_json::Value;

/// Bytes of a page.
pub const PAGE: f64 = 4096.0;

/// One migration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct One {
    /// When each phase began, ms.
    pub phases: Vec<(f64, String)>,
    /// When the last of them ended, ms.
    pub end: f64,
    /// When the freeze began and ended, ms.
    pub freeze: Option<(f64, f64)>,
    /// Rounds, the last one being the one inside the freeze.
    pub rounds: Vec<Round>,
    /// When each round ended and how long it took, ms.
    pub ends: Vec<(f64, f64)>,
    /// From the first interrupt to the answer that the copy runs, as the sender's agent says, ms.
    pub downtime: f64,
    /// Its parts one after the other, ms.
    pub parts: Vec<(&'static str, f64)>,
    /// What the destination took to rebuild the program, within them, ms.
    pub restore: f64,
    /// How many faults took less than 1 us, 1, 2 to 3, 4 to 7 us, and so on.
    pub faults: Vec<f64>,
    /// Median, 99th percentile and longest of them, us.
    pub latency: [f64; 3],
    /// Steps a second of the program: (ms; rate).
    pub speed: Vec<(f64, f64)>,
    /// How long all tasks were stopped in the rounds, to look at what they had written, ms.
    pub stopped: f64,
    /// What the sender said.
    pub notes: Vec<String>,
    /// Nothing was moved.
    pub predicted: bool,
}

/// One round.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Round {
    /// Pages with content.
    pub pages: f64,
    /// Pages of zeros.
    pub zero: f64,
    /// Bytes on the wire.
    pub wire: f64,
    /// Milliseconds.
    pub ms: f64,
    /// What the planner made of it.
    pub plan: Option<Plan>,
}

impl Round {
    /// Bytes of pages with content.
    pub fn bytes(&self) -> f64 {
        self.pages * PAGE
    }
}

/// What the planner found after a round.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Plan {
    /// Bytes that the program had written and that had not been sent.
    pub dirty: f64,
    /// The freeze that would have come of freezing then, ms.
    pub freeze: f64,
}

impl One {
    /// Out of what was measured.
    pub fn of(measured: &Measured) -> One {
        let report = &measured.report;
        let events: Vec<&(f64, Value)> = measured.events.iter().filter(|(at, _)| at.is_finite()).collect();
        let named = |name: &'static str| events.iter().filter(move |(_, e)| e["event"] == name);
        let phases: Vec<(f64, String)> = named("phase")
            .filter_map(|(at, e)| Some((*at, e["phase"].as_str()?.to_owned())))
            .collect();
        let began = phases.first().map_or(0.0, |(at, _)| *at);
        let last = phases.last().map_or(0.0, |(at, _)| *at);
        let downtime = number(&report["downtime_ms"]);
        let freeze = phases
            .iter()
            .rfind(|(_, name)| name == "freeze")
            .map(|(at, _)| (*at, at + downtime));
        let end = (began + number(&report["total_ms"]))
            .max(last)
            .max(freeze.map_or(0.0, |(_, to)| to));
        let mut rounds: Vec<Round> = array(&report["rounds"])
            .map(|r| Round {
                pages: number(&r["pages"]),
                zero: number(&r["zero_pages"]),
                wire: number(&r["bytes"]),
                ms: number(&r["ms"]),
                plan: None,
            })
            .collect();
        for (_, event) in named("plan") {
            let plan = Plan {
                dirty: number(&event["dirty_bytes"]),
                freeze: number(&event["predicted_downtime_ms"]),
            };
            // Counted from one: what it says is the state after that round.
            let index = (number(&event["round"]) as usize).wrapping_sub(1);
            if let Some(round) = rounds.get_mut(index) {
                round.plan = Some(plan);
            }
        }
        let stopped = array(&report["rounds"]).map(|r| number(&r["stopped_ms"])).sum();
        let part = |name: &str| number(&report["downtime"][name]);
        let [interrupt, collect, scan, transfer, handover] =
            ["interrupt_ms", "collect_ms", "scan_ms", "transfer_ms", "handover_ms"].map(part);
        let rest = downtime - interrupt - collect - scan - transfer - handover;
        let parts = [
            ("interrupt", interrupt),
            ("collect", collect),
            ("scan", scan),
            ("between", rest.max(0.0)),
            ("transfer", transfer),
            ("handover", handover),
        ];
        let latency = &report["fault_latency_us"];
        One {
            end,
            freeze,
            rounds,
            ends: named("round").map(|(at, e)| (*at, number(&e["ms"]))).collect(),
            downtime,
            parts: parts.into_iter().filter(|(_, ms)| *ms > 0.0).collect(),
            restore: part("restore_ms"),
            stopped,
            faults: array(&latency["histogram"]).map(number).collect(),
            latency: ["p50", "p99", "max"].map(|name| number(&latency[name])),
            speed: measured
                .speed
                .iter()
                .copied()
                .filter(|(at, rate)| at.is_finite() && rate.is_finite())
                .collect(),
            notes: named("note").filter_map(|(_, e)| Some(e["text"].as_str()?.to_owned())).collect(),
            predicted: report["outcome"] == "predicted",
            phases,
        }
    }

    /// Bytes a second of pages with content in the first round, where it is long enough to say something.
    pub fn throughput(&self) -> Option<f64> {
        let first = self
            .rounds
            .first()
            .filter(|r| !self.predicted && r.ms > 0.0 && r.bytes() >= f64::from(ENOUGH))?;
        Some(first.bytes() / (first.ms / 1000.0))
    }
}

/// Bytes below which a round is mostly waiting for answers.
const ENOUGH: u32 = 8 << 20;

fn number(value: &Value) -> f64 {
    value.as_f64().filter(|n| n.is_finite() && *n >= 0.0).unwrap_or(0.0)
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn read() {
        let measured = Measured {
            report: json!({
                "downtime_ms": 10.0, "total_ms": 500.0,
                "downtime": {"interrupt_ms": 1.0, "collect_ms": 2.0, "scan_ms": 0.0, "transfer_ms": 3.0, "restore_ms": 4.0, "handover_ms": 2.5},
                "rounds": [{"pages": 4096, "zero_pages": 1, "bytes": 9, "ms": 100.0}, {"pages": 2, "stopped_ms": 0.5}],
                "fault_latency_us": {"p50": 3, "p99": 9, "max": 12, "count": 3, "histogram": [0, 1, 2]},
            }),
            events: vec![
                (20.0, json!({"event": "phase", "phase": "inventory"})),
                (150.0, json!({"event": "round", "ms": 100.0})),
                (
                    151.0,
                    json!({"event": "plan", "round": 1, "dirty_bytes": 8192, "predicted_downtime_ms": 7.0}),
                ),
                (151.0, json!({"event": "plan", "round": 9})),
                (300.0, json!({"event": "phase", "phase": "freeze"})),
                (f64::NAN, json!({"event": "phase", "phase": "end"})),
                (301.0, json!({"event": "note", "text": "hm"})),
            ],
            speed: vec![(0.0, 1.0), (1.0, f64::NAN)],
            ..Measured::default()
        };
        let one = One::of(&measured);
        assert_eq!((one.end, one.freeze), (520.0, Some((300.0, 310.0))));
        assert_eq!(one.phases.len(), 2);
        let plan = Plan {
            dirty: 8192.0,
            freeze: 7.0,
        };
        assert_eq!((one.rounds[0].plan, one.rounds[1].plan), (Some(plan), None));
        assert_eq!(
            one.parts,
            [
                ("interrupt", 1.0),
                ("collect", 2.0),
                ("between", 1.5),
                ("transfer", 3.0),
                ("handover", 2.5)
            ]
        );
        assert_eq!((one.restore, one.latency, one.faults), (4.0, [3.0, 9.0, 12.0], vec![0.0, 1.0, 2.0]));
        assert_eq!((one.speed.len(), one.notes.len()), (1, 1));
        assert_eq!(one.stopped, 0.5);
        assert_eq!(one.ends, [(150.0, 100.0)]);
        let throughput = One::of(&measured).throughput().unwrap();
        assert!((throughput - 167_772_160.0).abs() < 1.0, "{throughput}");
    }

    #[test]
    fn of_nothing() {
        assert_eq!(One::of(&Measured::default()), One::default());
        let odd = Measured {
            report: json!({"rounds": 3, "downtime": [], "downtime_ms": "x", "fault_latency_us": {"histogram": {}}}),
            events: vec![(0.0, json!([])), (1.0, json!({"event": "plan", "round": 0}))],
            ..Measured::default()
        };
        assert_eq!(One::of(&odd), One::default());
    }
}

//! What was measured, for a terminal.

use super::results::{Case, Measured, Results};
use crate::human;

const PARTS: [&str; 6] = ["interrupt", "collect", "scan", "transfer", "restore", "handover"];

/// The whole report.
pub fn text(results: &Results) -> String {
    let m = &results.machine;
    let mut text = format!(
        "machine      {}, {}, {} of memory, Linux {}, load {:.1} before\n",
        m.cpu,
        human::plural(m.cpus.into(), "cpu", "cpus"),
        human::bytes(m.memory),
        m.kernel,
        m.load
    );
    text += &format!("migrate      {}, tracker {}, link: {}\n", m.version, m.tracker, m.link);
    if let Some(version) = &m.criu {
        text += &format!("criu         {version}\n");
    }
    let rate = |r: Option<f64>| r.map_or("not measured".to_owned(), |r| human::rate(r as u64));
    let c = &results.ceilings;
    text += &format!(
        "ceilings     plain QUIC {}, TCP {}, memory copy {}\n",
        rate(c.quic),
        rate(c.tcp),
        rate(c.memcpy)
    );
    text += &format!("took         {}\n\n", human::millis(results.took_s * 1e3));
    text += &human::table(&freezes(results));
    text += "\nGaps in ms. program: of the program itself, at the freeze, or the longest in its output; longest: in the whole migration; alone: in as long without one.\n\
             client: the longest that a client waited which asks every millisecond, from the start of the migration to its end. agents: what they say themselves.\n\
             carried: memory a second in the first round, and as a share of plain QUIC. Medians; p99 and worst of the runs.\n";
    let parts = parts(results);
    if parts.len() > 1 {
        text += "\nThe freeze by what the agents say, ms, medians. restore is the other host's own clock, within handover where both overlap.\n\n";
        text += &human::table(&parts);
    }
    let failed: Vec<String> = results.cases.iter().flat_map(failures).collect();
    if !failed.is_empty() {
        text += "\nNot measured:\n";
        text += &failed.concat();
    }
    if let Some(why) = &results.without_criu {
        text += &format!("\nNot compared: {why}\n");
    }
    text
}

fn failures(case: &Case) -> Vec<String> {
    let line = |why: &String| format!("  {}, {}: {}\n", case.workload, case.mode, human::printable_lines(why));
    case.failed.iter().map(line).collect()
}

fn number(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(v) if v < 99.95 => format!("{v:.1}"),
        Some(v) => format!("{v:.0}"),
    }
}

fn freezes(results: &Results) -> Vec<Vec<String>> {
    let heading = [
        "workload", "mode", "n", "program", "p99", "worst", "longest", "alone", "client", "worst", "alone", "agents", "total", "sent",
        "rounds", "carried",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for case in results.cases.iter().filter(|c| !c.runs.is_empty()) {
        let program = case.spread(|r| r.program_ms);
        let client = case.spread(|r| r.client_ms);
        let median = |f: &dyn Fn(&Measured) -> Option<f64>| case.spread(f).map(|s| s.median);
        let carried = median(&carried);
        let share = carried.zip(results.ceilings.quic).map(|(c, q)| format!(" ({:.0}%)", 100.0 * c / q));
        let optional = |value: Option<f64>, text: &dyn Fn(f64) -> String| value.map_or("-".to_owned(), text);
        rows.push(vec![
            case.workload.clone(),
            mode(case),
            case.runs.len().to_string(),
            number(program.map(|s| s.median)),
            number(program.map(|s| s.p99)),
            number(program.map(|s| s.worst)),
            number(median(&|r| r.program_longest_ms)),
            number(median(&|r| r.program_noise_ms)),
            number(client.map(|s| s.median)),
            number(client.map(|s| s.worst)),
            number(median(&|r| r.client_noise_ms)),
            number(median(&|r| r.number("/downtime_ms"))),
            optional(median(&|r| r.number("/total_ms")), &human::millis),
            optional(median(&|r| r.number("/bytes_sent")), &|b| human::bytes(b as u64)),
            optional(median(&|r| r.report["rounds"].as_array().map(|a| a.len() as f64)), &|n| {
                format!("{n:.0}")
            }),
            carried.map_or("-".to_owned(), |c| human::rate(c as u64) + share.as_deref().unwrap_or("")),
        ]);
    }
    rows
}

/// With where CRIU's images were, if that makes it slower.
fn mode(case: &Case) -> String {
    if case.runs.iter().any(|r| r.report["images"] == "disk") {
        return format!("{}, images on disk", case.mode);
    }
    case.mode.clone()
}

/// Memory a second in the first round, bytes; only of rounds that are long enough to say something.
fn carried(run: &Measured) -> Option<f64> {
    let (pages, ms) = (run.number("/rounds/0/pages")?, run.number("/rounds/0/ms")?);
    (ms >= 20.0).then(|| pages * 4096.0 / (ms / 1e3))
}

fn parts(results: &Results) -> Vec<Vec<String>> {
    let heading = ["workload", "mode"].iter().chain(&PARTS).map(|s| (*s).to_owned());
    let mut rows = vec![heading.collect::<Vec<_>>()];
    for case in &results.cases {
        let part = |name: &str| case.spread(|r| r.number(&format!("/downtime/{name}_ms"))).map(|s| s.median);
        if part(PARTS[0]).is_none() {
            continue;
        }
        let mut row = vec![case.workload.clone(), case.mode.clone()];
        row.extend(PARTS.iter().map(|name| part(name).map_or("-".to_owned(), |v| format!("{v:.2}"))));
        rows.push(row);
    }
    rows
}

//! The tables of a bench run: all cases, what failed, what the link carries.

use super::{
    charts::{bytes, millis, rate},
    html::{escape, list, paragraph, table as html_table},
    one::One,
};
use crate::bench::results::{Case, Measured, Results, Spread};

/// What stands where nothing was measured.
const NOTHING: &str = "–";

/// Every case, a row each, and what the columns are.
pub fn table(results: &Results) -> String {
    let measured: Vec<&Case> = results.cases.iter().filter(|c| !c.runs.is_empty()).collect();
    if measured.is_empty() {
        return String::new();
    }
    let clients = measured.iter().any(|c| c.runs.iter().any(|m| m.client_ms.is_some()));
    let mut head = vec![
        "workload",
        "mode",
        "runs",
        "gap: median",
        "gap: 99th",
        "gap: worst",
        "noise: median",
        "longest: median",
    ];
    if clients {
        head.extend(["client: median", "client: worst", "client noise: median"]);
    }
    head.extend(["agents' figure: median", "total: median", "sent: median", "rounds: median"]);
    let rows: Vec<Vec<String>> = measured.iter().map(|case| row(case, clients)).collect();
    let meanings = [
        (
            "gap",
            "the program's own: from its last step on one host to its first on the other. With fewer than a hundred runs the 99th percentile is the worst.",
        ),
        (
            "noise",
            "its longest gap in as long a time before, without a migration: shorter gaps than this are not the migration's doing.",
        ),
        (
            "longest",
            "its longest gap from the start of the migration to its end, rounds and late pages included.",
        ),
        (
            "client",
            "the longest that a client waited for an answer, from the start of the migration to its end; client noise is the same without one.",
        ),
        (
            "agents' figure",
            "the freeze as the sender's agent sees it: from the first interrupt to the answer that the copy runs.",
        ),
        ("total", "the whole of migrate send."),
        ("sent", "bytes that the sender put on the wire."),
        ("rounds", "how many there were, the one inside the freeze included."),
    ];
    let meanings: String = meanings
        .iter()
        .filter(|(name, _)| clients || *name != "client")
        .map(|(name, what)| format!("<div><dt>{}</dt><dd>{}</dd></div>\n", escape(name), escape(what)))
        .collect();
    format!(
        "{}<dl class=\"meanings\">\n{meanings}</dl>\n",
        html_table("All cases", 2, &head, &rows)
    )
}

fn row(case: &Case, clients: bool) -> Vec<String> {
    let spread = |figure: &dyn Fn(&Measured) -> Option<f64>| case.spread(figure);
    let ms = |spread: Option<Spread>, of: fn(Spread) -> f64| spread.map_or(NOTHING.into(), |s| millis(of(s)));
    let gap = spread(&|m| m.program_ms);
    let mut row = vec![
        case.workload.clone(),
        case.mode.clone(),
        case.runs.len().to_string(),
        ms(gap, |s| s.median),
        ms(gap, |s| s.p99),
        ms(gap, |s| s.worst),
        ms(spread(&|m| m.program_noise_ms), |s| s.median),
        ms(spread(&|m| m.program_longest_ms), |s| s.median),
    ];
    if clients {
        let client = spread(&|m| m.client_ms);
        row.extend([
            ms(client, |s| s.median),
            ms(client, |s| s.worst),
            ms(spread(&|m| m.client_noise_ms), |s| s.median),
        ]);
    }
    let rounds = spread(&|m| Some(m.report.get("rounds")?.as_array()?.len() as f64));
    row.extend([
        ms(spread(&|m| m.number("/downtime_ms")), |s| s.median),
        ms(spread(&|m| m.number("/total_ms")), |s| s.median),
        spread(&|m| m.number("/bytes_sent")).map_or(NOTHING.into(), |s| bytes(s.median)),
        rounds.map_or(NOTHING.into(), |s| s.median.to_string()),
    ]);
    row
}

/// What did not work, in words.
pub fn failures(results: &Results) -> String {
    let failed = results
        .cases
        .iter()
        .flat_map(|c| c.failed.iter().map(move |why| format!("{}, {}: {why}", c.workload, c.mode)));
    let lines: Vec<String> = failed.collect();
    if lines.is_empty() {
        return String::new();
    }
    format!("<h3>What failed</h3>\n{}", list(&lines))
}

/// What plain means carry, and what the first round of each mode did.
pub fn ceilings(results: &Results) -> String {
    let c = &results.ceilings;
    let known = |rate: Option<f64>| rate.filter(|r| r.is_finite() && *r > 0.0);
    let (quic, tcp) = (known(c.quic), known(c.tcp));
    let share = |of: f64, ceiling: Option<f64>| ceiling.map_or(NOTHING.into(), |ceiling| format!("{:.0} %", 100.0 * of / ceiling));
    let plain = [
        ("copying memory on one core", known(c.memcpy)),
        ("one plain TCP connection", tcp),
        ("one plain QUIC stream, encrypted", quic),
    ];
    let plain = plain.into_iter().filter_map(|(name, r)| Some((name.to_owned(), r?)));
    let mut rows: Vec<(String, f64)> = plain.collect();
    for case in fullest(results) {
        if let Some(spread) = case.spread(|m| One::of(m).throughput()) {
            rows.push((format!("first round: {}, {}", case.workload, case.mode), spread.median));
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    let moved = rows.iter().any(|(name, _)| name.starts_with("first round"));
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(name, r)| vec![name, rate(r), share(r, quic), share(r, tcp)])
        .collect();
    let mut says = "What plain means carry between the two hosts, measured in the same run.".to_owned();
    if moved {
        says.push_str(
            " Below them, for each mode with the most memory, the bytes of pages with content in the first round over its time, the \
             median of the runs. Pages are compressed where that pays, so this can be more than the link carries.",
        );
    }
    paragraph(&says) + &html_table("Throughput", 1, &["", "rate", "of QUIC", "of TCP"], &rows)
}

/// Of each mode the case whose first round is the largest.
fn fullest(results: &Results) -> Vec<&Case> {
    let first = |case: &Case| {
        case.runs
            .first()
            .map_or(0.0, |m| One::of(m).rounds.first().map_or(0.0, |r| r.bytes()))
    };
    let mut found: Vec<&Case> = Vec::new();
    for case in &results.cases {
        match found.iter_mut().find(|c| c.mode == case.mode) {
            Some(known) if first(case) > first(known) => *known = case,
            Some(_) => {}
            None => found.push(case),
        }
    }
    found
}

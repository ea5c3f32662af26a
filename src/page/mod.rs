//! The pages of `send --report` and `bench --report`: one HTML file each, which loads nothing and runs nothing.
//!
//! Every chart is drawn twice, for a desktop and for a phone, and the style sheet shows one. Whatever came from a program or a peer goes
//! through [`html::escape`]; whatever is a number goes through [`svg`], which takes none that a browser would not.

mod cases;
mod charts;
mod faults;
mod html;
mod memory;
mod one;
mod rounds;
mod speed;
mod svg;
mod timeline;

#[cfg(test)]
mod browser;
#[cfg(test)]
mod sample;
#[cfg(test)]
mod tests;

use crate::{
    bench::results::{Case, Machine, Measured, Results},
    human,
};
use charts::{bytes, millis, rate};
use html::{document, escape, facts, list, paragraph, section, utc};
use one::One;

/// One migration, for `migrate send --report`, and the one that `migrate bench` shows closer.
pub fn migration(one: &Measured, about: &Machine, title: &str) -> String {
    let model = One::of(one);
    let body = [
        format!(
            "<header>\n<h1>{}</h1>\n{}</header>\n",
            escape(title),
            facts("facts", &machine(about))
        ),
        section(
            "How it went",
            &(facts("tiles", &figures(one, &model)) + &notes(&model) + &closer(&model)),
        ),
        section("Pages that followed", &faults::chart(&model, "")),
    ];
    document(title, &body.concat())
}

/// A whole bench run.
pub fn bench(results: &Results) -> String {
    let mut about = machine(&results.machine);
    about.insert(0, ("command", results.command.clone()));
    if results.took_s > 0.0 {
        about.insert(2, ("took", millis(results.took_s * 1e3)));
    }
    let intro = "How long programs stand still when migrate moves them, as the programs and their clients measure it themselves. \
                 Spreads are of equal runs one after the other.";
    let mut body = format!(
        "<header>\n<h1>migrate bench</h1>\n{}{}</header>\n",
        paragraph(intro),
        facts("facts", &about)
    );
    body += &section("All cases", &(cases::table(results) + &cases::failures(results)));
    body += &section("Other tools", &results.without_criu.as_deref().map_or(String::new(), without_criu));
    body += &section("Freeze", &memory::chart(results));
    body += &section("Throughput", &cases::ceilings(results));
    if let Some((case, index)) = closest(results) {
        let (measured, model) = (&case.runs[index], One::of(&case.runs[index]));
        let which = format!("{}: the one with the middle freeze.", named(case, index));
        let content = paragraph(&which) + &facts("tiles", &figures(measured, &model)) + &notes(&model) + &closer(&model);
        body += &section("One migration, closer", &content);
    }
    if let Some((case, index)) = faultiest(results) {
        let which = format!("{}: the one with the most faults. ", named(case, index));
        body += &section("Pages that followed", &faults::chart(&One::of(&case.runs[index]), &which));
    }
    document("migrate bench", &body)
}

/// What a migration comes down to.
fn figures(one: &Measured, model: &One) -> Vec<(&'static str, String)> {
    let ms = |value: Option<f64>| value.map_or(String::new(), millis);
    let count = |path: &str| {
        one.number(path)
            .filter(|n| *n > 0.0)
            .map_or(String::new(), |n| human::count(n as u64))
    };
    let size = |path: &str| one.number(path).filter(|n| *n > 0.0).map_or(String::new(), bytes);
    let positive = |path: &str| ms(one.number(path).filter(|n| *n > 0.0));
    vec![
        ("outcome", one.report["outcome"].as_str().unwrap_or_default().to_owned()),
        ("frozen, as the program saw it", ms(one.program_ms)),
        ("frozen, as the sender's agent saw it", positive("/downtime_ms")),
        ("a client's longest wait", ms(one.client_ms)),
        ("whole run", positive("/total_ms")),
        ("sent", size("/bytes_sent")),
        ("first round, pages a second", model.throughput().map_or(String::new(), rate)),
        (
            "rounds",
            if model.rounds.is_empty() {
                String::new()
            } else {
                model.rounds.len().to_string()
            },
        ),
        ("pages with content", count("/pages_sent")),
        ("zero pages", count("/pages_zero")),
        ("pages after the resume", count("/pages_lazy")),
        ("processes", count("/processes")),
        ("threads", count("/threads")),
        ("peak memory of the sender", size("/agent_peak_rss")),
    ]
}

/// The charts of one migration.
fn closer(model: &One) -> String {
    timeline::chart(model) + &rounds::chart(model) + &speed::chart(model)
}

/// What the sender said meanwhile.
fn notes(model: &One) -> String {
    if model.notes.is_empty() {
        return String::new();
    }
    format!("<h3>Notes of the sender</h3>\n{}", list(&model.notes))
}

/// When, with what and where.
fn machine(about: &Machine) -> Vec<(&'static str, String)> {
    let known = |known: bool, text: String| if known { text } else { String::new() };
    // Nothing was found out of a machine without a processor.
    let there = !about.cpu.is_empty();
    vec![
        ("started", known(about.since > 0, utc(about.since))),
        ("migrate", about.version.clone()),
        ("CRIU", about.criu.clone().unwrap_or_default()),
        ("link", about.link.clone()),
        ("CPU", about.cpu.clone()),
        ("logical CPUs", known(about.cpus > 0, about.cpus.to_string())),
        ("memory", known(about.memory > 0, human::bytes(about.memory))),
        ("kernel", about.kernel.clone()),
        ("written pages are found by", about.tracker.clone()),
        (
            "load, the minute before",
            known(there && about.load.is_finite(), format!("{:.2}", about.load)),
        ),
    ]
}

fn without_criu(why: &str) -> String {
    paragraph(&format!("Not in the table: {}.", why.trim_end_matches('.')))
}

/// "256 MiB, 50 MB/s, hybrid, run 3 of 5".
fn named(case: &Case, index: usize) -> String {
    format!("{}, {}, run {} of {}", case.workload, case.mode, index + 1, case.runs.len())
}

/// The run to be shown closer: of the case that shows most (hybrid before pre-copy before others, with rounds and speed, with most
/// memory) the one with the middle freeze.
fn closest(results: &Results) -> Option<(&Case, usize)> {
    let shows = |case: &Case| {
        let first = One::of(case.runs.first()?);
        if first.phases.is_empty() && first.rounds.is_empty() {
            return None;
        }
        let mode = ["stop", "post-copy", "pre-copy", "hybrid"].iter().position(|m| *m == case.mode)?;
        Some((
            !first.rounds.is_empty() && first.speed.len() > 1,
            mode,
            first.rounds.len() > 1,
            case.mib,
        ))
    };
    let (_, case) = results
        .cases
        .iter()
        .filter_map(|c| Some((shows(c)?, c)))
        .max_by_key(|(key, _)| *key)?;
    let freeze = |m: &Measured| m.program_ms.or_else(|| m.number("/downtime_ms")).unwrap_or(0.0);
    let mut order: Vec<usize> = (0..case.runs.len()).collect();
    order.sort_by(|a, b| freeze(&case.runs[*a]).total_cmp(&freeze(&case.runs[*b])));
    Some((case, *order.get(order.len() / 2)?))
}

/// The run in which most faults waited.
fn faultiest(results: &Results) -> Option<(&Case, usize)> {
    let runs = results.cases.iter().flat_map(|c| (0..c.runs.len()).map(move |i| (c, i)));
    let faults = |(case, index): &(&Case, usize)| One::of(&case.runs[*index]).faults.iter().sum::<f64>() as u64;
    runs.filter(|run| faults(run) > 0).max_by_key(faults)
}

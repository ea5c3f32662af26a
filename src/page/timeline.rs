//! Timeline of one migration, and its freeze magnified.

use super::{
    charts::{both, millis, plain, time_unit},
    html::{Key, Swatch, figure},
    one::One,
    svg::{Anchor, HALF, Scale, Size, Svg, TEXT, labelled, text_width},
};

/// The phases, and what they look like.
fn class(phase: &str) -> &'static str {
    match phase {
        "inventory" => "bar g0",
        "connect" => "bar g1",
        "preflight" => "bar g2",
        "pre-copy" => "bar c0",
        "freeze" => "bar c1",
        "handover" => "bar c4",
        "drain" => "bar c2",
        _ => "bar g3",
    }
}

/// The parts of the freeze, and what they look like.
fn part_class(part: &str) -> &'static str {
    match part {
        "interrupt" => "bar c3",
        "collect" => "bar c0",
        "scan" => "bar c2",
        "transfer" => "bar c1",
        "handover" => "bar c4",
        _ => "bar g1",
    }
}

/// One phase with its time.
struct Span<'a> {
    name: &'a str,
    from: f64,
    to: f64,
}

fn spans(one: &One) -> Vec<Span<'_>> {
    let ends = one.phases.iter().skip(1).map(|(at, _)| *at).chain([one.end]);
    let phases = one.phases.iter().zip(ends);
    phases
        .map(|((from, name), to)| Span {
            name,
            from: *from,
            to: to.max(*from),
        })
        .collect()
}

/// The chart; nothing without phases and without a freeze.
pub fn chart(one: &One) -> String {
    let spans = spans(one);
    let parts = if one.predicted { &[][..] } else { &one.parts };
    let mut html = String::new();
    if !spans.is_empty() && one.end > spans[0].from {
        let keys: Vec<Key> = spans
            .iter()
            .map(|s| Key::new(Swatch::Block, class(s.name), format!("{} {}", s.name, millis(s.to - s.from))))
            .collect();
        let mut says =
            "From the start of the sender to its end; the legend names the phases from left to right with their times.".to_owned();
        if !one.ends.is_empty() {
            says.push_str(" Below, the rounds by number; F is what is sent inside the freeze.");
        }
        says.push_str(" The program stands still in freeze and handover");
        if one.stopped > 0.0 {
            says.push_str(&format!(
                ", and for {} in all during the rounds, in which it is looked for what it has written",
                millis(one.stopped)
            ));
        }
        says.push('.');
        html += &figure("Timeline", &says, &keys, &both(|size| draw(one, &spans, size)));
    }
    if !parts.is_empty() {
        let mut keys: Vec<Key> = parts
            .iter()
            .map(|(name, ms)| Key::new(Swatch::Block, part_class(name), format!("{name} {}", millis(*ms))))
            .collect();
        let mut says = format!(
            "The {} of the freeze as the sender's agent saw it, in parts one after the other: interrupt stops every task, collect reads \
             registers, descriptors and mappings, scan looks for the pages written since the last round, transfer sends the state and \
             the last pages until they are there, handover waits for the answer that the copy runs.",
            millis(one.downtime)
        );
        if parts.iter().any(|(name, _)| *name == "between") {
            says.push_str(" What belongs to none of them is between.");
        }
        if one.restore > 0.0 {
            keys.push(Key::new(
                Swatch::Block,
                "bar c5",
                format!("restore {}, at the destination", millis(one.restore)),
            ));
            says.push_str(
                " Restore is the same time seen from the destination, by its clock: it overlaps transfer and handover and must not be \
                 added to them. It is drawn so that it ends with the freeze.",
            );
        }
        html += &figure("The freeze, magnified", &says, &keys, &both(|size| magnified(one, parts, size)));
    }
    html
}

fn draw(one: &One, spans: &[Span], size: Size) -> String {
    let (left, right) = (8.0, size.width() - 8.0);
    let from = spans[0].from;
    let (per, unit) = time_unit(one.end - from);
    let x = Scale::between(0.0, (one.end - from) / per, left, right);
    let at = |ms: f64| x.at((ms - from) / per);
    let (top, thick) = (8.0, 34.0);
    let lane = top + thick + 10.0;
    let rounds = !one.ends.is_empty();
    let bottom = if rounds { lane + 24.0 } else { top + thick + 6.0 };
    let mut svg = Svg::new(size, bottom + 42.0);
    let mut words = Vec::new();
    for span in spans {
        let text = format!("{} {}", span.name, millis(span.to - span.from));
        block(
            &mut svg,
            (at(span.from), at(span.to)),
            (top, thick),
            class(span.name),
            span.name,
            &text,
        );
        words.push(text);
    }
    if rounds {
        let last = one.ends.len() - 1;
        for (index, (end, ms)) in one.ends.iter().enumerate() {
            let name = if index == last && one.freeze.is_some_and(|(began, _)| *end >= began) {
                "F".to_owned()
            } else {
                (index + 1).to_string()
            };
            let class = if name == "F" { "bar c1" } else { ["bar g3", "bar g1"][index % 2] };
            let tip = format!("round {name}: {}", millis(*ms));
            block(&mut svg, (at((end - ms).max(from)), at(*end)), (lane, 18.0), class, &name, &tip);
        }
    }
    svg.x_axis(&x, bottom, &labelled(&x, size.or(10, 5), plain), &format!("time, {unit}"));
    svg.finish(&format!("Phases of the migration: {}.", words.join(", ")))
}

/// A block on a lane, with its name where that fits; never too thin to be seen.
fn block(svg: &mut Svg, (from, to): (f64, f64), (top, thick): (f64, f64), class: &str, name: &str, tip: &str) {
    let to = to.max(from + 1.5);
    svg.rect((from, top), (to, top + thick), class, tip);
    if text_width(name) + 6.0 <= to - from {
        svg.text((from + to) / 2.0, top + thick / 2.0, Anchor::Middle, "on", name);
    }
}

fn magnified(one: &One, parts: &[(&str, f64)], size: Size) -> String {
    let (left, right) = (8.0, size.width() - 8.0);
    let sum: f64 = parts.iter().map(|(_, ms)| ms).sum();
    let whole = sum.max(one.downtime);
    let (per, unit) = time_unit(whole);
    let x = Scale::between(0.0, whole / per, left, right);
    let at = |ms: f64| x.at(ms / per);
    let (top, thick) = (24.0, 34.0);
    let mut svg = Svg::new(size, if one.restore > 0.0 { 180.0 } else { 108.0 });
    svg.text(left, top - 4.0 - TEXT / 2.0, Anchor::Start, "axis", "seen from the source");
    let mut done = 0.0;
    let mut words = Vec::new();
    for (name, ms) in parts {
        let text = format!("{name} {}", millis(*ms));
        block(&mut svg, (at(done), at(done + ms)), (top, thick), part_class(name), name, &text);
        words.push(text);
        done += ms;
    }
    let mut bottom = top + thick + 8.0;
    if one.restore > 0.0 {
        let lane = top + thick + 30.0;
        svg.text(left, lane - HALF - TEXT / 2.0, Anchor::Start, "axis", "seen from the destination");
        let text = format!("restore {}", millis(one.restore));
        block(
            &mut svg,
            (at((whole - one.restore).max(0.0)), at(whole)),
            (lane, thick),
            "bar c5",
            "restore",
            &text,
        );
        words.push(format!("at the destination {text}, overlapping"));
        bottom = lane + thick + 8.0;
    }
    svg.x_axis(
        &x,
        bottom,
        &labelled(&x, size.or(10, 5), plain),
        &format!("since the first interrupt, {unit}"),
    );
    svg.finish(&format!("Parts of the freeze: {}.", words.join(", ")))
}

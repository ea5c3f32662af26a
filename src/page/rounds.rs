//! Rounds of one migration: what each sent, what was dirty after it, and the freeze that the planner expected.

use super::{
    charts::{both, bytes, millis, plain, prefixed},
    html::{Key, Swatch, figure, table},
    one::One,
    svg::{Anchor, Scale, Size, Svg, labelled, margin, text_width},
};
use crate::human;

/// Values that span so many decades get a logarithmic axis.
const DECADES: f64 = 1.7;

/// The chart, and its figures as a table; nothing without rounds.
pub fn chart(one: &One) -> String {
    if one.rounds.is_empty() {
        return String::new();
    }
    let planned = one.rounds.iter().any(|r| r.plan.is_some());
    let log = sent(one, 0.0, 1.0).is_log();
    let mut keys = Vec::new();
    if one.rounds.len() > 1 {
        keys.push(Key::new(Swatch::Block, "bar c0", "sent while the program runs"));
    }
    keys.push(Key::new(Swatch::Block, "bar c1", "sent inside the freeze (F)"));
    let mut says = "Bars are the bytes of pages with content that each round sent, before compression. ".to_owned();
    if planned {
        keys.push(Key::new(Swatch::Marker(3), "c2", "dirty after the round"));
        keys.push(Key::new(Swatch::Both(0), "c3", "predicted freeze"));
        says.push_str(
            "A diamond is what the program had written again when the round was over: while it falls, another round pays. \
             Below, the freeze that the planner predicted at that point, and the freeze as it came.",
        );
        keys.push(Key::new(Swatch::Marker(1), "c1", "freeze as it came"));
    }
    if log {
        says.push_str(" The axis of bytes is logarithmic.");
    }
    let drawings = both(|size| draw(one, size, planned));
    figure("Rounds", &says, &keys, &(drawings + &figures(one)))
}

fn sent(one: &One, from: f64, to: f64) -> Scale {
    let dirty = one.rounds.iter().filter_map(|r| r.plan).map(|p| p.dirty);
    let values: Vec<f64> = one.rounds.iter().map(|r| r.bytes()).chain(dirty).collect();
    Scale::fitting(&values, DECADES, from, to)
}

fn draw(one: &One, size: Size, planned: bool) -> String {
    let rounds = &one.rounds;
    let (top, middle) = (30.0, size.or(230.0, 210.0));
    // The second panel, when there is one.
    let (lower, bottom) = (middle + 46.0, middle + size.or(150.0, 140.0));
    let y = sent(one, middle, top);
    let ticks = labelled(&y, 6, |v| prefixed(v, "B"));
    let freezes: Vec<f64> = rounds
        .iter()
        .filter_map(|r| r.plan)
        .map(|p| p.freeze)
        .chain([one.downtime])
        .collect();
    let z = Scale::fitting(&freezes, DECADES, bottom, lower);
    let below = labelled(&z, 4, plain);
    let left = margin(&ticks).max(margin(&below));
    let right = size.width() - 12.0;
    let band = (right - left) / rounds.len() as f64;
    let at = |index: usize| left + band * index as f64;
    let mut svg = Svg::new(size, if planned { bottom } else { middle } + 44.0);
    svg.y_axis(&y, left, right, &ticks, "pages, bytes");
    let wide = (band * 0.56).clamp(1.0, 56.0);
    for (index, round) in rounds.iter().enumerate() {
        let frozen = index + 1 == rounds.len();
        let center = at(index) + band / 2.0;
        let height = y.at(round.bytes()).min(if round.bytes() > 0.0 { middle - 1.5 } else { middle });
        let tip = format!(
            "{}: {} pages, {}, {} on the wire, {}",
            name(index, frozen),
            human::count(round.pages as u64),
            bytes(round.bytes()),
            bytes(round.wire),
            millis(round.ms)
        );
        svg.rect(
            (center - wide / 2.0, height),
            (center + wide / 2.0, middle),
            if frozen { "bar c1" } else { "bar c0" },
            &tip,
        );
    }
    svg.line((left, middle), (right, middle), "edge");
    let mut line = Vec::new();
    for (index, round) in rounds.iter().enumerate() {
        let Some(plan) = round.plan else { continue };
        // Between its bar and the next.
        let x = at(index + 1).min(right - 5.0);
        let tip = format!("after round {}: {} dirty", index + 1, bytes(plan.dirty));
        svg.marker((x, y.at(plan.dirty)), 3, "mark c2", &tip);
        line.push((
            x,
            z.at(plan.freeze),
            format!("after round {}: {} predicted", index + 1, millis(plan.freeze)),
        ));
    }
    if planned {
        svg.y_axis(&z, left, right, &below, "freeze, ms");
        let path: Vec<(f64, f64)> = line.iter().map(|(x, y, _)| (*x, *y)).collect();
        svg.path(&path, "stroke c3");
        for (x, y, tip) in &line {
            svg.marker((*x, *y), 0, "mark c3", tip);
        }
        let came = (at(rounds.len() - 1) + band / 2.0, z.at(one.downtime));
        svg.marker(came, 1, "mark c1", &format!("freeze: {}", millis(one.downtime)));
        svg.line((left, bottom), (right, bottom), "edge");
    }
    let foot = if planned { bottom } else { middle };
    let mut free = f64::MIN;
    let mut ended = at(rounds.len() - 1) + band / 2.0;
    svg.text(ended, foot + 13.0, Anchor::Middle, "tick", "F");
    ended -= text_width("F");
    for index in 0..rounds.len() - 1 {
        let (label, x) = ((index + 1).to_string(), at(index) + band / 2.0);
        let half = text_width(&label) / 2.0;
        if x - half >= free && x + half <= ended {
            svg.text(x, foot + 13.0, Anchor::Middle, "tick", &label);
            free = x + half + 3.0;
        }
    }
    svg.text(right, foot + 31.0, Anchor::End, "axis", "round");
    let words: Vec<String> = rounds
        .iter()
        .enumerate()
        .map(|(index, r)| format!("{} {}", name(index, index + 1 == rounds.len()), bytes(r.bytes())))
        .collect();
    svg.finish(&format!("Bytes of pages by round: {}.", words.join(", ")))
}

fn name(index: usize, frozen: bool) -> String {
    if frozen {
        "inside the freeze".into()
    } else {
        format!("round {}", index + 1)
    }
}

/// The figures themselves.
fn figures(one: &One) -> String {
    let head = [
        "round",
        "pages",
        "zero pages",
        "bytes of pages",
        "on the wire",
        "time",
        "dirty after it",
        "predicted freeze",
    ];
    let rows: Vec<Vec<String>> = one
        .rounds
        .iter()
        .enumerate()
        .map(|(index, r)| {
            let frozen = index + 1 == one.rounds.len();
            let of_plan = |text: &dyn Fn(super::one::Plan) -> String| r.plan.map_or("–".into(), text);
            vec![
                if frozen { "F".into() } else { (index + 1).to_string() },
                human::count(r.pages as u64),
                human::count(r.zero as u64),
                bytes(r.bytes()),
                bytes(r.wire),
                millis(r.ms),
                of_plan(&|p| bytes(p.dirty)),
                of_plan(&|p| millis(p.freeze)),
            ]
        })
        .collect();
    format!(
        "<details>\n<summary>The same in figures</summary>\n{}</details>\n",
        table("Rounds in figures", 1, &head, &rows)
    )
}

//! How long the program waited for pages that followed it.

use super::{
    charts::{both, plain, prefixed},
    html::{Key, Swatch, figure},
    one::One,
    svg::{Anchor, Scale, Size, Svg, labelled, margin, text_width},
};
use crate::human;

/// What the vertical axis shows.
const SAYS: &str = "number of faults";

/// The chart; nothing without faults. `which` says whose they are.
pub fn chart(one: &One, which: &str) -> String {
    if total(one) == 0.0 {
        return String::new();
    }
    let [p50, p99, max] = one.latency.map(|us| human::count(us as u64));
    let keys = [
        Key::new(Swatch::Block, "bar c0", "faults"),
        Key::new(Swatch::Line, "c3 d2", format!("median {p50} us")),
        Key::new(Swatch::Line, "c2 d1", format!("99th percentile {p99} us")),
        Key::new(Swatch::Line, "c1 d0", format!("longest {max} us")),
    ];
    let says = format!(
        "{which}The program ran before all its pages had arrived. This is how often it waited for one and for how long: {}, each from the \
         moment that the fault is read to the page in place. Each bar reaches twice as far as the one before it; its height is the \
         number of faults.",
        human::plural(total(one) as u64, "fault", "faults")
    );
    figure("Waiting for pages after the resume", &says, &keys, &both(|size| draw(one, size)))
}

fn total(one: &One) -> f64 {
    one.faults.iter().sum()
}

/// Where a latency lies, counted in bars: bar 0 is below 1 us, bar b from 2^(b-1) us.
fn place(us: f64) -> f64 {
    if us < 1.0 { us.max(0.0) } else { us.log2() + 1.0 }
}

fn draw(one: &One, size: Size) -> String {
    let first = one.faults.iter().position(|n| *n > 0.0).unwrap_or(0);
    let last = one.faults.iter().rposition(|n| *n > 0.0).unwrap_or(0);
    let (top, bottom) = (46.0, size.or(260.0, 230.0));
    let y = Scale::linear(one.faults.iter().map(|n| n * 1.05), bottom, top);
    let ticks = labelled(&y, 5, |v| prefixed(v, ""));
    let (left, right) = (margin(&ticks), size.width() - 16.0);
    let x = Scale::between(first as f64, last as f64 + 1.0, left, right);
    let mut svg = Svg::new(size, bottom + 44.0);
    svg.y_axis(&y, left, right, &ticks, SAYS);
    let band = (right - left) / (last + 1 - first) as f64;
    let gap = (band * 0.08).min(3.0);
    let mut words = Vec::new();
    for bar in first..=last {
        let count = one.faults[bar];
        let range = match bar {
            0 => "less than 1 us".to_owned(),
            1 => "1 us".to_owned(),
            _ => format!("{} to {} us", human::count(power(bar - 1)), human::count(power(bar) - 1)),
        };
        if count > 0.0 {
            let tip = format!("{range}: {}", human::plural(count as u64, "fault", "faults"));
            let from = x.at(bar as f64);
            // One fault among thousands is to be seen too.
            svg.rect(
                (from + gap, y.at(count).min(bottom - 2.0)),
                (from + band - gap, bottom),
                "bar c0",
                &tip,
            );
            words.push(tip);
        }
    }
    let edges: Vec<(f64, String)> = (first..=last + 1)
        .map(|bar| (bar as f64, if bar == 0 { "0".into() } else { plain(power(bar - 1) as f64) }))
        .collect();
    svg.x_axis(&x, bottom, &edges, "wait, us (logarithmic)");
    // Their names above, where they do not touch.
    let mut free = 6.0 + text_width(SAYS);
    let [p50, p99, max] = one.latency;
    for (us, name, class) in [(p50, "median", "c3 d2"), (p99, "p99", "c2 d1"), (max, "max", "c1 d0")] {
        let at = x.at(place(us));
        let half = text_width(name) / 2.0;
        let middle = at.clamp(half, size.width() - half);
        let fits = middle - half >= free;
        if fits {
            svg.text(middle, top - 18.0, Anchor::Middle, "tick", name);
            free = middle + half + 4.0;
        }
        svg.line((at, if fits { top - 10.0 } else { top }), (at, bottom), &format!("stroke {class}"));
    }
    svg.finish(&format!("Faults by how long they waited. {}.", words.join("; ")))
}

fn power(of: usize) -> u64 {
    1_u64.checked_shl(of as u32).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        assert_eq!(place(0.0), 0.0);
        assert_eq!(place(1.0), 1.0);
        assert_eq!(place(2.0), 2.0);
        assert_eq!(place(4.0), 3.0);
        assert!(place(7.0) < 4.0);
    }
}

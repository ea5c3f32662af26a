//! How fast the program went before, during and after.

use super::{
    charts::{both, millis, plain, prefixed},
    html::{Key, Swatch, figure},
    one::One,
    svg::{Anchor, Scale, Size, Svg, labelled, margin, text_width},
};

/// What the vertical axis shows.
const SAYS: &str = "steps/s";

/// The chart; nothing without two points.
pub fn chart(one: &One) -> String {
    if one.speed.len() < 2 {
        return String::new();
    }
    let mut keys = vec![Key::new(Swatch::Line, "c0 d0", "steps a second")];
    let mut says =
        "Steps of its work that the program did each second, measured by the program. Time 0 is the start of the sender".to_owned();
    says.push_str(if one.end > 0.0 {
        "; the shaded span is the migration, from there to its end."
    } else {
        "."
    });
    if one.end > 0.0 {
        keys.push(Key::new(Swatch::Block, "span", "migration"));
    }
    if let Some((from, to)) = one.freeze {
        keys.push(Key::new(Swatch::Line, "c1 d1", format!("freeze, {}", millis(to - from))));
        says.push_str(" The dashed line is the freeze.");
    }
    figure("Speed of the program", &says, &keys, &both(|size| draw(one, size)))
}

fn draw(one: &One, size: Size) -> String {
    let (top, bottom) = (46.0, size.or(260.0, 230.0));
    let first = one.speed.iter().map(|p| p.0).fold(0.0, f64::min);
    let last = one.speed.iter().map(|p| p.0).fold(one.end, f64::max);
    let y = Scale::linear(one.speed.iter().map(|p| p.1 * 1.05), bottom, top);
    let ticks = labelled(&y, 5, |v| prefixed(v, ""));
    let (left, right) = (margin(&ticks), size.width() - 12.0);
    let x = Scale::between(first / 1000.0, last / 1000.0, left, right);
    let at = |ms: f64| x.at(ms / 1000.0);
    let mut svg = Svg::new(size, bottom + 44.0);
    if one.end > 0.0 {
        svg.rect((at(0.0), top), (at(one.end), bottom), "span", "migration");
    }
    svg.y_axis(&y, left, right, &ticks, SAYS);
    svg.x_axis(&x, bottom, &labelled(&x, size.or(10, 5), plain), "since the start of the sender, s");
    let points: Vec<(f64, f64)> = one.speed.iter().map(|(ms, rate)| (at(*ms), y.at(*rate))).collect();
    svg.path(&thinned(points), "stroke c0 d0");
    if let Some((from, to)) = one.freeze {
        let (from, to) = (at(from), at(to));
        if to - from > 2.0 {
            svg.rect((from, top), (to, bottom), "shade c1", "freeze");
        }
        svg.line((from, top - 8.0), (from, bottom), "stroke c1 d1");
        let half = text_width("freeze") / 2.0;
        // Beside what the axis says, above it.
        let middle = from.clamp(text_width(SAYS) + half + 8.0, size.width() - half);
        svg.text(middle, top - 16.0, Anchor::Middle, "tick", "freeze");
    }
    let rates = || one.speed.iter().map(|p| p.1);
    let (least, most) = (rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max));
    svg.finish(&format!(
        "Steps a second of the program over time: between {} and {}.",
        prefixed(least, ""),
        prefixed(most, "")
    ))
}

/// Lowest and highest point of each unit of width, when there are more than that can be seen.
fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    const FEW: usize = 600;
    if points.len() <= FEW {
        return points;
    }
    let mut thin: Vec<(f64, f64)> = Vec::new();
    for column in points.chunk_by(|a, b| a.0.floor() == b.0.floor()) {
        let index = |better: fn(f64, f64) -> bool| {
            let ends = column.iter().enumerate().reduce(|a, b| if better(b.1.1, a.1.1) { b } else { a });
            ends.map_or(0, |(index, _)| index)
        };
        let (low, high) = (index(|a, b| a < b), index(|a, b| a > b));
        thin.push(column[low.min(high)]);
        if low != high {
            thin.push(column[low.max(high)]);
        }
    }
    thin
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extremes_stay() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i) / 100.0, 50.0)).collect();
        points[5_005].1 = 0.0;
        points[7_007].1 = 99.0;
        let thin = thinned(points);
        assert!(thin.len() <= 200 && thin.contains(&(50.05, 0.0)) && thin.contains(&(70.07, 99.0)));
        assert!(thin.is_sorted_by(|a, b| a.0 <= b.0));
    }
}

//! Inline SVG: scales, ticks, axes, and a drawing that takes no number that is not one.

use super::html::escape;
use std::fmt::Write;

/// Height of the text, in units of the drawing.
pub const TEXT: f64 = 12.0;
/// Room for one character at that height, in units: more than most fonts take.
const CHARACTER: f64 = 7.2;

/// What a chart is drawn for: the style sheet shows the one that fits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Size {
    /// A desktop.
    Wide,
    /// A phone.
    Narrow,
}

impl Size {
    /// Units from the left to the right.
    pub fn width(self) -> f64 {
        match self {
            Size::Wide => 1000.0,
            Size::Narrow => 340.0,
        }
    }

    /// One or the other.
    pub fn or<T>(self, wide: T, narrow: T) -> T {
        match self {
            Size::Wide => wide,
            Size::Narrow => narrow,
        }
    }
}

/// From values to units of the drawing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    min: f64,
    max: f64,
    log: bool,
    from: f64,
    to: f64,
}

impl Scale {
    /// From zero to the largest of the values, or a little above.
    pub fn linear(values: impl IntoIterator<Item = f64>, from: f64, to: f64) -> Scale {
        let max = values.into_iter().filter(|v| v.is_finite()).fold(0.0, f64::max);
        let max = if max > 0.0 { max.min(f64::MAX / 4.0) } else { 1.0 };
        Scale::between(0.0, max, from, to)
    }

    /// Between these, which must be apart.
    pub fn between(min: f64, max: f64, from: f64, to: f64) -> Scale {
        let fine = min.is_finite() && max.is_finite() && max > min && (max - min).is_finite();
        let (min, max) = if fine { (min, max) } else { (0.0, 1.0) };
        Scale {
            min,
            max,
            log: false,
            from,
            to,
        }
    }

    /// Logarithmic: all values above zero, and room of a factor on each side.
    pub fn log(values: impl IntoIterator<Item = f64>, room: f64, from: f64, to: f64) -> Scale {
        let (mut min, mut max) = (f64::MAX, 0.0_f64);
        for value in values.into_iter().filter(|v| *v > 1e-9 && *v < 1e18) {
            min = min.min(value);
            max = max.max(value);
        }
        if max == 0.0 {
            (min, max) = (1.0, 10.0);
        }
        Scale {
            min: min / room.max(1.01),
            max: max * room.max(1.01),
            log: true,
            from,
            to,
        }
    }

    /// Logarithmic when the values above zero span so many decades, linear otherwise.
    pub fn fitting(values: &[f64], decades: f64, from: f64, to: f64) -> Scale {
        let log = Scale::log(values.iter().copied(), 1.01, from, to);
        if (log.max / log.min).log10() >= decades {
            Scale::log(values.iter().copied(), 1.6, from, to)
        } else {
            Scale::linear(values.iter().map(|v| v * 1.08), from, to)
        }
    }

    /// Whether it is logarithmic.
    pub fn is_log(&self) -> bool {
        self.log
    }

    /// Where a value lies; what is outside, or no number, lies on the edge.
    pub fn at(&self, value: f64) -> f64 {
        let value = if value.is_nan() {
            self.min
        } else {
            value.clamp(self.min, self.max)
        };
        let share = if self.log {
            (value / self.min).ln() / (self.max / self.min).ln()
        } else {
            (value - self.min) / (self.max - self.min)
        };
        let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
        self.from + (self.to - self.from) * share
    }

    /// Round values along it, about so many at most.
    pub fn ticks(&self, wanted: usize) -> Vec<f64> {
        let wanted = wanted.max(2);
        if self.log {
            let (low, high) = (self.min.log10().floor() as i32, self.max.log10().ceil() as i32);
            let decades: Vec<i32> = (low..=high).collect();
            for parts in [&[1.0, 2.0, 5.0][..], &[1.0, 3.0]] {
                let ticks = self.inside(decades.iter().flat_map(|d| parts.iter().map(|p| p * 10_f64.powi(*d))));
                if ticks.len() <= wanted {
                    return ticks;
                }
            }
            let every = |step: i32| self.inside(decades.iter().filter(move |d| **d % step == 0).map(|d| 10_f64.powi(*d)));
            let sparse = |step: &i32| every(*step).len() <= wanted;
            return every((1..=high - low + 1).find(sparse).unwrap_or(1));
        }
        let rough = (self.max - self.min) / wanted as f64;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|s| s * power)
            .into_iter()
            .find(|s| *s >= rough * 0.999)
            .unwrap_or(rough);
        if !(step > 0.0 && step.is_finite()) {
            return vec![self.min];
        }
        let first = (self.min / step).ceil();
        self.inside((0..=wanted * 2).map(|i| (first + i as f64) * step))
    }

    fn inside(&self, values: impl Iterator<Item = f64>) -> Vec<f64> {
        let edge = (self.max - self.min) * 1e-9;
        values
            .filter(|v| v.is_finite() && *v >= self.min - edge && *v <= self.max + edge)
            .collect()
    }
}

/// The side of a text that its place is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Anchor {
    /// It goes on to the right.
    Start,
    /// Both ways.
    Middle,
    /// It ends there.
    End,
}

/// About how wide a text is.
pub fn text_width(text: &str) -> f64 {
    text.chars().count() as f64 * CHARACTER
}

/// Pixels between the baseline of a text and its middle.
pub const HALF: f64 = 4.2;

/// A drawing under way. Colours, dashes and fonts are classes of the style sheet.
#[derive(Debug)]
pub struct Svg {
    body: String,
    size: Size,
    height: f64,
}

impl Svg {
    /// An empty one.
    pub fn new(size: Size, height: f64) -> Svg {
        Svg {
            body: String::new(),
            size,
            height,
        }
    }

    /// A straight line.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        let (x1, y1, x2, y2) = (number(from.0), number(from.1), number(to.0), number(to.1));
        let _ = writeln!(
            self.body,
            "<line x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\" class=\"{class}\"/>"
        );
    }

    /// A rectangle between two corners, with what a pointer over it shows.
    pub fn rect(&mut self, a: (f64, f64), b: (f64, f64), class: &str, tip: &str) {
        let (x, y) = (number(a.0.min(b.0)), number(a.1.min(b.1)));
        let (w, h) = (number((a.0 - b.0).abs()), number((a.1 - b.1).abs()));
        let tip = title(tip);
        let _ = writeln!(
            self.body,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{h}\" class=\"{class}\">{tip}</rect>"
        );
    }

    /// A line through points.
    pub fn path(&mut self, points: &[(f64, f64)], class: &str) {
        if points.is_empty() {
            return;
        }
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{},{}", number(*x), number(*y))).collect();
        let _ = writeln!(self.body, "<polyline points=\"{}\" class=\"{class}\"/>", points.join(" "));
    }

    /// A point of a series: each has a shape of its own.
    pub fn marker(&mut self, at: (f64, f64), shape: usize, class: &str, tip: &str) {
        let _ = writeln!(
            self.body,
            "<path d=\"{}\" class=\"{class}\">{}</path>",
            outline(shape, at, 4.5),
            title(tip)
        );
    }

    /// Text; `middle` is the height of its middle.
    pub fn text(&mut self, x: f64, middle: f64, anchor: Anchor, class: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let (x, y) = (number(x), number(middle + HALF));
        let _ = writeln!(
            self.body,
            "<text x=\"{x}\" y=\"{y}\"{anchor} class=\"{class}\">{}</text>",
            escape(text)
        );
    }

    /// Grid lines and labels of a vertical axis, and what it says, above.
    pub fn y_axis(&mut self, y: &Scale, left: f64, right: f64, ticks: &[(f64, String)], says: &str) {
        for (value, label) in ticks {
            let at = y.at(*value);
            self.line((left, at), (right, at), "grid");
            self.text(left - 6.0, at, Anchor::End, "tick", label);
        }
        let top = y.from.min(y.to);
        self.text(2.0, top - 16.0, Anchor::Start, "axis", says);
    }

    /// The line, marks and labels of a horizontal axis, and what it says, below. Labels that would touch are left out.
    pub fn x_axis(&mut self, x: &Scale, at: f64, ticks: &[(f64, String)], says: &str) {
        self.line((x.from, at), (x.to, at), "edge");
        let mut free = f64::MIN;
        for (value, label) in ticks {
            let place = x.at(*value);
            self.line((place, at), (place, at + 4.0), "edge");
            let half = text_width(label) / 2.0;
            let middle = place.clamp(half, (self.size.width() - half).max(half));
            if middle - half >= free {
                self.text(middle, at + 13.0, Anchor::Middle, "tick", label);
                free = middle + half + 4.0;
            }
        }
        self.text(x.to, at + 31.0, Anchor::End, "axis", says);
    }

    /// The element, for a reader that sees no picture with what it shows in words.
    pub fn finish(self, says: &str) -> String {
        format!(
            "<svg class=\"chart {}\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">\n{}</svg>\n",
            self.size.or("wide", "narrow"),
            number(self.size.width()),
            number(self.height),
            escape(says),
            self.body
        )
    }
}

/// Room that the labels of a vertical axis take.
pub fn margin(ticks: &[(f64, String)]) -> f64 {
    ticks.iter().map(|(_, label)| text_width(label)).fold(20.0, f64::max) + 10.0
}

/// Ticks with labels.
pub fn labelled(scale: &Scale, wanted: usize, label: impl Fn(f64) -> String) -> Vec<(f64, String)> {
    scale.ticks(wanted).into_iter().map(|value| (value, label(value))).collect()
}

/// How many shapes there are.
pub const SHAPES: usize = 6;

/// The path of a shape around a point.
pub fn outline(shape: usize, at: (f64, f64), r: f64) -> String {
    let points: &[(f64, f64)] = match shape % SHAPES {
        0 => {
            let (x, y, r) = (number(at.0 - r), number(at.1), number(r));
            return format!(
                "M{x} {y}a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0 -{d} 0z",
                d = number(2.0 * number_of(&r))
            );
        }
        1 => &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2 => &[(0.0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        3 => &[(0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)],
        4 => &[(0.0, 1.15), (1.1, -0.85), (-1.1, -0.85)],
        _ => &[(-1.2, -0.4), (1.2, -0.4), (1.2, 0.4), (-1.2, 0.4)],
    };
    let points: Vec<String> = points
        .iter()
        .map(|(x, y)| format!("{} {}", number(at.0 + x * r), number(at.1 + y * r)))
        .collect();
    format!("M{}z", points.join("L"))
}

fn number_of(text: &str) -> f64 {
    text.parse().unwrap_or(0.0)
}

/// A coordinate; none that a browser would not take.
fn number(value: f64) -> String {
    if !value.is_finite() {
        return "0".into();
    }
    let value = (value.clamp(-1e6, 1e6) * 10.0).round() / 10.0;
    // Not "-0".
    format!("{}", value + 0.0)
}

fn title(tip: &str) -> String {
    if tip.is_empty() {
        return String::new();
    }
    format!("<title>{}</title>", escape(tip))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn linear_ticks() {
        let scale = Scale::linear([3.0, 9.7], 0.0, 100.0);
        assert_eq!(scale.ticks(5), [0.0, 2.0, 4.0, 6.0, 8.0]);
        assert_eq!(scale.at(0.0), 0.0);
        assert_eq!(scale.at(9.7), 100.0);
        assert_eq!(
            Scale::between(-2000.0, 3000.0, 0.0, 1.0).ticks(5),
            [-2000.0, -1000.0, 0.0, 1000.0, 2000.0, 3000.0]
        );
        assert_eq!(Scale::linear([], 0.0, 1.0).ticks(2), [0.0, 0.5, 1.0]);
    }

    #[test]
    fn log_ticks() {
        let scale = Scale::log([1.0, 1000.0], 1.01, 0.0, 300.0);
        assert_eq!(scale.ticks(4), [1.0, 10.0, 100.0, 1000.0]);
        assert_eq!(scale.ticks(10), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]);
        assert!((scale.at(10.0) - 100.0).abs() < 1.0);
        let wide = Scale::log([1e-3, 1e9], 1.01, 0.0, 300.0);
        assert!(wide.ticks(4).len() <= 5, "{:?}", wide.ticks(4));
    }

    #[test]
    fn scales_of_nothing() {
        for scale in [
            Scale::log([], 1.5, 5.0, 9.0),
            Scale::linear([f64::NAN], 5.0, 9.0),
            Scale::between(3.0, 3.0, 5.0, 9.0),
        ] {
            assert!((5.0..=9.0).contains(&scale.at(f64::NAN)));
            assert_eq!(scale.at(f64::INFINITY), 9.0);
            assert_eq!(scale.at(f64::NEG_INFINITY), 5.0);
        }
        assert!(Scale::fitting(&[1.0, 500.0], 2.0, 0.0, 1.0).is_log());
        assert!(!Scale::fitting(&[10.0, 500.0], 2.0, 0.0, 1.0).is_log());
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(number(1.0 / 3.0), "0.3");
        assert_eq!(number(-0.001), "0");
        assert_eq!(number(f64::NAN), "0");
        assert_eq!(number(12.0), "12");
    }

    #[test]
    fn text_is_escaped() {
        let mut svg = Svg::new(Size::Wide, 10.0);
        svg.text(1.0, 1.0, Anchor::Start, "tick", "<b>");
        svg.rect((0.0, 0.0), (1.0, 1.0), "x", "</title><script>");
        let svg = svg.finish("a \"quote\"");
        assert!(svg.contains("&lt;b&gt;") && svg.contains("&lt;/title&gt;&lt;script&gt;") && svg.contains("&quot;quote&quot;"));
    }

    proptest! {
        #[test]
        fn every_value_lies_within(values in prop::collection::vec(any::<f64>(), 0..20), log: bool, wanted in 0_usize..12) {
            let scale = if log {
                Scale::log(values.iter().copied(), 1.5, 10.0, 90.0)
            } else {
                Scale::linear(values.iter().copied(), 90.0, 10.0)
            };
            for value in values.iter().copied().chain(scale.ticks(wanted)) {
                prop_assert!((10.0..=90.0).contains(&scale.at(value)), "{value} at {}", scale.at(value));
            }
            prop_assert!(scale.ticks(wanted).len() <= 2 * wanted.max(2) + 1);
        }
    }
}

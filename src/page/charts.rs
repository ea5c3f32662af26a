//! What the charts share: units on axes, and a chart in both sizes.

use super::svg::Size;
use crate::human;

/// The same chart for a desktop and for a phone.
pub fn both(draw: impl Fn(Size) -> String) -> String {
    draw(Size::Wide) + &draw(Size::Narrow)
}

/// A round number of an axis without a unit: 0.05, 20, 1,500.
pub fn plain(value: f64) -> String {
    if value >= 1000.0 {
        return human::count(value.min(1e15).round() as u64);
    }
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// A round number with a decimal prefix: "20 MB", "1.5 k".
pub fn prefixed(value: f64, unit: &str) -> String {
    let mut value = value;
    let mut prefix = "";
    for next in ["k", "M", "G", "T", "P"] {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        prefix = next;
    }
    let text = format!("{value:.1}");
    format!("{} {prefix}{unit}", text.trim_end_matches(".0")).trim_end().to_owned()
}

/// Milliseconds on an axis that goes to `most` ms: the divisor and the name of its unit.
pub fn time_unit(most: f64) -> (f64, &'static str) {
    match most {
        most if most < 1.0 => (0.001, "us"),
        most if most < 2000.0 => (1.0, "ms"),
        _ => (1000.0, "s"),
    }
}

/// Bytes, of a number that may be anything.
pub fn bytes(value: f64) -> String {
    human::bytes(value.max(0.0) as u64)
}

/// Bytes a second, likewise.
pub fn rate(value: f64) -> String {
    human::rate(value.max(0.0) as u64)
}

/// Milliseconds, likewise.
pub fn millis(value: f64) -> String {
    human::millis(if value.is_finite() { value.clamp(0.0, 1e12) } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(plain(0.0), "0");
        assert_eq!(plain(-0.0), "0");
        assert_eq!(plain(0.05), "0.05");
        assert_eq!(plain(20.0), "20");
        assert_eq!(plain(1500.0), "1,500");
        assert_eq!(prefixed(0.0, "B"), "0 B");
        assert_eq!(prefixed(20e6, "B"), "20 MB");
        assert_eq!(prefixed(1500.0, ""), "1.5 k");
        assert_eq!(prefixed(5.0, ""), "5");
        assert_eq!(millis(f64::NAN), "0 us");
        assert_eq!(bytes(-1.0), "0 B");
        assert_eq!(time_unit(0.2), (0.001, "us"));
    }
}

//! Numbers for people: 268 MB, 12.3 ms, 65,536 pages.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes in decimal units, three digits.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{} {}", three(value), UNITS[unit])
    }
}

/// Bytes a second.
pub fn rate(rate: u64) -> String {
    format!("{}/s", bytes(rate))
}

/// Milliseconds as microseconds, milliseconds, seconds or minutes.
pub fn millis(ms: f64) -> String {
    if ms < 0.9995 {
        format!("{:.0} us", ms * 1000.0)
    } else if ms < 999.5 {
        format!("{} ms", three(ms))
    } else if ms < 120_000.0 {
        format!("{} s", three(ms / 1000.0))
    } else {
        let seconds = Duration::from_secs_f64(ms / 1000.0).as_secs();
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    }
}

/// 65,536.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// "1 page", "2 pages".
pub fn plural(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// "3 min ago" of seconds since 1970.
pub fn ago(unix: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    match now.saturating_sub(unix) {
        seconds @ 0..120 => format!("{seconds} s ago"),
        seconds @ 120..7200 => format!("{} min ago", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h ago", seconds / 3600),
        seconds => format!("{} days ago", seconds / 86_400),
    }
}

/// Text that came from a program or a peer, without what would act on a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The same, lines kept.
pub fn printable_lines(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// Rows in columns; the first row is the heading.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn three(value: f64) -> String {
    if value < 9.995 {
        format!("{value:.2}")
    } else if value < 99.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "1.00 kB");
        assert_eq!(bytes(268_435_456), "268 MB");
        assert_eq!(bytes(999_999_999), "1.00 GB");
        assert_eq!(bytes(u64::MAX), "18447 PB");
        assert_eq!(millis(0.4), "400 us");
        assert_eq!(millis(12.34), "12.3 ms");
        assert_eq!(millis(1340.0), "1.34 s");
        assert_eq!(millis(125_000.0), "2 min 05 s");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(count(12), "12");
        assert_eq!(plural(1, "page", "pages"), "1 page");
    }

    #[test]
    fn terminals_are_safe() {
        assert_eq!(printable_lines("a\rb\nc\n"), "a\u{fffd}b\nc\n");
        assert_eq!(printable("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }

    #[test]
    fn columns() {
        let rows = [vec!["A".into(), "LONG".into()], vec!["xyz".into(), "1".into()]];
        assert_eq!(table(&rows), "A    LONG\nxyz  1\n");
    }
}

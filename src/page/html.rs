//! Pieces of the documents: escaped text, tables, lists of facts, legends, figures.

use super::svg::outline;
use std::fmt::Write;

/// Text for between tags and within quotes; what a terminal would act on is not in it either.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\n' => safe.push('\n'),
            c if c.is_control() => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// A whole document.
pub fn document(title: &str, body: &str) -> String {
    // The policy lets it load nothing and run nothing, should text of a program ever get through as more than text.
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{}</title>\n<style>\n{}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escape(title),
        include_str!("style.css")
    )
}

/// A part of the page under a heading, left out when there is nothing in it.
pub fn section(heading: &str, content: &str) -> String {
    if content.is_empty() {
        return String::new();
    }
    format!("<section>\n<h2>{}</h2>\n{content}</section>\n", escape(heading))
}

/// A paragraph of text.
pub fn paragraph(text: &str) -> String {
    format!("<p>{}</p>\n", escape(text))
}

/// Names and values; those without a value are left out.
pub fn facts(class: &str, facts: &[(&str, String)]) -> String {
    let mut html = String::new();
    for (name, value) in facts.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = writeln!(html, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
    }
    if html.is_empty() {
        return html;
    }
    format!("<dl class=\"{class}\">\n{html}</dl>\n")
}

/// A list of lines.
pub fn list(lines: &[String]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let lines: String = lines.iter().map(|line| format!("<li>{}</li>\n", escape(line))).collect();
    format!("<ul>\n{lines}</ul>\n")
}

/// A table that scrolls by itself when the page is narrow. The first `words` columns are words, the others numbers.
pub fn table(says: &str, words: usize, head: &[&str], rows: &[Vec<String>]) -> String {
    let class = |column: usize| if column < words { "" } else { " class=\"n\"" };
    let mut html = format!(
        "<div class=\"scroll\" role=\"region\" tabindex=\"0\" aria-label=\"{}\">\n<table>\n<thead>\n<tr>",
        escape(says)
    );
    for (column, name) in head.iter().enumerate() {
        let _ = write!(html, "<th scope=\"col\"{}>{}</th>", class(column), escape(name));
    }
    html.push_str("</tr>\n</thead>\n<tbody>\n");
    for row in rows {
        html.push_str("<tr>");
        for (column, cell) in row.iter().enumerate() {
            let _ = match column {
                0 => write!(html, "<th scope=\"row\">{}</th>", escape(cell)),
                _ => write!(html, "<td{}>{}</td>", class(column), escape(cell)),
            };
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody>\n</table>\n</div>\n");
    html
}

/// What stands for a series in the legend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Swatch {
    /// A filled block.
    Block,
    /// A line, dashed as its class says.
    Line,
    /// A marker of this shape.
    Marker(usize),
    /// The line with its marker.
    Both(usize),
}

/// One entry of a legend.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    /// What it looks like.
    pub swatch: Swatch,
    /// The classes that colour it.
    pub class: String,
    /// What it is.
    pub text: String,
}

impl Key {
    /// One entry.
    pub fn new(swatch: Swatch, class: &str, text: impl Into<String>) -> Key {
        Key {
            swatch,
            class: class.into(),
            text: text.into(),
        }
    }
}

/// What the colours, dashes and markers stand for.
fn legend(keys: &[Key]) -> String {
    if keys.is_empty() {
        return String::new();
    }
    let mut html = String::from("<ul class=\"legend\">\n");
    for key in keys {
        let class = &key.class;
        let line = format!("<line x1=\"0\" y1=\"7\" x2=\"28\" y2=\"7\" class=\"stroke {class}\"/>");
        let marker = |shape| format!("<path d=\"{}\" class=\"mark {class}\"/>", outline(shape, (14.0, 7.0), 4.5));
        let drawn = match key.swatch {
            Swatch::Block => format!("<rect x=\"6\" y=\"1\" width=\"16\" height=\"12\" class=\"{class}\"/>"),
            Swatch::Line => line,
            Swatch::Marker(shape) => marker(shape),
            Swatch::Both(shape) => line + &marker(shape),
        };
        let _ = writeln!(
            html,
            "<li><svg class=\"swatch\" viewBox=\"0 0 28 14\" aria-hidden=\"true\">{drawn}</svg>{}</li>",
            escape(&key.text)
        );
    }
    html.push_str("</ul>\n");
    html
}

/// A chart with its heading, what it says and how to read it, its legend, the drawings, and what else belongs to it.
pub fn figure(heading: &str, says: &str, keys: &[Key], drawings: &str) -> String {
    format!(
        "<figure>\n<figcaption>\n<h3>{}</h3>\n<p>{}</p>\n</figcaption>\n{}{drawings}</figure>\n",
        escape(heading),
        escape(says),
        legend(keys)
    )
}

/// Seconds since 1970 as "2026-11-23 21:30 UTC".
pub fn utc(since: u64) -> String {
    let (year, month, day) = civil(since / 86_400);
    let minutes = since % 86_400 / 60;
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", minutes / 60, minutes % 60)
}

/// Year, month and day of a day counted from 1970-01-01. Years are counted from March, so that the leap day is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    // Days since 0000-03-01; 146,097 are 400 years.
    let days = days.saturating_add(719_468);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let of_month = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped() {
        assert_eq!(
            escape("<a href='x'>&\"\u{1b}[2J"),
            "&lt;a href=&#39;x&#39;&gt;&amp;&quot;\u{fffd}[2J"
        );
    }

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01 00:00 UTC");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(utc(951_868_800), "2000-03-01 00:00 UTC");
        assert_eq!(utc(1_795_469_400), "2026-11-23 21:30 UTC");
        assert_eq!(utc(4_107_542_400), "2100-03-01 00:00 UTC");
        assert_eq!(civil(19_722), (2023, 12, 31));
        // Of every day of five centuries the next one is the one after it.
        let mut last = civil(0);
        for day in 1..182_622 {
            let next = civil(day);
            let (year, month, of_month) = last;
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let long = match month {
                2 => 28 + u64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            let expected = match (of_month == long, month) {
                (false, _) => (year, month, of_month + 1),
                (true, 12) => (year + 1, 1, 1),
                (true, _) => (year, month + 1, 1),
            };
            assert_eq!(next, expected);
            last = next;
        }
        let _ = utc(u64::MAX);
    }

    #[test]
    fn nothing_is_left_out() {
        assert_eq!(section("heading", ""), "");
        assert_eq!(facts("x", &[("name", String::new())]), "");
        assert_eq!(list(&[]), "");
    }
}

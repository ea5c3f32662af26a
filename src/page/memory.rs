//! Freeze against memory: one point and a whisker for each size, one line for each mode and rate.

use super::{
    charts::{both, millis, plain},
    html::{Key, Swatch, figure},
    svg::{SHAPES, Scale, Size, Svg, labelled, margin},
};
use crate::{
    bench::results::{Case, Measured, Results, Spread},
    human,
};

/// Dashes there are.
const DASHES: usize = 4;
/// Least that the axis shows, ms.
const LEAST: f64 = 0.01;

/// The cases of one mode and rate.
struct Series {
    name: String,
    /// Colour and shape.
    mode: usize,
    /// Dash, and whether the markers are filled.
    rate: usize,
    points: Vec<Point>,
}

struct Point {
    mib: f64,
    spread: Spread,
    tip: String,
}

/// The freeze of a case: the program's own gap, else what the agents say.
fn freeze(case: &Case) -> Option<(Spread, bool)> {
    let positive = |s: Spread| (s.worst > 0.0).then_some(s);
    match case.spread(|m| m.program_ms).and_then(positive) {
        Some(spread) => Some((spread, true)),
        None => Some((case.spread(agents).and_then(positive)?, false)),
    }
}

fn agents(measured: &Measured) -> Option<f64> {
    measured.number("/downtime_ms")
}

fn series(results: &Results) -> (Vec<Series>, bool) {
    let (mut modes, mut rates): (Vec<&str>, Vec<Option<u64>>) = (Vec::new(), Vec::new());
    let mut found: Vec<Series> = Vec::new();
    let mut all_own = true;
    for case in &results.cases {
        let Some((mib, (spread, own))) = case.mib.filter(|m| *m > 0).zip(freeze(case)) else {
            continue;
        };
        let mode = index(&mut modes, case.mode.as_str());
        let rate = index(&mut rates, case.rate);
        all_own &= own;
        let pace = case.rate.map_or("as fast as it can".into(), |r| format!("{r} MB/s"));
        let name = format!("{}, {pace}", case.mode);
        let point = Point {
            mib: mib as f64,
            spread,
            tip: format!(
                "{name}, {} MiB: median {}, worst {} of {}{}",
                human::count(mib),
                millis(spread.median),
                millis(spread.worst),
                human::plural(case.runs.len() as u64, "run", "runs"),
                if own { "" } else { " (the agents' figure)" }
            ),
        };
        match found.iter_mut().find(|s| s.mode == mode && s.rate == rate) {
            Some(series) => series.points.push(point),
            None => found.push(Series {
                name,
                mode,
                rate,
                points: vec![point],
            }),
        }
    }
    for one in &mut found {
        one.points.sort_by(|a, b| a.mib.total_cmp(&b.mib));
    }
    (found, all_own)
}

fn index<T: PartialEq>(known: &mut Vec<T>, one: T) -> usize {
    known.iter().position(|k| *k == one).unwrap_or_else(|| {
        known.push(one);
        known.len() - 1
    })
}

impl Series {
    fn class(&self) -> String {
        let hollow = if self.rate.is_multiple_of(2) { "" } else { " hollow" };
        format!("c{} d{}{hollow}", self.mode % 6, self.rate % DASHES)
    }
}

/// The chart; nothing without a case of the built-in workload.
pub fn chart(results: &Results) -> String {
    let (series, all_own) = series(results);
    if series.is_empty() {
        return String::new();
    }
    let keys: Vec<Key> = series
        .iter()
        .map(|s| Key::new(Swatch::Both(s.mode % SHAPES), &s.class(), &s.name))
        .collect();
    let whose = if all_own {
        "The program measures its freeze itself: the time between its last step on one host and its first on the other."
    } else {
        "The freeze is the time between the program's last step on one host and its first on the other, as the program measures it; \
         where it did not, the agents' figure."
    };
    let says = format!(
        "{whose} A marker is the median of the runs, the line up from it ends at the worst. Both axes are logarithmic. \
         Markers of one size stand side by side so that they can be told apart."
    );
    let drawings = both(|size| draw(&series, size));
    figure("Freeze against memory", &says, &keys, &drawings)
}

fn draw(series: &[Series], size: Size) -> String {
    let (top, bottom, height) = (30.0, size.or(370.0, 290.0), size.or(414.0, 334.0));
    let points = || series.iter().flat_map(|s| &s.points);
    let values = points().flat_map(|p| [p.spread.median.max(LEAST), p.spread.worst.max(LEAST)]);
    let y = Scale::log(values, 1.6, bottom, top);
    let ticks = labelled(&y, 8, plain);
    let (left, right) = (margin(&ticks), size.width() - 12.0);
    // Room for the markers that stand side by side.
    let step = size.or(9.0, 6.0_f64).min(40.0 / series.len() as f64);
    let room = step * series.len() as f64 / 2.0 + 8.0;
    let inner = Scale::log(points().map(|p| p.mib), 1.02, left + room, right - room);
    let mut svg = Svg::new(size, height);
    svg.y_axis(&y, left, right, &ticks, "freeze, ms");
    let mut sizes: Vec<f64> = points().map(|p| p.mib).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    svg.line((left, bottom), (right, bottom), "edge");
    let sizes: Vec<(f64, String)> = sizes.into_iter().map(|mib| (mib, plain(mib))).collect();
    svg.x_axis(&inner, bottom, &sizes, "memory of the program, MiB");
    for (number, one) in series.iter().enumerate() {
        let class = one.class();
        let aside = step * (number as f64 - (series.len() - 1) as f64 / 2.0);
        let place = |p: &Point| (inner.at(p.mib) + aside, y.at(p.spread.median.max(LEAST)));
        svg.path(&one.points.iter().map(place).collect::<Vec<_>>(), &format!("stroke {class}"));
        for point in &one.points {
            let (x, middle) = place(point);
            let end = y.at(point.spread.worst.max(LEAST));
            svg.line((x, middle), (x, end), &format!("whisker {class}"));
            svg.line((x - 3.0, end), (x + 3.0, end), &format!("whisker {class}"));
            svg.marker((x, middle), one.mode, &format!("mark {class}"), &point.tip);
        }
    }
    let says: Vec<&str> = points().map(|p| p.tip.as_str()).collect();
    svg.finish(&format!("Freeze in ms against memory in MiB. {}.", says.join("; ")))
}

//! In what order the source sends what follows. Pure.
//!
//! Whoever waits for a page gets that page, and a few behind it, on a connection of its own. The rest goes in pieces, beginning where faults were
//! last: upward and downward from there in turn, since programs walk through memory both ways, until enough around it is there; then from the
//! beginning of what is left. No page is sent twice: one that is under way when it is asked for arrives soon, because little is under way at a time.

use super::bits::Bits;
use crate::image::PAGE;
use std::collections::{BTreeMap, VecDeque};

/// Pages that go with the one asked for.
pub const WINDOW: u64 = 8;
/// Pages in a piece of the push.
pub const PIECE: u64 = 64;
/// Runs in a piece.
const RUNS: usize = 256;
/// Places of faults that are kept.
const HINTS: usize = 16;
/// How far from a fault the push follows it, each way.
const REACH: u64 = 4 << 20;

#[derive(Debug, Clone, Copy)]
struct Hint {
    name: u32,
    up: u64,
    down: u64,
    /// Bytes still to be followed, each way.
    reach: (u64, u64),
    turn: bool,
}

/// What has not been sent yet.
#[derive(Debug, Default)]
pub struct Left {
    spaces: BTreeMap<u32, Bits>,
    hints: VecDeque<Hint>,
    pages: u64,
}

impl Left {
    /// These ranges: (name, start, end).
    pub fn new(ranges: impl IntoIterator<Item = (u32, u64, u64)>) -> Left {
        let mut left = Left::default();
        for (name, start, end) in ranges {
            left.spaces.entry(name).or_default().insert(start, end);
        }
        left.count();
        left
    }

    fn count(&mut self) {
        self.pages = self.spaces.values().map(Bits::len).sum();
    }

    /// Pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    fn take(&mut self, name: u32, start: u64, end: u64) {
        if let Some(b) = self.spaces.get_mut(&name) {
            self.pages -= b.remove(start, end);
        }
    }

    /// Somebody waits for this page: what is sent at once. Empty: it is on its way already.
    pub fn fault(&mut self, name: u32, at: u64) -> Vec<(u64, u64)> {
        let page = at & !(PAGE - 1);
        let end = page + WINDOW * PAGE;
        let Some(bits) = self.spaces.get(&name) else { return Vec::new() };
        let ranges: Vec<(u64, u64)> = if bits.contains(page) {
            bits.ranges(page, end).collect()
        } else {
            Vec::new()
        };
        for (a, b) in &ranges {
            self.take(name, *a, *b);
        }
        // A fault near an earlier one replaces it: the program has walked on.
        let near = |h: &Hint| h.name == name && h.down.saturating_sub(REACH) <= page && page <= h.up + REACH;
        self.hints.retain(|h| !near(h));
        self.hints.push_front(Hint {
            name,
            up: end,
            down: page,
            reach: (REACH, REACH),
            turn: true,
        });
        self.hints.truncate(HINTS);
        ranges
    }

    /// The next piece to push, as ranges of one space.
    pub fn take_piece(&mut self) -> Option<(u32, Vec<(u64, u64)>)> {
        while let Some(mut h) = self.hints.pop_front() {
            let piece = self.follow(&mut h);
            if h.reach.0 > 0 || h.reach.1 > 0 {
                self.hints.push_front(h);
            }
            if let Some(ranges) = piece {
                for (a, b) in &ranges {
                    self.take(h.name, *a, *b);
                }
                return Some((h.name, ranges));
            }
        }
        let (name, bits) = self.spaces.iter().find(|(_, b)| !b.is_empty())?;
        let name = *name;
        let ranges = gather(bits, 0, 1 << 57);
        for (a, b) in &ranges {
            self.take(name, *a, *b);
        }
        Some((name, ranges))
    }

    fn follow(&self, h: &mut Hint) -> Option<Vec<(u64, u64)>> {
        let bits = self.spaces.get(&h.name).filter(|b| !b.is_empty());
        let Some(bits) = bits else {
            h.reach = (0, 0);
            return None;
        };
        for _ in 0..2 {
            h.turn = !h.turn;
            if !h.turn && h.reach.0 > 0 {
                let ranges = gather(bits, h.up, h.up + h.reach.0);
                let to = ranges.last().map_or(h.up + h.reach.0, |r| r.1);
                h.reach.0 -= (to - h.up).min(h.reach.0);
                h.up = to;
                if !ranges.is_empty() {
                    return Some(ranges);
                }
            }
            if h.turn && h.reach.1 > 0 {
                let floor = h.down.saturating_sub(h.reach.1);
                let Some(last) = bits.last_below(h.down).filter(|l| *l >= floor) else {
                    h.reach.1 = 0;
                    continue;
                };
                let from = (last + PAGE).saturating_sub(PIECE * PAGE).max(floor);
                let ranges: Vec<(u64, u64)> = bits.ranges(from, last + PAGE).collect();
                h.reach.1 -= (h.down - from).min(h.reach.1);
                h.down = from;
                return Some(ranges);
            }
        }
        None
    }
}

/// A piece's worth of pages from an address on.
fn gather(bits: &Bits, from: u64, end: u64) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    let (mut at, mut spare) = (from, PIECE * PAGE);
    while spare > 0
        && out.len() < RUNS
        && let Some((a, b)) = bits.next(at, end, spare)
    {
        out.push((a, b));
        spare -= b - a;
        at = b;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn every_page_goes_once(ranges in proptest::collection::vec((0u32..2, 0u64..5000, 1u64..600), 1..12),
                                faults in proptest::collection::vec((0u32..3, 0u64..6000, 0usize..6), 0..40)) {
            let mut all = BTreeSet::new();
            for (n, a, l) in &ranges {
                all.extend((*a..a + l).map(|p| (*n, p)));
            }
            let mut left = Left::new(ranges.iter().map(|(n, a, l)| (*n, a * PAGE, (a + l) * PAGE)));
            prop_assert_eq!(left.pages(), all.len() as u64);
            let mut sent = BTreeSet::new();
            let mut note = |name: u32, ranges: Vec<(u64, u64)>| {
                for (a, b) in ranges {
                    for p in a / PAGE..b / PAGE {
                        assert!(sent.insert((name, p)), "sent twice");
                    }
                }
            };
            for (name, page, pushes) in faults {
                let got = left.fault(name, page * PAGE + 5);
                if let Some(first) = got.first() {
                    prop_assert_eq!(first.0, page * PAGE, "the page asked for comes first");
                }
                note(name, got);
                for _ in 0..pushes {
                    if let Some((name, ranges)) = left.take_piece() {
                        prop_assert!(!ranges.is_empty());
                        note(name, ranges);
                    }
                }
            }
            while let Some((name, ranges)) = left.take_piece() {
                prop_assert!(ranges.iter().map(|r| r.1 - r.0).sum::<u64>() <= PIECE * PAGE);
                note(name, ranges);
            }
            prop_assert_eq!(left.pages(), 0);
            prop_assert_eq!(sent, all);
        }
    }

    #[test]
    fn the_push_follows_a_fault_both_ways() {
        let mut left = Left::new([(0, 0, 64 << 20)]);
        let at = 32 << 20;
        assert_eq!(left.fault(0, at), [(at, at + WINDOW * PAGE)]);
        let up = (at + WINDOW * PAGE, at + (WINDOW + PIECE) * PAGE);
        assert_eq!(left.take_piece(), Some((0, vec![up])));
        assert_eq!(left.take_piece(), Some((0, vec![(at - PIECE * PAGE, at)])));
        assert_eq!(left.take_piece(), Some((0, vec![(up.1, up.1 + PIECE * PAGE)])));
        // Asked for once more while it is under way: nothing is sent again.
        assert!(left.fault(0, at).is_empty());
        // Where nobody is, it begins at the beginning, once what is around the fault is there.
        let mut rest: Vec<u64> = std::iter::from_fn(|| left.take_piece()).map(|p| p.1[0].0).collect();
        let first = rest.iter().position(|a| *a == 0).unwrap();
        let around = rest.drain(..first).filter(|a| a.abs_diff(at) > REACH + PIECE * PAGE).count();
        assert_eq!(around, 0);
    }
}

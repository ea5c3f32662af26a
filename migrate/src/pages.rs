//! Sets of pages of one address space, as ranges. Pure.
//!
//! What is dirty, what was sent, what has gone: each is a [`PageSet`], and a round is a few unions and differences of them. Dirty pages come in
//! runs and a scan reports runs, so a sorted vector of ranges is smaller than a bitmap of a sparse 64 GiB reserve, and every operation of two sets
//! is one merge of two sorted lists.

use crate::image::PAGE;

/// A set of 4 KiB pages, by their addresses.
///
/// Kept as half-open byte ranges `(start, end)`, each page aligned and not empty, ascending, with a gap between any two: one set has one
/// representation, so that `==` compares sets. Every range given to it is rounded outward to whole pages; an empty or reversed one counts as nothing;
/// what would lie in the last page of the 64-bit space, where no address of a program is, is cut off. Nothing here panics.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct PageSet {
    ranges: Vec<(u64, u64)>,
}

/// Whole pages that hold the bytes `start..end`; `None` when there are none.
fn outward(start: u64, end: u64) -> Option<(u64, u64)> {
    let first = start & !(PAGE - 1);
    let last = end.checked_next_multiple_of(PAGE).unwrap_or(!(PAGE - 1));
    (start < end && first < last).then_some((first, last))
}

impl PageSet {
    /// No pages.
    pub const fn new() -> PageSet {
        PageSet { ranges: Vec::new() }
    }

    /// The pages of some byte ranges, in any order, which may overlap. O(n) when they ascend, else O(n log n).
    pub fn from_ranges(ranges: impl IntoIterator<Item = (u64, u64)>) -> PageSet {
        let ranges = ranges.into_iter();
        let mut set = PageSet {
            ranges: Vec::with_capacity(ranges.size_hint().0),
        };
        let mut behind = Vec::new();
        for (start, end) in ranges.filter_map(|(start, end)| outward(start, end)) {
            match set.ranges.last() {
                Some(last) if start < last.0 => behind.push((start, end)),
                _ => set.append(start, end),
            }
        }
        if behind.is_empty() {
            return set;
        }
        behind.sort_unstable();
        let mut rest = PageSet::new();
        behind.into_iter().for_each(|(start, end)| rest.append(start, end));
        set.union(&rest)
    }

    /// Adds an aligned range that starts at or after the start of the last one.
    fn append(&mut self, start: u64, end: u64) {
        match self.ranges.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => self.ranges.push((start, end)),
        }
    }

    /// Index of the first range that ends after this byte.
    fn first_after(&self, byte: u64) -> usize {
        self.ranges.partition_point(|r| r.1 <= byte)
    }

    /// Adds the pages of the bytes `start..end`. O(1) amortised at the end of the set, else a binary search and the move of what lies behind.
    pub fn insert(&mut self, start: u64, end: u64) {
        let Some((start, end)) = outward(start, end) else { return };
        if self.ranges.last().is_none_or(|last| start >= last.0) {
            return self.append(start, end);
        }
        // Ranges that touch the new one, neighbours included, become one with it.
        let from = self.ranges.partition_point(|r| r.1 < start);
        let to = from + self.ranges[from..].partition_point(|r| r.0 <= end);
        let joined = match self.ranges.get(from..to) {
            Some([first, .., last]) => (first.0.min(start), last.1.max(end)),
            Some([only]) => (only.0.min(start), only.1.max(end)),
            _ => (start, end),
        };
        self.ranges.splice(from..to, [joined]);
    }

    /// Takes out the pages of the bytes `start..end`: every page that holds one of them.
    pub fn remove(&mut self, start: u64, end: u64) {
        let Some((start, end)) = outward(start, end) else { return };
        let from = self.first_after(start);
        let to = from + self.ranges[from..].partition_point(|r| r.0 < end);
        let Some(hit) = self.ranges.get(from..to).filter(|hit| !hit.is_empty()) else {
            return;
        };
        let left = (hit[0].0, start);
        let right = (end, hit[hit.len() - 1].1);
        let rest = [left, right].into_iter().filter(|r| r.0 < r.1);
        self.ranges.splice(from..to, rest);
    }

    /// Pages that are in either. O(n + m).
    #[must_use]
    pub fn union(&self, other: &PageSet) -> PageSet {
        let mut out = PageSet {
            ranges: Vec::with_capacity(self.ranges.len().max(other.ranges.len())),
        };
        let (mut a, mut b) = (self.ranges.iter().peekable(), other.ranges.iter().peekable());
        loop {
            let next = match (a.peek(), b.peek()) {
                (Some(x), Some(y)) if x.0 <= y.0 => a.next(),
                (_, Some(_)) => b.next(),
                (_, None) => a.next(),
            };
            let Some(&(start, end)) = next else { return out };
            out.append(start, end);
        }
    }

    /// Pages that are in both. O(n + m).
    #[must_use]
    pub fn intersection(&self, other: &PageSet) -> PageSet {
        let mut out = PageSet::new();
        let (mut a, mut b) = (self.ranges.iter().peekable(), other.ranges.iter().peekable());
        while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
            let both = (x.0.max(y.0), x.1.min(y.1));
            let a_is_done = x.1 <= y.1;
            if both.0 < both.1 {
                out.ranges.push(both);
            }
            if a_is_done {
                a.next()
            } else {
                b.next()
            };
        }
        out
    }

    /// Pages of this set that are not in the other. O(n + m).
    #[must_use]
    pub fn difference(&self, other: &PageSet) -> PageSet {
        let mut out = PageSet::new();
        let mut holes = other.ranges.iter().peekable();
        for &(mut start, end) in &self.ranges {
            while start < end {
                match holes.peek() {
                    Some(hole) if hole.1 <= start => {
                        holes.next();
                    }
                    Some(hole) if hole.0 < end => {
                        if start < hole.0 {
                            out.ranges.push((start, hole.0));
                        }
                        start = hole.1;
                    }
                    _ => {
                        out.ranges.push((start, end));
                        break;
                    }
                }
            }
        }
        out
    }

    /// The part inside the pages of the bytes `start..end`. O(log n + size of the part).
    #[must_use]
    pub fn clip(&self, start: u64, end: u64) -> PageSet {
        let Some((start, end)) = outward(start, end) else {
            return PageSet::new();
        };
        let inside = self.ranges[self.first_after(start)..].iter().take_while(|r| r.0 < end);
        PageSet {
            ranges: inside.map(|r| (r.0.max(start), r.1.min(end))).collect(),
        }
    }

    /// Adds all pages of the other set.
    pub fn extend(&mut self, other: &PageSet) {
        match (self.ranges.last(), other.ranges.first()) {
            (_, None) => {}
            // The usual case while a scan goes from one mapping to the next: no copy of what is there already.
            (Some(&last), Some(first)) if first.0 >= last.0 => {
                let apart = other.ranges.partition_point(|r| r.0 <= last.1);
                let (near, rest) = other.ranges.split_at(apart);
                near.iter().for_each(|r| self.append(r.0, r.1));
                // What `near` has added ends before the next of the same set begins.
                self.ranges.extend_from_slice(rest);
            }
            (None, _) => self.ranges.clone_from(&other.ranges),
            _ => *self = self.union(other),
        }
    }

    /// Takes out all pages of the other set.
    pub fn subtract(&mut self, other: &PageSet) {
        if !self.is_empty() && !other.is_empty() {
            *self = self.difference(other);
        }
    }

    /// Takes out every page.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Whether the page that holds this byte is in the set. O(log n).
    pub fn contains(&self, addr: u64) -> bool {
        self.ranges.get(self.first_after(addr)).is_some_and(|r| r.0 <= addr)
    }

    /// Whether any page of the bytes `start..end` is in the set. O(log n).
    pub fn overlaps(&self, start: u64, end: u64) -> bool {
        outward(start, end).is_some_and(|(start, end)| self.ranges.get(self.first_after(start)).is_some_and(|r| r.0 < end))
    }

    /// The ranges, as described at [`PageSet`].
    pub fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|r| r.1 - r.0).sum()
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE
    }

    /// No page is in it.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use std::collections::BTreeSet;

    /// The naive twin: page numbers.
    type Twin = BTreeSet<u64>;

    fn twin_of(ranges: &[(u64, u64)]) -> Twin {
        ranges
            .iter()
            .filter(|r| r.0 < r.1)
            .flat_map(|r| r.0 / PAGE..r.1.div_ceil(PAGE))
            .collect()
    }

    /// Checks the representation too.
    fn pages_of(set: &PageSet) -> Twin {
        assert!(
            set.ranges().iter().all(|r| r.0 < r.1 && r.0 % PAGE == 0 && r.1 % PAGE == 0),
            "{set:?}"
        );
        assert!(set.ranges().windows(2).all(|w| w[0].1 < w[1].0), "{set:?}");
        twin_of(set.ranges())
    }

    /// Few pages, so that ranges touch, overlap and fall into one another; odd bytes too.
    fn range() -> impl Strategy<Value = (u64, u64)> {
        prop_oneof![
            4 => (0u64..64, 0u64..12).prop_map(|(at, n)| (at * PAGE, (at + n) * PAGE)),
            1 => (0u64..64 * PAGE, 0u64..64 * PAGE),
        ]
    }

    fn ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
        vec(range(), 0..24)
    }

    #[test]
    fn the_ends_of_the_address_space() {
        let all = PageSet::from_ranges([(0, u64::MAX)]);
        assert_eq!(all.ranges(), [(0, u64::MAX - 4095)]);
        assert!(all.contains(0) && !all.contains(u64::MAX));
        assert!(PageSet::from_ranges([(u64::MAX - 1, u64::MAX)]).is_empty());
        let mut set = all.clone();
        set.remove(u64::MAX - 5, u64::MAX);
        assert_eq!(set, all);
        set.remove(1, 2);
        assert_eq!(set.ranges(), [(4096, u64::MAX - 4095)]);
        set.insert(0, 4096);
        assert_eq!(set, all);
        assert!(all.overlaps(0, u64::MAX) && !all.overlaps(7, 7) && !all.overlaps(8, 7));
    }

    #[test]
    fn neighbours_become_one() {
        let mut set = PageSet::new();
        for at in [6, 2, 4, 3] {
            set.insert(at * PAGE, (at + 1) * PAGE);
        }
        assert_eq!(set.ranges(), [(2 * PAGE, 5 * PAGE), (6 * PAGE, 7 * PAGE)]);
        set.insert(5 * PAGE + 1, 5 * PAGE + 2);
        assert_eq!(set.ranges(), [(2 * PAGE, 7 * PAGE)]);
        assert_eq!((set.bytes(), set.pages()), (5 * PAGE, 5));
    }

    proptest! {
        #[test]
        fn from_ranges_is_the_twin(r in ranges()) {
            prop_assert_eq!(pages_of(&PageSet::from_ranges(r.iter().copied())), twin_of(&r));
        }

        #[test]
        fn insert_and_remove_are_the_twin_s(ops in vec((any::<bool>(), range()), 0..60)) {
            let (mut set, mut twin) = (PageSet::new(), Twin::new());
            for (add, (start, end)) in ops {
                let pages = twin_of(&[(start, end)]);
                if add {
                    set.insert(start, end);
                    twin.extend(pages);
                } else {
                    set.remove(start, end);
                    twin.retain(|p| !pages.contains(p));
                }
                prop_assert_eq!(&pages_of(&set), &twin);
                prop_assert_eq!(set.is_empty(), twin.is_empty());
            }
        }

        #[test]
        fn ascending_inserts_are_appends(mut r in ranges()) {
            r.sort_unstable();
            let mut set = PageSet::new();
            r.iter().for_each(|r| set.insert(r.0, r.1));
            prop_assert_eq!(pages_of(&set), twin_of(&r));
        }

        #[test]
        fn operations_of_two_sets(a in ranges(), b in ranges()) {
            let (ta, tb) = (twin_of(&a), twin_of(&b));
            let (a, b) = (PageSet::from_ranges(a), PageSet::from_ranges(b));
            prop_assert_eq!(pages_of(&a.union(&b)), ta.union(&tb).copied().collect::<Twin>());
            prop_assert_eq!(pages_of(&a.intersection(&b)), ta.intersection(&tb).copied().collect::<Twin>());
            prop_assert_eq!(pages_of(&a.difference(&b)), ta.difference(&tb).copied().collect::<Twin>());
            let (mut more, mut less) = (a.clone(), a.clone());
            more.extend(&b);
            less.subtract(&b);
            prop_assert_eq!(more, a.union(&b));
            prop_assert_eq!(less, a.difference(&b));
            prop_assert_eq!(a.pages(), ta.len() as u64);
            prop_assert_eq!(a.bytes(), ta.len() as u64 * PAGE);
        }

        #[test]
        fn one_after_the_other(a in ranges(), b in ranges(), gap in 0u64..8) {
            // The append path of `extend`, touching and apart.
            let a = PageSet::from_ranges(a);
            let from = a.ranges().last().map_or(0, |r| r.1);
            let b = PageSet::from_ranges(b.into_iter().map(|r| (r.0 + from + gap * PAGE, r.1 + from + gap * PAGE)));
            let mut both = a.clone();
            both.extend(&b);
            prop_assert_eq!(pages_of(&both), pages_of(&a).union(&pages_of(&b)).copied().collect::<Twin>());
        }

        #[test]
        fn questions(r in ranges(), (start, end) in range(), addr in 0u64..80 * PAGE) {
            let (set, twin) = (PageSet::from_ranges(r.iter().copied()), twin_of(&r));
            let asked = twin_of(&[(start, end)]);
            prop_assert_eq!(set.contains(addr), twin.contains(&(addr / PAGE)));
            prop_assert_eq!(set.overlaps(start, end), !twin.is_disjoint(&asked));
            prop_assert_eq!(pages_of(&set.clip(start, end)), twin.intersection(&asked).copied().collect::<Twin>());
            let mut none = set;
            none.clear();
            prop_assert!(none.is_empty() && none == PageSet::new());
        }

        #[test]
        fn nothing_panics(ops in vec((0u8..6, any::<u64>(), any::<u64>()), 0..30)) {
            let mut set = PageSet::new();
            for (op, start, end) in ops {
                match op {
                    0 | 1 => set.insert(start, end),
                    2 => set.remove(start, end),
                    3 => { let _ = (set.clip(start, end), set.overlaps(start, end), set.contains(start)); }
                    4 => set.extend(&PageSet::from_ranges([(start, end), (end, start)])),
                    _ => set.subtract(&PageSet::from_ranges([(end, start)])),
                }
                assert!(set.ranges().windows(2).all(|w| w[0].1 < w[1].0));
            }
        }
    }
}

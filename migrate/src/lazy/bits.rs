//! A set of pages that is taken apart page by page.
//!
//! A [`crate::pages::PageSet`] is a sorted list of ranges, made for unions and differences of whole sets. Here pages leave one at a time and in any
//! order, and every hole in a list of ranges moves what lies behind it. So it is a bitmap, cut into blocks of 2 MiB (512 bits) that exist only
//! where there are pages: 64 bytes for 2 MiB, nothing for a sparse reserve.

use crate::image::PAGE;
use std::collections::BTreeMap;

const WORDS: usize = 8;
/// Bytes of address space in a block.
const BLOCK: u64 = WORDS as u64 * 64 * PAGE;

/// See the module. Ranges given to it are page aligned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bits {
    blocks: BTreeMap<u64, [u64; WORDS]>,
    pages: u64,
}

/// Bits `from..to` of a block as words.
fn mask(from: u64, to: u64) -> [u64; WORDS] {
    let mut m = [0; WORDS];
    for (w, word) in m.iter_mut().enumerate() {
        let (a, b) = (from.max(w as u64 * 64), to.min((w as u64 + 1) * 64));
        if a < b {
            *word = (u64::MAX >> (64 - (b - a))) << (a % 64);
        }
    }
    m
}

/// The first bit from `at` on that is (or is not) set.
fn find(words: &[u64; WORDS], at: u64, set: bool) -> Option<u64> {
    let mut at = at;
    while at < WORDS as u64 * 64 {
        let w = (at / 64) as usize;
        let word = if set { words[w] } else { !words[w] } >> (at % 64);
        if word != 0 {
            return Some(at + u64::from(word.trailing_zeros()));
        }
        at = (w as u64 + 1) * 64;
    }
    None
}

/// The pieces of a range by block: (block, first bit, bit behind the last).
fn pieces(start: u64, end: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let block = at / BLOCK;
        let base = block * BLOCK;
        let stop = end.min(base + BLOCK);
        let piece = (block, (at - base) / PAGE, (stop - base) / PAGE);
        at = stop;
        Some(piece)
    })
}

impl Bits {
    /// Adds the pages of `start..end`.
    pub fn insert(&mut self, start: u64, end: u64) {
        for (block, from, to) in pieces(start, end) {
            let words = self.blocks.entry(block).or_default();
            for (w, m) in words.iter_mut().zip(mask(from, to)) {
                self.pages += u64::from((m & !*w).count_ones());
                *w |= m;
            }
        }
    }

    /// Takes them out; how many were there.
    pub fn remove(&mut self, start: u64, end: u64) -> u64 {
        let mut gone = 0;
        if start >= end {
            return 0;
        }
        // A range may be all of an address space: only blocks that exist are looked at.
        let blocks: Vec<u64> = self.blocks.range(start / BLOCK..=(end - 1) / BLOCK).map(|b| *b.0).collect();
        for block in blocks {
            let base = block * BLOCK;
            let from = start.saturating_sub(base).min(BLOCK) / PAGE;
            let to = (end - base).min(BLOCK) / PAGE;
            let Some(words) = self.blocks.get_mut(&block) else { continue };
            for (w, m) in words.iter_mut().zip(mask(from, to)) {
                gone += u64::from((m & *w).count_ones());
                *w &= !m;
            }
            if *words == [0; WORDS] {
                self.blocks.remove(&block);
            }
        }
        self.pages -= gone;
        gone
    }

    /// Whether the page at this address is in it.
    pub fn contains(&self, at: u64) -> bool {
        let bit = at % BLOCK / PAGE;
        self.blocks
            .get(&(at / BLOCK))
            .is_some_and(|w| w[(bit / 64) as usize] >> (bit % 64) & 1 != 0)
    }

    /// How many pages.
    pub fn len(&self) -> u64 {
        self.pages
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// The first run of pages at or behind `from`, cut off at `end` and after `most` bytes.
    pub fn next(&self, from: u64, end: u64, most: u64) -> Option<(u64, u64)> {
        let mut start: Option<u64> = None;
        let mut expected = 0;
        if from >= end {
            return None;
        }
        for (&block, words) in self.blocks.range(from / BLOCK..=(end - 1) / BLOCK) {
            let base = block * BLOCK;
            if let Some(s) = start
                && base != expected
            {
                return Some((s, expected));
            }
            let mut at = from.saturating_sub(base).min(BLOCK) / PAGE;
            if start.is_none() {
                match find(words, at, true) {
                    Some(bit) => {
                        let s = base + bit * PAGE;
                        if s >= end {
                            return None;
                        }
                        start = Some(s);
                        at = bit;
                    }
                    None => continue,
                }
            }
            let s = start?;
            let limit = end.min(s + most);
            if let Some(bit) = find(words, at, false) {
                return Some((s, (base + bit * PAGE).min(limit)));
            }
            expected = base + BLOCK;
            if expected >= limit {
                return Some((s, limit));
            }
        }
        start.map(|s| (s, expected))
    }

    /// The last page below `before`, by its address.
    pub fn last_below(&self, before: u64) -> Option<u64> {
        if before == 0 {
            return None;
        }
        self.blocks.range(..=(before - 1) / BLOCK).rev().find_map(|(&block, words)| {
            let base = block * BLOCK;
            let to = (before - base).min(BLOCK) / PAGE;
            let below = mask(0, to);
            (0..WORDS).rev().find_map(|w| {
                let word = words[w] & below[w];
                (word != 0).then(|| base + (w as u64 * 64 + 63 - u64::from(word.leading_zeros())) * PAGE)
            })
        })
    }

    /// The runs of pages inside `start..end`, ascending.
    pub fn ranges(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut at = start;
        std::iter::from_fn(move || {
            let run = self.next(at, end, u64::MAX >> 8)?;
            at = run.1;
            Some(run)
        })
    }

    /// All runs.
    pub fn all(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.ranges(0, 1 << 57)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn as_a_set_of_pages(steps in proptest::collection::vec((any::<bool>(), 0u64..3000, 1u64..1200), 1..40), probe in 0u64..4000, most in 1u64..700) {
            let (mut bits, mut model) = (Bits::default(), BTreeSet::new());
            for (add, start, len) in steps {
                let range = (start * PAGE, (start + len) * PAGE);
                if add {
                    bits.insert(range.0, range.1);
                    model.extend(start..start + len);
                } else {
                    let before = model.len();
                    model.retain(|p| !(start..start + len).contains(p));
                    prop_assert_eq!(bits.remove(range.0, range.1), (before - model.len()) as u64);
                }
            }
            prop_assert_eq!(bits.len(), model.len() as u64);
            prop_assert_eq!(bits.contains(probe * PAGE), model.contains(&probe));
            let pages: Vec<u64> = bits.all().flat_map(|(a, b)| a / PAGE..b / PAGE).collect();
            prop_assert_eq!(&pages, &model.iter().copied().collect::<Vec<_>>());
            prop_assert!(bits.all().zip(bits.all().skip(1)).all(|(a, b)| a.1 < b.0), "runs are as long as they can be");
            let first = model.range(probe..).next().copied();
            let run = bits.next(probe * PAGE, 1 << 40, most * PAGE);
            prop_assert_eq!(run.map(|r| r.0 / PAGE), first);
            if let Some((a, b)) = run {
                prop_assert!(b - a <= most * PAGE && a < b);
                let full = (a / PAGE..b / PAGE).all(|p| model.contains(&p));
                prop_assert!(full && (b - a == most * PAGE || !model.contains(&(b / PAGE))));
            }
            prop_assert_eq!(bits.last_below(probe * PAGE).map(|a| a / PAGE), model.range(..probe).next_back().copied());
        }
    }
}

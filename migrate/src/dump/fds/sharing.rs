//! Which descriptors share one open file description.
//!
//! Only descriptors that look equal (same link, offset, flags, fdinfo) are compared, with kcmp(2). Its order lets each be placed by binary
//! search: n descriptors of k descriptions cost n log k calls, so neither a large table nor many processes with inherited ones are slow.
//! A call is 0.8 µs, and 10,000 descriptors of one device took 120 ms of a freeze: the order that the inventory found is remembered, and whoever comes in
//! that order is compared once, with the one before. It is a hint: what the kernel says counts.

use super::{DumpError, Mode, Source, table::Raw};
use crate::sys::fdcalls;
use std::{cmp::Ordering, collections::HashMap};

/// An open file description and the descriptors that refer to it.
#[derive(Debug)]
pub(super) struct Open {
    /// Indices into the raw table, ascending; never empty.
    pub holders: Vec<usize>,
}

impl Open {
    /// The descriptor it is looked at through.
    pub fn first(&self) -> usize {
        self.holders[0]
    }
}

/// The kernel's order of descriptors that look alike, as an earlier look found it: the place in it, by process and number.
#[derive(Debug, Default)]
pub(super) struct Order(HashMap<(i32, i32), u32>);

#[cfg(test)]
impl Order {
    /// One that is no longer true: places multiplied, and every fifth descriptor unknown.
    pub fn mixed(&self, by: u32) -> Order {
        let known = self.0.iter().filter(|((_, fd), _)| fd % 5 != 0);
        Order(known.map(|(&name, &at)| (name, at * by % 23)).collect())
    }
}

/// Finds the descriptions, ordered by their first descriptor.
pub(super) fn group(sources: &[Source], raws: &[Raw], mode: Mode, order: &mut Order) -> Result<Vec<Open>, DumpError> {
    let name = |i: usize| (sources[raws[i].process].pid, raws[i].fd);
    let mut alike: HashMap<u64, Vec<usize>> = HashMap::with_capacity(raws.len());
    for (i, raw) in raws.iter().enumerate() {
        alike.entry(raw.key).or_default().push(i);
    }
    let mut opens = Vec::with_capacity(alike.len());
    for mut members in alike.into_values() {
        if members.len() == 1 {
            opens.push(Open { holders: members });
            continue;
        }
        members.sort_by_cached_key(|&i| order.0.get(&name(i)).copied().unwrap_or(u32::MAX));
        // Sorted by the kernel's order.
        let mut found: Vec<Open> = Vec::new();
        for i in members {
            match position(sources, raws, &found, i) {
                Ok(Ok(at)) => found[at].holders.push(i),
                Ok(Err(at)) => found.insert(at, Open { holders: vec![i] }),
                // Closed meanwhile.
                Err(_) if mode == Mode::Inventory => {}
                Err(e) => return Err(DumpError::new(sources[raws[i].process].pid, raws[i].fd, "kcmp", e)),
            }
        }
        if mode == Mode::Inventory {
            let places = found.iter().zip(0..);
            order
                .0
                .extend(places.flat_map(|(open, at)| open.holders.iter().map(move |&i| (name(i), at))));
        }
        // Ascending, as without a hint.
        found.iter_mut().for_each(|open| open.holders.sort_unstable());
        opens.append(&mut found);
    }
    opens.sort_unstable_by_key(Open::first);
    Ok(opens)
}

fn position(sources: &[Source], raws: &[Raw], found: &[Open], i: usize) -> std::io::Result<Result<usize, usize>> {
    let of = |r: &Raw| (sources[r.process].pid, r.fd);
    let (mut low, mut high) = (0, found.len());
    // The last one first: that is all for those that come in order.
    let mut middle = high.saturating_sub(1);
    while low < high {
        match fdcalls::compare_files(of(&raws[found[middle].first()]), of(&raws[i]))? {
            Ordering::Equal => return Ok(Ok(middle)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
        middle = (low + high) / 2;
    }
    Ok(Err(low))
}

/// Pairs of tasks of different processes that share one descriptor table (clone(2), CLONE_FILES): indices into `sources`.
pub(super) fn shared_tables(sources: &[Source]) -> Vec<(usize, usize)> {
    let mut sorted: Vec<usize> = Vec::new();
    let mut shared = Vec::new();
    for i in 0..sources.len() {
        let (mut low, mut high) = (0, sorted.len());
        let mut equal = None;
        while low < high {
            let middle = (low + high) / 2;
            match fdcalls::compare_tables(sources[sorted[middle]].pid, sources[i].pid) {
                Ok(Ordering::Less) => low = middle + 1,
                Ok(Ordering::Greater) => high = middle,
                Ok(Ordering::Equal) => {
                    equal = Some(sorted[middle]);
                    break;
                }
                // A process that is gone or has no table shares none.
                Err(_) => break,
            }
        }
        match equal {
            Some(other) => shared.push((other, i)),
            None => sorted.insert(low, i),
        }
    }
    shared
}

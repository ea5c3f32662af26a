//! What is missing where, while the program runs on and moves its memory about. Pure.
//!
//! A *space* here is an address space of the running copy, one for each userfaultfd: those that the copy began with, and those that fork(2) makes
//! of them. Its *regions* say which memory of the source lies where: the source knows a page only by the name of its address space and the address
//! it had at the freeze (its *origin*), wherever the program has moved it by now. What is missing is kept by present addresses. One page of the
//! source may be missing in several spaces, when a process that still missed it has forked.
//!
//! The kernel's events (userfaultfd(2)) change it: a fork copies a space, mremap(2) moves a piece, munmap(2) ends one, and of a range that was dropped
//! by madvise(2) nothing is missing any more: it reads as zeros, as it would have where the program came from.
//!
//! Of shared memory ([`super::object`]) it is the object that misses pages, by their offsets; regions say where which object is mapped. Nothing that a
//! process does to its own mappings changes what the object misses.

use super::bits::Bits;
use crate::{dump::pages::OBJECT_SPACE, image::PAGE};
use std::collections::{BTreeMap, HashMap};

/// A range of present addresses, and where its first byte was at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// Behind the last.
    pub end: u64,
    /// Name of the address space at the source, or of an object.
    pub name: u32,
    /// Address of the first byte there, or its offset.
    pub origin: u64,
}

impl Region {
    /// Whether it is shared memory.
    pub fn shared(&self) -> bool {
        self.name >= OBJECT_SPACE
    }
}

#[derive(Debug, Clone, Default)]
struct Space {
    /// By their starts; disjoint.
    regions: BTreeMap<u64, Region>,
    /// Starts of the regions of private memory by name and origin, which are disjoint as well.
    by_origin: BTreeMap<(u32, u64), u64>,
    missing: Bits,
}

impl Space {
    fn put(&mut self, r: Region) {
        self.regions.insert(r.start, r);
        if !r.shared() {
            self.by_origin.insert((r.name, r.origin), r.start);
        }
    }

    fn take(&mut self, r: Region) {
        self.regions.remove(&r.start);
        if !r.shared() {
            self.by_origin.remove(&(r.name, r.origin));
        }
    }

    /// Regions with memory of a range of the source.
    fn with_origin(&self, name: u32, start: u64, end: u64) -> impl Iterator<Item = &Region> {
        let candidates = self.by_origin.range((name, 0)..(name, end)).rev();
        candidates
            .filter_map(|(_, at)| self.regions.get(at))
            .take_while(move |r| r.origin + (r.end - r.start) > start)
    }

    /// Takes the regions of a range out, with parts of those at its borders.
    fn cut(&mut self, start: u64, end: u64) -> Vec<Region> {
        let mut out = Vec::new();
        let first = self.regions.range(..start).next_back().map_or(start, |r| *r.0);
        let hit: Vec<Region> = self.regions.range(first..end).map(|r| *r.1).filter(|r| r.end > start).collect();
        for r in hit {
            self.take(r);
            let part = |a: u64, b: u64| Region {
                start: a,
                end: b,
                name: r.name,
                origin: r.origin + (a - r.start),
            };
            if r.start < start {
                self.put(part(r.start, start));
            }
            if r.end > end {
                self.put(part(end, r.end));
            }
            out.push(part(r.start.max(start), r.end.min(end)));
        }
        out
    }

    fn region(&self, at: u64) -> Option<&Region> {
        self.regions.range(..=at).next_back().map(|r| r.1).filter(|r| at < r.end)
    }
}

/// Where pages that have arrived belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which space.
    pub space: usize,
    /// Present address.
    pub start: u64,
    /// Behind the last byte.
    pub end: u64,
    /// Address of the first byte at the source.
    pub origin: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Table {
    spaces: Vec<Option<Space>>,
    /// Indices of spaces that are no more, for others.
    free: Vec<usize>,
    /// Spaces that have memory of a source's address space.
    by_name: HashMap<u32, Vec<usize>>,
    /// What objects miss, by offset.
    objects: BTreeMap<u32, Bits>,
}

impl Table {
    /// Adds a space with its regions; of them `missing` is missing.
    pub fn add(&mut self, regions: impl IntoIterator<Item = Region>, missing: impl IntoIterator<Item = (u64, u64)>) -> usize {
        let mut space = Space::default();
        regions.into_iter().for_each(|r| space.put(r));
        for (a, b) in missing {
            space.missing.insert(a, b);
        }
        self.push(space)
    }

    fn push(&mut self, space: Space) -> usize {
        let index = self.free.pop().unwrap_or(self.spaces.len());
        for r in space.regions.values() {
            let list = self.by_name.entry(r.name).or_default();
            if list.last() != Some(&index) {
                list.push(index);
            }
        }
        match self.spaces.get_mut(index) {
            Some(free) => *free = Some(space),
            None => self.spaces.push(Some(space)),
        }
        index
    }

    /// A space was forked: the child misses what its parent misses. It may get the index of one that has ended.
    pub fn fork(&mut self, parent: usize) -> usize {
        let child = self.spaces.get(parent).cloned().flatten().unwrap_or_default();
        self.push(child)
    }

    /// A space is no more.
    pub fn end(&mut self, space: usize) {
        if self.spaces.get_mut(space).and_then(Option::take).is_some() {
            self.free.push(space);
        }
        self.by_name.values_mut().for_each(|l| l.retain(|i| *i != space));
        if self.live().next().is_none() {
            self.objects.clear();
        }
    }

    /// Adds an object with what it misses.
    pub fn add_object(&mut self, name: u32, missing: impl IntoIterator<Item = (u64, u64)>) {
        let bits = self.objects.entry(name).or_default();
        missing.into_iter().for_each(|(a, b)| bits.insert(a, b));
    }

    /// What an object misses of a range.
    pub fn missing_of(&self, object: u32, start: u64, end: u64) -> Vec<(u64, u64)> {
        self.objects
            .get(&object)
            .map_or_else(Vec::new, |bits| bits.ranges(start, end).collect())
    }

    /// Pages of an object are not missing any more.
    pub fn arrived(&mut self, object: u32, start: u64, end: u64) {
        if let Some(bits) = self.objects.get_mut(&object) {
            bits.remove(start, end);
        }
    }

    /// The region at an address.
    pub fn region(&self, space: usize, at: u64) -> Option<&Region> {
        self.spaces.get(space)?.as_ref()?.region(at)
    }

    /// Whether a page of the source is missing anywhere.
    pub fn lacks(&self, name: u32, at: u64) -> bool {
        match self.objects.get(&name) {
            Some(bits) => bits.contains(at),
            None => !self.places(name, at, at + PAGE).is_empty(),
        }
    }

    /// mremap(2) has moved `len` bytes.
    pub fn moved(&mut self, space: usize, from: u64, to: u64, len: u64) {
        let Some(s) = self.get(space) else { return };
        let len = len.next_multiple_of(PAGE);
        let missing: Vec<(u64, u64)> = s.missing.ranges(from, from + len).collect();
        let regions = s.cut(from, from + len);
        s.missing.remove(from, from + len);
        // What was at the new place is gone.
        s.cut(to, to + len);
        s.missing.remove(to, to + len);
        for r in regions {
            let start = r.start - from + to;
            let end = r.end - from + to;
            s.put(Region { start, end, ..r });
        }
        for (a, b) in missing {
            s.missing.insert(a - from + to, b - from + to);
        }
    }

    /// munmap(2): nothing is there any more.
    pub fn unmapped(&mut self, space: usize, start: u64, end: u64) {
        if let Some(s) = self.get(space) {
            s.cut(start, end);
            s.missing.remove(start, end);
        }
    }

    /// madvise(2) has dropped a range: zeros from now on.
    pub fn dropped(&mut self, space: usize, start: u64, end: u64) {
        if let Some(s) = self.get(space) {
            s.missing.remove(start, end);
        }
    }

    /// Pages of a space that are there now.
    pub fn filled(&mut self, space: usize, start: u64, end: u64) {
        self.dropped(space, start, end);
    }

    fn get(&mut self, space: usize) -> Option<&mut Space> {
        self.spaces.get_mut(space).and_then(Option::as_mut)
    }

    /// The origin of the page at an address, if it is missing: (name, address at the source).
    pub fn wants(&self, space: usize, at: u64) -> Option<(u32, u64)> {
        let s = self.spaces.get(space)?.as_ref()?;
        let page = at & !(PAGE - 1);
        let private = s.missing.contains(page);
        if !private && self.objects.is_empty() {
            return None;
        }
        let r = s.region(page)?;
        let origin = r.origin + (page - r.start);
        let missing = private || self.objects.get(&r.name).is_some_and(|bits| bits.contains(origin));
        missing.then_some((r.name, origin))
    }

    /// Where the pages of a range of the source are missing now.
    pub fn places(&self, name: u32, start: u64, end: u64) -> Vec<Place> {
        let mut out = Vec::new();
        for &index in self.by_name.get(&name).into_iter().flatten() {
            let Some(s) = self.spaces[index].as_ref() else { continue };
            for r in s.with_origin(name, start, end) {
                let (a, b) = (start.max(r.origin), end.min(r.origin + (r.end - r.start)));
                let (x, y) = (a - r.origin + r.start, b - r.origin + r.start);
                out.extend(s.missing.ranges(x, y).map(|(p, q)| Place {
                    space: index,
                    start: p,
                    end: q,
                    origin: p - r.start + r.origin,
                }));
            }
        }
        out
    }

    /// Pages that are missing anywhere.
    pub fn missing(&self) -> u64 {
        let private: u64 = self.spaces.iter().flatten().map(|s| s.missing.len()).sum();
        private + self.objects.values().map(Bits::len).sum::<u64>()
    }

    /// Pages that a space misses.
    pub fn missing_in(&self, space: usize) -> u64 {
        self.spaces.get(space).and_then(Option::as_ref).map_or(0, |s| s.missing.len())
    }

    /// Everything missing, as the source knows it: (name, start, end), ascending, each page once.
    pub fn owed(&self) -> Vec<(u32, u64, u64)> {
        let mut by_name: BTreeMap<u32, Bits> = BTreeMap::new();
        for s in self.spaces.iter().flatten() {
            for r in s.regions.values().filter(|r| !r.shared()) {
                let bits = by_name.entry(r.name).or_default();
                for (a, b) in s.missing.ranges(r.start, r.end) {
                    bits.insert(a - r.start + r.origin, b - r.start + r.origin);
                }
            }
        }
        by_name
            .iter()
            .chain(&self.objects)
            .flat_map(|(name, bits)| bits.all().map(|(a, b)| (*name, a, b)).collect::<Vec<_>>())
            .collect()
    }

    /// The regions of a space.
    pub fn regions(&self, space: usize) -> impl Iterator<Item = &Region> {
        let space = self.spaces.get(space).and_then(Option::as_ref);
        space.into_iter().flat_map(|s| s.regions.values())
    }

    /// Indices of the spaces that are there.
    pub fn live(&self) -> impl Iterator<Item = usize> + '_ {
        self.spaces.iter().enumerate().filter(|(_, s)| s.is_some()).map(|(i, _)| i)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const N: u64 = 64;

    fn region(start: u64, len: u64, name: u32, origin: u64) -> Region {
        Region {
            start: start * PAGE,
            end: (start + len) * PAGE,
            name,
            origin: origin * PAGE,
        }
    }

    /// Each page of a space: what it misses there.
    type Model = Vec<Vec<Option<u64>>>;

    fn check(table: &Table, model: &Model) {
        for (i, pages) in model.iter().enumerate() {
            for (p, want) in pages.iter().enumerate() {
                let got = table.wants(i, p as u64 * PAGE + 17);
                assert_eq!(got, want.map(|o| (7, o * PAGE)), "space {i}, page {p}");
            }
        }
        let count: usize = model.iter().flatten().flatten().count();
        assert_eq!(table.missing(), count as u64);
        let mut owed: Vec<u64> = model.iter().flatten().flatten().copied().collect();
        owed.sort_unstable();
        owed.dedup();
        let got: Vec<u64> = table.owed().iter().flat_map(|r| r.1 / PAGE..r.2 / PAGE).collect();
        assert_eq!(got, owed);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Fork(usize),
        Move(usize, u64, u64, u64),
        Unmap(usize, u64, u64),
        Drop(usize, u64, u64),
        Arrive(u64, u64),
        End(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..N, 1..N / 4);
        prop_oneof![
            (0usize..3).prop_map(Step::Fork),
            (0usize..3, 0..N, 0..N, 1..N / 4).prop_map(|(s, a, b, l)| Step::Move(s, a, b, l)),
            (0usize..3, range.clone()).prop_map(|(s, (a, l))| Step::Unmap(s, a, l)),
            (0usize..3, range.clone()).prop_map(|(s, (a, l))| Step::Drop(s, a, l)),
            range.prop_map(|(a, l)| Step::Arrive(a, l)),
            (1usize..3).prop_map(Step::End),
        ]
    }

    proptest! {
        #[test]
        fn as_page_by_page(missing in proptest::collection::vec((0..N, 1..N / 3), 0..6), steps in proptest::collection::vec(step(), 0..30)) {
            let (len, at) = (N as usize, |a: u64| (a * PAGE, PAGE));
            let mut table = Table::default();
            // The first half of the space is the source's pages from 100 on, the rest those from 300 on.
            let origin = |p: u64| if p < N / 2 { 100 + p } else { 300 + p - N / 2 };
            let ranges = missing.iter().map(|(a, l)| (at(*a).0, (a + l).min(N) * PAGE));
            table.add([region(0, N / 2, 7, 100), region(N / 2, N / 2, 7, 300)], ranges);
            let mut model: Model = vec![vec![None; len]];
            let mut ended = std::collections::HashSet::new();
            for (a, l) in &missing {
                (*a..(a + l).min(N)).for_each(|p| model[0][p as usize] = Some(origin(p)));
            }
            for s in steps {
                match s {
                    Step::Fork(s) if s < model.len() && model.len() < 5 => {
                        let (child, pages) = (table.fork(s), model[s].clone());
                        if child == model.len() {
                            model.push(pages);
                        } else {
                            assert!(ended.remove(&child), "{child} is in use");
                            model[child] = pages;
                        }
                    }
                    Step::Move(s, from, to, l) if s < model.len() && from.abs_diff(to) >= l => {
                        let l = l.min(N - from).min(N - to);
                        table.moved(s, from * PAGE, to * PAGE, l * PAGE);
                        for k in 0..l as usize {
                            model[s][to as usize + k] = model[s][from as usize + k].take();
                        }
                    }
                    Step::Unmap(s, a, l) | Step::Drop(s, a, l) if s < model.len() => {
                        let end = (a + l).min(N);
                        if matches!(step_kind(&s), 0) && l % 2 == 0 {
                            table.unmapped(s, a * PAGE, end * PAGE);
                        } else {
                            table.dropped(s, a * PAGE, end * PAGE);
                        }
                        (a..end).for_each(|p| model[s][p as usize] = None);
                    }
                    Step::Arrive(a, l) => {
                        let (from, to) = (100 + a, 100 + a + l);
                        for p in table.places(7, from * PAGE, to * PAGE) {
                            let pages = (p.end - p.start) / PAGE;
                            for k in 0..pages {
                                let slot = &mut model[p.space][(p.start / PAGE + k) as usize];
                                assert_eq!(*slot, Some(p.origin / PAGE + k));
                                *slot = None;
                            }
                            table.filled(p.space, p.start, p.end);
                        }
                        assert!(model.iter().flatten().flatten().all(|o| !(from..to).contains(o)), "a place was overlooked");
                    }
                    Step::End(s) if s < model.len() => {
                        table.end(s);
                        ended.insert(s);
                        model[s] = vec![None; len];
                    }
                    _ => {}
                }
                check(&table, &model);
            }
        }
    }

    fn step_kind(s: &usize) -> usize {
        s % 2
    }

    #[test]
    fn an_object_misses_its_pages_wherever_it_is_mapped() {
        const NAME: u32 = OBJECT_SPACE + 4;
        let mut t = Table::default();
        // Twice in one process, and of another part in a second one.
        let one = t.add(
            [region(0, 8, NAME, 0), region(8, 8, 3, 50), region(20, 8, NAME, 0)],
            [(8 * PAGE, 10 * PAGE)],
        );
        let two = t.add([region(100, 4, NAME, 4)], []);
        t.add_object(NAME, [(2 * PAGE, 6 * PAGE)]);
        assert_eq!(t.missing(), 6);
        assert_eq!(t.owed(), [(3, 50 * PAGE, 52 * PAGE), (NAME, 2 * PAGE, 6 * PAGE)]);
        let wants = |t: &Table, space, page: u64| t.wants(space, page * PAGE + 5).map(|w| w.1 / PAGE);
        assert_eq!(
            (wants(&t, one, 2), wants(&t, one, 22), wants(&t, two, 101)),
            (Some(2), Some(2), Some(5))
        );
        assert_eq!((wants(&t, one, 1), wants(&t, two, 102), wants(&t, one, 8)), (None, None, Some(50)));
        // What a process does to its own mappings is no matter of the object's.
        t.dropped(one, 20 * PAGE, 28 * PAGE);
        t.moved(one, 20 * PAGE, 40 * PAGE, 8 * PAGE);
        t.unmapped(one, 0, 8 * PAGE);
        assert_eq!((wants(&t, one, 42), wants(&t, one, 22), wants(&t, one, 2)), (Some(2), None, None));
        let child = t.fork(one);
        assert_eq!(wants(&t, child, 43), Some(3));
        assert!(t.lacks(NAME, 2 * PAGE) && t.lacks(3, 50 * PAGE) && !t.lacks(NAME, 6 * PAGE));
        assert_eq!(t.missing_of(NAME, 0, 4 * PAGE), [(2 * PAGE, 4 * PAGE)]);
        t.arrived(NAME, 2 * PAGE, 4 * PAGE);
        assert_eq!(
            (wants(&t, one, 42), wants(&t, child, 43), wants(&t, two, 100)),
            (None, None, Some(4))
        );
        t.end(one);
        t.end(child);
        assert_eq!(t.missing(), 2);
        t.end(two);
        assert_eq!(t.missing(), 0, "nobody is left to miss it");
    }

    #[test]
    fn a_page_of_two_spaces_arrives_in_both() {
        let mut t = Table::default();
        let parent = t.add([region(0, 8, 3, 50)], [(0, 8 * PAGE)]);
        let child = t.fork(parent);
        t.moved(child, 0, 100 * PAGE, 4 * PAGE);
        let places = t.places(3, 51 * PAGE, 52 * PAGE);
        let at: Vec<(usize, u64)> = places.iter().map(|p| (p.space, p.start / PAGE)).collect();
        assert_eq!(at, [(parent, 1), (child, 101)]);
        assert_eq!(t.owed(), [(3, 50 * PAGE, 58 * PAGE)]);
        t.end(parent);
        assert_eq!(t.places(3, 51 * PAGE, 52 * PAGE).len(), 1);
    }
}

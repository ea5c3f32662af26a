//! The copy's userfaultfds: made by each process for itself while it is a skeleton, taken by the agent, registered when the state has come.
//!
//! A mapping that misses a page is registered as a whole, never in part: registered and not registered memory cannot be one mapping, and a program
//! that moves a mapping with mremap(2) fails where there are two.
//!
//! Where one mremap(2) can move several mappings (Linux 6.17) the process's other private mappings are registered too, for asynchronous write
//! protection, which costs their pages nothing. The kernel moves no registered mapping together with others, but finds that out mapping by mapping: one
//! that is not registered, before one that is, would have been moved by the time the call fails. With all of them registered it fails at the
//! first, with nothing moved, as it does on older kernels, which is what programs are prepared for. Registering them for missing pages instead would send
//! each first touch of fresh memory to the keeper.
//!
//! Shared memory that follows ([`lazy::object`]) has its missing pages made without content, and every mapping of it registered in every process: the
//! pages that the source announces in rounds ([`Rebuild::expect`]) long before the freeze, others in it.
//!
//! Between the moment in which a stale page is dropped and the registration khugepaged could make a huge page of its neighbours and fill the gap with
//! zeros; so the process has huge pages switched off for that time (PR_SET_THP_DISABLE; registered memory is never collapsed). [`Rebuild::complete`]
//! gives it back what it had.

use super::{
    mm::PR_SET_THP_DISABLE,
    pilots::{Batch, PilotError},
    rebuild::Rebuild,
};
use crate::{
    dump::{self, pages::OBJECT_SPACE},
    image::{Backing, PAGE, Vma},
    lazy::{
        self,
        audit::Watched,
        keeper::{Armed, Pending},
    },
    pages::PageSet,
    sys::{self, uffd::Userfault},
    track::{self, wp_async},
    wire::Ranges,
};
use std::{io, os::fd::AsFd};

/// Ranges of shared memory from which on it is faster to look where it has pages than to have them made once more.
const MANY: usize = 1024;

fn wrong(what: &str) -> PilotError {
    PilotError::agent(what)(io::Error::new(
        io::ErrorKind::InvalidData,
        "the source lists pages that cannot follow",
    ))
}

impl Rebuild {
    /// Gives every process that has none a userfaultfd, and takes it from it.
    pub fn userfaults(&mut self) -> Result<(), PilotError> {
        let pids = &self.pids;
        self.userfaults.retain(|pid, _| pids.contains(pid));
        for i in 0..self.tree.processes.len() {
            let pid = self.pids[i];
            if self.tree.processes[i].zombie.is_some() || self.userfaults.contains_key(&pid) {
                continue;
            }
            let slot = self.slots[i][0];
            let mut b = Batch::new();
            let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
            b.call("make a userfaultfd", libc::SYS_userfaultfd, &[flags]);
            let fd = self.pilots.run(slot, &b)?.first().copied().unwrap_or(-1);
            let taken = Userfault::take_missing(pid, fd as i32).map_err(PilotError::agent("take a userfaultfd"))?;
            let mut b = Batch::new();
            b.call("close the userfaultfd", libc::SYS_close, &[fd as u64]);
            self.pilots.run(slot, &b)?;
            self.userfaults.insert(pid, taken);
        }
        Ok(())
    }

    /// Switches huge pages off in all processes until the release.
    pub fn no_huge_pages(&mut self) -> Result<(), PilotError> {
        let live: Vec<usize> = (0..self.tree.processes.len())
            .filter(|i| self.tree.processes[*i].zombie.is_none())
            .collect();
        let mut b = Batch::new();
        b.call("no huge pages for now", libc::SYS_prctl, &[PR_SET_THP_DISABLE, 1, 0, 0, 0]);
        for &i in &live {
            self.pilots.post(self.slots[i][0], &b);
        }
        for &i in &live {
            self.pilots.wait(self.slots[i][0], &b)?;
        }
        self.huge_pages_off = true;
        Ok(())
    }

    /// The call that gives a process back what it had.
    pub(super) fn huge_pages_again(&self, b: &mut Batch, disabled: bool) {
        if self.huge_pages_off {
            b.call(
                "huge pages as before",
                libc::SYS_prctl,
                &[PR_SET_THP_DISABLE, u64::from(disabled), 0, 0, 0],
            );
        }
    }

    /// Makes pages of shared memory, without content, of which the source says that they will follow. Those that are there already stay what they are.
    pub fn expect(&mut self, ranges: &[Ranges]) -> Result<(), PilotError> {
        self.make_pages(ranges).map(drop)
    }

    /// The same; returns the objects, by their indices, with the pages.
    fn make_pages<'r>(&mut self, ranges: impl IntoIterator<Item = &'r Ranges>) -> Result<Vec<(usize, PageSet)>, PilotError> {
        let made = |e| PilotError::agent("make pages of shared memory")(e);
        let all = self.follows(ranges)?;
        for (o, pages) in &all {
            let known = self.expected.entry(self.names.objects[*o]).or_default();
            let mut new = pages.difference(known);
            if new.ranges().len() > MANY {
                // What was written in rounds is there.
                let there = dump::pages::data(self.objects[*o].as_fd(), self.tree.objects[*o].size).map_err(made)?;
                new.subtract(&PageSet::from_ranges(there));
            }
            for &(a, b) in new.ranges() {
                rustix::fs::fallocate(&self.objects[*o], rustix::fs::FallocateFlags::empty(), a, b - a).map_err(|e| made(e.into()))?;
            }
            known.extend(pages);
        }
        Ok(all)
    }

    /// Takes out of a list of hashes, which goes by indices, the pages of shared memory that follow: an older version of them may be here.
    pub fn without_expected(&self, later: &[Ranges], hashes: &mut Vec<(u32, u64, u64)>) {
        // What cannot follow is refused when it is registered.
        let all = self.follows(later.iter().filter(|r| r.space >= OBJECT_SPACE));
        for (o, pages) in all.into_iter().flatten() {
            hashes.retain(|h| h.0 != OBJECT_SPACE + o as u32 || !pages.contains(h.1));
        }
    }

    /// The objects that ranges are of, by their indices, which can follow.
    fn follows<'r>(&self, ranges: impl IntoIterator<Item = &'r Ranges>) -> Result<Vec<(usize, PageSet)>, PilotError> {
        let bad = || wrong("make pages of shared memory");
        let mut ranges = ranges.into_iter().peekable();
        if ranges.peek().is_none() {
            return Ok(Vec::new());
        }
        let can = lazy::objects(&self.tree, &self.names);
        let one = |r: &'r Ranges| {
            let pages = PageSet::from_ranges(r.unpack().ok_or_else(bad)?);
            let o = self.names.objects.iter().position(|n| *n == r.space).ok_or_else(bad)?;
            let size = self.tree.objects[o].size;
            let inside = size.is_multiple_of(PAGE) && pages.clip(0, size).bytes() == pages.bytes();
            if inside && can.contains(&r.space) {
                Ok((o, pages))
            } else {
                Err(bad())
            }
        };
        ranges.map(one).collect()
    }

    /// Registers what misses pages. From here on nothing may touch these pages but the keeper. `watch`: for the memory oracle too, which has to know what
    /// the program writes.
    pub fn arm(&mut self, later: &[Ranges], watch: bool) -> Result<(Vec<Armed>, Vec<Pending>), PilotError> {
        let (shared, private): (Vec<&Ranges>, Vec<&Ranges>) = later.iter().partition(|r| r.space >= OBJECT_SPACE);
        let mut pending = Vec::new();
        let mut objects = Vec::new();
        for (o, pages) in self.make_pages(shared)? {
            objects.push(o as u32);
            let fd = self.objects[o].try_clone().map_err(PilotError::agent("hand over shared memory"))?;
            pending.push(Pending {
                fd,
                name: self.names.objects[o],
                size: self.tree.objects[o].size,
                missing: pages.ranges().to_vec(),
                expected: watch.then(Vec::new),
            });
        }
        let known = |r: &&Ranges| self.names.spaces.contains(&r.space);
        if !private.iter().all(known) {
            return Err(wrong("register missing pages"));
        }
        let mut out = Vec::new();
        for (i, p) in self.tree.processes.iter().enumerate().filter(|(_, p)| p.zombie.is_none()) {
            let name = self.names.spaces[p.mm as usize];
            let vmas = &self.tree.mms[p.mm as usize].vmas;
            let of = private.iter().find(|r| r.space == name);
            let missing = of.map_or(Some(Vec::new()), |r| r.unpack());
            let missing = missing.ok_or_else(|| wrong("register missing pages"))?;
            let maps = |v: &&Vma| matches!(v.backing, Backing::Object { object, .. } if objects.contains(&object));
            if missing.is_empty() && !vmas.iter().any(|v| maps(&v)) {
                continue;
            }
            let fd = self
                .userfaults
                .remove(&self.pids[i])
                .ok_or_else(|| wrong("register missing pages twice"))?;
            let mut regions = self.register(&fd, vmas, &missing, name, watch)?;
            for v in vmas.iter().filter(maps) {
                let Backing::Object { object, offset, .. } = v.backing else {
                    continue;
                };
                fd.register_shared(v.start, v.end)
                    .map_err(PilotError::agent(format!("register {:x}-{:x}, which is shared", v.start, v.end)))?;
                regions.push((v.start, v.end, self.names.objects[object as usize], offset));
            }
            let open = || Watched::open(self.pids[i]).map_err(PilotError::agent("open its memory"));
            let watched = (watch && !missing.is_empty()).then(open).transpose()?.map(|w| (w, Vec::new()));
            out.push(Armed {
                fd,
                regions,
                missing,
                name,
                watched,
            });
        }
        Ok((out, pending))
    }

    fn register(
        &self,
        fd: &Userfault,
        vmas: &[Vma],
        missing: &[(u64, u64)],
        name: u32,
        watch: bool,
    ) -> Result<Vec<(u64, u64, u32, u64)>, PilotError> {
        let mut regions = Vec::new();
        let set = PageSet::from_ranges(missing.iter().copied());
        let mut covered = 0;
        for v in vmas.iter().filter(|v| set.overlaps(v.start, v.end)) {
            if !lazy::can_wait(v) {
                return Err(wrong("register missing pages"));
            }
            fd.register_missing(v.start, v.end, watch)
                .map_err(PilotError::agent(format!("register {:x}-{:x} for missing pages", v.start, v.end)))?;
            covered += set.clip(v.start, v.end).bytes();
            regions.push((v.start, v.end, name, v.start));
        }
        if covered != set.bytes() {
            return Err(wrong("register missing pages outside of every mapping"));
        }
        if sys::mem::moves_several() && wp_async::available() {
            let others = vmas
                .iter()
                .filter(|v| track::has_private_pages(v) && !v.flags.droppable && !set.overlaps(v.start, v.end));
            // As few calls as there are gaps.
            let others = PageSet::from_ranges(others.map(|v| (v.start, v.end)));
            for &(start, end) in others.ranges() {
                fd.register(start, end)
                    .map_err(PilotError::agent(format!("register {start:x}-{end:x}, which has all its pages")))?;
            }
        }
        Ok(regions)
    }
}

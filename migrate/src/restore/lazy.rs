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
//! Between the moment in which a stale page is dropped and the registration khugepaged could make a huge page of its neighbours and fill the gap with
//! zeros; so the process has huge pages switched off for that time (PR_SET_THP_DISABLE; registered memory is never collapsed). [`Rebuild::complete`]
//! gives it back what it had.

use super::{
    mm::PR_SET_THP_DISABLE,
    pilots::{Batch, PilotError},
    rebuild::Rebuild,
};
use crate::{
    image::Vma,
    lazy::{self, audit::Watched, keeper::Armed},
    pages::PageSet,
    sys::{self, uffd::Userfault},
    track::{self, wp_async},
    wire::Ranges,
};
use std::io;

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

    /// Registers what misses pages. From here on nothing may touch these pages but the keeper. `watch`: for the memory oracle too, which has to know what
    /// the program writes.
    pub fn arm(&mut self, later: &[Ranges], watch: bool) -> Result<Vec<Armed>, PilotError> {
        let mut out = Vec::new();
        for r in later {
            let missing = r.unpack().ok_or_else(|| wrong("register missing pages"))?;
            let mm = self.names.spaces.iter().position(|n| *n == r.space);
            let i = self
                .tree
                .processes
                .iter()
                .position(|p| p.zombie.is_none() && Some(p.mm as usize) == mm)
                .ok_or_else(|| wrong("register missing pages"))?;
            let fd = self
                .userfaults
                .remove(&self.pids[i])
                .ok_or_else(|| wrong("register missing pages twice"))?;
            let vmas = &self.tree.mms[self.tree.processes[i].mm as usize].vmas;
            let regions = self.register(&fd, vmas, &missing, r.space, watch)?;
            let open = || Watched::open(self.pids[i]).map_err(PilotError::agent("open its memory"));
            let watched = watch.then(open).transpose()?.map(|w| (w, Vec::new()));
            out.push(Armed {
                fd,
                regions,
                missing,
                name: r.space,
                watched,
            });
        }
        Ok(out)
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

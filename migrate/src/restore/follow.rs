//! The skeleton follows the running original: what [`super::shape`] says is done here.
//!
//! - A process that is gone is killed, and waited for by its parent's pilot; a zombie would be there in the copy.
//! - A thread that is gone exits; its slot is used again once the kernel has forgotten it.
//! - A new process is cloned from its parent's pilot, which may hold gigabytes by then. Large mappings are kept out of that fork by
//!   MADV_DONTFORK, or the page tables alone would cost milliseconds a GiB. The child gives up what it inherited and is mapped like any other.
//! - An address space that was replaced (execve) is emptied and mapped anew.

use super::{
    mm::{self, Batches},
    pilots::{Batch, PilotError},
    rebuild::{Names, Rebuild},
    shape,
};
use crate::{
    dump::pages::OBJECT_SPACE,
    image::{Backing, Tree, Vma},
    laps::Laps,
    procfs,
    sys::misc,
};
use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

/// Mappings from this size on are kept out of a fork.
const LARGE: u64 = 8 << 20;
/// How long a thread that was told to exit may take.
const EXIT_PATIENCE: Duration = Duration::from_secs(2);

/// Why the skeleton could not follow.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// It has to be built anew; the source knows that too ([`shape::losses`]).
    #[error("the tree changed its shape: {0}")]
    Anew(String),
    /// Something failed.
    #[error(transparent)]
    Failed(#[from] PilotError),
}

/// What the source asks for beside the new shape: memory that is to be untouched again, as (space or object, start, end).
pub type Drops = [(u32, u64, u64)];

impl Rebuild {
    /// Becomes the skeleton of another shape of the tree. After an error it is good for nothing but being dropped.
    pub fn follow(&mut self, new: Tree, names: Names, drops: &Drops) -> Result<(), FollowError> {
        let mut laps = Laps::start();
        if !names.fit(&new) {
            return Err(failed("name the address spaces").into());
        }
        for m in &new.mms {
            mm::validate(m)?;
        }
        let shape = shape::processes(&self.tree, &new).map_err(FollowError::Anew)?;
        self.end_gone(&shape.gone)?;
        let old = std::mem::replace(&mut self.tree, new);
        let old_names = std::mem::replace(&mut self.names, names);
        let old_slots = std::mem::take(&mut self.slots);
        let old_pids = std::mem::take(&mut self.pids);
        let old_objects = std::mem::take(&mut self.objects);
        self.adopt_objects(&old_names, old_objects)?;
        laps.lap("objects");
        // Kept processes take their slots and pids along before anything is made, so that a failure still finds all to end.
        let count = self.tree.processes.len();
        self.slots = vec![Vec::new(); count];
        self.pids = vec![0; count];
        for (i, from) in shape.from.iter().enumerate() {
            if let Some(o) = *from {
                self.pids[i] = old_pids[o];
                self.slots[i].clone_from(&old_slots[o]);
            }
        }
        for (i, from) in shape.from.iter().enumerate() {
            match *from {
                Some(o) => self.keep(i, &old, o)?,
                None => self.make(i)?,
            }
            if shape.setsid.contains(&i) {
                let mut b = Batch::new();
                b.call_eq("setsid", self.tree.processes[i].pid as i64, libc::SYS_setsid, &[]);
                self.pilots.run(self.slots[i][0], &b)?;
            }
            if self.tree.processes[i].zombie.is_some() {
                continue;
            }
            match from {
                Some(o) if old.processes[*o].zombie.is_none() => self.remap(i, &old, &old_names, *o)?,
                _ => self.map(i)?,
            }
        }
        laps.lap("processes");
        let former: Vec<Option<i32>> = shape.from.iter().map(|f| f.map(|o| old.processes[o].pgid)).collect();
        self.groups(&former)?;
        self.drop_pages(drops)?;
        let live: std::collections::HashSet<u32> = self.names.spaces.iter().chain(&self.names.objects).copied().collect();
        self.written.retain(|name| live.contains(name));
        self.expected.retain(|name, _| live.contains(name));
        laps.lap("groups and drops");
        laps.log("follow");
        Ok(())
    }

    /// Kills these processes of the present tree, children before parents, and has their parents wait for them.
    fn end_gone(&mut self, gone: &[usize]) -> Result<(), PilotError> {
        for &o in gone {
            misc::kill(self.pids[o], libc::SIGKILL).map_err(PilotError::agent("end a process that is gone"))?;
            let p = &self.tree.processes[o];
            if let Some(parent) = p.parent {
                let mut b = Batch::new();
                // __WALL: whatever signal it would have sent.
                b.call_eq("wait for it", p.pid as i64, libc::SYS_wait4, &[p.pid as u64, 0, 0x4000_0000, 0]);
                self.pilots.run(self.slots[parent as usize][0], &b)?;
            }
            for slot in std::mem::take(&mut self.slots[o]) {
                self.pilots.give_back(slot);
            }
            self.userfaults.remove(&self.pids[o]);
            self.pids[o] = 0;
        }
        Ok(())
    }

    /// Threads of a process that goes on.
    fn keep(&mut self, i: usize, old: &Tree, o: usize) -> Result<(), PilotError> {
        let was = &old.processes[o];
        let p = &self.tree.processes[i];
        let slots = std::mem::take(&mut self.slots[i]);
        let (leader, pid) = (slots[0], p.pid);
        let former: std::collections::HashMap<i32, usize> = was.threads.iter().map(|t| t.tid).zip(slots.iter().copied()).skip(1).collect();
        let wanted: Vec<i32> = p.threads.iter().skip(1).map(|t| t.tid).collect();
        let gone: Vec<(i32, usize)> = former.iter().filter(|(t, _)| !wanted.contains(t)).map(|(t, s)| (*t, *s)).collect();
        for (_, slot) in &gone {
            let mut b = Batch::new();
            b.pseudo("end a thread", libc::SYS_exit, 0);
            self.pilots.post(*slot, &b);
        }
        let end = Instant::now() + EXIT_PATIENCE;
        let left = |me: &Rebuild| procfs::tasks(me.pids[i]).map_or(0, |t| t.len());
        while !gone.is_empty() && left(self) > 1 + former.len() - gone.len() {
            if Instant::now() > end {
                return Err(PilotError::Silent {
                    pid,
                    ms: EXIT_PATIENCE.as_millis(),
                    what: "end threads that are gone".into(),
                });
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        for (_, slot) in gone {
            self.pilots.give_back(slot);
        }
        let mut list = vec![leader];
        let mut fresh = Vec::new();
        for tid in wanted {
            let slot = match former.get(&tid) {
                Some(s) => *s,
                None => {
                    let s = self
                        .pilots
                        .take(tid, false)
                        .map_err(PilotError::agent("find room for one more task"))?;
                    fresh.push((s, tid));
                    s
                }
            };
            list.push(slot);
        }
        self.slots[i] = list;
        self.make_threads(i, fresh)
    }

    /// A process that was not there before, emptied, with its threads.
    fn make(&mut self, i: usize) -> Result<(), PilotError> {
        let p = self.tree.processes[i].clone();
        self.slots[i] = Self::slots_for(&mut self.pilots, &p)?;
        let parent = p.parent.ok_or_else(|| failed("find its parent"))? as usize;
        let at = self.tree.processes[parent]
            .threads
            .iter()
            .position(|t| t.tid == p.parent_tid)
            .filter(|k| *k < self.slots[parent].len())
            .unwrap_or(0);
        let slot = self.slots[parent][at];
        let control = self.pilots.control(self.slots[i][0], self.tree.processes[parent].pid);
        // What its parent has mapped by now, and where the kernel's own mappings are.
        let parent_mm = self.tree.mms.get(self.tree.processes[parent].mm as usize).cloned();
        let zombie_parent = self.tree.processes[parent].zombie.is_some();
        let mm = parent_mm
            .filter(|_| !zombie_parent)
            .ok_or_else(|| failed("find its parent's memory"))?;
        let large: Vec<&Vma> = mm
            .vmas
            .iter()
            .filter(|v| v.len() >= LARGE && !v.flags.dont_fork && !matches!(v.backing, Backing::Special(_)))
            .collect();
        let leader = self.slots[parent][0];
        let advise = |me: &mut Rebuild, what: &str, advice: i32| -> Result<(), PilotError> {
            let mut b = Batch::new();
            for v in &large {
                b.call(what, libc::SYS_madvise, &[v.start, v.len(), advice as u64]);
            }
            if b.is_empty() {
                Ok(())
            } else {
                me.pilots.run(leader, &b).map(drop)
            }
        };
        advise(self, "keep memory out of a fork", libc::MADV_DONTFORK)?;
        let mut b = Batch::new();
        let exit_signal = p.exit_signal.max(0) as u64;
        self.clone_call(&mut b, slot, format!("create process {}", p.pid), p.pid, [0, exit_signal], control);
        self.pilots.run(slot, &b)?;
        advise(self, "let memory be forked", libc::MADV_DOFORK)?;
        self.pids[i] = p.pid;
        if self.fresh {
            self.locate()?;
        }
        let special = self.special(&mm, &self.tree.vdsos)?;
        let mut b = Batch::new();
        mm::empty_again(&mut b, self.pilots.range(), &self.park, &special);
        self.pilots.run(self.slots[i][0], &b)?;
        self.threads(i)
    }

    /// Mappings of a process that goes on.
    fn remap(&mut self, i: usize, old: &Tree, old_names: &Names, o: usize) -> Result<(), PilotError> {
        let (a, b) = (old.processes[o].mm as usize, self.tree.processes[i].mm as usize);
        let slot = self.slots[i][0];
        let new = self.tree.mms[b].clone();
        let same_object = |x: u32, y: u32| old_names.objects.get(x as usize) == self.names.objects.get(y as usize);
        let change = (old_names.spaces[a] == self.names.spaces[b])
            .then(|| shape::change(&old.mms[a], &new, &same_object))
            .flatten();
        let Some(change) = change else {
            let special = self.special(&old.mms[a], &old.vdsos)?;
            let mut batch = Batch::new();
            mm::empty_again(&mut batch, self.pilots.range(), &self.park, &special);
            self.pilots.run(slot, &batch)?;
            return self.map(i);
        };
        if change.is_empty() {
            return Ok(());
        }
        let (records, _) = self.pilots.capacity(slot);
        let mut out = Batches::new(records - 8);
        for (start, end) in &change.unmap {
            out.room(1).call("unmap", libc::SYS_munmap, &[*start, end - start]);
        }
        let needed: Vec<&Vma> = change.map.iter().filter(|v| v.backing != Backing::Anonymous).collect();
        let given = if needed.is_empty() {
            Default::default()
        } else {
            self.give_mapped(i, &needed, None)?
        };
        for v in &change.map {
            mm::map_one(&mut out, v, &|v| given.number(v));
            if v.pkey != 0 {
                mm::protect(&mut out, v.start, v.end, v.prot, Some(v.pkey));
            }
        }
        for (start, end, prot, pkey) in &change.protect {
            mm::protect(&mut out, *start, *end, *prot, (new.pkeys != 0).then_some(*pkey));
        }
        for (start, end, advice) in &change.advise {
            mm::advise(&mut out, *start, *end, *advice);
        }
        for (start, end, name) in &change.name {
            mm::name(&mut out, *start, *end, name.as_deref());
        }
        if !needed.is_empty() {
            out.room(1)
                .call("close mapping descriptors", libc::SYS_close_range, &[0, self.socket_number - 1, 0]);
        }
        for b in &out.into_vec() {
            self.pilots.run(slot, b)?;
        }
        Ok(())
    }

    /// Objects that go on keep their descriptors; others are made, or closed.
    fn adopt_objects(&mut self, old_names: &Names, old: Vec<OwnedFd>) -> Result<(), PilotError> {
        let mut former: std::collections::HashMap<u32, OwnedFd> = old_names.objects.iter().copied().zip(old).collect();
        let fresh: Vec<usize> = (0..self.tree.objects.len())
            .filter(|&i| !former.contains_key(&self.names.objects[i]))
            .collect();
        let wanted: Vec<_> = fresh.iter().map(|&i| self.tree.objects[i].clone()).collect();
        let made = super::fds::create_objects(&wanted).map_err(|e| PilotError::agent("create shared memory")(io::Error::other(e)))?;
        let mut made = made.into_iter();
        let mut list = Vec::with_capacity(self.tree.objects.len());
        for (o, name) in self.tree.objects.iter().zip(&self.names.objects) {
            let fd = match former.remove(name) {
                Some(fd) => {
                    let size = rustix::fs::fstat(&fd).map(|s| s.st_size as u64);
                    if size != Ok(o.size) {
                        rustix::fs::ftruncate(&fd, o.size).map_err(|e| PilotError::agent("resize shared memory")(e.into()))?;
                    }
                    fd
                }
                None => made.next().ok_or_else(|| failed("create shared memory"))?,
            };
            list.push(fd);
        }
        self.objects = list;
        Ok(())
    }

    /// Before the last pages are written. `lazy`: some of what is dropped will be missing when the copy runs.
    pub fn make_way(&mut self, drops: &Drops, lazy: bool) -> Result<(), PilotError> {
        if lazy {
            self.no_huge_pages()?;
        }
        self.drop_pages(drops)
    }

    /// Makes ranges untouched again: zeros, or the file behind a private mapping.
    fn drop_pages(&mut self, drops: &Drops) -> Result<(), PilotError> {
        for (i, p) in self.tree.processes.iter().enumerate().filter(|(_, p)| p.zombie.is_none()) {
            let space = self.names.spaces[p.mm as usize];
            let slot = self.slots[i][0];
            let (records, _) = self.pilots.capacity(slot);
            let mut out = Batches::new(records - 8);
            let vmas = &self.tree.mms[p.mm as usize].vmas;
            for (_, start, end) in drops.iter().filter(|d| d.0 == space) {
                // Only within what may hold private pages.
                let first = vmas.partition_point(|v| v.end <= *start);
                for v in vmas[first..].iter().take_while(|v| v.start < *end) {
                    let (a, b) = (v.start.max(*start), v.end.min(*end));
                    if a < b && crate::track::has_private_pages(v) {
                        out.room(1)
                            .call("drop pages", libc::SYS_madvise, &[a, b - a, libc::MADV_DONTNEED as u64]);
                    }
                }
            }
            for b in &out.into_vec() {
                self.pilots.run(slot, b)?;
            }
        }
        for ((o, fd), name) in self.tree.objects.iter().zip(&self.objects).zip(&self.names.objects) {
            for (_, start, end) in drops.iter().filter(|d| d.0 == *name && d.0 >= OBJECT_SPACE) {
                let end = (*end).min(o.size);
                if *start < end {
                    use rustix::fs::FallocateFlags as F;
                    rustix::fs::fallocate(fd, F::PUNCH_HOLE | F::KEEP_SIZE, *start, end - start)
                        .map_err(|e| PilotError::agent("punch a hole")(e.into()))?;
                    if let Some(expected) = self.expected.get_mut(name) {
                        expected.remove(*start, end);
                    }
                }
            }
        }
        Ok(())
    }
}

fn failed(what: &str) -> PilotError {
    PilotError::agent(what)(io::ErrorKind::InvalidData.into())
}

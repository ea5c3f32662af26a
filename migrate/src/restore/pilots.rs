//! Steering the pilots: one slot of a shared region for each task being rebuilt. See [`crate::arch::pilot`] for what runs there.
//!
//! Layout of the mapping at `base` in the agent and in every task:
//! ```text
//! base            decision page   the word at +64; a file of the journal, so that the release *is* the journal entry
//! base + 4 KiB    code, timespec  shared by all
//! base + 8 KiB    slots           control block, records, signal frame, data of each task
//! ```

use crate::{
    arch::pilot::{self, RECORD, Record},
    sys::region::Region,
};
use std::{
    fs::File,
    io,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

const PAGE: usize = 4096;
const CODE: usize = 0;
const INTERVAL: usize = PAGE - 16;
/// The decision word in its page.
pub const WORD: usize = 64;
/// Name of the region's memfd, by which one left behind is recognised.
pub const NAME: &std::ffi::CStr = c"migrate-pilot";

/// Records and data bytes of a process leader's slot, of any other thread's.
const LEADER: (usize, usize) = (1024, 512 << 10);
const THREAD: (usize, usize) = (64, 64 << 10);
const FRAME_LEN: usize = 16 << 10;
const CTL: usize = 64;

#[derive(Debug, Clone, Copy)]
struct Slot {
    at: usize,
    records: usize,
    data: usize,
    seq: u32,
    posted: usize,
}

impl Slot {
    fn table(&self) -> usize {
        self.at + CTL
    }
    fn frame_at(&self) -> usize {
        (self.table() + self.records * RECORD).next_multiple_of(64)
    }
    fn data_at(&self) -> usize {
        self.frame_at() + FRAME_LEN
    }
    fn size(records: usize, data: usize) -> usize {
        (CTL + records * RECORD + data + 64 + FRAME_LEN).next_multiple_of(PAGE)
    }
}

/// Why a rebuilt task failed.
#[derive(Debug, thiserror::Error)]
pub enum PilotError {
    /// A system call in a task failed.
    #[error("process {pid}: {what}: {source}")]
    Call {
        /// Process or thread, as the tree sees it.
        pid: i32,
        /// What was tried.
        what: String,
        /// Reason.
        source: io::Error,
    },
    /// A task does not answer.
    #[error("process {pid} of the copy does not answer after {ms} ms ({what})")]
    Silent {
        /// Process.
        pid: i32,
        /// Waited.
        ms: u128,
        /// What it was asked.
        what: String,
    },
    /// Something on the agent's side.
    #[error("{what}: {source}")]
    Agent {
        /// What was tried.
        what: String,
        /// Reason.
        source: io::Error,
    },
}

impl PilotError {
    /// An error of the agent itself.
    pub fn agent(what: impl Into<String>) -> impl FnOnce(io::Error) -> PilotError {
        let what = what.into();
        move |source| PilotError::Agent { what, source }
    }
}

#[derive(Debug, Clone)]
enum Expect {
    Success,
    Any,
    /// A negative errno that is as good as success.
    Or(i32),
    /// This very result.
    Equals(i64),
}

/// Records with what they are for and what they must return.
#[derive(Debug, Default)]
pub struct Batch {
    records: Vec<Record>,
    notes: Vec<(String, Expect)>,
    data: Vec<u8>,
}

impl Batch {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }
    fn put(&mut self, what: impl Into<String>, e: Expect, nr: i64, args: &[u64]) {
        self.records.push(Record::new(nr, args));
        self.notes.push((what.into(), e));
    }
    /// A call that must succeed.
    pub fn call(&mut self, what: impl Into<String>, nr: i64, args: &[u64]) {
        self.put(what, Expect::Success, nr, args);
    }
    /// A call whose failure does not matter.
    pub fn try_call(&mut self, what: impl Into<String>, nr: i64, args: &[u64]) {
        self.put(what, Expect::Any, nr, args);
    }
    /// A call that must succeed or fail with this errno.
    pub fn call_or(&mut self, what: impl Into<String>, errno: i32, nr: i64, args: &[u64]) {
        self.put(what, Expect::Or(errno), nr, args);
    }
    /// A call that must return this.
    pub fn call_eq(&mut self, what: impl Into<String>, ret: i64, nr: i64, args: &[u64]) {
        self.put(what, Expect::Equals(ret), nr, args);
    }
    /// A pseudo record of the pilot.
    pub fn pseudo(&mut self, what: impl Into<String>, nr: i64, arg: u64) {
        self.put(what, Expect::Any, nr, &[arg]);
    }
    /// Puts bytes into the slot's data area, 16-byte aligned; returns a token to use as an argument.
    pub fn data(&mut self, bytes: &[u8]) -> u64 {
        self.data_aligned(bytes, 16)
    }
    /// The same with another alignment, up to 64.
    pub fn data_aligned(&mut self, bytes: &[u8], align: usize) -> u64 {
        let at = self.data.len().next_multiple_of(align);
        self.data.resize(at, 0);
        self.data.extend_from_slice(bytes);
        DATA | at as u64
    }
    /// Number of records.
    pub fn len(&self) -> usize {
        self.records.len()
    }
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
    /// Bytes of data.
    pub fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Arguments with these top bits are offsets into the slot's data: no address or flag of ours looks like it.
const DATA: u64 = 0x7a7a_0000_0000_0000;
const DATA_MASK: u64 = 0xffff_0000_0000_0000;

/// The region and its slots.
#[derive(Debug)]
pub struct Pilots {
    word: Region,
    region: Region,
    slots: Vec<Slot>,
    pids: Vec<i32>,
    /// Free slots: of leaders, of other threads.
    free: [Vec<usize>; 2],
    patience: Duration,
}

impl Pilots {
    /// Bytes of address space needed for this many leaders and other threads.
    pub fn space(leaders: usize, threads: usize) -> usize {
        2 * PAGE + leaders * Slot::size(LEADER.0, LEADER.1) + threads * Slot::size(THREAD.0, THREAD.1)
    }

    /// Maps everything at `base`, with this many slots for leaders and for other threads. `word` is the file with the decision page.
    pub fn create(base: u64, word: &File, leaders: usize, threads: usize) -> io::Result<Pilots> {
        let len = Self::space(leaders, threads) - PAGE;
        let word = Region::map_fixed(word, PAGE, base)?;
        let region = Region::create(NAME, len, base + PAGE as u64)?;
        region.write(CODE, pilot::code());
        region.write(INTERVAL, &[&0u64.to_le_bytes()[..], &50_000_000u64.to_le_bytes()].concat());
        let mut at = PAGE;
        let kinds = std::iter::repeat_n(LEADER, leaders).chain(std::iter::repeat_n(THREAD, threads));
        let slots: Vec<Slot> = kinds
            .map(|(records, data)| {
                let s = Slot {
                    at,
                    records,
                    data,
                    seq: 0,
                    posted: 0,
                };
                at += Slot::size(records, data);
                s
            })
            .collect();
        Ok(Pilots {
            word,
            region,
            pids: vec![0; slots.len()],
            slots,
            free: [(0..leaders).rev().collect(), (leaders..leaders + threads).rev().collect()],
            patience: Duration::from_secs(30),
        })
    }

    /// A free slot for a task, by its id in the tree.
    pub fn take(&mut self, id: i32, leader: bool) -> io::Result<usize> {
        let slot = self.free[usize::from(!leader)].pop().ok_or(io::ErrorKind::OutOfMemory)?;
        self.pids[slot] = id;
        Ok(slot)
    }

    /// Gives back the slot of a task that has ended.
    pub fn give_back(&mut self, slot: usize) {
        let leader = self.slots[slot].records == LEADER.0;
        self.free[usize::from(!leader)].push(slot);
    }

    /// The whole mapping, to keep or to unmap.
    pub fn range(&self) -> (u64, u64) {
        (self.word.remote, self.region.remote + self.region.len() as u64)
    }

    /// Where a task starts.
    pub fn entry(&self) -> u64 {
        self.region.addr(CODE)
    }

    /// Address of a slot's control block; prepares it for a task whose parent will be `ppid`.
    pub fn control(&mut self, slot: usize, ppid: i32) -> u64 {
        let s = self.slots[slot];
        self.region.write(s.at, &[0u8; 24]);
        let mut rest = [0u8; 24];
        rest[..8].copy_from_slice(&(ppid as u32 as u64).to_le_bytes());
        rest[8..16].copy_from_slice(&self.word.addr(WORD).to_le_bytes());
        rest[16..].copy_from_slice(&self.region.addr(INTERVAL).to_le_bytes());
        self.region.write(s.at + 24, &rest);
        // The kernel has to find these pages: now, and not for every task within the freeze.
        for page in [s.frame_at(), s.frame_at() + PAGE, s.data_at()] {
            self.region.write(page, &[0]);
        }
        self.slots[slot].seq = 0;
        self.region.addr(s.at)
    }

    /// Records a batch for one run may hold, with room for the closing ones.
    pub fn capacity(&self, slot: usize) -> (usize, usize) {
        (self.slots[slot].records, self.slots[slot].data)
    }

    /// Address a data token will have in a slot.
    fn resolve(&self, slot: usize, v: u64) -> u64 {
        if v & DATA_MASK == DATA {
            self.region.addr(self.slots[slot].data_at() + (v & !DATA_MASK) as usize)
        } else {
            v
        }
    }

    /// Address of byte `offset` of a slot's data area.
    pub fn data_addr(&self, slot: usize, offset: usize) -> u64 {
        self.region.addr(self.slots[slot].data_at() + offset)
    }

    /// Overwrites data after a batch was built, for structures that hold addresses of data themselves.
    pub fn patch(batch: &mut Batch, token: u64, offset: usize, bytes: &[u8]) {
        let at = (token & !DATA_MASK) as usize + offset;
        batch.data[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The address that a token will have in a slot.
    pub fn address_of(&self, slot: usize, token: u64) -> u64 {
        self.resolve(slot, token)
    }

    /// Starts a batch; [`Pilots::wait`] collects it.
    pub fn post(&mut self, slot: usize, batch: &Batch) {
        let s = self.slots[slot];
        assert!(
            batch.len() <= s.records && batch.data.len() <= s.data,
            "a batch of {} records, {} bytes",
            batch.len(),
            batch.data.len()
        );
        self.region.write(s.data_at(), &batch.data);
        let mut bytes = Vec::with_capacity(batch.len() * RECORD);
        for r in &batch.records {
            let mut r = *r;
            for a in &mut r.args {
                *a = self.resolve(slot, *a);
            }
            bytes.extend_from_slice(&r.to_bytes());
        }
        self.region.write(s.table(), &bytes);
        self.region.write(s.at + 8, &(batch.len() as u64).to_le_bytes());
        self.region.write(s.at + 16, &self.region.addr(s.table()).to_le_bytes());
        let seq = s.seq.wrapping_add(1);
        self.slots[slot].seq = seq;
        self.slots[slot].posted = batch.len();
        self.region.word(s.at).store(seq, Ordering::Release);
        self.region.wake(s.at);
    }

    /// Waits for a posted batch and checks its results.
    pub fn wait(&self, slot: usize, batch: &Batch) -> Result<Vec<i64>, PilotError> {
        let s = self.slots[slot];
        let pid = self.pids[slot];
        let start = Instant::now();
        let mut spins = 0;
        loop {
            let done = self.region.word(s.at + 4).load(Ordering::Acquire);
            if done == s.seq {
                break;
            }
            spins += 1;
            if spins < 50 {
                std::hint::spin_loop();
                continue;
            }
            self.region.wait(s.at + 4, done, 100);
            if start.elapsed() > self.patience || self.word.word(WORD).load(Ordering::Acquire) == 2 {
                let k = (0..batch.len())
                    .find(|k| self.region.read_u64(s.table() + k * RECORD + 56) as i64 == i64::MIN)
                    .unwrap_or(0);
                let mut what = batch.notes.get(k).map_or_else(String::new, |n| n.0.clone());
                // In a fresh pid namespace this number is somebody else's here; then it only says less.
                let look = |name: &str| {
                    std::fs::read_to_string(format!("/proc/{pid}/{name}"))
                        .unwrap_or_default()
                        .trim()
                        .to_owned()
                };
                what = format!(
                    "{what}; decision {}, task {} {}",
                    self.word.word(WORD).load(Ordering::Acquire),
                    look("syscall"),
                    look("wchan")
                );
                return Err(PilotError::Silent {
                    pid,
                    ms: start.elapsed().as_millis(),
                    what,
                });
            }
        }
        let mut out = Vec::with_capacity(batch.len());
        for (k, (what, expect)) in batch.notes.iter().enumerate() {
            let ret = self.region.read_u64(s.table() + k * RECORD + 56) as i64;
            let ok = match expect {
                Expect::Any => true,
                Expect::Success => !(-4095..0).contains(&ret),
                Expect::Or(errno) => !(-4095..0).contains(&ret) || ret == -(*errno as i64),
                Expect::Equals(v) => ret == *v,
            };
            if !ok {
                let source = if (-4095..0).contains(&ret) {
                    io::Error::from_raw_os_error(-ret as i32)
                } else {
                    io::Error::other(format!("returned {ret:#x}"))
                };
                return Err(PilotError::Call {
                    pid,
                    what: what.clone(),
                    source,
                });
            }
            out.push(ret);
        }
        Ok(out)
    }

    /// Runs a batch to its end, in pieces when it has more records than the slot.
    pub fn run(&mut self, slot: usize, batch: &Batch) -> Result<Vec<i64>, PilotError> {
        let cap = self.slots[slot].records;
        if batch.data.len() > self.slots[slot].data {
            let what = format!("{} bytes for the calls of task {}", batch.data.len(), self.pids[slot]);
            return Err(PilotError::agent(what)(io::ErrorKind::OutOfMemory.into()));
        }
        let mut out = Vec::with_capacity(batch.len());
        for at in (0..batch.len()).step_by(cap) {
            let end = (at + cap).min(batch.len());
            let piece = Batch {
                records: batch.records[at..end].to_vec(),
                notes: batch.notes[at..end].to_vec(),
                data: batch.data.clone(),
            };
            self.post(slot, &piece);
            out.extend(self.wait(slot, &piece)?);
        }
        Ok(out)
    }

    /// Whether a batch fits its slot in one piece.
    pub fn fits(&self, slot: usize, batch: &Batch) -> bool {
        batch.len() <= self.slots[slot].records && batch.data.len() <= self.slots[slot].data
    }

    /// Reads from a slot's data area.
    pub fn read_data(&self, slot: usize, token: u64, buf: &mut [u8]) {
        self.region.read(self.slots[slot].data_at() + (token & !DATA_MASK) as usize, buf);
    }

    /// Puts the frame of rt_sigreturn into a slot: `make` gets its address.
    pub fn frame(&self, slot: usize, make: impl FnOnce(u64) -> (Vec<u8>, u64)) -> u64 {
        let at = self.slots[slot].frame_at();
        let (bytes, sp) = make(self.region.addr(at));
        assert!(bytes.len() <= FRAME_LEN);
        self.region.write(at, &bytes);
        sp
    }

    /// The one release event. False: a task had found its parent gone and the copy is dead.
    pub fn release(&self) -> bool {
        let ok = self
            .word
            .word(WORD)
            .compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        self.word.wake(WORD);
        ok
    }

    /// Ends every task that was not released. False: they were released before.
    pub fn abort(&self) -> bool {
        let r = self.word.word(WORD).compare_exchange(0, 2, Ordering::AcqRel, Ordering::Acquire);
        self.word.wake(WORD);
        for s in &self.slots {
            self.region.wake(s.at);
        }
        r != Err(1)
    }
}

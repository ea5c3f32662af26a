//! Which bytes of a frozen (or running) tree have to be sent, and reading them in bounded pieces.
//!
//! A *space* is what an address in a page run refers to: the address space with index n, or [`OBJECT_SPACE`] + n for object n.

use crate::{
    image::{Backing, Mm, PAGE, Tree, Vma},
    sys::{
        mem::{self, Mem},
        pagemap::{Pagemap, Range},
    },
};
use bytes::Bytes;
use migrate_transport::Run;
use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::Mutex,
};

/// Spaces from here on are objects.
pub const OBJECT_SPACE: u32 = 0x8000_0000;
/// Pages in one frame: 1 MiB.
pub const FRAME_PAGES: u64 = 256;

/// Ranges of one space that hold content, ascending.
#[derive(Debug, Clone, Default)]
pub struct SpacePlan {
    /// The space.
    pub space: u32,
    /// (start, end) in bytes, page aligned.
    pub ranges: Vec<(u64, u64)>,
}

impl SpacePlan {
    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(a, b)| b - a).sum()
    }
}

/// Guard regions of an address space (MADV_GUARD_INSTALL): (start, end).
pub type Guards = Vec<(u64, u64)>;

/// Private pages of an address space that the destination cannot get from a file, and its guard regions.
pub fn plan_mm(pid: i32, space: u32, mm: &Mm) -> io::Result<(SpacePlan, Guards)> {
    plan_some(pid, space, mm, &|_| true)
}

/// The same of some mappings.
pub fn plan_some(pid: i32, space: u32, mm: &Mm, wanted: &dyn Fn(&Vma) -> bool) -> io::Result<(SpacePlan, Guards)> {
    let pagemap = Pagemap::open(pid)?;
    let mut found: Vec<Range> = Vec::new();
    let mut plan = SpacePlan { space, ranges: Vec::new() };
    let mut guards = Vec::new();
    for v in mm.vmas.iter().filter(|v| wanted(v)) {
        let private_over_file = match &v.backing {
            Backing::Special(_) => continue,
            Backing::Anonymous => false,
            _ if v.shared => continue,
            _ => true,
        };
        found.clear();
        pagemap.populated(v.start, v.end, &mut found)?;
        for r in &found {
            if r.guard {
                guards.push((r.start, r.end));
            } else if !(private_over_file && r.file) {
                match plan.ranges.last_mut() {
                    // Runs may not cross a mapping border: the other side writes them mapping by mapping.
                    Some(l) if l.1 == r.start && r.start != v.start => l.1 = r.end,
                    _ => plan.ranges.push((r.start, r.end)),
                }
            }
        }
    }
    Ok((plan, guards))
}

/// Pages of anonymous mappings of an address space, and its guard regions there: quick, see [`Pagemap::populated_anonymous`].
pub fn plan_anonymous(pid: i32, space: u32, vmas: &[Vma]) -> io::Result<(SpacePlan, Guards)> {
    let pagemap = Pagemap::open(pid)?;
    let (mut plan, mut guards) = (SpacePlan { space, ranges: Vec::new() }, Vec::new());
    for v in vmas {
        let mut found = Vec::new();
        pagemap.populated_anonymous(v.start, v.end, &mut found)?;
        for r in found {
            if r.guard { &mut guards } else { &mut plan.ranges }.push((r.start, r.end));
        }
    }
    Ok((plan, guards))
}

/// The parts of an object that hold data.
pub fn plan_object(space: u32, fd: &OwnedFd, size: u64) -> io::Result<SpacePlan> {
    Ok(SpacePlan {
        space,
        ranges: data(fd.as_fd(), size)?,
    })
}

/// The page ranges of a file of `size` bytes that hold data (lseek(2), SEEK_DATA).
pub fn data(fd: BorrowedFd<'_>, size: u64) -> io::Result<Vec<(u64, u64)>> {
    use nix::unistd::{Whence, lseek};
    let mut ranges = Vec::new();
    let mut at = 0i64;
    while (at as u64) < size {
        let data = match lseek(fd, at, Whence::SeekData) {
            Ok(d) => d,
            Err(nix::Error::ENXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let hole = lseek(fd, data, Whence::SeekHole)?;
        // It may have grown since its size was read.
        let (start, end) = (data as u64 & !(PAGE - 1), (hole as u64).min(size).next_multiple_of(PAGE));
        if start < end {
            ranges.push((start, end));
        }
        at = hole;
    }
    Ok(ranges)
}

/// Pages of a part of a file, which begins at a page, that hold data. One by one: SEEK_HOLE would look through all the data behind this part, too.
pub fn data_pages(fd: BorrowedFd<'_>, start: u64, end: u64) -> io::Result<Vec<u64>> {
    use nix::unistd::{Whence, lseek};
    let mut pages = Vec::new();
    let mut at = start;
    while at < end {
        at = match lseek(fd, at as i64, Whence::SeekData) {
            Ok(d) => d as u64 & !(PAGE - 1),
            Err(nix::Error::ENXIO) => break,
            Err(e) => return Err(e.into()),
        };
        if at < end {
            pages.push(at);
        }
        at += PAGE;
    }
    Ok(pages)
}

/// Everything of a frozen tree.
pub fn plan_tree(tree: &Tree, pids: &[i32], objects: &[OwnedFd]) -> io::Result<(Vec<SpacePlan>, Vec<Guards>)> {
    let mut plans = Vec::new();
    let mut guards = Vec::new();
    for (p, pid) in tree.processes.iter().zip(pids).filter(|(p, _)| p.zombie.is_none()) {
        let (plan, g) = plan_mm(*pid, p.mm, &tree.mms[p.mm as usize])?;
        plans.push(plan);
        guards.push(g);
    }
    for (i, (o, fd)) in tree.objects.iter().zip(objects).enumerate() {
        plans.push(plan_object(OBJECT_SPACE + i as u32, fd, o.size)?);
    }
    Ok((plans, guards))
}

/// Where the bytes of a space come from.
#[derive(Debug)]
pub enum Reader {
    /// A process.
    Process(Mem),
    /// An object.
    Object(File),
}

impl Reader {
    fn read_many(&self, ranges: &[(u64, u64)], buf: &mut [u8]) -> io::Result<()> {
        if let Reader::Process(m) = self
            && ranges.len() > 1
            && mem::read_many(m.pid(), ranges, buf).is_ok()
        {
            return Ok(());
        }
        let mut at = 0;
        for &(start, len) in ranges {
            self.read(start, &mut buf[at..at + len as usize])?;
            at += len as usize;
        }
        Ok(())
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        match self {
            Reader::Process(m) => m.read(at, buf),
            // An object may end within its last page: the rest reads as zeros.
            Reader::Object(f) => {
                let mut got = 0;
                while got < buf.len() {
                    match f.read_at(&mut buf[got..], at + got as u64)? {
                        0 => break,
                        n => got += n,
                    }
                }
                buf[got..].fill(0);
                Ok(())
            }
        }
    }
}

/// A frame's worth of pages, ready to send.
#[derive(Debug)]
pub struct Batch {
    /// Runs in ascending order.
    pub runs: Vec<Run>,
    /// Content of the runs that are not zero.
    pub data: Vec<Bytes>,
    /// Pages with content.
    pub pages: u64,
    /// Zero pages.
    pub zero: u64,
}

/// Reads a plan piece by piece, zero pages turned into runs, and hands each frame's worth to `sink`; stops when it says so.
pub fn read_plan(plan: &SpacePlan, reader: &Reader, sink: &mut dyn FnMut(Batch) -> bool) -> io::Result<()> {
    read_with(plan, reader, &mut |_, e| Err(e), sink)
}

/// The same of a running process, where memory may be unmapped under the read: such pages are left out, and listed in `missed`.
pub fn read_running(
    plan: &SpacePlan,
    reader: &Reader,
    missed: &mut Vec<(u32, u64, u64)>,
    sink: &mut dyn FnMut(Batch) -> bool,
) -> io::Result<()> {
    let space = plan.space;
    let mut miss = |at, _| {
        missed.push((space, at, at + PAGE));
        Ok(())
    };
    read_with(plan, reader, &mut miss, sink)
}

fn read_with(
    plan: &SpacePlan,
    reader: &Reader,
    miss: &mut dyn FnMut(u64, io::Error) -> io::Result<()>,
    sink: &mut dyn FnMut(Batch) -> bool,
) -> io::Result<()> {
    // A frame's worth of ranges at a time: pages dirtied at random are ranges of one page, and a call for each would cost more than the copy.
    let mut group: Vec<(u64, u64)> = Vec::new();
    let mut held = 0;
    let mut send = |group: &mut Vec<(u64, u64)>| -> io::Result<bool> {
        let batch = read_group(plan.space, reader, group, miss)?;
        group.clear();
        Ok(batch.is_none_or(&mut *sink))
    };
    for &(start, end) in &plan.ranges {
        let mut at = start;
        while at < end {
            let n = (end - at).min((FRAME_PAGES - held) * PAGE);
            group.push((at, n));
            held += n / PAGE;
            at += n;
            if held >= FRAME_PAGES {
                held = 0;
                if !send(&mut group)? {
                    return Ok(());
                }
            }
        }
    }
    if held > 0 {
        send(&mut group)?;
    }
    Ok(())
}

/// Reads ranges, (address, bytes), of a frame at most. None: nothing could be read.
fn read_group(
    space: u32,
    reader: &Reader,
    group: &[(u64, u64)],
    miss: &mut dyn FnMut(u64, io::Error) -> io::Result<()>,
) -> io::Result<Option<Batch>> {
    let mut batch = Builder::new(space);
    let total: u64 = group.iter().map(|r| r.1).sum();
    let mut buf = Buffer::take(total as usize);
    if reader.read_many(group, &mut buf.bytes).is_ok() {
        batch.take(group, buf);
        return batch.finish().map(Some);
    }
    // Page by page, to find the one that cannot be read.
    for &(start, len) in group {
        for page in (start..start + len).step_by(PAGE as usize) {
            let mut buf = Buffer::take(PAGE as usize);
            match reader.read(page, &mut buf.bytes) {
                Ok(()) => batch.take(&[(page, PAGE)], buf),
                Err(e) => miss(page, e)?,
            }
        }
    }
    if batch.held == 0 {
        return Ok(None);
    }
    batch.finish().map(Some)
}

/// Whether a page is all zeros.
pub fn is_zero(page: &[u8]) -> bool {
    // A look at the first words settles it for nearly every page with content.
    page[..64].iter().all(|&b| b == 0) && page.as_chunks::<8>().0.iter().all(|c| u64::from_ne_bytes(*c) == 0)
}

/// A buffer that goes back to a pool when the network is through with it: fresh memory for every frame costs a tenth of the throughput in
/// page faults and zeroing.
struct Buffer {
    bytes: Vec<u8>,
}

static POOL: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());
/// Buffers kept: what is in flight at most, with the sender's window of 16 MiB.
const POOLED: usize = 40;

impl Buffer {
    fn take(len: usize) -> Buffer {
        let mut bytes = POOL
            .lock()
            .ok()
            .and_then(|mut p| p.pop())
            .unwrap_or_else(|| Vec::with_capacity((FRAME_PAGES * PAGE) as usize));
        bytes.resize(len, 0);
        Buffer { bytes }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Ok(mut pool) = POOL.lock()
            && pool.len() < POOLED
        {
            pool.push(std::mem::take(&mut self.bytes));
        }
    }
}

struct Builder {
    space: u32,
    runs: Vec<(u64, u64, bool)>,
    data: Vec<Bytes>,
    held: u64,
    zero: u64,
}

impl Builder {
    fn new(space: u32) -> Self {
        Builder {
            space,
            runs: Vec::new(),
            data: Vec::new(),
            held: 0,
            zero: 0,
        }
    }

    /// Takes ranges over that were read one after the other into a buffer.
    fn take(&mut self, ranges: &[(u64, u64)], buf: Buffer) {
        let buf = Bytes::from_owner(buf);
        let mut k = 0usize;
        for &(start, len) in ranges {
            let (base, end) = (k, k + len as usize);
            while k < end {
                let zero = is_zero(&buf[k..k + PAGE as usize]);
                let from = k;
                while k < end && is_zero(&buf[k..k + PAGE as usize]) == zero {
                    k += PAGE as usize;
                }
                let pages = (k - from) as u64 / PAGE;
                if zero {
                    self.zero += pages;
                } else {
                    self.data.push(buf.slice(from..k));
                }
                self.runs.push((start + (from - base) as u64, pages, zero));
            }
            self.held += len / PAGE;
        }
    }

    fn finish(self) -> io::Result<Batch> {
        let runs = self
            .runs
            .iter()
            .map(|&(start, pages, zero)| Run::new(self.space, start, pages as u32, zero))
            .collect::<Result<Vec<_>, _>>()
            .map_err(io::Error::other)?;
        Ok(Batch {
            pages: self.held - self.zero,
            zero: self.zero,
            runs,
            data: self.data,
        })
    }
}

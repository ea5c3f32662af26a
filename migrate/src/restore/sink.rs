//! Where arriving pages go: straight into the memory of the copy's processes, or into shared objects.

use crate::{
    image::{Mm, PAGE},
    sys::{
        mem::{self, Mem},
        pagemap::Pagemap,
    },
    track,
};
use migrate_transport::{PageFrame, Run};
use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::Mutex,
};

#[derive(Debug)]
struct Space {
    pid: i32,
    mem: Mem,
    ranges: Vec<Area>,
    /// Nothing was written here before: anonymous memory is zero.
    fresh: bool,
    pagemap: Pagemap,
}

#[derive(Debug)]
struct Area {
    start: u64,
    end: u64,
    /// By the process itself.
    writable: bool,
    /// An untouched page shows a file, not zeros.
    over_file: bool,
}

/// Writes page frames. Every run has to lie inside one mapping that may hold private pages, or inside an object.
#[derive(Debug, Default)]
pub struct Sink {
    /// Pages that could not be written are noted here instead of being an error: in rounds the original may have mapped something else by now than
    /// what the copy was told of, e.g. a file that ends before this page. They stay owed by the source.
    missed: Option<Mutex<Vec<(u32, u64, u64)>>>,
    spaces: HashMap<u32, Space>,
    /// Descriptor, bytes, nothing written before.
    objects: HashMap<u32, (File, u64, bool)>,
}

impl Sink {
    /// From now on pages that cannot be written are only noted: see [`Sink::missed`].
    pub fn tolerant(mut self) -> Self {
        self.missed = Some(Mutex::default());
        self
    }

    /// Pages that could not be written: (space, start, end).
    pub fn missed(self) -> Vec<(u32, u64, u64)> {
        self.missed.and_then(|m| m.into_inner().ok()).unwrap_or_default()
    }

    /// An error of writing a run becomes a note where that is allowed.
    fn excuse(&self, run: (u32, u64, u64), r: io::Result<()>) -> io::Result<()> {
        match (r, &self.missed) {
            (Err(_), Some(missed)) => {
                if let Ok(mut m) = missed.lock() {
                    m.push(run);
                }
                Ok(())
            }
            (r, _) => r,
        }
    }

    /// Adds a process's address space. `fresh`: nothing was written to it before.
    pub fn add_process(&mut self, space: u32, pid: i32, mm: &Mm, fresh: bool) -> io::Result<()> {
        let ranges = mm
            .vmas
            .iter()
            .filter(|v| track::has_private_pages(v))
            .map(|v| Area {
                start: v.start,
                end: v.end,
                writable: v.prot & 2 != 0 && v.pkey == 0,
                over_file: track::over_file(v),
            })
            .collect();
        self.spaces.insert(
            space,
            Space {
                pid,
                mem: Mem::open(pid)?,
                ranges,
                fresh,
                pagemap: Pagemap::open(pid)?,
            },
        );
        Ok(())
    }

    /// Adds an object by its name. `fresh`: nothing was written to it before.
    pub fn add_object(&mut self, name: u32, fd: OwnedFd, size: u64, fresh: bool) {
        self.objects.insert(name, (File::from(fd), size, fresh));
    }

    /// Writes one frame; returns (pages with content, zero pages).
    pub fn write(&self, frame: &PageFrame) -> io::Result<(u64, u64)> {
        let mut data = Cursor {
            chunks: &frame.data,
            chunk: 0,
            at: 0,
        };
        let (mut pages, mut zeros) = (0, 0);
        // Runs of one process that it may write itself are written together: pages dirtied at random are runs of one page.
        let mut together = Together::default();
        for run in &frame.runs {
            if run.zero {
                zeros += run.pages as u64;
                self.check(run)?;
                self.excuse((run.space, run.start, run.end()), self.zero(run))?;
                continue;
            }
            pages += run.pages as u64;
            let len = run.pages as usize * PAGE as usize;
            let slices = data.take(len)?;
            match self.direct(run)? {
                Some(pid) => {
                    if !together.fits(pid, slices.len()) {
                        together.write(self)?;
                    }
                    together.add(pid, run, slices);
                }
                None => {
                    self.check(run)?;
                    self.excuse((run.space, run.start, run.end()), self.write_run(run, &slices))?;
                }
            }
        }
        together.write(self)?;
        Ok((pages, zeros))
    }

    /// The process, when the run lies in its private memory and it may write there.
    fn direct(&self, run: &Run) -> io::Result<Option<i32>> {
        if self.objects.contains_key(&run.space) {
            return Ok(None);
        }
        let (space, area) = self.range(run)?;
        Ok(area.writable.then_some(space.pid))
    }

    /// Zero pages. Fresh anonymous memory is zero already; over a file zeros are content like any other.
    fn zero(&self, run: &Run) -> io::Result<()> {
        let end = run.start + run.len();
        if let Some((file, size, fresh)) = self.objects.get(&run.space) {
            self.check(run)?;
            if !fresh && run.start < *size {
                use nix::fcntl::{FallocateFlags, fallocate};
                let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(file, flags, run.start as i64, (end.min(*size) - run.start) as i64)?;
            }
            return Ok(());
        }
        let (space, area) = self.range(run)?;
        if area.over_file {
            return zero_out(space, run.start, end);
        }
        if space.fresh {
            return Ok(());
        }
        let mut there = Vec::new();
        space.pagemap.populated(run.start, end, &mut there)?;
        there.iter().try_for_each(|r| zero_out(space, r.start, r.end))
    }

    fn check(&self, run: &Run) -> io::Result<()> {
        let end = run.start + run.pages as u64 * PAGE;
        if let Some((_, size, _)) = self.objects.get(&run.space) {
            return if end <= size.next_multiple_of(PAGE) {
                Ok(())
            } else {
                Err(outside(run))
            };
        }
        self.range(run).map(drop)
    }

    fn range(&self, run: &Run) -> io::Result<(&Space, &Area)> {
        let space = self.spaces.get(&run.space).ok_or_else(|| outside(run))?;
        let end = run.start + run.pages as u64 * PAGE;
        let i = space.ranges.partition_point(|r| r.end <= run.start);
        match space.ranges.get(i) {
            Some(area) if area.start <= run.start && end <= area.end => Ok((space, area)),
            _ => Err(outside(run)),
        }
    }

    fn write_run(&self, run: &Run, slices: &[&[u8]]) -> io::Result<()> {
        if let Some((file, size, _)) = self.objects.get(&run.space) {
            self.check(run)?;
            let mut at = run.start;
            for s in slices {
                let n = (s.len() as u64).min(size.saturating_sub(at)) as usize;
                file.write_all_at(&s[..n], at)?;
                at += s.len() as u64;
            }
            return Ok(());
        }
        let (space, _) = self.range(run)?;
        let mut at = run.start;
        for s in slices {
            space.mem.write(at, s)?;
            at += s.len() as u64;
        }
        Ok(())
    }
}

/// Runs of one process, waiting to be written in one call.
#[derive(Default)]
struct Together<'a> {
    pid: i32,
    spaces: Vec<u32>,
    ranges: Vec<(u64, u64)>,
    chunks: Vec<&'a [u8]>,
}

impl<'a> Together<'a> {
    fn fits(&self, pid: i32, chunks: usize) -> bool {
        self.pid == pid && self.ranges.len() < mem::RANGES && self.chunks.len() + chunks <= mem::RANGES
    }

    fn add(&mut self, pid: i32, run: &Run, chunks: Vec<&'a [u8]>) {
        self.pid = pid;
        self.spaces.push(run.space);
        self.ranges.push((run.start, run.len()));
        self.chunks.extend(chunks);
    }

    fn write(&mut self, sink: &Sink) -> io::Result<()> {
        if self.ranges.is_empty() {
            return Ok(());
        }
        if mem::write_many(self.pid, &self.ranges, &self.chunks).is_err() {
            // Page by page and by force, to find what cannot be written and say which.
            let mem = Mem::open(self.pid)?;
            let all = self.chunks.concat();
            let mut pages = all.chunks(PAGE as usize);
            for (space, &(start, len)) in self.spaces.iter().zip(&self.ranges) {
                for at in (start..start + len).step_by(PAGE as usize) {
                    let page = pages.next().ok_or(io::ErrorKind::InvalidData)?;
                    let written = mem
                        .write(at, page)
                        .map_err(|e| io::Error::new(e.kind(), format!("page {at:#x}: {e}")));
                    sink.excuse((*space, at, at + PAGE), written)?;
                }
            }
        }
        self.spaces.clear();
        self.ranges.clear();
        self.chunks.clear();
        Ok(())
    }
}

fn zero_out(space: &Space, start: u64, end: u64) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut at = start;
    while at < end {
        let n = (end - at).min(ZEROS.len() as u64);
        space.mem.write(at, &ZEROS[..n as usize])?;
        at += n;
    }
    Ok(())
}

fn outside(run: &Run) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!(
            "a page run at {:#x} of {} pages in space {:#x} lies outside every mapping",
            run.start, run.pages, run.space
        ),
    )
}

struct Cursor<'a> {
    chunks: &'a [bytes::Bytes],
    chunk: usize,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, mut len: usize) -> io::Result<Vec<&'a [u8]>> {
        let mut out = Vec::new();
        while len > 0 {
            let c = self
                .chunks
                .get(self.chunk)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a page frame is shorter than its runs"))?;
            let n = len.min(c.len() - self.at);
            out.push(&c[self.at..self.at + n]);
            self.at += n;
            len -= n;
            if self.at == c.len() {
                self.chunk += 1;
                self.at = 0;
            }
        }
        Ok(out)
    }
}

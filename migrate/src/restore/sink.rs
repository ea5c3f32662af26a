//! Where arriving pages go: straight into the memory of the copy's processes, or into shared objects.

use crate::{
    dump::pages::OBJECT_SPACE,
    image::{Backing, Mm, PAGE},
    sys::mem::{self, Mem},
};
use migrate_transport::{PageFrame, Run};
use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
};

#[derive(Debug)]
struct Space {
    pid: i32,
    mem: Mem,
    /// (start, end, writable by the process itself), ascending.
    ranges: Vec<(u64, u64, bool)>,
}

/// Writes page frames. Every run has to lie inside one mapping that may hold private pages, or inside an object.
#[derive(Debug, Default)]
pub struct Sink {
    spaces: HashMap<u32, Space>,
    objects: HashMap<u32, (File, u64)>,
}

impl Sink {
    /// Adds a process's address space.
    pub fn add_process(&mut self, space: u32, pid: i32, mm: &Mm) -> io::Result<()> {
        let ranges = mm
            .vmas
            .iter()
            .filter(|v| !v.shared && !matches!(v.backing, Backing::Special(_)))
            .map(|v| (v.start, v.end, v.prot & 2 != 0 && v.pkey == 0))
            .collect();
        self.spaces.insert(
            space,
            Space {
                pid,
                mem: Mem::open(pid)?,
                ranges,
            },
        );
        Ok(())
    }

    /// Adds an object.
    pub fn add_object(&mut self, index: u32, fd: OwnedFd, size: u64) {
        self.objects.insert(OBJECT_SPACE + index, (File::from(fd), size));
    }

    /// Writes one frame; returns (pages with content, zero pages).
    pub fn write(&self, frame: &PageFrame) -> io::Result<(u64, u64)> {
        let mut data = Cursor {
            chunks: &frame.data,
            chunk: 0,
            at: 0,
        };
        let (mut pages, mut zeros) = (0, 0);
        for run in &frame.runs {
            if run.zero {
                zeros += run.pages as u64;
                // Fresh memory and fresh objects are zero. A later round that clears a page punches it out.
                self.check(run)?;
                continue;
            }
            pages += run.pages as u64;
            let len = run.pages as usize * PAGE as usize;
            let slices = data.take(len)?;
            self.write_run(run, &slices)?;
        }
        Ok((pages, zeros))
    }

    fn check(&self, run: &Run) -> io::Result<()> {
        let end = run.start + run.pages as u64 * PAGE;
        if let Some((_, size)) = self.objects.get(&run.space) {
            return if end <= size.next_multiple_of(PAGE) {
                Ok(())
            } else {
                Err(outside(run))
            };
        }
        self.range(run).map(drop)
    }

    fn range(&self, run: &Run) -> io::Result<(&Space, bool)> {
        let space = self.spaces.get(&run.space).ok_or_else(|| outside(run))?;
        let end = run.start + run.pages as u64 * PAGE;
        let i = space.ranges.partition_point(|r| r.1 <= run.start);
        match space.ranges.get(i) {
            Some(&(a, b, w)) if a <= run.start && end <= b => Ok((space, w)),
            _ => Err(outside(run)),
        }
    }

    fn write_run(&self, run: &Run, slices: &[&[u8]]) -> io::Result<()> {
        if let Some((file, size)) = self.objects.get(&run.space) {
            self.check(run)?;
            let mut at = run.start;
            for s in slices {
                let n = (s.len() as u64).min(size.saturating_sub(at)) as usize;
                file.write_all_at(&s[..n], at)?;
                at += s.len() as u64;
            }
            return Ok(());
        }
        let (space, writable) = self.range(run)?;
        if writable {
            return mem::write(space.pid, run.start, slices);
        }
        let mut at = run.start;
        for s in slices {
            space.mem.write(at, s)?;
            at += s.len() as u64;
        }
        Ok(())
    }
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

//! Soft-dirty bits (Documentation/admin-guide/mm/soft-dirty.rst): bit 55 of a page's pagemap entry is set by a write and cleared, for a whole
//! process at once, by `4` in /proc/PID/clear_refs.
//!
//! Reading and clearing are two calls. A write between them would be lost, so the process is stopped for both. Tried on paper and dropped:
//! clearing first and reading afterwards, which needs a second copy of the bits that the kernel does not keep.

use super::{Scan, TrackError, Tracker, over_file};
use crate::{
    image::Vma,
    pages::PageSet,
    sys::pagemap::{self, Pagemap},
};
use std::{io, sync::OnceLock};

/// Tracks one process.
#[derive(Debug)]
pub struct SoftDirty {
    pid: i32,
    pagemap: Pagemap,
    /// Mappings that were there when the bits were last cleared.
    known: PageSet,
    seen: PageSet,
}

impl SoftDirty {
    /// A tracker that has seen nothing: its first look finds everything.
    pub fn new(pid: i32) -> io::Result<SoftDirty> {
        Ok(SoftDirty {
            pid,
            pagemap: Pagemap::open(pid)?,
            known: PageSet::new(),
            seen: PageSet::new(),
        })
    }
}

impl Tracker for SoftDirty {
    fn scan(&mut self, vma: &Vma, held: &PageSet, _last: bool) -> Result<Scan, TrackError> {
        let mut found = Vec::new();
        match self.pagemap.soft_dirty(vma.start, vma.end, &mut found) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(TrackError::Gone),
            r => r?,
        }
        let over_file = over_file(vma);
        let fresh = !self.known.contains(vma.start);
        self.seen.insert(vma.start, vma.end);
        let mut scan = Scan {
            fresh,
            ..Default::default()
        };
        let mut private = PageSet::new();
        for (r, dirty) in found {
            if r.guard {
                scan.guards.insert(r.start, r.end);
            } else if !(over_file && r.file) {
                private.insert(r.start, r.end);
                if dirty || fresh {
                    scan.dirty.insert(r.start, r.end);
                }
            }
        }
        scan.gone = held.clip(vma.start, vma.end).difference(&private);
        Ok(scan)
    }

    fn arm(&mut self) -> io::Result<()> {
        self.known = std::mem::take(&mut self.seen);
        pagemap::clear_soft_dirty(self.pid)
    }

    fn stops(&self) -> bool {
        true
    }

    fn alive(&self) -> bool {
        self.pagemap.alive()
    }
}

/// Whether this kernel has it: clears this process's bits and sees whether a write sets one.
pub fn available() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(probe)
}

fn probe() -> bool {
    // Without it a page that was dropped and read again would look unchanged.
    if pagemap::ZeroPage::get().is_none() {
        return false;
    }
    let pid = std::process::id() as i32;
    let mut page = vec![1u8; 3 * 4096];
    let at = (page.as_ptr() as u64).next_multiple_of(4096);
    let dirty = || {
        let mut found = Vec::new();
        let map = Pagemap::open(pid).and_then(|p| p.soft_dirty(at, at + 4096, &mut found));
        map.is_ok() && found.iter().any(|f| f.1)
    };
    if pagemap::clear_soft_dirty(pid).is_err() || dirty() {
        return false;
    }
    let offset = (at - page.as_ptr() as u64) as usize;
    std::hint::black_box(&mut page)[offset] = 2;
    dirty()
}

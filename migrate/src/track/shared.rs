//! Shared memory that one process maps, by userfaultfd with asynchronous write protection: what this process may have written.
//!
//! All of a mapping is armed, holes too (by markers in the page tables, 2 MiB for a GiB). A page that was written and then taken out of the page tables
//! again, by MADV_DONTNEED or by the kernel to swap it out, is neither there nor armed, and so shows. That is why holes have to be armed: those
//! that never were could not be told from it.
//!
//! The userfaultfd is another than the one for private memory: it tells of forks and of madvise(2), for which calls wait ([`super::listener`]).

use super::{TrackError, listener::Listener};
use crate::{
    image::Vma,
    pages::PageSet,
    sys::{pagemap::Pagemap, uffd::Userfault},
};
use std::{io, sync::Weak};

/// Tracks the shared mappings of one process.
#[derive(Debug)]
pub struct SharedMemory {
    pagemap: Pagemap,
    /// The listener's.
    uffd: Weak<Userfault>,
    /// Registered, and not armed yet.
    void: PageSet,
}

impl SharedMemory {
    /// `fd`: the number that userfaultfd(2) returned inside process `pid`. The caller closes it there.
    pub fn new(pid: i32, fd: i32, listener: &Listener) -> io::Result<SharedMemory> {
        let pagemap = Pagemap::open(pid)?;
        Ok(SharedMemory {
            pagemap,
            uffd: listener.watch(Userfault::take_with_events(pid, fd)?),
            void: PageSet::new(),
        })
    }

    /// Tracks these mappings from the next look on.
    pub fn adopt(&mut self, mappings: &[(u64, u64)]) {
        let Some(uffd) = self.uffd.upgrade() else { return };
        for &(start, end) in mappings {
            match uffd.register(start, end) {
                Ok(()) => self.void.insert(start, end),
                Err(e) => tracing::debug!(error = %e, "shared mapping {start:x}-{end:x} cannot be tracked"),
            }
        }
    }

    /// Looks at one mapping: pages that may have been written since the last look. None: it cannot say yet, but it is tracked from now on. `last`:
    /// everything is stopped, and nothing is armed.
    pub fn scan(&mut self, vma: &Vma, last: bool) -> Result<Option<PageSet>, TrackError> {
        let mut open = Vec::new();
        let looked = if last {
            self.pagemap.unarmed(vma.start, vma.end, &mut open)
        } else {
            self.clear(vma)
                .and_then(|()| self.pagemap.take_unarmed(vma.start, vma.end, &mut open))
        };
        if let Err(e) = looked {
            self.void.insert(vma.start, vma.end);
            return Err(super::wp_async::changed(e));
        }
        if self.void.overlaps(vma.start, vma.end) {
            if !last {
                self.void.remove(vma.start, vma.end);
            }
            return Ok(None);
        }
        Ok(Some(PageSet::from_ranges(open)))
    }

    /// A mapping that is new here may have marks of an earlier registration, under which pages were written since: see [`super::wp_async`].
    fn clear(&self, vma: &Vma) -> io::Result<()> {
        match self.uffd.upgrade() {
            Some(uffd) if self.void.overlaps(vma.start, vma.end) => super::clear_marks(&self.pagemap, &uffd, vma.start, vma.end),
            _ => Ok(()),
        }
    }
}

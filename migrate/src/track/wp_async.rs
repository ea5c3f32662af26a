//! userfaultfd with asynchronous write protection (UFFD_FEATURE_WP_ASYNC) and PAGEMAP_SCAN (Documentation/admin-guide/mm/userfaultfd.rst and
//! pagemap.rst, Linux 6.7).
//!
//! The descriptor has to belong to the process it tracks, so it is made there by an injected call and taken by pidfd_getfd(2); all else is done
//! from outside while the process runs. Reading what was written and arming it again is one atomic call, so no round stops anything.
//!
//! - A mapping that appeared since is not registered: the scan answers EPERM. By then it may have armed some pages, so the whole mapping
//!   counts as new, and everything in it is sent again.
//! - Registering a range splits mappings at its ends. Done from an old list while the process runs, that cut a mapping in two that had grown in
//!   between, and the program's next mremap(2) over both failed with EFAULT. So mappings are registered in a short stop, whole, by the list of that
//!   moment, and only those that have outlived a round.
//! - The kernel takes a registration away when mremap(2) moves the mapping; and from its new neighbour too if that is registered as well and the two become one.
//!   The neighbour's pages keep their marks. Written without a registration such a page is writable and looks armed, so that once it was registered again no
//!   look ever showed it written. So all marks are taken away first where a mapping is looked at for the first time, or again.
//! - Pages dropped by MADV_DONTNEED are holes again, and holes are not armed: the last look asks for everything that is not armed, which is
//!   also the kernel's fast way. Asking it over a large reserve would report all of that reserve, so only blocks in which the destination
//!   holds pages are looked at like that; in the others whatever is populated is new.
//! - The last look by two threads did not pay: 1.35 ms for 4 GiB in place of 1.5. The second core has to wake up first.
//! - A private page over a file that was dropped shows the file again, present and unarmed or not there at all: the pages held are looked at one
//!   by one.

use super::{Scan, TrackError, Tracker, over_file};
use crate::{
    image::{PAGE, Vma},
    pages::PageSet,
    sys::{
        pagemap::{Pagemap, Range},
        uffd::{self, Userfault},
    },
};
use std::{io, sync::OnceLock};

/// Tracks one address space.
#[derive(Debug)]
pub struct WpAsync {
    pagemap: Pagemap,
    uffd: Userfault,
    /// Guard regions seen in rounds: once armed, the fast scan does not show them.
    guards: PageSet,
    /// Ranges whose look failed after it may have armed something: looked at as if new.
    void: PageSet,
}

/// What one page table covers: held pages are looked for by such blocks.
const BLOCK: u64 = 2 << 20;
/// Clean pages between two written ones that are looked at along with them: about what one more call costs.
const NEAR: u64 = 16 * PAGE;

impl WpAsync {
    /// `fd`: the number that userfaultfd(2) returned inside process `pid`. The caller closes it there.
    pub fn new(pid: i32, fd: i32) -> io::Result<WpAsync> {
        Ok(WpAsync {
            pagemap: Pagemap::open(pid)?,
            uffd: Userfault::take(pid, fd)?,
            guards: PageSet::new(),
            void: PageSet::new(),
        })
    }

    fn note(&mut self, found: &[Range], over_file: bool, scan: &mut Scan) {
        for r in found {
            if r.guard {
                scan.guards.insert(r.start, r.end);
                self.guards.insert(r.start, r.end);
            } else if !(over_file && r.file) {
                scan.dirty.insert(r.start, r.end);
            }
        }
    }

    /// What was written, armed again. Where the destination holds pages the kernel's fast way tells first which are not armed: 0.3 ms for a GiB
    /// in place of 10 ms. In the other blocks that would show, and arm, every hole of a reserve.
    fn take_written(&self, vma: &Vma, held: &PageSet, found: &mut Vec<Range>) -> io::Result<()> {
        if over_file(vma) {
            return self.pagemap.take_written(vma.start, vma.end, found);
        }
        let blocks = blocks(&held.clip(vma.start, vma.end), vma);
        let mut rest = PageSet::new();
        rest.insert(vma.start, vma.end);
        rest.subtract(&blocks);
        for &(a, b) in rest.ranges() {
            self.pagemap.take_written(a, b, found)?;
        }
        let mut open = Vec::new();
        for &(a, b) in blocks.ranges() {
            self.pagemap.unarmed(a, b, &mut open)?;
        }
        let near = open.chunk_by(|l, r| r.0 - l.1 <= NEAR);
        for (a, b) in near.filter_map(|g| Some((g.first()?.0, g.last()?.1))) {
            self.pagemap.take_written(a, b, found)?;
        }
        Ok(())
    }

    fn round(&mut self, vma: &Vma, held: &PageSet) -> Result<Scan, TrackError> {
        let mut scan = Scan::default();
        let mut found = Vec::new();
        let void = self.void.overlaps(vma.start, vma.end);
        if void {
            match super::clear_marks(&self.pagemap, &self.uffd, vma.start, vma.end) {
                Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::ENOENT)) => return Err(TrackError::Untracked),
                r => r.map_err(changed)?,
            }
        }
        match self.take_written(vma, held, &mut found) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => return Err(TrackError::Untracked),
            r => r.map_err(changed)?,
        }
        if void {
            // Armed by now, all of it: what is there has to be sent, whenever it was written.
            self.void.remove(vma.start, vma.end);
            return self.whole(vma, held).map(|whole| Scan {
                gone: PageSet::new(),
                ..whole
            });
        }
        self.note(&found, over_file(vma), &mut scan);
        if over_file(vma) {
            // Dropped pages of a private file mapping show the file again: seen here as well as at the last look, so that the lists stay short.
            scan.gone = self.reverted(vma, held)?;
            scan.dirty.subtract(&scan.gone);
        }
        Ok(scan)
    }

    /// Held pages of a private file mapping that are not private any more.
    fn reverted(&self, vma: &Vma, held: &PageSet) -> Result<PageSet, TrackError> {
        let held = held.clip(vma.start, vma.end);
        let mut private = PageSet::new();
        for &(a, b) in held.ranges() {
            let mut found = Vec::new();
            self.pagemap.populated(a, b, &mut found).map_err(changed)?;
            found
                .iter()
                .filter(|r| !r.file && !r.guard)
                .for_each(|r| private.insert(r.start, r.end));
        }
        Ok(held.difference(&private))
    }

    fn last(&mut self, vma: &Vma, held: &PageSet) -> Result<Scan, TrackError> {
        let mut scan = Scan::default();
        let over_file = over_file(vma);
        let mine = held.clip(vma.start, vma.end);
        if self.void.overlaps(vma.start, vma.end) {
            return self.whole(vma, &mine);
        }
        if over_file {
            // Small: what a library's data pages are.
            let mut found = Vec::new();
            match self.pagemap.take_written(vma.start, vma.end, &mut found) {
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => return self.whole(vma, &mine),
                r => r.map_err(changed)?,
            }
            self.note(&found, true, &mut scan);
            scan.gone = self.reverted(vma, held)?;
            scan.dirty.subtract(&scan.gone);
            return Ok(scan);
        }
        let blocks = blocks(&mine, vma);
        let mut open = Vec::new();
        for &(a, b) in blocks.ranges() {
            match self.pagemap.unarmed(a, b, &mut open) {
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => return self.whole(vma, &mine),
                r => r.map_err(changed)?,
            }
        }
        let mut rest = PageSet::new();
        rest.insert(vma.start, vma.end);
        rest.subtract(&blocks);
        rest.extend(&PageSet::from_ranges(open));
        // What is not armed is content, a guard, or nothing any more.
        let mut populated = PageSet::new();
        let mut found = Vec::new();
        rest.extend(&self.guards.clip(vma.start, vma.end));
        for &(a, b) in rest.ranges() {
            found.clear();
            self.pagemap.populated(a, b, &mut found).map_err(changed)?;
            for r in &found {
                if r.guard {
                    scan.guards.insert(r.start, r.end);
                } else {
                    populated.insert(r.start, r.end);
                }
            }
        }
        scan.gone = mine.intersection(&rest).difference(&populated);
        scan.dirty = populated;
        Ok(scan)
    }

    /// A mapping that is not registered, or not wholly: everything in it is new.
    fn whole(&self, vma: &Vma, held: &PageSet) -> Result<Scan, TrackError> {
        let mut scan = Scan {
            fresh: true,
            ..Default::default()
        };
        let mut found = Vec::new();
        self.pagemap.populated(vma.start, vma.end, &mut found).map_err(changed)?;
        let over_file = over_file(vma);
        for r in &found {
            if r.guard {
                scan.guards.insert(r.start, r.end);
            } else if !(over_file && r.file) {
                scan.dirty.insert(r.start, r.end);
            }
        }
        scan.gone = held.difference(&scan.dirty);
        Ok(scan)
    }
}

/// The blocks of a mapping in which pages are held.
fn blocks(held: &PageSet, vma: &Vma) -> PageSet {
    let mut out = PageSet::new();
    for &(a, b) in held.ranges() {
        out.insert((a & !(BLOCK - 1)).max(vma.start), b.next_multiple_of(BLOCK).min(vma.end));
    }
    out
}

/// What an error of a look means.
pub(super) fn changed(e: io::Error) -> TrackError {
    match e.raw_os_error() {
        Some(libc::ESRCH) => TrackError::Gone,
        // Unmapped, replaced or split between the list of mappings and now.
        Some(libc::EPERM | libc::EINVAL | libc::ENOENT | libc::EFAULT | libc::ENOMEM) => TrackError::Changed,
        _ => TrackError::Io(e),
    }
}

impl Tracker for WpAsync {
    fn scan(&mut self, vma: &Vma, held: &PageSet, last: bool) -> Result<Scan, TrackError> {
        if last {
            return self.last(vma, held);
        }
        let r = self.round(vma, held);
        if r.is_err() {
            self.void.insert(vma.start, vma.end);
        }
        r
    }

    fn arm(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn adopt(&mut self, mappings: &[(u64, u64)]) {
        for &(start, end) in mappings {
            // What cannot be registered stays untracked, and is sent at the freeze.
            match self.uffd.register(start, end) {
                Ok(()) => self.void.insert(start, end),
                Err(e) => tracing::debug!(error = %e, "mapping {start:x}-{end:x} cannot be tracked"),
            }
        }
    }

    fn stops(&self) -> bool {
        false
    }

    fn alive(&self) -> bool {
        self.pagemap.alive()
    }
}

/// Whether this kernel has it.
pub fn available() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        uffd::features().is_ok_and(|f| f & uffd::WP_ASYNC != 0) && Pagemap::open(std::process::id() as i32).is_ok_and(|p| p.scan_works())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Backing, VmaFlags};

    fn vma(start: u64, end: u64) -> Vma {
        Vma {
            start,
            end,
            prot: 3,
            shared: false,
            backing: Backing::Anonymous,
            flags: VmaFlags::default(),
            name: None,
            pkey: 0,
        }
    }

    /// A tracked mapping moves beside another, the two become one, and the kernel forgets that either was tracked, but not which pages were armed. What is
    /// written before they are tracked again, and after that, must show.
    #[test]
    fn marks_of_an_earlier_registration_are_not_trusted() {
        if !available() {
            return eprintln!("SKIP marks_of_an_earlier_registration_are_not_trusted: no WP_ASYNC");
        }
        const HALF: usize = 8 * PAGE as usize;
        let (none, both) = (libc::PROT_NONE, libc::PROT_READ | libc::PROT_WRITE);
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // Home, a gap, and a place aside.
        // SAFETY: new mappings, and then one inside them.
        let low = unsafe {
            let room = libc::mmap(std::ptr::null_mut(), 5 * HALF, none, private, -1, 0);
            assert_ne!(room, libc::MAP_FAILED);
            let low = room.byte_add(HALF / 2);
            assert_eq!(libc::mmap(low, 2 * HALF, both, private | libc::MAP_FIXED, -1, 0), low);
            low
        };
        let write = |page: usize, byte: u8| {
            // SAFETY: inside the lower half, which stays where it is.
            unsafe { low.cast::<u8>().add(page * PAGE as usize).write_volatile(byte) };
        };
        // SAFETY: as above, both halves.
        unsafe { low.cast::<u8>().write_bytes(1, 2 * HALF) };
        let shift = |from: *mut libc::c_void, to: *mut libc::c_void| {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: from one place that is ours to another.
            assert_eq!(unsafe { libc::mremap(from, HALF, HALF, flags, to) }, to);
        };
        let (high, aside) = (low.wrapping_byte_add(HALF), low.wrapping_byte_add(3 * HALF));
        let (start, middle, end) = (low as u64, high as u64, high as u64 + HALF as u64);
        let away = (aside as u64, aside as u64 + HALF as u64);

        let me = std::process::id() as i32;
        let flags = libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64 | uffd::USER_MODE_ONLY;
        // SAFETY: no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as i32;
        let mut tracker = WpAsync::new(me, fd).unwrap();
        // SAFETY: the tracker has a descriptor of its own.
        unsafe { libc::close(fd) };
        let mut held = PageSet::new();
        let look = |tracker: &mut WpAsync, v: &Vma, held: &PageSet| tracker.scan(v, held, false).map(|s| s.dirty.pages());
        tracker.adopt(&[(start, end)]);
        assert_eq!(look(&mut tracker, &vma(start, end), &held).unwrap(), 16);
        held.insert(start, end);
        assert_eq!(look(&mut tracker, &vma(start, end), &held).unwrap(), 0);
        shift(high, aside);
        assert!(matches!(
            look(&mut tracker, &vma(away.0, away.1), &held),
            Err(TrackError::Untracked)
        ));
        tracker.adopt(&[away]);
        assert_eq!(look(&mut tracker, &vma(away.0, away.1), &held).unwrap(), 8);
        assert_eq!(
            look(&mut tracker, &vma(start, middle), &held).unwrap(),
            0,
            "the other half is still tracked"
        );
        shift(aside, high);
        let lost = look(&mut tracker, &vma(start, end), &held);
        write(5, 2);
        if lost.is_ok() {
            eprintln!("this kernel keeps the registration");
        }
        tracker.adopt(&[(start, end)]);
        assert_eq!(look(&mut tracker, &vma(start, end), &held).unwrap(), 16, "all of it is sent again");
        write(5, 3);
        write(6, 3);
        assert_eq!(look(&mut tracker, &vma(start, end), &held).unwrap(), 2);
        assert_eq!(look(&mut tracker, &vma(start, end), &held).unwrap(), 0);
        // SAFETY: all of it is this test's own.
        unsafe { libc::munmap(low.byte_sub(HALF / 2), 5 * HALF) };
    }
}

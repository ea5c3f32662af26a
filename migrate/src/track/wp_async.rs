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
//! - An entry of the page tables that does not matter costs the kernel 1 ns in its fast way, which tells what is not armed and no more, and else 2; one that it
//!   tells of costs 9; and a call that arms anything 1.2 us, most of it for the TLB. So a round asks in the fast way and arms place by place where little was
//!   written, and goes through it in one pass where more was. Always the first took 2.4 ms a GiB instead of 0.8 with one page in a hundred written; always the
//!   second 0.54 instead of 0.25 with none. In blocks of which the destination holds nothing the fast way would show every hole of a reserve.
//! - Of pages that are owed the last look need only know which have no content: they are sent, written or not. Where much was written that is 0.6 ms a GiB and one range
//!   for many pages, and the other question some 2 ms, a range for each place, and all that is done with so many ranges.
//! - Pages dropped by MADV_DONTNEED are holes again, and holes are not armed: the last look asks for everything that is not armed, which is
//!   also the kernel's fast way. Asking it over a large reserve would report all of that reserve, so only blocks in which the destination
//!   holds pages are looked at like that; in the others whatever is populated is new.
//! - The last look by two threads did not pay, as long as it came after everything else in the freeze: 1.35 ms for 4 GiB in place of 1.5. The second core has to
//!   wake up first. Now it begins with the stop, on threads that are awake ([`super::ahead`]).
//! - A private page over a file that was dropped shows the file again, present and unarmed or not there at all: the pages held are looked at one
//!   by one.
//! - Dropped while it was armed such a page leaves a marker, and the next write to it takes two faults: one maps a copy of the file's page, armed like the
//!   marker, the second one lets the write through, and only that one tells. Whoever is stopped between the two, or never comes back to that write from a
//!   signal, leaves a page that looks armed and unwritten and has another content than the one that was sent. Every second stop of a program that did nothing
//!   but drop and write was such a one. It has the file's content then. So each look at a running program notes of the pages it has armed a word by which they
//!   differ from the file (a *witness*), and the last one reads those words again: 60 ms for 256 MiB. Holding all of the pages against the file within the freeze took
//!   200. Where a drop would be told of (UFFD_FEATURE_EVENT_REMOVE) the program would wait for the agent, and a file that is truncated would still go unnoticed.

use super::{
    Scan, TrackError, Tracker,
    ahead::{self, Seen},
    over_file,
};
use crate::{
    image::{Backing, PAGE, Vma},
    pages::PageSet,
    procfs,
    sys::{
        mem::{self, Mem},
        pagemap::{Pagemap, Range},
        uffd::{self, Userfault},
    },
};
use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, OnceLock},
};

/// Tracks one address space.
#[derive(Debug)]
pub struct WpAsync {
    pid: i32,
    pagemap: Arc<Pagemap>,
    uffd: Userfault,
    /// Guard regions seen in rounds: once armed, the fast scan does not show them.
    guards: PageSet,
    /// Ranges whose look failed after it may have armed something: looked at as if new.
    void: PageSet,
    /// Of private pages over a file, by page: where something else is than in the file, and what.
    witnesses: HashMap<u64, (u64, [u8; WORD])>,
}

/// What one page table covers: held pages are looked for by such blocks.
const BLOCK: u64 = 2 << 20;
/// Pages between two that are looked at along with them: what one more call costs, where only pages without content are told of.
const NEAR: u64 = 128 * PAGE;
/// Bytes of pages that are sent in any case, in a run, of which the last look does not ask whether they were written: about what two more calls cost.
const OWED: u64 = 256 * PAGE;
/// Written places in a part of a mapping up to which it asks that of owed pages nevertheless: where little was written it is the cheaper question.
const PLACES: usize = 64;
/// Bytes of which a round asks first whether much of it was written.
const STRETCH: u64 = 64 << 20;
/// Written places in a stretch that are worth a call each.
const FEW: usize = 16;
/// Bytes that are held against the file at a time.
const COMPARED: usize = 256 << 10;
/// Bytes of a witness.
const WORD: usize = 8;

impl WpAsync {
    /// `fd`: the number that userfaultfd(2) returned inside process `pid`. The caller closes it there.
    pub fn new(pid: i32, fd: i32) -> io::Result<WpAsync> {
        Ok(WpAsync {
            pid,
            pagemap: Arc::new(Pagemap::open(pid)?),
            uffd: Userfault::take(pid, fd)?,
            guards: PageSet::new(),
            void: PageSet::new(),
            witnesses: HashMap::new(),
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

    /// What was written, armed again.
    fn take_written(&self, vma: &Vma, held: &PageSet, found: &mut Vec<Range>) -> io::Result<()> {
        if over_file(vma) {
            return self.pagemap.take_written(vma.start, vma.end, true, found);
        }
        let blocks = blocks(&held.clip(vma.start, vma.end), vma);
        let mut rest = PageSet::new();
        rest.insert(vma.start, vma.end);
        rest.subtract(&blocks);
        for &(a, b) in rest.ranges() {
            self.pagemap.take_written(a, b, false, found)?;
        }
        let mut dense = false;
        let mut open = Vec::new();
        for &(start, end) in blocks.ranges() {
            for a in (start..end).step_by(STRETCH as usize) {
                let b = end.min(a + STRETCH);
                if !dense {
                    open.clear();
                    self.pagemap.unarmed(a, b, &mut open)?;
                    dense = is_dense(open.iter().copied());
                }
                let before = found.len();
                if dense {
                    self.pagemap.take_written(a, b, false, found)?;
                    dense = is_dense(found[before..].iter().map(|r| (r.start, r.end)));
                } else {
                    for (a, b) in near(&open) {
                        self.pagemap.take_written(a, b, false, found)?;
                    }
                }
            }
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
        tracked(self.take_written(vma, held, &mut found))?;
        if void {
            // Armed by now, all of it: what is there has to be sent, whenever it was written.
            self.void.remove(vma.start, vma.end);
            let whole = self.whole(vma, held)?;
            self.witness(vma, &whole.dirty);
            return Ok(Scan {
                gone: PageSet::new(),
                ..whole
            });
        }
        self.note(&found, over_file(vma), &mut scan);
        if over_file(vma) {
            // Dropped pages of a private file mapping show the file again: seen here as well as at the last look, so that the lists stay short.
            scan.gone = self.reverted(vma, held)?;
            scan.dirty.subtract(&scan.gone);
            self.witness(vma, &scan.dirty);
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

    fn last_look(&mut self, vma: &Vma, held: &PageSet, owed: &PageSet, seen: Option<Seen>) -> Result<Scan, TrackError> {
        let mut scan = Scan::default();
        let over_file = over_file(vma);
        let mine = held.clip(vma.start, vma.end);
        if self.void.overlaps(vma.start, vma.end) {
            return self.whole(vma, &mine);
        }
        if over_file {
            let (mut own, mut written) = (Vec::new(), Vec::new());
            match self.pagemap.own_pages(vma.start, vma.end, &mut own, &mut written) {
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => return self.whole(vma, &mine),
                r => r.map_err(changed)?,
            }
            self.note(&own, true, &mut scan);
            scan.gone = mine.difference(&scan.dirty);
            let mut kept = mine.intersection(&scan.dirty);
            kept.subtract(&PageSet::from_ranges(written));
            scan.dirty.subtract(&kept);
            scan.dirty.extend(&self.without_witness(&kept));
            return Ok(scan);
        }
        let blocks = blocks(&mine, vma);
        let mut seen = match seen.filter(|s| s.blocks == blocks) {
            Some(seen) => seen,
            None => {
                let mut all = Seen::default();
                for &(a, b) in blocks.ranges() {
                    match unarmed(&self.pagemap, a, b, owed) {
                        Err(TrackError::Untracked) => return self.whole(vma, &mine),
                        seen => all.extend(&seen?),
                    }
                }
                all
            }
        };
        // What was not looked at yet, or has to be once more.
        let touched = seen.touched.clip(vma.start, vma.end);
        for set in [&mut seen.open, &mut seen.absent, &mut seen.guards] {
            set.subtract(&touched);
        }
        let mut rest = PageSet::new();
        rest.insert(vma.start, vma.end);
        rest.subtract(&blocks);
        rest.extend(&self.guards.clip(vma.start, vma.end));
        rest.extend(&touched);
        rest.subtract(&seen.open);
        let (absent, guards) = content(&self.pagemap, &rest)?;
        rest.subtract(&absent);
        seen.open.subtract(&seen.absent);
        scan.dirty = seen.open;
        scan.dirty.extend(&rest);
        scan.gone = mine.intersection(&seen.absent.union(&absent));
        scan.guards = seen.guards;
        scan.guards.extend(&guards);
        Ok(scan)
    }

    /// Notes of these pages, which are armed, a word by which each differs from the file's page. Only of a mapping of a file.
    fn witness(&mut self, vma: &Vma, pages: &PageSet) {
        let (Backing::File { offset, .. } | Backing::Object { offset, .. }) = vma.backing else {
            return;
        };
        if pages.is_empty() {
            return;
        }
        // Without a witness a page is sent again at the freeze.
        let opened = File::open(procfs::mapped(self.pid, vma.start, vma.end)).and_then(|file| Ok((file, Mem::open(self.pid)?)));
        let Ok((file, mem)) = opened.inspect_err(|e| tracing::debug!(error = %e, "no witnesses at {:x}", vma.start)) else {
            return;
        };
        let (mut own, mut behind) = (vec![0; COMPARED], vec![0; COMPARED]);
        for &(start, end) in pages.ranges() {
            for at in (start..end).step_by(COMPARED) {
                let len = (end - at).min(COMPARED as u64) as usize;
                let read = mem
                    .read(at, &mut own[..len])
                    .and_then(|()| read_padded(&file, &mut behind[..len], offset + (at - vma.start)));
                let both = own[..len].chunks(PAGE as usize).zip(behind.chunks(PAGE as usize));
                for (page, (own, behind)) in (at..).step_by(PAGE as usize).zip(both) {
                    match difference(own, behind).filter(|_| read.is_ok()) {
                        Some((k, word)) => self.witnesses.insert(page, (page + k, word)),
                        None => self.witnesses.remove(&page),
                    };
                }
            }
        }
    }

    /// Those of these pages of a stopped process whose witness has another word now, or that have none.
    fn without_witness(&self, pages: &PageSet) -> PageSet {
        let mut out = PageSet::new();
        let mut words = Vec::new();
        for page in pages.ranges().iter().flat_map(|r| (r.0..r.1).step_by(PAGE as usize)) {
            match self.witnesses.get(&page) {
                Some(&(at, word)) => words.push((page, at, word)),
                None => out.insert(page, page + PAGE),
            }
        }
        let mut buf = vec![0; words.len().min(mem::RANGES) * WORD];
        for batch in words.chunks(mem::RANGES) {
            let ranges: Vec<(u64, u64)> = batch.iter().map(|w| (w.1, WORD as u64)).collect();
            let now = &mut buf[..batch.len() * WORD];
            let mut known = vec![true; batch.len()];
            if mem::read_many(self.pid, &ranges, now).is_err() {
                // One of them may not be read by the program itself.
                let mem = Mem::open(self.pid);
                for ((now, known), (at, _)) in now.chunks_mut(WORD).zip(&mut known).zip(&ranges) {
                    *known = mem.as_ref().is_ok_and(|m| m.read(*at, now).is_ok());
                }
            }
            for ((now, known), (page, _, word)) in now.chunks(WORD).zip(known).zip(batch) {
                if !known || now != word {
                    out.insert(*page, page + PAGE);
                }
            }
        }
        out
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

/// Of a part of a mapping without a file, in a process that stands still: what is not armed, and what that is. Where that is many places, long runs of pages that are
/// owed count as if they were not armed, unasked.
pub(super) fn unarmed(pagemap: &Pagemap, start: u64, end: u64, owed: &PageSet) -> Result<Seen, TrackError> {
    let mut open = Vec::new();
    let mut at = start;
    let owed = owed.clip(start, end);
    let long = |r: &(u64, u64)| r.1 - r.0 >= OWED;
    if owed.ranges().iter().any(long) {
        at = tracked(pagemap.unarmed_places(start, end, PLACES, &mut open))?;
        let owed = owed.clip(at, end);
        for (a, b) in owed.ranges().iter().copied().filter(long) {
            tracked(pagemap.unarmed(at, a, &mut open))?;
            open.push((a, b));
            at = b;
        }
    }
    tracked(pagemap.unarmed(at, end, &mut open))?;
    let open = PageSet::from_ranges(open);
    let (absent, guards) = content(pagemap, &open)?;
    Ok(Seen {
        open,
        absent,
        guards,
        ..Seen::default()
    })
}

/// Of pages that are not armed those that have no content, and which of these are guards. Places near each other are looked at in one call: with
/// every third page of a GiB written a call for each took 20 ms. The kernel is asked for the few that are not content: telling of each that is took 3 to 7 ms a GiB.
fn content(pagemap: &Pagemap, pages: &PageSet) -> Result<(PageSet, PageSet), TrackError> {
    let mut absent = Vec::new();
    for (a, b) in near(pages.ranges()) {
        pagemap.absent_no_file(a, b, &mut absent).map_err(changed)?;
    }
    let guards = absent.iter().filter(|r| r.guard).map(|r| (r.start, r.end));
    let guards = PageSet::from_ranges(guards).intersection(pages);
    let absent = PageSet::from_ranges(absent.iter().map(|r| (r.start, r.end)));
    Ok((absent.intersection(pages), guards))
}

/// The first word by which two pages differ: its offset, and what it is in the first.
fn difference(a: &[u8], b: &[u8]) -> Option<(u64, [u8; WORD])> {
    let (a, b) = (a.as_chunks::<WORD>().0, b.as_chunks::<WORD>().0);
    let k = a.iter().zip(b).position(|(a, b)| a != b)?;
    Some(((k * WORD) as u64, a[k]))
}

/// Reads a file as a mapping shows it: zeros after its end.
fn read_padded(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    buf[done..].fill(0);
    Ok(())
}

/// The blocks of a mapping in which pages are held.
fn blocks(held: &PageSet, vma: &Vma) -> PageSet {
    let mut out = PageSet::new();
    for &(a, b) in held.ranges() {
        out.insert((a & !(BLOCK - 1)).max(vma.start), b.next_multiple_of(BLOCK).min(vma.end));
    }
    out
}

/// Whether so much of a stretch was written that it is looked at in one pass, and what follows too.
fn is_dense(written: impl ExactSizeIterator<Item = (u64, u64)>) -> bool {
    written.len() > FEW || written.map(|r| r.1 - r.0).sum::<u64>() > STRETCH / 16
}

/// Sorted ranges, those joined that are near enough to each other to be looked at in one call.
fn near(ranges: &[(u64, u64)]) -> impl Iterator<Item = (u64, u64)> {
    let groups = ranges.chunk_by(|l, r| r.0 - l.1 <= NEAR);
    groups.filter_map(|g| Some((g.first()?.0, g.last()?.1)))
}

/// A look at a mapping that has to be registered.
fn tracked<T>(look: io::Result<T>) -> Result<T, TrackError> {
    look.map_err(|e| match e.raw_os_error() {
        Some(libc::EPERM) => TrackError::Untracked,
        _ => changed(e),
    })
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
            return self.last_look(vma, held, &PageSet::new(), None);
        }
        let r = self.round(vma, held);
        if r.is_err() {
            self.void.insert(vma.start, vma.end);
        }
        r
    }

    fn ahead(&self, vma: &Vma, held: &PageSet) -> Option<(PageSet, Arc<Pagemap>)> {
        if over_file(vma) || vma.len() < ahead::LARGE || self.void.overlaps(vma.start, vma.end) {
            return None;
        }
        let blocks = blocks(&held.clip(vma.start, vma.end), vma);
        (blocks.bytes() >= ahead::LARGE).then(|| (blocks, self.pagemap.clone()))
    }

    fn last(&mut self, vma: &Vma, held: &PageSet, owed: &PageSet, seen: Option<Seen>) -> Result<Scan, TrackError> {
        self.last_look(vma, held, owed, seen)
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
    use crate::image::VmaFlags;

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

    /// A tracker of this process.
    fn own() -> WpAsync {
        let fd = uffd::create().unwrap();
        WpAsync::new(std::process::id() as i32, std::os::fd::AsRawFd::as_raw_fd(&fd)).unwrap()
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

        let mut tracker = own();
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

    /// A round takes what was written, no more and no less, however much of which stretch that is.
    #[test]
    fn a_round_takes_what_was_written() {
        const NAME: &str = "a_round_takes_what_was_written";
        if !available() {
            return eprintln!("SKIP {NAME}: no WP_ASYNC");
        }
        const STRETCHES: u64 = 4;
        const LEN: usize = (STRETCHES * STRETCH) as usize - 3 * PAGE as usize;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, of small pages.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), LEN, prot, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: that mapping.
        unsafe { libc::madvise(at, LEN, libc::MADV_NOHUGEPAGE) };
        let (start, pages, stretch) = (at as u64, LEN as u64 / PAGE, STRETCH / PAGE);
        let mut tracker = own();
        let v = vma(start, start + LEN as u64);
        tracker.adopt(&[(v.start, v.end)]);
        let mut held = tracker.scan(&v, &PageSet::new(), false).unwrap().dirty;
        assert!(held.is_empty());
        let mut next = crate::sys::numbers(777);
        for turn in 0..40 {
            let mut written = PageSet::new();
            for k in 0..STRETCHES {
                let first = k * stretch;
                let room = pages.min(first + stretch) - first;
                // None, few, as many as are worth a call each and one more, many, most.
                let times = [0, next(5), FEW as u64, FEW as u64 + 1, next(3000), room * 2][next(6) as usize];
                for _ in 0..times {
                    let page = start + (first + next(room)) * PAGE;
                    // SAFETY: inside the mapping.
                    unsafe { (page as *mut u8).write_volatile(turn) };
                    written.insert(page, page + PAGE);
                }
            }
            let round = tracker.scan(&v, &held, false).unwrap();
            assert_eq!(round.dirty, written, "turn {turn}");
            assert!(round.guards.is_empty());
            // Now and then the destination loses some, and with it what is known of their blocks.
            held.extend(&written);
            if next(4) == 0 {
                let lost = start + next(pages) * PAGE;
                held.remove(lost, lost + 8 * BLOCK);
            }
        }
        // SAFETY: all of it is this test's own.
        unsafe { libc::munmap(at, LEN) };
    }

    /// What other threads see of a large mapping from the stop on, and the last look makes of it, is what that look sees by itself: with pages written, dropped, never
    /// touched, with guards, and with some that were written after the threads had looked.
    #[test]
    fn a_look_begun_ahead_sees_what_the_last_one_sees() {
        use crate::track::ahead::{Ahead, LARGE, Task};
        const NAME: &str = "a_look_begun_ahead_sees_what_the_last_one_sees";
        if !available() {
            return eprintln!("SKIP {NAME}: no WP_ASYNC");
        }
        const LEN: usize = 5 * LARGE as usize + 7 * PAGE as usize;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, of small pages.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), LEN, prot, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: that mapping.
        unsafe { libc::madvise(at, LEN, libc::MADV_NOHUGEPAGE) };
        let (start, pages) = (at as u64, LEN as u64 / PAGE);
        let write = |page: u64| {
            // SAFETY: inside the mapping.
            unsafe { at.cast::<u8>().add((page * PAGE) as usize).write_volatile(page as u8 | 1) };
        };
        let advise = |page: u64, count: u64, advice: i32| {
            // SAFETY: inside the mapping.
            unsafe { libc::madvise(at.byte_add((page * PAGE) as usize), (count * PAGE) as usize, advice) }
        };
        let mut tracker = own();
        let v = vma(start, start + LEN as u64);
        // Most of it has content; a tail that the destination holds nothing of has not.
        (0..pages - 1024).for_each(write);
        tracker.adopt(&[(v.start, v.end)]);
        let mut held = tracker.scan(&v, &PageSet::new(), false).unwrap().dirty;
        assert_eq!(held.pages(), pages - 1024);
        let mut next = crate::sys::numbers(12345);
        for turn in 0..30u64 {
            for _ in 0..next(3000) {
                write(next(pages));
            }
            for _ in 0..next(20) {
                // Now and then as much as has page tables of its own, which the kernel may take back.
                let count = if next(30) == 0 { 1100 } else { 1 + next(63) };
                advise(next(pages - count), count, libc::MADV_DONTNEED);
            }
            // Out to swap, where there is any.
            advise(next(pages - 200), 200, libc::MADV_PAGEOUT);
            // MADV_GUARD_INSTALL; a kernel that has none says so.
            advise(next(pages - 8), 1 + next(7), 102);
            // Runs that are sent in any case, long and short ones, some of pages that the destination has an older version of.
            let mut owed = PageSet::new();
            for _ in 0..next(5) {
                let a = start + next(pages) * PAGE;
                owed.insert(a, v.end.min(a + [OWED / 2, OWED, 5 * OWED][next(3) as usize]));
            }
            let known = held.union(&owed);
            let (blocks, pagemap) = tracker.ahead(&v, &known).expect("it is large");
            let task = Task {
                space: 7,
                start: v.start,
                end: v.end,
                blocks,
                owed: owed.clone(),
                pagemap,
            };
            let ahead = Ahead::ready(vec![task]);
            let Some(ahead) = ahead else {
                return eprintln!("SKIP {NAME}: one cpu");
            };
            ahead.go();
            if turn % 2 == 0 {
                std::thread::yield_now();
            }
            let mut seen = ahead.seen();
            let (space, a, b, mut seen) = seen.pop().expect("seen");
            assert_eq!((space, a, b), (7, v.start, v.end));
            // Written since, and said so.
            let late = next(pages - 1024);
            let guarded = seen.guards.contains(start + late * PAGE);
            if !guarded {
                write(late);
                seen.touched.insert(start + late * PAGE, start + late * PAGE + 1);
            }
            let ahead = tracker.last(&v, &known, &owed, Some(seen)).unwrap();
            let alone = tracker.last(&v, &known, &owed, None).unwrap();
            let plain = tracker.scan(&v, &known, true).unwrap();
            for scan in [&ahead, &alone] {
                let more = scan.dirty.difference(&plain.dirty);
                assert_eq!(more.difference(&owed), PageSet::new(), "turn {turn}");
                assert_eq!(plain.dirty.difference(&scan.dirty), PageSet::new(), "turn {turn}");
                assert_eq!((&scan.gone, &scan.guards), (&plain.gone, &plain.guards), "turn {turn}");
                // All of it is sent, and no more than that.
                assert_eq!(
                    scan.dirty.union(&owed).difference(&scan.gone),
                    plain.dirty.union(&owed).difference(&plain.gone),
                    "turn {turn}"
                );
            }
            assert!(guarded || ahead.dirty.contains(start + late * PAGE));
            // Asked for page by page, too: what has content, and what not.
            let mut found = Vec::new();
            tracker.pagemap.populated(v.start, v.end, &mut found).unwrap();
            let of = |guard| PageSet::from_ranges(found.iter().filter(|r| r.guard == guard).map(|r| (r.start, r.end)));
            assert_eq!(plain.guards, of(true), "turn {turn}");
            assert_eq!(plain.gone, known.difference(&of(false)), "turn {turn}");
            assert_eq!(ahead.dirty.difference(&of(false)), PageSet::new(), "turn {turn}");
            assert_eq!(plain.dirty.difference(&of(false)), PageSet::new(), "turn {turn}");
            // Guards go, and a round takes what there is.
            for &(a, b) in plain.guards.ranges() {
                advise((a - start) / PAGE, (b - a) / PAGE, 103);
            }
            let round = tracker.scan(&v, &held, false).unwrap();
            assert_eq!(round.dirty, plain.dirty, "turn {turn}");
            held.subtract(&plain.gone);
            held.extend(&round.dirty);
        }
        // Another mapping by now: nothing of it counts.
        let (blocks, pagemap) = tracker.ahead(&v, &held).expect("it is large");
        // SAFETY: the mapping from above, made anew in its place.
        unsafe { libc::mmap(at, LEN, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1, 0) };
        let ahead = Ahead::ready(vec![Task {
            space: 7,
            start: v.start,
            end: v.end,
            blocks,
            owed: held,
            pagemap,
        }])
        .expect("two cpus");
        ahead.go();
        assert!(ahead.seen().is_empty());
        // SAFETY: as above.
        unsafe { libc::munmap(at, LEN) };
    }

    /// Pages of the mapping in [`a_page_dropped_while_armed_and_about_to_be_written_shows`].
    const PAGES: usize = 64;
    const LEN: usize = PAGES * PAGE as usize;

    /// Writes pages whole, gives the lot back, and writes each again, for ever.
    fn drop_and_write(at: *mut u8) -> ! {
        for byte in (1..=200).cycle() {
            for page in 0..PAGES {
                // SAFETY: the caller's mapping.
                unsafe { at.add(page * PAGE as usize).write_bytes(byte, PAGE as usize) };
            }
            // The tracker looks in a pause, if anywhere.
            // SAFETY: plain calls on that mapping.
            unsafe {
                libc::usleep(300);
                libc::madvise(at.cast(), LEN, libc::MADV_DONTNEED);
            }
            for page in 0..PAGES {
                // SAFETY: as above.
                unsafe { at.add(page * PAGE as usize).write_volatile(byte) };
            }
        }
        unreachable!("a cycle has no end")
    }

    /// A program stopped at any moment between the drop of pages and the write to them: what the destination would have, by what the tracker said, is what the
    /// program has.
    #[test]
    fn a_page_dropped_while_armed_and_about_to_be_written_shows() {
        const NAME: &str = "a_page_dropped_while_armed_and_about_to_be_written_shows";
        if !available() {
            return eprintln!("SKIP {NAME}: no WP_ASYNC");
        }
        let file = tempfile::tempfile().unwrap();
        let behind = vec![b'f'; PAGE as usize];
        (0..PAGES as u64).for_each(|k| file.write_all_at(&behind, k * PAGE).unwrap());
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: a new mapping.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), LEN, prot, flags, std::os::fd::AsRawFd::as_raw_fd(&file), 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let flags = libc::O_NONBLOCK as u64 | uffd::USER_MODE_ONLY;
        // SAFETY: the child makes only system calls.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: as above; the descriptor is the child's, with the number that the parent expects.
            unsafe {
                let fd = libc::syscall(libc::SYS_userfaultfd, flags) as i32;
                libc::dup2(fd, CHILDS);
                libc::raise(libc::SIGSTOP);
                drop_and_write(at.cast());
            }
        }
        let child = Child(pid);
        child.stops();
        let start = at as u64;
        let vma = Vma {
            backing: Backing::Object {
                object: 0,
                offset: 0,
                writable: true,
            },
            ..vma(start, start + LEN as u64)
        };
        let mut tracker = WpAsync::new(pid, CHILDS).unwrap();
        tracker.adopt(&[(vma.start, vma.end)]);
        let mem = Mem::open(pid).unwrap();
        let page = |at: u64| {
            let mut page = vec![0; PAGE as usize];
            mem.read(at, &mut page).map(|()| page)
        };
        // What the destination has.
        let mut copy = std::collections::BTreeMap::new();
        let mut held = PageSet::new();
        let (mut tricky, mut stops) = (0, 0);
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while stops < 300 || tricky < 30 {
            assert!(
                std::time::Instant::now() < end,
                "{stops} stops, {tricky} pages of the kind that is looked for"
            );
            for last in [false, true] {
                // SAFETY: the child from above.
                unsafe { libc::kill(pid, if last { libc::SIGSTOP } else { libc::SIGCONT }) };
                if last {
                    child.stops();
                    stops += 1;
                } else {
                    std::thread::sleep(std::time::Duration::from_micros(stops * 7 % 900));
                }
                // What a round sends it reads after its look, from a program that runs.
                let scan = tracker.scan(&vma, &held, last).unwrap();
                scan.gone.ranges().iter().for_each(|r| held.remove(r.0, r.1));
                held.extend(&scan.dirty);
                copy.retain(|at, _| held.contains(*at));
                for at in scan.dirty.ranges().iter().flat_map(|r| (r.0..r.1).step_by(PAGE as usize)) {
                    copy.insert(at, page(at).unwrap());
                }
                if last {
                    let (mut own, mut written) = (Vec::new(), Vec::new());
                    tracker.pagemap.own_pages(vma.start, vma.end, &mut own, &mut written).unwrap();
                    let mut own = PageSet::from_ranges(own.iter().map(|r| (r.start, r.end)));
                    own.subtract(&PageSet::from_ranges(written));
                    for at in (vma.start..vma.end).step_by(PAGE as usize) {
                        let now = page(at).unwrap();
                        tricky += u64::from(own.contains(at) && now == behind);
                        assert!(*copy.get(&at).unwrap_or(&behind) == now, "page {at:x} at stop {stops}");
                    }
                }
            }
        }
        eprintln!("{stops} stops, {tricky} pages between their two faults");
        // SAFETY: the mapping from above.
        unsafe { libc::munmap(at, LEN) };
    }

    /// A child of this process, which nobody else waits for.
    struct Child(i32);

    impl Child {
        fn stops(&self) {
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            assert_eq!(unsafe { libc::waitpid(self.0, &raw mut status, libc::WUNTRACED) }, self.0);
            assert!(libc::WIFSTOPPED(status), "the child ended: {status:x}");
        }
    }

    impl Drop for Child {
        fn drop(&mut self) {
            // SAFETY: no memory is involved.
            unsafe {
                libc::kill(self.0, libc::SIGKILL);
                libc::waitpid(self.0, std::ptr::null_mut(), 0);
            }
        }
    }

    /// A number that no descriptor of the tests has.
    const CHILDS: i32 = 999;
}

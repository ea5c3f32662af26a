//! The operations: each does something to memory and tells the model.

use super::model::{BOTH, Model, NONE, Object, Page, READ, Region, fill, holds, protect};
use crate::{
    kit::{Numbers, sys, sys0},
    memory::PAGE,
};
use std::{io, os::fd::AsRawFd, path::Path, time::Duration};

pub const FILE_PAGES: usize = 256;
pub const FILE_SEED: u64 = 1 << 62;
const HUGE: usize = 512;
const MREMAP_DONTUNMAP: i32 = 4;
const MADV_COLLAPSE: i32 = 25;

/// What the options ask for.
#[derive(Clone)]
pub struct Size {
    /// Pages mapped at most.
    pub pages: usize,
    /// Regions at most.
    pub regions: usize,
}

/// Memory, its model, and the numbers that decide.
pub struct World {
    pub model: Model,
    pub numbers: Numbers,
    pub size: Size,
    file: i32,
    file_object: usize,
    /// Where the heap's region ends, while it is ours to move.
    heap_ends: usize,
    /// System calls that failed although they might have worked.
    pub failed: u64,
    throttled: bool,
}

fn pointer(at: usize) -> *mut libc::c_void {
    at as *mut libc::c_void
}

/// The file that private mappings show. Made once, read-only from then on.
pub fn make_file(path: &Path) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(FILE_PAGES * PAGE);
    let mut page = vec![0_u64; PAGE / 8];
    for p in 0..FILE_PAGES {
        let at = page.as_mut_ptr() as usize;
        fill(at, FILE_SEED + p as u64);
        page.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
    }
    std::fs::write(path, bytes)
}

impl World {
    /// `throttled`: operations may rest a little, where others could come between.
    pub fn new(seed: u64, first_op: u64, size: Size, file: &Path, throttled: bool) -> io::Result<World> {
        let name = std::ffi::CString::new(file.to_string_lossy().as_ref())?;
        let file = sys!(open(name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC))?;
        let mut model = Model::new(first_op);
        let file_object = model.add_object(Object {
            fd: None,
            pages: (0..FILE_PAGES).map(|p| Page::Seed(FILE_SEED + p as u64)).collect(),
            file: true,
        });
        Ok(World {
            model,
            numbers: Numbers::new(seed),
            size,
            file,
            file_object,
            heap_ends: 0,
            failed: 0,
            throttled,
        })
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.numbers.draw() >> 16) as usize % n.max(1)
    }

    /// None when a call failed, which is counted.
    fn tried<T>(&mut self, result: io::Result<T>) -> Option<T> {
        self.failed += u64::from(result.is_err());
        result.ok()
    }

    /// A region and some pages of it.
    fn pick(&mut self, most: usize, fits: impl Fn(&Region) -> bool) -> Option<(usize, usize, usize)> {
        for _ in 0..8 {
            if self.model.regions.is_empty() {
                return None;
            }
            let r = self.below(self.model.regions.len());
            if fits(&self.model.regions[r]) {
                let len = self.model.regions[r].pages.len();
                let first = self.below(len);
                let n = 1 + self.below(most.min(len - first));
                return Some((r, first, n));
            }
        }
        None
    }

    fn add(&mut self, at: usize, pages: usize, prot: i32, object: Option<(usize, usize)>, shared: bool) {
        self.model.note("map", at, pages * PAGE);
        let content = if object.is_some() { Page::Base } else { Page::Zero };
        self.model.regions.push(Region {
            at,
            pages: vec![content; pages],
            prot: vec![prot; pages],
            object,
            shared,
            heap: false,
        });
    }

    fn full(&self, more: usize) -> bool {
        self.model.regions.len() >= self.size.regions || self.model.mapped_pages() + more > self.size.pages
    }

    /// A new mapping of any kind; old ones make room.
    pub fn map(&mut self) {
        let pages = match self.below(40) {
            0 => HUGE + self.below(HUGE),
            1..6 => 64 + self.below(192),
            _ => 1 + self.below(32),
        };
        for _ in 0..64 {
            if !self.full(pages) {
                break;
            }
            self.unmap_whole();
        }
        if self.full(pages) {
            return;
        }
        let (anonymous, shared) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::MAP_SHARED);
        match self.below(10) {
            0..5 => {
                let got = sys!(mmap(std::ptr::null_mut(), pages * PAGE, BOTH, anonymous, -1, 0));
                if let Some(at) = self.tried(got) {
                    self.add(at as usize, pages, BOTH, None, false);
                }
            }
            5 | 6 => {
                let got = sys!(mmap(std::ptr::null_mut(), pages * PAGE, BOTH, shared | libc::MAP_ANONYMOUS, -1, 0));
                if let Some(at) = self.tried(got) {
                    let object = self.model.add_object(Object {
                        fd: None,
                        pages: vec![Page::Zero; pages],
                        file: false,
                    });
                    self.add(at as usize, pages, BOTH, Some((object, 0)), true);
                }
            }
            7 | 8 => self.map_memfd(pages),
            _ => {
                let pages = pages.min(FILE_PAGES);
                let first = self.below(FILE_PAGES - pages + 1);
                let got = sys!(mmap(
                    std::ptr::null_mut(),
                    pages * PAGE,
                    BOTH,
                    libc::MAP_PRIVATE,
                    self.file,
                    (first * PAGE) as i64
                ));
                if let Some(at) = self.tried(got) {
                    self.add(at as usize, pages, BOTH, Some((self.file_object, first)), false);
                }
            }
        }
    }

    /// An open memfd, by choice; its descriptor and object.
    fn memfd(&mut self) -> Option<(i32, usize)> {
        let open: Vec<(i32, usize)> = (0..self.model.objects.len())
            .filter_map(|o| Some((self.model.objects[o].as_ref()?.fd?, o)))
            .collect();
        if open.is_empty() {
            None
        } else {
            Some(open[self.below(open.len())])
        }
    }

    /// A window of a memfd, new or not, shared or private.
    fn map_memfd(&mut self, pages: usize) {
        let known = if self.below(2) == 0 { self.memfd() } else { None };
        let open = self.model.objects.iter().flatten().filter(|o| o.fd.is_some()).count();
        let (fd, o) = match known {
            Some(known) => known,
            None if open < 12 => {
                let made = sys!(memfd_create(c"soak".as_ptr(), libc::MFD_CLOEXEC));
                let Some(fd) = self.tried(made) else { return };
                let sized = sys!(ftruncate(fd, (pages * PAGE) as i64));
                if self.tried(sized).is_none() {
                    return;
                }
                let object = Object {
                    fd: Some(fd),
                    pages: vec![Page::Zero; pages],
                    file: false,
                };
                (fd, self.model.add_object(object))
            }
            None => return,
        };
        let size = self.model.objects[o].as_ref().map_or(0, |o| o.pages.len());
        let n = 1 + self.below(size);
        let first = self.below(size - n + 1);
        let shared = self.below(3) != 0;
        let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let got = sys!(mmap(std::ptr::null_mut(), n * PAGE, BOTH, flags, fd, (first * PAGE) as i64));
        if let Some(at) = self.tried(got) {
            self.add(at as usize, n, BOTH, Some((o, first)), shared);
        }
    }

    fn unmap_region(&mut self, r: usize) {
        let region = &self.model.regions[r];
        let (at, bytes) = (region.at, region.pages.len() * PAGE);
        let done = sys!(munmap(pointer(at), bytes));
        if self.tried(done).is_some() {
            self.model.note("unmap", at, bytes);
            self.model.forget(r);
        }
    }

    fn unmap_whole(&mut self) {
        if let Some((r, ..)) = self.pick(1, |r| !r.heap) {
            self.unmap_region(r);
        }
    }

    /// A part of a mapping goes, or all of it.
    pub fn unmap(&mut self) {
        if let Some((r, first, n)) = self.pick(64, |r| !r.heap) {
            let r = self.model.isolate(r, first, n);
            self.unmap_region(r);
        }
    }

    /// Something else at the same place: mapped over it, or unmapped and mapped again.
    pub fn replace(&mut self) {
        let Some((r, first, n)) = self.pick(64, |r| !r.heap) else { return };
        let r = self.model.isolate(r, first, n);
        let at = self.model.regions[r].at;
        let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        if self.below(2) == 0 {
            self.unmap_region(r);
            // Another thread may have taken the place.
            flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let got = sys!(mmap(pointer(at), n * PAGE, BOTH, flags, -1, 0));
            if self.tried(got).is_some() {
                self.add(at, n, BOTH, None, false);
            }
            return;
        }
        let got = sys!(mmap(pointer(at), n * PAGE, BOTH, flags, -1, 0));
        if self.tried(got).is_some() {
            self.model.forget(r);
            self.add(at, n, BOTH, None, false);
        }
    }

    /// mremap(2): grow, shrink, move, or move and leave an empty mapping behind.
    pub fn remap(&mut self) {
        match self.below(4) {
            0 => self.grow(),
            1 => self.shrink(),
            2 => self.shift(false),
            _ => self.shift(true),
        }
    }

    fn grow(&mut self) {
        let Some((r, ..)) = self.pick(1, |r| !r.heap && r.anonymous()) else {
            return;
        };
        let prot = &self.model.regions[r].prot;
        let (len, last) = (prot.len(), prot[prot.len() - 1]);
        // One call may not cross mappings, and other rights are another mapping.
        let same = prot.iter().rev().take_while(|p| **p == last).count();
        let more = 1 + self.below(32);
        if self.full(more) {
            return;
        }
        let r = self.model.isolate(r, len - same, same);
        let at = self.model.regions[r].at;
        let flags = if self.below(2) == 0 { 0 } else { libc::MREMAP_MAYMOVE };
        let got = sys!(mremap(pointer(at), same * PAGE, (same + more) * PAGE, flags));
        if let Some(to) = self.tried(got) {
            let to = to as usize;
            self.model.note("grow from", at, same * PAGE);
            self.model.note("grow to", to, (same + more) * PAGE);
            let region = &mut self.model.regions[r];
            region.at = to;
            region.pages.resize(same + more, Page::Zero);
            region.prot.resize(same + more, last);
        }
    }

    fn shrink(&mut self) {
        let Some((r, first, _)) = self.pick(1, |r| !r.heap && r.pages.len() > 1) else {
            return;
        };
        let keep = first.max(1);
        let region = &self.model.regions[r];
        let (at, len) = (region.at, region.pages.len());
        if keep == len {
            return;
        }
        let got = sys!(mremap(pointer(at), len * PAGE, keep * PAGE, 0));
        if self.tried(got).is_some() {
            self.model.note("shrink away", at + keep * PAGE, (len - keep) * PAGE);
            let tail = self.model.isolate(r, keep, len - keep);
            self.model.forget(tail);
        }
    }

    fn shift(&mut self, leave: bool) {
        let Some((r, first, n)) = self.pick(128, |r| !r.heap && (r.anonymous() || !leave)) else {
            return;
        };
        let prot = &self.model.regions[r].prot;
        let n = prot[first..first + n].iter().take_while(|p| **p == prot[first]).count();
        if leave && self.full(n) {
            return;
        }
        let r = self.model.isolate(r, first, n);
        let (from, bytes) = (self.model.regions[r].at, n * PAGE);
        // A file that no region is of, so that it is told from what moves there.
        let Some(place) = self.tried(std::fs::File::open(PLACE)) else {
            return;
        };
        let got = sys!(mmap(std::ptr::null_mut(), bytes, NONE, libc::MAP_PRIVATE, place.as_raw_fd(), 0));
        drop(place);
        let Some(to) = self.tried(got) else { return };
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | if leave { MREMAP_DONTUNMAP } else { 0 };
        let got = sys!(mremap(pointer(from), bytes, bytes, flags, to));
        if let Err(e) = &got {
            let what = match e.raw_os_error() {
                Some(libc::EFAULT) => "move failed with EFAULT",
                Some(libc::ENOMEM) => "move failed with ENOMEM",
                Some(libc::EINVAL) => "move failed with EINVAL",
                _ => "move failed",
            };
            self.model.note(what, from, bytes);
        }
        if self.tried(got).is_none() {
            self.undo_move(from, to as usize, n);
            return;
        }
        let prot = self.model.regions[r].prot[0];
        self.model.note("move from", from, bytes);
        self.model.note("move to", to as usize, bytes);
        self.model.regions[r].at = to as usize;
        if leave {
            self.add(from, n, prot, None, false);
        }
    }

    /// Since Linux 6.17 one mremap(2) moves several mappings, one after the other, and stops in the middle at one that has to stay (one with a
    /// userfaultfd, for example): EFAULT, and those before it are moved. They are moved back.
    fn undo_move(&mut self, from: usize, to: usize, n: usize) {
        let gone = (moved_until(to, to + n * PAGE) - to) / PAGE;
        if gone > 0 {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let back = sys!(mremap(pointer(to), gone * PAGE, gone * PAGE, flags, pointer(from)));
            self.model.note("moved back", from, gone * PAGE);
            if let Err(e) = back {
                self.model.differs(format!("{gone} pages cannot be moved back to {from:x}: {e}"));
            }
        }
        sys0!(munmap(pointer(to + gone * PAGE), (n - gone) * PAGE));
    }

    /// mprotect(2) to nothing, read-only, or both; twice as often to both.
    pub fn protect(&mut self) {
        let prot = [NONE, READ, BOTH, BOTH][self.below(4)];
        let Some((r, first, n)) = self.pick(64, |_| true) else { return };
        let at = self.model.regions[r].address(first);
        let done = protect(at, n, prot);
        if self.tried(done).is_some() {
            let what = ["protect none", "protect read", "", "protect write"][prot as usize];
            self.model.note(what, at, n * PAGE);
            self.model.regions[r].prot[first..first + n].fill(prot);
        }
    }

    fn advise(&mut self, what: &'static str, (r, first, n): (usize, usize, usize), advice: i32) -> bool {
        let at = self.model.regions[r].address(first);
        let done = sys!(madvise(pointer(at), n * PAGE, advice));
        let done = self.tried(done).is_some();
        if done {
            self.model.note(what, at, n * PAGE);
        }
        done
    }

    /// MADV_DONTNEED: zeros, the file's content, or nothing at all for shared memory.
    pub fn dont_need(&mut self) {
        let Some(some) = self.pick(64, |_| true) else { return };
        if self.advise("MADV_DONTNEED", some, libc::MADV_DONTNEED) {
            let region = &mut self.model.regions[some.0];
            let after = if region.anonymous() { Page::Zero } else { Page::Base };
            region.pages[some.1..some.1 + some.2].fill(after);
        }
    }

    /// MADV_FREE: what it was or zeros, until it is written.
    pub fn free(&mut self) {
        let Some(some) = self.pick(64, Region::anonymous) else { return };
        if self.advise("MADV_FREE", some, libc::MADV_FREE) {
            for page in &mut self.model.regions[some.0].pages[some.1..some.1 + some.2] {
                if let Page::Seed(seed) = *page {
                    *page = Page::Freed(seed);
                }
            }
        }
    }

    /// Huge pages wanted, not wanted, or made at once.
    pub fn huge(&mut self) {
        let Some(some) = self.pick(2 * HUGE, |r| !r.heap) else { return };
        match self.below(3) {
            0 => drop(self.advise("MADV_HUGEPAGE", some, libc::MADV_HUGEPAGE)),
            1 => drop(self.advise("MADV_NOHUGEPAGE", some, libc::MADV_NOHUGEPAGE)),
            _ => {
                let large = self.pick(1, |r| r.pages.len() >= HUGE && r.anonymous());
                if let Some((r, ..)) = large {
                    let all = (r, 0, self.model.regions[r].pages.len());
                    self.advise("MADV_COLLAPSE", all, MADV_COLLAPSE);
                }
            }
        }
    }

    /// A hole in a shared object, through a mapping or its descriptor: zeros in every mapping.
    pub fn punch(&mut self) {
        let (o, from, n) = if self.below(2) == 0 {
            let Some((r, first, n)) = self.pick(32, |r| r.shared) else { return };
            let region = &self.model.regions[r];
            let Some((o, offset)) = region.object else { return };
            if region.prot[first..first + n].iter().any(|p| *p != BOTH) || !self.advise("MADV_REMOVE", (r, first, n), libc::MADV_REMOVE) {
                return;
            }
            (o, offset + first, n)
        } else {
            let Some((fd, o)) = self.memfd() else { return };
            let (first, n) = self.window(o);
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let done = sys!(fallocate(fd, mode, (first * PAGE) as i64, (n * PAGE) as i64));
            if self.tried(done).is_none() {
                return;
            }
            self.note_object("punch", o, first, n);
            (o, first, n)
        };
        if let Some(object) = &mut self.model.objects[o] {
            object.pages[from..from + n].fill(Page::Zero);
        }
    }

    /// Some pages of an object.
    fn window(&mut self, o: usize) -> (usize, usize) {
        let size = self.model.objects[o].as_ref().map_or(1, |o| o.pages.len());
        let first = self.below(size);
        (first, 1 + self.below((size - first).min(16)))
    }

    /// Remembers a change of an object at each place where it is seen.
    fn note_object(&mut self, what: &'static str, o: usize, first: usize, n: usize) {
        let mut seen = Vec::new();
        for region in &self.model.regions {
            if let Some((other, offset)) = region.object
                && other == o
                && offset < first + n
                && first < offset + region.pages.len()
            {
                let from = first.max(offset);
                let to = (first + n).min(offset + region.pages.len());
                seen.push((region.address(from - offset), (to - from) * PAGE));
            }
        }
        seen.into_iter().for_each(|(at, bytes)| self.model.note(what, at, bytes));
    }

    /// write(2) or pwrite(2) of whole pages to a memfd.
    pub fn write_descriptor(&mut self) {
        let Some((fd, o)) = self.memfd() else { return };
        let (first, n) = self.window(o);
        let mut buffer = [0_u64; PAGE / 8];
        fill(buffer.as_mut_ptr() as usize, self.model.op);
        let by_offset = self.below(2) == 0;
        if !by_offset {
            sys0!(lseek(fd, (first * PAGE) as i64, libc::SEEK_SET));
        }
        for p in first..first + n {
            let bytes = buffer.as_ptr().cast();
            let wrote = if by_offset {
                sys!(pwrite(fd, bytes, PAGE, (p * PAGE) as i64))
            } else {
                sys!(write(fd, bytes, PAGE))
            };
            if self.tried(wrote) != Some(PAGE as isize) {
                self.model.differs(format!("memfd {fd}: a page could not be written at {p}"));
                return;
            }
            if let Some(object) = &mut self.model.objects[o] {
                object.pages[p] = Page::Seed(self.model.op);
            }
        }
        self.note_object(if by_offset { "pwrite" } else { "write" }, o, first, n);
    }

    /// A descriptor is closed; its mappings stay.
    pub fn close(&mut self) {
        if let Some((fd, o)) = self.memfd() {
            sys0!(close(fd));
            if let Some(object) = &mut self.model.objects[o] {
                object.fd = None;
            }
            self.model.drop_unused(o);
        }
    }

    /// Plain writes.
    pub fn write(&mut self) {
        let Some((r, first, n)) = self.pick(8, |_| true) else { return };
        for page in first..first + n {
            if self.model.regions[r].prot[page] == BOTH {
                let at = self.model.regions[r].address(page);
                fill(at, self.model.op);
                self.model.wrote(r, page);
                self.model.note("write", at, PAGE);
            }
        }
    }

    /// A page at random is looked at; seldom one without rights.
    pub fn look(&mut self) {
        let Some((r, page, _)) = self.pick(1, |_| true) else { return };
        let at = self.model.regions[r].address(page);
        if self.model.regions[r].prot[page] != NONE {
            self.model.check(r, page);
        } else if self.below(8) == 0 && protect(at, 1, READ).is_ok() {
            self.model.check(r, page);
            let _ = protect(at, 1, NONE);
        }
    }

    /// The break goes up or down, as long as nobody else moved it.
    pub fn heap(&mut self) {
        let now = sys0!(sbrk(0)) as usize;
        let Some(r) = self.model.regions.iter().position(|r| r.heap) else {
            if self.heap_ends == 0 && self.model.regions.len() < self.size.regions {
                let first = now.next_multiple_of(PAGE);
                let got = sys!(sbrk((first - now + PAGE) as isize));
                if self.tried(got).is_some() {
                    self.add(first, 1, BOTH, None, false);
                    self.heap_ends = first + PAGE;
                    if let Some(region) = self.model.regions.last_mut() {
                        region.heap = true;
                    }
                }
            }
            return;
        };
        if now != self.heap_ends {
            return;
        }
        let (start, len) = (self.model.regions[r].at, self.model.regions[r].pages.len());
        let n = 1 + self.below(16);
        if self.below(2) == 0 && len + n < 512 {
            let got = sys!(sbrk((n * PAGE) as isize));
            if self.tried(got).is_some() {
                self.model.note("brk up", now, n * PAGE);
                let region = &mut self.model.regions[r];
                region.pages.resize(len + n, Page::Zero);
                region.prot.resize(len + n, BOTH);
            }
        } else if n < len {
            let got = sys!(sbrk(-((n * PAGE) as isize)));
            if self.tried(got).is_some() {
                self.model.note("brk down", now - n * PAGE, n * PAGE);
                let region = &mut self.model.regions[r];
                region.pages.truncate(len - n);
                region.prot.truncate(len - n);
            }
        }
        self.heap_ends = start + self.model.regions[r].pages.len() * PAGE;
    }

    /// Down the stack and up again, with something to lose in each frame.
    pub fn stack(&mut self) {
        let levels = 1 + self.below(400);
        let pause = self.throttled && self.below(4) == 0;
        let wrong = descend(levels as u64, self.model.op, pause);
        if wrong > 0 {
            let op = self.model.op;
            self.model
                .differs(format!("{wrong} of {levels} stack frames differ at operation {op}"));
        }
    }

    /// In a forked child: what others write to meanwhile is no longer looked at, and unmapped here.
    pub fn leave_shared(&mut self) {
        let mut r = 0;
        while r < self.model.regions.len() {
            if self.model.regions[r].object.is_some_and(|(o, _)| o != self.file_object) {
                let before = self.model.regions.len();
                self.unmap_region(r);
                if self.model.regions.len() < before {
                    continue;
                }
            }
            r += 1;
        }
        for o in 0..self.model.objects.len() {
            if let Some(fd) = self.model.objects[o].as_mut().and_then(|o| o.fd.take()) {
                sys0!(close(fd));
            }
            self.model.drop_unused(o);
        }
    }
}

/// Frames of two pages; how many were not what they should be.
#[inline(never)]
fn descend(levels: u64, seed: u64, pause: bool) -> u64 {
    // Room for one aligned page.
    let mut frame = std::hint::black_box([0_u64; 2 * PAGE / 8]);
    let at = (frame.as_mut_ptr() as usize).next_multiple_of(PAGE);
    fill(at, seed ^ (levels << 48));
    let mut wrong = 0;
    if levels > 1 {
        wrong = descend(levels - 1, seed, pause);
    } else if pause {
        std::thread::sleep(Duration::from_millis(2));
    }
    wrong + u64::from(!holds(at, seed ^ (levels << 48)))
}

/// Mapped where something is going to move.
const PLACE: &str = "/proc/self/exe";

/// Up to where something was moved over the mapping of [`PLACE`] that began here: older kernels unmap the place before they refuse.
fn moved_until(start: usize, end: usize) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let name = std::fs::read_link(PLACE).unwrap_or_default();
    let mut at = start;
    for line in maps.lines().filter(|line| !line.ends_with(&*name.to_string_lossy())) {
        let range = line.split_ascii_whitespace().next().and_then(|r| r.split_once('-'));
        let number = |n: &str| usize::from_str_radix(n, 16).unwrap_or(0);
        match range.map(|(from, to)| (number(from), number(to))) {
            Some((from, to)) if from <= at && at < to => at = to,
            _ => {}
        }
    }
    at.min(end)
}

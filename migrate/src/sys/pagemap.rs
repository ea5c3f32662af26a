//! Which pages of a mapping hold content: PAGEMAP_SCAN (Documentation/admin-guide/mm/pagemap.rst, Linux 6.7), or the pagemap file before it.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::OnceLock,
};

const PAGE: u64 = crate::image::PAGE;

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<ScanArg>() == 96);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

impl Region {
    /// What it says of its pages, of the categories that were asked for.
    fn range(self) -> Range {
        Range {
            start: self.start,
            end: self.end,
            file: self.categories & FILE != 0,
            guard: self.categories & GUARD != 0,
        }
    }
}

// _IOWR('f', 16, struct pm_scan_arg)
const PAGEMAP_SCAN: u64 = 3 << 30 | 96 << 16 | (b'f' as u64) << 8 | 16;
const WRITTEN: u64 = 2;
const FILE: u64 = 4;
const PRESENT: u64 = 8;
const SWAPPED: u64 = 16;
const PFNZERO: u64 = 32;
const HUGE: u64 = 64;
const SOFT_DIRTY: u64 = 128;
const GUARD: u64 = 256;
const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;
/// Bits of an entry of the pagemap file that are the page's frame; zeros without CAP_SYS_ADMIN.
const FRAME: u64 = (1 << 55) - 1;
/// A huge page of the page tables' second level (x86-64).
const HUGE_PAGE: u64 = 2 << 20;
/// Regions asked for in one call.
const REGIONS: usize = 512;
const FEW: usize = 16;
/// Bytes of address space that one call looks at. It keeps mmap(2) and the like waiting in the program meanwhile: 20 ms a GiB where it arms all pages.
const STRETCH: u64 = 64 << 20;

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Pages that share a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// The page is a page of the file or shmem object behind the mapping, not private.
    pub file: bool,
    /// A guard region (MADV_GUARD_INSTALL): touching it faults.
    pub guard: bool,
}

/// /proc/PID/pagemap.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens it.
    pub fn open(pid: i32) -> io::Result<Self> {
        Ok(Pagemap {
            file: File::open(format!("/proc/{pid}/pagemap"))?,
        })
    }

    /// One that was opened elsewhere.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Pagemap { file: File::from(fd) }
    }

    /// Ranges of `start..end` that are present or swapped out, and guards. The shared zero page counts as absent.
    pub fn populated(&self, start: u64, end: u64, out: &mut Vec<Range>) -> io::Result<()> {
        match with_guards(|guard| self.scan(start, end, guard, out)) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => self.read_entries(start, end, out),
            r => r,
        }
    }

    /// What the ranges of [`Pagemap::populated`] leave, and guards: pages that were never touched, or dropped, or only read; of memory that no file is behind.
    /// Where most pages have content it is had five times as fast (0.55 ms a GiB of pages for 3.0): an entry of the page tables costs the kernel 2 ns, a page that
    /// it has to tell of another 9. PAGEMAP_SCAN only: ENOTTY without it.
    pub fn absent_no_file(&self, start: u64, end: u64, out: &mut Vec<Range>) -> io::Result<()> {
        let from = out.len();
        let mut swapped = Vec::new();
        let mut scan = |guard: u64| {
            let arg = ScanArg {
                start,
                end,
                // Not present, the zero page, or a guard.
                category_inverted: PRESENT,
                category_anyof_mask: PRESENT | PFNZERO | guard,
                return_mask: SWAPPED | guard,
                ..Default::default()
            };
            self.scan_into(arg, |r| {
                if r.categories & guard == 0 && r.categories & SWAPPED != 0 {
                    swapped.push(r.range());
                } else {
                    out.push(r.range());
                }
            })
        };
        with_guards(&mut scan)?;
        // Of what counts as swapped some are markers, which are nothing.
        for r in swapped {
            let mut content = vec![r];
            self.without_markers(r.start, &mut content)?;
            let mut at = r.start;
            for c in content.iter().chain([&Range { start: r.end, ..r }]) {
                if at < c.start {
                    out.push(Range {
                        start: at,
                        end: c.start,
                        ..r
                    });
                }
                at = c.end;
            }
        }
        out[from..].sort_unstable_by_key(|r| r.start);
        Ok(())
    }

    /// The same, and the shared zero page counts as content. Several times as fast as [`Pagemap::populated`].
    pub fn populated_anonymous(&self, start: u64, end: u64, out: &mut Vec<Range>) -> io::Result<()> {
        let arg = ScanArg {
            start,
            end,
            category_anyof_mask: PRESENT | SWAPPED | GUARD,
            return_mask: PRESENT | SWAPPED | GUARD,
            ..Default::default()
        };
        let mut doubtful = false;
        let mut add = |r: Region| {
            doubtful |= r.categories & (PRESENT | GUARD) == 0;
            out.push(r.range());
        };
        match self.scan_into(arg, &mut add) {
            Ok(()) if doubtful => self.without_markers(start, out),
            Ok(()) => Ok(()),
            // Not on this kernel, or not all of it.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                out.truncate(out.partition_point(|r| r.end <= start));
                self.populated(start, end, out)
            }
            Err(e) => Err(e),
        }
    }

    /// Whether the kernel has PAGEMAP_SCAN.
    pub fn scan_works(&self) -> bool {
        let probe = 0u8;
        let at = &raw const probe as u64 & !(PAGE - 1);
        self.scan(at, at + PAGE, 0, &mut Vec::new()).is_ok()
    }

    fn scan(&self, start: u64, end: u64, guard: u64, out: &mut Vec<Range>) -> io::Result<()> {
        let arg = ScanArg {
            start,
            end,
            category_anyof_mask: PRESENT | SWAPPED | guard,
            return_mask: PRESENT | SWAPPED | FILE | PFNZERO | guard,
            ..Default::default()
        };
        let mut doubtful = false;
        self.scan_into(arg, |r| {
            if r.categories & guard == 0 && r.categories & PFNZERO != 0 {
                return;
            }
            doubtful |= r.categories & (PRESENT | guard) == 0;
            out.push(r.range());
        })?;
        if doubtful { self.without_markers(start, out) } else { Ok(()) }
    }

    /// Takes what is no content out of the ranges from `start` on: markers that write protection leaves in the page tables of dropped pages count
    /// as swapped to the scan. Their swap type is the last of 32 (SWP_PTE_MARKER), which no swap area can have.
    fn without_markers(&self, start: u64, out: &mut Vec<Range>) -> io::Result<()> {
        let from = out.partition_point(|r| r.end <= start);
        let ranges = out.split_off(from);
        for r in ranges {
            if r.guard || r.file {
                out.push(r);
                continue;
            }
            self.entries(r.start, r.end, |at, e| {
                const SWAP: u64 = 1 << 62;
                let marker = e & SWAP != 0 && e & 31 == 31;
                let nothing = e >> 62 & 3 == 0;
                if marker || nothing {
                    return;
                }
                match out.last_mut() {
                    Some(l) if l.end == at && l.start >= r.start && !l.guard && !l.file => l.end += PAGE,
                    _ => out.push(Range {
                        start: at,
                        end: at + PAGE,
                        ..r
                    }),
                }
            })?;
        }
        Ok(())
    }

    fn scan_into(&self, arg: ScanArg, take: impl FnMut(Region)) -> io::Result<()> {
        self.scan_some(arg, usize::MAX, take).map(drop)
    }

    /// As long as it is at most so many regions: up to where.
    fn scan_some(&self, mut arg: ScanArg, most: usize, mut take: impl FnMut(Region)) -> io::Result<u64> {
        // A scan of a few pages is cheaper than clearing a long list for it.
        let (mut few, mut many);
        let vec: &mut [Region] = if arg.end - arg.start <= FEW as u64 * PAGE {
            few = [Region::default(); FEW];
            &mut few
        } else {
            many = [Region::default(); REGIONS];
            &mut many
        };
        arg.size = 96;
        arg.vec = vec.as_mut_ptr() as u64;
        let end = arg.end;
        let mut left = most;
        while arg.start < end && left > 0 {
            arg.end = end.min(arg.start.saturating_add(STRETCH));
            arg.vec_len = vec.len().min(left) as u64;
            // SAFETY: `arg` and the vector it names outlive the call; the kernel writes at most vec_len regions.
            let n = super::check(unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) } as i64)? as usize;
            vec[..n].iter().for_each(|r| take(*r));
            left -= n;
            if arg.walk_end <= arg.start {
                break;
            }
            arg.start = arg.walk_end;
        }
        Ok(arg.start)
    }

    /// Pages of `start..end` that were written since they were last armed, populated ones only; arms them again. Every page of the range
    /// has to be registered with an asynchronous userfaultfd: else EPERM, and what was armed before the error is lost. Which are a file's only if `files`: for that the
    /// kernel looks at the pages themselves, twice as long as at their entries.
    pub fn take_written(&self, start: u64, end: u64, files: bool, out: &mut Vec<Range>) -> io::Result<()> {
        let scan = |guard: u64| {
            let arg = ScanArg {
                flags: WP_MATCHING | CHECK_WPASYNC,
                start,
                end,
                category_mask: WRITTEN,
                category_anyof_mask: PRESENT | SWAPPED,
                return_mask: guard | if files { FILE } else { WRITTEN },
                ..Default::default()
            };
            let mut found = Vec::new();
            self.scan_into(arg, |r| found.push(r.range()))?;
            Ok(found)
        };
        out.extend(with_guards(scan)?);
        Ok(())
    }

    /// Of a mapping of a file: the pages of `start..end` that are the process's own and no longer the file's, guards too, and which of them were written since
    /// they were last armed. Arms nothing. EPERM as for [`Pagemap::take_written`].
    pub fn own_pages(&self, start: u64, end: u64, own: &mut Vec<Range>, written: &mut Vec<(u64, u64)>) -> io::Result<()> {
        let mut doubtful = false;
        let mut scan = |guard: u64| {
            let arg = ScanArg {
                flags: CHECK_WPASYNC,
                start,
                end,
                category_inverted: FILE,
                category_mask: FILE,
                category_anyof_mask: PRESENT | SWAPPED | guard,
                return_mask: WRITTEN | PRESENT | PFNZERO | guard,
                ..Default::default()
            };
            self.scan_into(arg, |r| {
                if r.categories & guard == 0 {
                    if r.categories & PFNZERO != 0 {
                        return;
                    }
                    doubtful |= r.categories & PRESENT == 0;
                    if r.categories & WRITTEN != 0 {
                        written.push((r.start, r.end));
                    }
                }
                own.push(r.range());
            })
        };
        with_guards(&mut scan)?;
        if doubtful { self.without_markers(start, own) } else { Ok(()) }
    }

    /// Everything of `start..end` that is not armed: pages written since, and holes. The fast way of the kernel (0.3 to 0.6 ms a GiB); arms
    /// nothing. EPERM as for [`Pagemap::take_written`].
    pub fn unarmed(&self, start: u64, end: u64, out: &mut Vec<(u64, u64)>) -> io::Result<()> {
        self.scan_unarmed(start, end, CHECK_WPASYNC, usize::MAX, out).map(drop)
    }

    /// The same, as long as it is at most so many places: up to where.
    pub fn unarmed_places(&self, start: u64, end: u64, places: usize, out: &mut Vec<(u64, u64)>) -> io::Result<u64> {
        self.scan_unarmed(start, end, CHECK_WPASYNC, places, out)
    }

    /// The same as [`Pagemap::unarmed`], and arms it all, holes too: their page tables then take 2 MiB for a GiB of mapping.
    pub fn take_unarmed(&self, start: u64, end: u64, out: &mut Vec<(u64, u64)>) -> io::Result<()> {
        self.scan_unarmed(start, end, WP_MATCHING | CHECK_WPASYNC, usize::MAX, out)
            .map(drop)
    }

    fn scan_unarmed(&self, start: u64, end: u64, flags: u64, most: usize, out: &mut Vec<(u64, u64)>) -> io::Result<u64> {
        let arg = ScanArg {
            flags,
            start,
            end,
            category_mask: WRITTEN,
            return_mask: WRITTEN,
            ..Default::default()
        };
        self.scan_some(arg, most, |r| out.push((r.start, r.end)))
    }

    /// Pages of `start..end` that are there and armed: nobody has written them since.
    pub fn unwritten(&self, start: u64, end: u64, out: &mut Vec<(u64, u64)>) -> io::Result<()> {
        let arg = ScanArg {
            start,
            end,
            category_inverted: WRITTEN,
            category_mask: PRESENT | WRITTEN,
            return_mask: PRESENT,
            ..Default::default()
        };
        self.scan_into(arg, |r| out.push((r.start, r.end)))
    }

    /// Pages of `start..end` that hold content, with whether each is soft-dirty (Documentation/admin-guide/mm/soft-dirty.rst): by PAGEMAP_SCAN
    /// where it knows the category, else from the pagemap file, bit 55. The shared zero pages are no content: a page that was dropped and then
    /// only read is one of them, present and clean.
    pub fn soft_dirty(&self, start: u64, end: u64, out: &mut Vec<(Range, bool)>) -> io::Result<()> {
        let from = out.len();
        for guard in [GUARD, 0] {
            match self.scan_soft_dirty(start, end, guard, out) {
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => out.truncate(from),
                r => return r,
            }
        }
        self.read_soft_dirty(start, end, out)
    }

    fn scan_soft_dirty(&self, start: u64, end: u64, guard: u64, out: &mut Vec<(Range, bool)>) -> io::Result<()> {
        let arg = ScanArg {
            start,
            end,
            category_anyof_mask: PRESENT | SWAPPED | guard,
            return_mask: FILE | PFNZERO | HUGE | SOFT_DIRTY | guard,
            ..Default::default()
        };
        let mut huge = Vec::new();
        self.scan_into(arg, |r| {
            let range = r.range();
            if !range.guard && r.categories & PFNZERO != 0 {
                return;
            }
            // The huge zero page is not among the zero pages of kernels before 6.17, and is no anonymous page to any.
            if r.categories & (HUGE | SOFT_DIRTY) == HUGE {
                huge.push(range);
            } else {
                out.push((range, r.categories & SOFT_DIRTY != 0));
            }
        })?;
        for r in huge {
            let mut at = r.start;
            while at < r.end {
                let end = (at + 1).next_multiple_of(HUGE_PAGE).min(r.end);
                if !self.is_zero_page(at)? {
                    out.push((Range { start: at, end, ..r }, false));
                }
                at = end;
            }
        }
        out.sort_unstable_by_key(|(r, _)| r.start);
        Ok(())
    }

    fn read_soft_dirty(&self, start: u64, end: u64, out: &mut Vec<(Range, bool)>) -> io::Result<()> {
        let zero = ZeroPage::get().ok_or(io::ErrorKind::PermissionDenied)?;
        // Where a block that the huge zero page fills ends.
        let mut skip = 0;
        self.entries(start, end, |at, e| {
            if e >> 62 & 3 == 0 || at < skip {
                return;
            }
            let (present, file, dirty, frame) = (e >> 63 != 0, e >> 61 & 1 != 0, e >> 55 & 1 != 0, e & FRAME);
            if present {
                if frame == zero.frame {
                    return;
                }
                let may_be_huge = at.is_multiple_of(HUGE_PAGE) && frame.is_multiple_of(HUGE_PAGE / PAGE);
                if may_be_huge && !dirty && zero.is_one(frame) {
                    skip = at + HUGE_PAGE;
                    return;
                }
            }
            match out.last_mut() {
                Some((l, d)) if l.end == at && l.file == file && *d == dirty && l.start >= start => l.end += PAGE,
                _ => {
                    let range = Range {
                        start: at,
                        end: at + PAGE,
                        file,
                        guard: false,
                    };
                    out.push((range, dirty));
                }
            }
        })
    }

    /// Whether one of the kernel's zero pages is mapped there.
    fn is_zero_page(&self, at: u64) -> io::Result<bool> {
        let zero = ZeroPage::get().ok_or(io::ErrorKind::PermissionDenied)?;
        let mut is = false;
        self.entries(at, at + PAGE, |_, e| is = e >> 63 != 0 && zero.is_one(e & FRAME))?;
        Ok(is)
    }

    fn entries(&self, start: u64, end: u64, mut each: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut buf = vec![0u8; 1 << 16];
        let mut at = start;
        while at < end {
            let n = (((end - at) / PAGE) as usize).min(buf.len() / 8);
            let got = self.file.read_at(&mut buf[..n * 8], at / PAGE * 8)? / 8;
            if got == 0 {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            for e in buf[..got * 8].as_chunks::<8>().0 {
                each(at, u64::from_le_bytes(*e));
                at += PAGE;
            }
        }
        Ok(())
    }

    /// Whether the address space this was opened on still exists: after execve(2) it does not.
    pub fn alive(&self) -> bool {
        let mut b = [0u8; 8];
        matches!(self.file.read_at(&mut b, 0), Ok(8))
    }

    /// The pagemap file: 8 bytes a page; bit 63 present, 62 swapped, 61 file or shared anonymous.
    fn read_entries(&self, start: u64, end: u64, out: &mut Vec<Range>) -> io::Result<()> {
        let mut buf = vec![0u8; 1 << 16];
        let mut at = start;
        while at < end {
            let n = (((end - at) / PAGE) as usize).min(buf.len() / 8);
            let got = self.file.read_at(&mut buf[..n * 8], at / PAGE * 8)? / 8;
            if got == 0 {
                break;
            }
            for e in buf[..got * 8].as_chunks::<8>().0 {
                let e = u64::from_le_bytes(*e);
                if e >> 62 & 3 != 0 {
                    let file = e >> 61 & 1 != 0;
                    match out.last_mut() {
                        Some(l) if l.end == at && l.file == file && !l.guard && l.start >= start => l.end += PAGE,
                        _ => out.push(Range {
                            start: at,
                            end: at + PAGE,
                            file,
                            guard: false,
                        }),
                    }
                }
                at += PAGE;
            }
        }
        Ok(())
    }
}

/// How the kernel's shared zero pages are told from others: by the frame of the small one, by a flag of the frame (the huge one comes and goes).
#[derive(Debug)]
pub struct ZeroPage {
    frame: u64,
    /// /proc/kpageflags: 8 bytes a frame (Documentation/admin-guide/mm/pagemap.rst).
    flags: File,
}

impl ZeroPage {
    /// `None` where frames are hidden from this process (it takes CAP_SYS_ADMIN).
    pub fn get() -> Option<&'static ZeroPage> {
        static ZERO: OnceLock<Option<ZeroPage>> = OnceLock::new();
        ZERO.get_or_init(|| ZeroPage::find().ok().flatten()).as_ref()
    }

    fn find() -> io::Result<Option<ZeroPage>> {
        // Read, never written: one of the zero pages stands behind it.
        let unwritten = Untouched::map(PAGE as usize)?;
        unwritten.read(0);
        let mut entry = 0;
        let own = Pagemap::open(std::process::id() as i32)?;
        own.entries(unwritten.start(), unwritten.start() + PAGE, |_, e| entry = e)?;
        let zero = ZeroPage {
            frame: entry & FRAME,
            flags: File::open("/proc/kpageflags")?,
        };
        Ok((zero.frame != 0 && zero.is_one(zero.frame)).then_some(zero))
    }

    /// Whether a frame is a zero page's. One that cannot be looked up is none: its page counts as content.
    fn is_one(&self, frame: u64) -> bool {
        const ZERO_PAGE: u64 = 1 << 24;
        let mut flags = [0; 8];
        let read = self.flags.read_exact_at(&mut flags, frame * 8);
        read.is_ok() && u64::from_le_bytes(flags) & ZERO_PAGE != 0
    }
}

/// Anonymous memory that nobody has written.
pub(crate) struct Untouched {
    at: *mut libc::c_void,
    len: usize,
}

impl Untouched {
    /// So many bytes.
    pub fn map(len: usize) -> io::Result<Untouched> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping; the result is checked.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Untouched { at, len })
    }

    /// Address of the first.
    pub fn start(&self) -> u64 {
        self.at as u64
    }

    /// One byte.
    pub fn read(&self, offset: usize) -> u8 {
        assert!(offset < self.len);
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { self.at.cast::<u8>().add(offset).read_volatile() }
    }
}

impl Drop for Untouched {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of which no reference is left.
        unsafe { libc::munmap(self.at, self.len) };
    }
}

/// Asks with the guard category where the kernel knows it, since 6.15, or else without; there are no guard regions before 6.13. A kernel that does not know it has
/// told nothing by then.
fn with_guards<T>(mut scan: impl FnMut(u64) -> io::Result<T>) -> io::Result<T> {
    match scan(GUARD) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => scan(0),
        r => r,
    }
}

/// Clears the soft-dirty bits of a process: `4` to /proc/PID/clear_refs.
pub fn clear_soft_dirty(pid: i32) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "4")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_agree() {
        let mut block = vec![0u8; 64 * 4096];
        for i in (0..block.len()).step_by(3 * 4096) {
            block[i] = 1;
        }
        let start = (block.as_ptr() as u64).next_multiple_of(PAGE);
        let end = start + 60 * PAGE;
        let p = Pagemap::open(std::process::id() as i32).unwrap();
        let (mut a, mut b) = (Vec::new(), Vec::new());
        p.read_entries(start, end, &mut a).unwrap();
        p.populated(start, end, &mut b).unwrap();
        let pages = |v: &[Range]| v.iter().flat_map(|r| (r.start..r.end).step_by(4096)).collect::<Vec<_>>();
        assert!(!a.is_empty());
        // The zero page is present to the file and absent to the scan.
        assert!(pages(&b).iter().all(|p| pages(&a).contains(p)));
        assert!(pages(&b).len() >= 20);
        std::hint::black_box(&mut block);
    }

    /// What is told to be absent is what is not told to be populated: pages written, read, dropped, armed before they were there (markers), guards, huge ones.
    #[test]
    fn absent_is_what_is_not_populated() {
        use crate::{pages::PageSet, sys::uffd};
        let own = Pagemap::open(std::process::id() as i32).unwrap();
        if !own.scan_works() {
            return eprintln!("SKIP absent_is_what_is_not_populated: no PAGEMAP_SCAN");
        }
        const BLOCKS: u64 = 6;
        let memory = Untouched::map(((BLOCKS + 1) * HUGE_PAGE) as usize).unwrap();
        let start = memory.start().next_multiple_of(HUGE_PAGE);
        let end = start + BLOCKS * HUGE_PAGE;
        let advise = |page: u64, count: u64, advice: i32| {
            // SAFETY: our own mapping.
            unsafe { libc::madvise((start + page * PAGE) as *mut _, (count * PAGE) as usize, advice) }
        };
        advise(0, 4 * 512, libc::MADV_NOHUGEPAGE);
        advise(4 * 512, 2 * 512, libc::MADV_HUGEPAGE);
        let tracker = uffd::create()
            .and_then(|fd| uffd::Userfault::take(std::process::id() as i32, fd.as_raw_fd()))
            .and_then(|u| u.register(start, end).map(|()| u));
        let (mut absent, mut kinds) = (Vec::new(), [0; 3]);
        let mut next = crate::sys::numbers(54321);
        // Which pages are guards: writing one would end this process.
        let mut guards = PageSet::new();
        for turn in 0..40 {
            for _ in 0..next(2000) {
                let at = start + next(BLOCKS * 512) * PAGE;
                if guards.contains(at) {
                    continue;
                }
                let offset = (at - memory.start()) as usize;
                if next(3) == 0 {
                    memory.read(offset);
                } else {
                    // SAFETY: inside the mapping, which nothing else looks at.
                    unsafe { memory.at.cast::<u8>().add(offset).write_volatile(1) };
                }
            }
            for _ in 0..next(30) {
                // Now and then as much as has page tables of its own, which the kernel may take back.
                let count = if next(20) == 0 { 1024 } else { 1 + next(64) };
                let page = next(BLOCKS * 512 - count);
                let at = start + page * PAGE;
                match next(4) {
                    // Out to swap, where there is any.
                    3 => _ = advise(page, count, libc::MADV_PAGEOUT),
                    // MADV_GUARD_INSTALL, where there is such a thing.
                    0 if advise(page, count, 102) == 0 => guards.insert(at, at + count * PAGE),
                    1 if tracker.is_ok() => own.take_unarmed(at, at + count * PAGE, &mut Vec::new()).unwrap(),
                    _ => _ = advise(page, count, libc::MADV_DONTNEED),
                }
            }
            let (a, b) = match turn % 2 {
                0 => (start, end),
                _ => {
                    let a = start + next(BLOCKS * 512 - 300) * PAGE;
                    (a, a + (1 + next(300)) * PAGE)
                }
            };
            let (mut populated, from) = (Vec::new(), absent.len());
            own.populated(a, b, &mut populated).unwrap();
            own.absent_no_file(a, b, &mut absent).unwrap();
            let absent = &absent[from..];
            assert!(absent.iter().is_sorted_by(|l, r| l.end <= r.start), "turn {turn}");
            let of = |v: &[Range], guard| PageSet::from_ranges(v.iter().filter(|r| r.guard == guard).map(|r| (r.start, r.end)));
            assert_eq!(of(absent, true), of(&populated, true), "turn {turn}");
            assert_eq!(of(absent, true), guards.clip(a, b), "turn {turn}");
            let mut rest = PageSet::from_ranges([(a, b)]);
            rest.subtract(&of(absent, true));
            rest.subtract(&of(absent, false));
            assert_eq!(rest, of(&populated, false), "turn {turn}");
            for (kind, n) in [&rest, &of(absent, false), &of(absent, true)].iter().zip(&mut kinds) {
                *n += kind.pages();
            }
            // Guards go again, with what was written under them.
            for &(a, b) in guards.ranges() {
                advise((a - start) / PAGE, (b - a) / PAGE, 103);
            }
            guards.clear();
        }
        assert!(kinds[0] > 1000 && kinds[1] > 1000, "{kinds:?}");
    }

    fn pages(found: &[(Range, bool)]) -> Vec<u64> {
        found.iter().flat_map(|(r, _)| (r.start..r.end).step_by(PAGE as usize)).collect()
    }

    /// A page that was dropped and read again is present, and clean to the soft-dirty bits: only its frame tells that its content is gone.
    #[test]
    fn a_zero_page_is_no_content() {
        if ZeroPage::get().is_none() {
            eprintln!("SKIP a_zero_page_is_no_content: frames are hidden (CAP_SYS_ADMIN)");
            return;
        }
        let memory = Untouched::map(16 << 20).unwrap();
        let start = memory.start().next_multiple_of(HUGE_PAGE);
        let at = |page: u64| (start - memory.start() + page * PAGE) as usize;
        // SAFETY: our own mapping.
        unsafe { libc::madvise(start as *mut _, HUGE_PAGE as usize, libc::MADV_NOHUGEPAGE) };
        // Huge pages, where the kernel gives them: one only read, one written.
        // SAFETY: as above.
        unsafe { libc::madvise((start + HUGE_PAGE) as *mut _, 2 * HUGE_PAGE as usize, libc::MADV_HUGEPAGE) };
        (0..8).for_each(|p| _ = memory.read(at(p)));
        memory.read(at(512 + 7));
        let written = [3, 5, 1024 + 9].map(|p| {
            // SAFETY: inside the mapping, which nothing else looks at.
            unsafe { memory.at.cast::<u8>().add(at(p)).write_volatile(1) };
            start + p * PAGE
        });
        let own = Pagemap::open(std::process::id() as i32).unwrap();
        let (mut read, mut scanned) = (Vec::new(), Vec::new());
        own.read_soft_dirty(start, start + 3 * HUGE_PAGE, &mut read).unwrap();
        let read = pages(&read);
        for page in written {
            assert!(read.contains(&page), "{page:x} was written");
        }
        let others = read.iter().filter(|p| **p < start + 2 * HUGE_PAGE && !written.contains(p));
        assert_eq!(others.count(), 0, "nothing else in the first two blocks was");
        // Kernels without soft-dirty bits do not know the category.
        match own.scan_soft_dirty(start, start + 3 * HUGE_PAGE, 0, &mut scanned) {
            Ok(()) => assert_eq!(pages(&scanned), read),
            Err(e) => assert!(matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)), "{e}"),
        }
    }
}

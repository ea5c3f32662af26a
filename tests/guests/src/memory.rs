//! Memory of every kind, filled with numbers that can be drawn again.

use crate::kit::{Kit, Numbers, Options, sys, sys0};
use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
    process::ExitCode,
};

pub(crate) const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;

/// A mapping, or part of one.
#[derive(Clone, Copy)]
pub(crate) struct Area {
    pub at: *mut u64,
    pub len: usize,
}

impl Area {
    pub fn map(len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> io::Result<Area> {
        let at = sys!(mmap(std::ptr::null_mut(), len, prot, flags, fd, offset))?;
        Ok(Area { at: at.cast(), len })
    }

    pub fn anonymous(len: usize, prot: i32, more: i32) -> io::Result<Area> {
        Area::map(len, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | more, -1, 0)
    }

    pub fn read_write(len: usize) -> io::Result<Area> {
        Area::anonymous(len, libc::PROT_READ | libc::PROT_WRITE, 0)
    }

    pub fn word(self, i: usize) -> u64 {
        assert!(i * 8 < self.len);
        // SAFETY: the index is inside the mapping, which is readable; other writers are processes that the caller takes turns with.
        unsafe { self.at.add(i).read_volatile() }
    }

    pub fn set(self, i: usize, value: u64) {
        assert!(i * 8 < self.len);
        // SAFETY: as in `word`, and the mapping is writable.
        unsafe { self.at.add(i).write_volatile(value) }
    }

    /// Page `page` becomes a stream of numbers of its own.
    pub fn fill_page(self, page: usize, seed: u64) {
        let mut numbers = Numbers::new(seed ^ ((page as u64) << 20));
        for i in 0..PAGE / 8 {
            self.set(page * (PAGE / 8) + i, numbers.draw());
        }
    }

    pub fn fill(self, seed: u64) {
        (0..self.len / PAGE).for_each(|page| self.fill_page(page, seed));
    }

    pub fn page_is(self, page: usize, seed: u64) -> bool {
        let mut numbers = Numbers::new(seed ^ ((page as u64) << 20));
        (0..PAGE / 8).all(|i| self.word(page * (PAGE / 8) + i) == numbers.draw())
    }

    pub fn page_is_zero(self, page: usize) -> bool {
        (0..PAGE / 8).all(|i| self.word(page * (PAGE / 8) + i) == 0)
    }

    /// Notes the first page that differs and how many.
    pub fn verify(self, kit: &mut Kit, what: &str, seed: u64) {
        let wrong: Vec<usize> = (0..self.len / PAGE).filter(|p| !self.page_is(*p, seed)).collect();
        if let Some(first) = wrong.first() {
            let zero = wrong.iter().filter(|p| self.page_is_zero(**p)).count();
            kit.differs(format!(
                "{what}: {} of {} pages differ, {zero} of them zero, first page {first} at {:p}",
                wrong.len(),
                self.len / PAGE,
                self.at
            ));
        }
    }

    pub fn protect(self, prot: i32) -> io::Result<()> {
        sys!(mprotect(self.at.cast(), self.len, prot)).map(drop)
    }

    pub fn advise(self, advice: i32) -> io::Result<()> {
        sys!(madvise(self.at.cast(), self.len, advice)).map(drop)
    }
}

/// How often each page was written.
#[derive(Debug)]
enum Versions {
    /// Goes where the guest goes, and back in time with it.
    Memory(Vec<u64>),
    /// For a guest that says how much it dirties: in its memory this would be dirtied as well, twice as many pages as it says.
    File(File),
}

impl Versions {
    fn create(path: &Path, pages: usize) -> io::Result<Versions> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_len(pages as u64 * 8)?;
        Ok(Versions::File(file))
    }

    fn of(&self, page: usize) -> io::Result<u64> {
        match self {
            Versions::Memory(all) => Ok(all[page]),
            Versions::File(file) => {
                let mut word = [0; 8];
                file.read_exact_at(&mut word, page as u64 * 8)?;
                Ok(u64::from_le_bytes(word))
            }
        }
    }

    /// It is written once more: its new version.
    fn next(&mut self, page: usize) -> io::Result<u64> {
        let version = self.of(page)? + 1;
        match self {
            Versions::Memory(all) => all[page] = version,
            Versions::File(file) => file.write_all_at(&version.to_le_bytes(), page as u64 * 8)?,
        }
        Ok(version)
    }
}

/// `--mib N` of random pages, checked one at a time as it beats; `--dirty N` rewrites that many pages between beats, `--rate N` so many megabytes a
/// second, at random addresses; `--shared 1`: the memory is shared, though nobody shares it; `--memfd 1`: it is that of a memfd, which stays open.
pub fn ballast(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let pages = options.number("mib", 64) as usize * MIB / PAGE;
    let dirty = options.number("dirty", 0) as usize;
    let kind = [libc::MAP_PRIVATE, libc::MAP_SHARED][usize::from(options.number("shared", 0) != 0)];
    let (mut kind, mut fd) = (kind | libc::MAP_ANONYMOUS, -1);
    if options.number("memfd", 0) != 0 {
        fd = sys!(memfd_create(c"ballast".as_ptr(), libc::MFD_CLOEXEC))?;
        sys!(ftruncate(fd, (pages * PAGE) as i64))?;
        kind = libc::MAP_SHARED;
    }
    let area = Area::map(pages * PAGE, libc::PROT_READ | libc::PROT_WRITE, kind, fd, 0)?;
    let zero = options.number("zero", 0) != 0;
    for page in 0..pages {
        if zero {
            area.set(page * (PAGE / 8), 0);
        } else {
            area.fill_page(page, 1);
        }
    }
    let rate = options.number("rate", 0) as f64 * 1e6 / PAGE as f64;
    let versions = std::cell::RefCell::new(if rate > 0.0 {
        Versions::create(&kit.dir().join("versions"), pages)?
    } else {
        Versions::Memory(vec![0; pages])
    });
    kit.ready()?;
    let holds = |page: usize| {
        let version = versions.borrow().of(page)?;
        Ok(if zero {
            area.page_is_zero(page)
        } else {
            area.page_is(page, 1 + version)
        })
    };
    // Paced by the clock. What a pause has kept it from is not made up for.
    let (mut due, mut last) = (0.0, std::time::Instant::now());
    let mut turn = Numbers::new(7);
    let code = kit.run(
        |kit| {
            let page = turn.draw() as usize % pages;
            let well: io::Result<bool> = holds(page);
            let well = kit.expect("the file of versions", well);
            kit.check(well == Some(true), format!("ballast page {page} differs"));
            let mut now = dirty;
            if rate > 0.0 {
                due += rate * last.elapsed().as_secs_f64().min(0.002);
                last = std::time::Instant::now();
                now += due as usize;
                due -= (due as usize) as f64;
            }
            for _ in 0..now {
                let page = turn.draw() as usize % pages;
                let version = versions.borrow_mut().next(page);
                if let Some(version) = kit.expect("the file of versions", version) {
                    area.fill_page(page, 1 + version);
                }
            }
        },
        |kit| {
            let wrong = (0..pages).filter(|p| !holds(*p).unwrap_or(false)).count();
            kit.equal("ballast pages that differ", wrong, 0);
        },
    );
    Ok(code)
}

/// One mapping of each kind.
pub fn memory(mut kit: Kit) -> io::Result<ExitCode> {
    let (r, w, x) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
    let rw = r | w;

    let private = Area::read_write(16 * MIB)?;
    private.fill(1);
    // Written with zeros, never touched, and dropped again: all read as zeros.
    let zeros = Area::read_write(MIB)?;
    (0..64).for_each(|p| zeros.set(p * 512, 0));
    let dropped = Area::read_write(MIB)?;
    dropped.fill(2);
    dropped.advise(libc::MADV_DONTNEED)?;

    let none = Area::read_write(MIB)?;
    none.fill(3);
    none.protect(libc::PROT_NONE)?;
    let read_only = Area::read_write(MIB)?;
    read_only.fill(4);
    read_only.protect(r)?;
    let executable = Area::read_write(PAGE)?;
    // mov eax, 42; ret
    executable.set(0, 0x0000_c300_0000_2ab8);
    executable.protect(r | x)?;

    let locked = Area::read_write(MIB)?;
    locked.fill(5);
    sys!(mlock(locked.at.cast(), locked.len))?;
    let onfault = Area::read_write(MIB)?;
    sys!(syscall(libc::SYS_mlock2, onfault.at, onfault.len, 1))?;
    onfault.fill_page(3, 6);

    let mut advised = Vec::new();
    for (i, advice) in [
        libc::MADV_DONTFORK,
        libc::MADV_WIPEONFORK,
        libc::MADV_DONTDUMP,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_HUGEPAGE,
        libc::MADV_SEQUENTIAL,
        libc::MADV_RANDOM,
        libc::MADV_MERGEABLE,
    ]
    .into_iter()
    .enumerate()
    {
        let area = Area::read_write(8 * PAGE)?;
        if area.advise(advice).is_ok() {
            area.fill(10 + i as u64);
            advised.push((area, 10 + i as u64));
        }
    }

    let huge = Area::read_write(8 * MIB)?;
    huge.advise(libc::MADV_HUGEPAGE)?;
    huge.fill(20);

    // Costs nothing untouched: a reserve without rights, and one with rights of which three pages are used.
    let reserve = Area::anonymous(64 * GIB, libc::PROT_NONE, libc::MAP_NORESERVE)?;
    let sparse = Area::anonymous(64 * GIB, rw, libc::MAP_NORESERVE)?;
    let sparse_pages = [0, 5 * GIB / PAGE + 7, 64 * GIB / PAGE - 1];
    sparse_pages.iter().for_each(|p| sparse.fill_page(*p, 21));

    // Shared with a child, which answers in it.
    let shared = Area::map(4 * MIB, rw, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)?;
    shared.fill(22);
    let talk = Area::map(PAGE, rw, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)?;
    let child = sys!(fork())?;
    if child == 0 {
        echo(talk);
    }

    let name = CString::new("guest")?;
    let memfd = sys!(memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING))?;
    sys!(ftruncate(memfd, 2 * MIB as i64))?;
    sys!(fcntl(memfd, libc::F_ADD_SEALS, libc::F_SEAL_GROW | libc::F_SEAL_SHRINK))?;
    let memfd_rw = Area::map(2 * MIB, rw, libc::MAP_SHARED, memfd, 0)?;
    let memfd_ro = Area::map(MIB, r, libc::MAP_SHARED, memfd, MIB as i64)?;
    let memfd_cow = Area::map(MIB, rw, libc::MAP_PRIVATE, memfd, 0)?;
    memfd_rw.fill(23);
    memfd_cow.fill_page(9, 24);

    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(kit.dir().join("mapped"))?;
    file.set_len(MIB as u64)?;
    let file_shared = Area::map(MIB, rw, libc::MAP_SHARED, file.as_raw_fd(), 0)?;
    file_shared.fill(25);
    // The private one is of a file that no one writes to any more.
    std::fs::copy(kit.dir().join("mapped"), kit.dir().join("mapped-private"))?;
    let private_file = OpenOptions::new().read(true).write(true).open(kit.dir().join("mapped-private"))?;
    let file_cow = Area::map(MIB, rw, libc::MAP_PRIVATE, private_file.as_raw_fd(), 0)?;
    let file_ro = Area::map(MIB / 2, r, libc::MAP_PRIVATE, private_file.as_raw_fd(), (MIB / 2) as i64)?;
    drop(private_file);
    (0..64).for_each(|p| file_cow.fill_page(p * 4, 26));

    let broken = sys!(sbrk(MIB as isize))?;
    let brk = Area {
        at: broken.cast::<u8>().wrapping_add(broken.align_offset(PAGE)).cast(),
        len: MIB - PAGE,
    };
    brk.fill(27);

    // With room below: the kernel keeps a growing mapping 1 MiB away from the next.
    let room = Area::anonymous(4 * MIB, libc::PROT_NONE, 0)?;
    sys!(munmap(room.at.cast(), room.len))?;
    let (top, grows) = (room.at.wrapping_add((room.len - PAGE) / 8), libc::MAP_GROWSDOWN | libc::MAP_STACK);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | grows;
    let down = Area {
        at: sys!(mmap(top.cast(), PAGE, rw, flags, -1, 0))?.cast(),
        len: PAGE,
    };
    down.fill(28);

    kit.ready()?;
    let mut turn = Numbers::new(9);
    let mut verified = false;
    let code = kit.run(
        |kit| {
            let page = turn.draw() as usize % (private.len / PAGE);
            kit.check(private.page_is(page, 1), format!("private page {page} differs"));
        },
        |kit| {
            private.verify(kit, "private anonymous memory", 1);
            for (what, area) in [("untouched zeros", zeros), ("dropped pages", dropped)] {
                kit.check((0..area.len / PAGE).all(|p| area.page_is_zero(p)), format!("{what} are not zero"));
            }
            let opened = none.protect(r);
            if kit.expect("mprotect of PROT_NONE memory", opened).is_some() {
                none.verify(kit, "PROT_NONE memory with content", 3);
            }
            let closed = none.protect(libc::PROT_NONE);
            kit.expect("mprotect back", closed);
            read_only.verify(kit, "read-only memory", 4);
            // SAFETY: the page holds a function of no arguments that returns a number.
            let answer = unsafe { std::mem::transmute::<*mut u64, extern "C" fn() -> i32>(executable.at) }();
            kit.equal("code made at run time", answer, 42);
            locked.verify(kit, "locked memory", 5);
            kit.check(onfault.page_is(3, 6), "memory locked on fault differs");
            for (area, seed) in &advised {
                area.verify(kit, &format!("advised memory number {}", seed - 10), *seed);
            }
            huge.verify(kit, "huge pages", 20);
            kit.check(sparse_pages.iter().all(|p| sparse.page_is(*p, 21)), "sparse memory differs");
            kit.check(sparse.page_is_zero(12345), "untouched sparse memory is not zero");
            let part = Area {
                at: reserve.at.wrapping_add(GIB / 8),
                len: PAGE,
            };
            let opened = part.protect(rw);
            if kit.expect("mprotect of a piece of the reserve", opened).is_some() {
                part.fill(1);
                let closed = part.protect(libc::PROT_NONE);
                kit.expect("mprotect back of the reserve", closed);
            }
            shared.verify(kit, "shared anonymous memory", 22);
            if !verified {
                file_shared.verify(kit, "shared file mapping", 25);
                memfd_rw.verify(kit, "memfd", 23);
            }
            let before = talk.word(1);
            talk.set(0, talk.word(0) + 1);
            let deadline = std::time::Instant::now();
            while talk.word(1) == before && deadline.elapsed().as_secs() < 10 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            kit.equal("what the child answers in shared memory", talk.word(1), talk.word(0) * 3);
            // Two mappings, the descriptor and a private copy of one object.
            memfd_rw.set(MIB / 8 + 5, 77);
            kit.equal("memfd through its second mapping", memfd_ro.word(5), 77);
            let mut word = 78_u64.to_le_bytes();
            let wrote = sys!(pwrite(memfd, word.as_ptr().cast(), 8, 8));
            kit.expect("write to memfd", wrote);
            kit.equal("memfd written through its descriptor", memfd_rw.word(1), 78);
            kit.check(memfd_cow.page_is(9, 24), "private page of memfd differs");
            kit.equal("memfd under its private mapping", memfd_cow.word(1), 78);
            let seals = sys!(fcntl(memfd, libc::F_GET_SEALS));
            let seals = kit.expect("seals", seals);
            kit.equal("seals", seals, Some(libc::F_SEAL_GROW | libc::F_SEAL_SHRINK));
            file_shared.set(3, 79);
            let got = file.read_exact_at(&mut word, 24);
            kit.expect("file under a shared mapping", got);
            kit.equal("file under a shared mapping", u64::from_le_bytes(word), 79);
            for p in 0..file_cow.len / PAGE {
                kit.check(
                    file_cow.page_is(p, if p % 4 == 0 { 26 } else { 25 }),
                    format!("private file mapping page {p} differs"),
                );
            }
            for p in 0..file_ro.len / PAGE {
                // The second half of the file, through a mapping of its own that nobody writes to.
                let mut numbers = Numbers::new(25 ^ ((p as u64 + 128) << 20));
                kit.check(
                    file_ro.word(p * 512) == numbers.draw(),
                    format!("read-only file mapping page {p} differs"),
                );
            }
            brk.verify(kit, "memory from brk", 27);
            // Seven more pages below, one fault at a time.
            for p in 1..8_usize {
                let below = Area {
                    at: down.at.wrapping_sub(p * PAGE / 8),
                    len: PAGE,
                };
                below.fill(29);
            }
            kit.check(down.page_is(0, 28), "memory that grows down differs");
            kit.equal("deep recursion", deep(4000), 4000);
            if !verified {
                verified = true;
                let more = sys!(sbrk(PAGE as isize));
                kit.expect("brk afterwards", more);
            }
        },
    );
    sys0!(kill(child, libc::SIGKILL));
    Ok(code)
}

/// The child: answers three times what it is told.
fn echo(talk: Area) -> ! {
    loop {
        let told = talk.word(0);
        if talk.word(1) != told * 3 {
            talk.set(1, told * 3);
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
        if sys0!(getppid()) == 1 {
            sys0!(_exit(0));
        }
    }
}

/// Uses about a kibibyte of stack a level.
#[inline(never)]
fn deep(levels: u64) -> u64 {
    let pad = std::hint::black_box([levels; 128]);
    if levels == 0 { 0 } else { deep(levels - 1) + 1 + pad[5] - levels }
}

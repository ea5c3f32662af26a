//! Memory whose pages arrive late: touched in every way a program has, each time another part of it.

use super::{Call, Trap, below};
use crate::{
    kit::{Kit, Numbers, sys, sys0, zeroed},
    memory::{Area, PAGE},
};
use std::{
    io,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

const SEED: u64 = 77;
const MIB: usize = 24;

pub fn kind(name: &str) -> Option<io::Result<Trap>> {
    Some(match name {
        "calls" => calls(),
        "touched-by-threads" => threads(),
        "interrupted" => signals(),
        "read-only" => read_only(),
        "own-mem" => own_mem(),
        "checked-by-children" => children(),
        "forks-beside" => forks_beside(),
        _ => return None,
    })
}

fn area() -> io::Result<Area> {
    let area = Area::read_write(MIB << 20)?;
    area.fill(SEED);
    Ok(area)
}

fn wrong(kit: &mut Kit, how: &str, page: usize) {
    kit.differs(format!("page {page} is not what it was, seen by {how}"));
}

fn at(area: Area, page: usize) -> *mut libc::c_void {
    (area.at as usize + page * PAGE) as *mut libc::c_void
}

/// The kernel reads and writes it: write(2), read(2), process_vm_readv(2), futex(2), getrandom(2), madvise(2), mlock(2).
fn calls() -> io::Result<Trap> {
    let area = area()?;
    let scratch = Area::read_write(PAGE)?;
    let mut pipe = [0; 2];
    sys!(pipe(pipe.as_mut_ptr()))?;
    // Pages that the kernel has written over: what they hold is not known any more.
    let mut spoilt = vec![false; area.len / PAGE];
    let mut numbers = Numbers::new(11);
    Ok(Box::new(move |kit, call| {
        if call == Call::Verify {
            for (page, spoilt) in spoilt.iter().enumerate() {
                if !spoilt && !area.page_is(page, SEED) {
                    wrong(kit, "itself", page);
                }
            }
            return Ok(());
        }
        for _ in 0..8 {
            let page = below(&mut numbers, area.len / PAGE);
            if spoilt[page] {
                continue;
            }
            let from = at(area, page);
            let how = numbers.draw() >> 20 & 7;
            match how {
                0 => {
                    sys!(write(pipe[1], from, PAGE))?;
                    sys!(read(pipe[0], scratch.at.cast(), PAGE))?;
                }
                1 => {
                    let local = libc::iovec {
                        iov_base: scratch.at.cast(),
                        iov_len: PAGE,
                    };
                    let remote = libc::iovec {
                        iov_base: from,
                        iov_len: PAGE,
                    };
                    sys!(process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0))?;
                }
                2 => {
                    // Not the value: it looks, and does not wait.
                    let none = libc::timespec { tv_sec: 0, tv_nsec: 1 };
                    sys0!(syscall(libc::SYS_futex, from, libc::FUTEX_WAIT, 0x7fff_1234, &raw const none, 0, 0));
                    continue;
                }
                3 => {
                    sys!(syscall(libc::SYS_getrandom, from, 16, 0))?;
                    spoilt[page] = true;
                    continue;
                }
                4 => {
                    const MADV_POPULATE_READ: i32 = 22;
                    let some = PAGE * (area.len / PAGE - page).min(5);
                    // Linux 5.14.
                    sys0!(madvise(from, some, MADV_POPULATE_READ));
                    continue;
                }
                5 => {
                    if sys0!(mlock(from, PAGE)) == 0 {
                        sys!(munlock(from, PAGE))?;
                    }
                    continue;
                }
                _ => {
                    if !area.page_is(page, SEED) {
                        wrong(kit, "itself", page);
                    }
                    continue;
                }
            }
            // SAFETY: a page of ours each.
            let same =
                unsafe { std::slice::from_raw_parts(scratch.at as *const u8, PAGE) == std::slice::from_raw_parts(from as *const u8, PAGE) };
            if !same || !area.page_is(page, SEED) {
                wrong(kit, ["write(2)", "process_vm_readv(2)"][how as usize], page);
            }
        }
        Ok(())
    }))
}

/// Several threads at once, often in the same page.
fn threads() -> io::Result<Trap> {
    let area = area()?;
    static WRONG: AtomicUsize = AtomicUsize::new(0);
    static ROUND: AtomicU64 = AtomicU64::new(0);
    for number in 0..6u64 {
        let start = std::thread::Builder::new().stack_size(128 << 10);
        let address = area.at as usize;
        start.spawn(move || {
            let area = Area {
                at: address as *mut u64,
                len: MIB << 20,
            };
            let mut numbers = Numbers::new(number);
            loop {
                let round = ROUND.load(Ordering::Relaxed);
                // All threads look at the pages of one round, each in its own order.
                let page = (round.wrapping_mul(977) as usize + below(&mut numbers, 4)) % (area.len / PAGE);
                if !area.page_is(page, SEED) {
                    WRONG.store(page + 1, Ordering::Relaxed);
                }
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        })?;
    }
    Ok(Box::new(move |kit, call| {
        ROUND.fetch_add(1, Ordering::Relaxed);
        match WRONG.swap(0, Ordering::Relaxed) {
            0 => {}
            page => wrong(kit, "a thread", page - 1),
        }
        if call == Call::Verify {
            area.verify(kit, "memory of all threads", SEED);
        }
        Ok(())
    }))
}

/// A handler runs while its task waits for a page, and touches others.
fn signals() -> io::Result<Trap> {
    static AREA: AtomicUsize = AtomicUsize::new(0);
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    static WRONG: AtomicUsize = AtomicUsize::new(0);
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn handler(_: i32) {
        let area = Area {
            at: AREA.load(Ordering::Relaxed) as *mut u64,
            len: MIB << 20,
        };
        let page = NEXT.fetch_add(389, Ordering::Relaxed) % (area.len / PAGE);
        if !area.page_is(page, SEED) {
            WRONG.store(page + 1, Ordering::Relaxed);
        }
        RUNS.fetch_add(1, Ordering::Relaxed);
    }
    let area = area()?;
    AREA.store(area.at as usize, Ordering::Relaxed);
    let mut action: libc::sigaction = zeroed();
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_RESTART;
    sys!(sigaction(libc::SIGALRM, &action, std::ptr::null_mut()))?;
    let every = libc::timeval { tv_sec: 0, tv_usec: 700 };
    let timer = libc::itimerval {
        it_interval: every,
        it_value: every,
    };
    sys!(setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()))?;
    let mut numbers = Numbers::new(5);
    let mut seen = 0;
    Ok(Box::new(move |kit, call| {
        for _ in 0..4 {
            let page = below(&mut numbers, area.len / PAGE);
            if !area.page_is(page, SEED) {
                wrong(kit, "itself", page);
            }
        }
        match WRONG.swap(0, Ordering::Relaxed) {
            0 => {}
            page => wrong(kit, "a handler", page - 1),
        }
        if call == Call::Verify {
            area.verify(kit, "memory of a handler", SEED);
            let runs = RUNS.load(Ordering::Relaxed);
            kit.check(runs > seen, "the timer's signals come");
            seen = runs;
        }
        Ok(())
    }))
}

/// Pages without the right to write, or without any until a moment ago.
fn read_only() -> io::Result<Trap> {
    let (fixed, changing) = (area()?, area()?);
    fixed.protect(libc::PROT_READ)?;
    changing.protect(libc::PROT_NONE)?;
    let mut numbers = Numbers::new(8);
    Ok(Box::new(move |kit, call| {
        if call == Call::Verify {
            fixed.verify(kit, "memory without the right to write", SEED);
            changing.protect(libc::PROT_READ)?;
            changing.verify(kit, "memory without rights", SEED);
            return changing.protect(libc::PROT_NONE);
        }
        for _ in 0..4 {
            let page = below(&mut numbers, fixed.len / PAGE);
            if !fixed.page_is(page, SEED) {
                wrong(kit, "itself, read-only", page);
            }
            let some = PAGE * (changing.len / PAGE - page).min(3);
            sys!(mprotect(at(changing, page), some, libc::PROT_READ))?;
            if !changing.page_is(page, SEED) {
                wrong(kit, "itself, readable again", page);
            }
            sys!(mprotect(at(changing, page), some, libc::PROT_NONE))?;
        }
        Ok(())
    }))
}

/// /proc/self/mem: the kernel does not wait for a page there and says EIO, but it never shows another.
fn own_mem() -> io::Result<Trap> {
    use std::os::unix::fs::FileExt;
    let area = area()?;
    let mut numbers = Numbers::new(21);
    Ok(Box::new(move |kit, call| {
        // Not open all the time: a descriptor of it cannot move.
        let mem = std::fs::File::open("/proc/self/mem")?;
        for _ in 0..4 {
            let page = below(&mut numbers, area.len / PAGE);
            let mut buffer = [0u8; PAGE];
            let read = mem.read_exact_at(&mut buffer, at(area, page) as u64);
            match read {
                Ok(()) => {
                    // SAFETY: a page of ours.
                    let same = unsafe { std::slice::from_raw_parts(at(area, page) as *const u8, PAGE) == buffer };
                    if !same || !area.page_is(page, SEED) {
                        wrong(kit, "/proc/self/mem", page);
                    }
                }
                Err(e) if e.raw_os_error() == Some(libc::EIO) && call == Call::Step => {}
                Err(e) => kit.differs(format!("page {page} cannot be read in /proc/self/mem: {e}")),
            }
        }
        if call == Call::Verify {
            area.verify(kit, "memory read by /proc/self/mem", SEED);
        }
        Ok(())
    }))
}

/// Children are forked while pages are missing, and need them too; some write to theirs, which is none of their parent's business.
fn children() -> io::Result<Trap> {
    let area = area()?;
    let mut numbers = Numbers::new(31);
    let mut children: Vec<i32> = Vec::new();
    Ok(Box::new(move |kit, call| {
        let mut status = 0;
        let most = if call == Call::Verify { 0 } else { 2 };
        while children.len() > most {
            let child = children.remove(0);
            sys!(waitpid(child, &mut status, 0))?;
            if status != 0 {
                kit.differs(format!("a child found its memory changed: status {status:#x}"));
            }
        }
        let page = below(&mut numbers, area.len / PAGE);
        if call == Call::Verify {
            area.verify(kit, "memory of a parent", SEED);
            return Ok(());
        }
        let child = sys!(fork())?;
        if child == 0 {
            let mut numbers = Numbers::new(page as u64);
            for k in 0..24 {
                let page = below(&mut numbers, area.len / PAGE);
                if k % 4 == 3 {
                    area.fill_page(page, 3);
                } else if !area.page_is(page, SEED) && !area.page_is(page, 3) {
                    sys0!(_exit(1));
                }
            }
            sys0!(_exit(0));
        }
        children.push(child);
        if !area.page_is(page, SEED) {
            wrong(kit, "the parent", page);
        }
        Ok(())
    }))
}

/// Children that end at once, beside memory that nobody touches before the end.
fn forks_beside() -> io::Result<Trap> {
    let area = area()?;
    let mut children = Vec::new();
    Ok(Box::new(move |kit, call| {
        if call == Call::Verify {
            for page in 0..area.len / PAGE {
                if !area.page_is(page, SEED) {
                    wrong(kit, "its owner", page);
                }
            }
            return Ok(());
        }
        super::tasks::reap(kit, &mut children, "child that ends at once")?;
        while children.len() < 4 {
            match sys!(fork())? {
                0 => sys0!(_exit(0)),
                pid => children.push(pid),
            }
        }
        Ok(())
    }))
}

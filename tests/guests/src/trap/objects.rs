//! Memory with something behind it: a file, or an object that several mappings, descriptors and processes share.

use super::{BOTH, Call, PRIVATE, Patch, READ, SHARED, Trap, below, map_at, unmap};
use crate::{
    kit::{Kit, Numbers, sys, sys0},
    memory::PAGE,
    soak::{
        lane::Lane,
        model::{Page, fill, holds, is_zero},
        ops::FILE_PAGES,
    },
};
use std::{ffi::CString, io, sync::atomic::Ordering};

/// The kinds of this file.
pub fn kind(name: &str, kit: &mut Kit) -> Option<io::Result<Trap>> {
    Some(match name {
        "file" => file(kit),
        "punched" => punched(kit),
        "written-by-descriptor" => written(kit, true),
        "only-a-descriptor" => written(kit, false),
        "written-by-workers" => written_by_workers(),
        "written-by-a-child" => written_by_another(kit, false),
        "written-from-outside" => written_by_another(kit, true),
        "shared-in-every-way" => in_every_way(),
        "doubled" => doubled(),
        "other-backing" => other_backing(kit),
        "userfaultfd" => userfaultfd(),
        _ => return None,
    })
}

fn memfd(pages: usize) -> io::Result<i32> {
    let fd = sys!(memfd_create(c"trap".as_ptr(), libc::MFD_CLOEXEC))?;
    sys!(ftruncate(fd, (pages * PAGE) as i64))?;
    Ok(fd)
}

fn open_file(kit: &Kit) -> io::Result<i32> {
    let name = CString::new(kit.dir().join("file").to_string_lossy().as_ref())?;
    sys!(open(name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC))
}

/// Pages of a private file mapping are written, and given back to the file.
fn file(kit: &Kit) -> io::Result<Trap> {
    let fd = open_file(kit)?;
    let at = map_at(0, FILE_PAGES, libc::MAP_PRIVATE, fd)?;
    sys!(close(fd))?;
    let mut patch = Patch::at(at, FILE_PAGES, Page::Base);
    let mut numbers = Numbers::new(31);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let (first, n) = (below(&mut numbers, FILE_PAGES - 16), 1 + below(&mut numbers, 16));
            (first..first + n).for_each(|p| patch.write(p));
            let (first, n) = (below(&mut numbers, FILE_PAGES - 16), 1 + below(&mut numbers, 16));
            patch.advise(first, n, libc::MADV_DONTNEED)?;
            patch.pages[first..first + n].fill(Page::Base);
        }
        patch.look(kit, "a private file mapping", call, &mut numbers);
        Ok(())
    }))
}

/// Holes: MADV_REMOVE in shared anonymous memory, fallocate(2) in a memfd.
fn punched(kit: &mut Kit) -> io::Result<Trap> {
    let fd = memfd(64)?;
    kit.ignore(format!("fdinfo {fd}:"));
    let mut anonymous = Patch::filled(64, SHARED)?;
    let mut object = Patch::at(map_at(0, 64, libc::MAP_SHARED, fd)?, 64, Page::Zero);
    (0..64).for_each(|p| object.write(p));
    let mut numbers = Numbers::new(32);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let (first, n) = (below(&mut numbers, 48), 1 + below(&mut numbers, 16));
            anonymous.advise(first, n, libc::MADV_REMOVE)?;
            anonymous.pages[first..first + n].fill(Page::Zero);
            // What a process drops from its page tables is still there for all.
            let page = below(&mut numbers, 64);
            anonymous.write(page);
            anonymous.advise(page, 1, libc::MADV_DONTNEED)?;
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            sys!(fallocate(fd, mode, (first * PAGE) as i64, (n * PAGE) as i64))?;
            object.pages[first..first + n].fill(Page::Zero);
            let page = below(&mut numbers, 64);
            anonymous.write(page);
            object.write(page);
        }
        anonymous.look(kit, "shared memory with holes", call, &mut numbers);
        object.look(kit, "a memfd with holes", call, &mut numbers);
        Ok(())
    }))
}

/// A memfd is written through its descriptor alone; it is seen in a mapping, or only read back.
fn written(kit: &mut Kit, mapped: bool) -> io::Result<Trap> {
    let fd = memfd(64)?;
    kit.ignore(format!("fdinfo {fd}:"));
    let mut patch = Patch::at(if mapped { map_at(0, 64, libc::MAP_SHARED, fd)? } else { 0 }, 64, Page::Zero);
    let mut numbers = Numbers::new(33);
    let mut buffer = vec![0_u64; PAGE / 8];
    Ok(Box::new(move |kit, call| {
        let at = buffer.as_mut_ptr() as usize;
        if call == Call::Step {
            for _ in 0..4 {
                let page = below(&mut numbers, 64);
                let seed = super::SEED.fetch_add(1, Ordering::Relaxed);
                fill(at, seed);
                sys!(lseek(fd, (page * PAGE) as i64, libc::SEEK_SET))?;
                let wrote = sys!(write(fd, buffer.as_ptr().cast(), PAGE))?;
                kit.equal("bytes written", wrote, PAGE as isize);
                patch.pages[page] = Page::Seed(seed);
            }
        }
        if mapped {
            patch.look(kit, "a memfd written through its descriptor", call, &mut numbers);
            return Ok(());
        }
        for page in 0..64 {
            if call == Call::Verify || below(&mut numbers, 16) == 0 {
                sys!(pread(fd, buffer.as_mut_ptr().cast(), PAGE, (page * PAGE) as i64))?;
                let well = match patch.pages[page] {
                    Page::Seed(seed) => holds(at, seed),
                    _ => is_zero(at),
                };
                kit.check(well, format!("page {page} of a memfd that nobody maps differs"));
            }
        }
        Ok(())
    }))
}

/// What a child does that writes to its lanes as long as `goes_on`; it does not return.
fn write_on(lanes: &[Lane], mut seed: u64, goes_on: impl Fn() -> bool) -> ! {
    while goes_on() {
        seed += 2;
        if lanes.iter().any(|l| l.work(seed, 20, 256, || true).is_err()) {
            sys0!(_exit(1));
        }
    }
    sys0!(_exit(0))
}

/// Compares a page of each lane, or all.
fn look_at(lanes: &[Lane], kit: &mut Kit, call: Call, numbers: &mut Numbers) {
    for lane in lanes {
        let wrong = match call {
            Call::Verify => lane.check_all(),
            Call::Step => lane.check(below(numbers, lane.pages())).err().into_iter().collect(),
        };
        wrong.into_iter().for_each(|w| kit.differs(w));
    }
}

/// A child that writes has found nothing wrong so far.
fn still_writes(kit: &mut Kit, child: i32) -> io::Result<()> {
    let mut status = 0;
    let ended = sys!(waitpid(child, &mut status, libc::WNOHANG))?;
    kit.check(ended == 0, format!("the child that writes ended with status {status:#x}"));
    Ok(())
}

/// Shared memory of which this process only reads what another writes: its child, or a process that is no part of the tree.
fn written_by_another(kit: &mut Kit, outside: bool) -> io::Result<Trap> {
    let fd = memfd(64)?;
    kit.ignore(format!("fdinfo {fd}:"));
    let lanes = [Lane::new(1, 64, SHARED, -1)?, Lane::new(2, 64, libc::MAP_SHARED, fd)?];
    let me = sys0!(getpid());
    let child = sys!(fork())?;
    if child == 0 {
        if outside {
            sys0!(setsid());
            if sys0!(fork()) > 0 {
                sys0!(_exit(0));
            }
        }
        // An outsider ends when the program has ended, wherever that was last.
        write_on(&lanes, 1, || if outside { sys0!(kill(me, 0)) == 0 } else { sys0!(getppid()) == me });
    }
    if outside {
        sys!(waitpid(child, std::ptr::null_mut(), 0))?;
    }
    let mut numbers = Numbers::new(34);
    Ok(Box::new(move |kit, call| {
        look_at(&lanes, kit, call, &mut numbers);
        if outside { Ok(()) } else { still_writes(kit, child) }
    }))
}

/// Shared anonymous memory that two workers write to all the time, each its own; a child that lives for one write now and then, with a child of its own
/// that outlives it; and this process, which takes rights away now and then.
fn written_by_workers() -> io::Result<Trap> {
    const PAGES: usize = 256;
    let lanes = (1..=3).map(|n| Lane::new(n, PAGES, SHARED, -1)).collect::<io::Result<Vec<_>>>()?;
    let visitors = lanes[2];
    let mut own = Patch::filled(PAGES, SHARED)?;
    let me = sys0!(getpid());
    let mut workers = Vec::new();
    for number in 0..2 {
        let child = sys!(fork())?;
        if child == 0 {
            write_on(&lanes[number..=number], number as u64, || sys0!(getppid()) == me);
        }
        workers.push(child);
    }
    let mut numbers = Numbers::new(36);
    let (mut turn, mut guest) = (0_u64, 0);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            turn += 1;
            let (first, n) = (below(&mut numbers, PAGES - 32), 1 + below(&mut numbers, 32));
            own.write(below(&mut numbers, PAGES));
            if turn % 32 == 0 {
                own.protect(first, n, [READ, BOTH][turn as usize / 32 % 2])?;
                own.check(kit, "shared memory without the right to write", first);
                own.protect(first, n, BOTH)?;
            }
            if guest > 0 && sys!(waitpid(guest, std::ptr::null_mut(), libc::WNOHANG))? == guest {
                guest = 0;
            }
            // Some time with forks between any two looks, then some time without.
            if turn / 64 % 2 == 0 && turn % 8 == 0 && guest == 0 {
                let page = below(&mut numbers, PAGES);
                guest = sys!(fork())?;
                if guest == 0 {
                    visitors.write(page);
                    // Whether its own child comes to its write before or after it ends.
                    let last = sys0!(fork());
                    if last != 0 {
                        sys0!(_exit(0));
                    }
                    visitors.write((page + 1) % PAGES);
                    sys0!(_exit(0));
                }
            }
        }
        look_at(&lanes, kit, call, &mut numbers);
        own.look(kit, "shared memory beside workers", call, &mut numbers);
        workers.iter().try_for_each(|child| still_writes(kit, *child))
    }))
}

/// A lot of shared anonymous memory, and whatever can be done to it by a process and its children: dropped from page tables, dropped for all, moved away and back,
/// locked, faulted in, without the right to write.
fn in_every_way() -> io::Result<Trap> {
    const PAGES: usize = 6144;
    const MADV_POPULATE_WRITE: i32 = 23;
    let mut patch = Patch::filled(PAGES, SHARED)?;
    let spare = map_at(0, 64, PRIVATE, -1)?;
    let mut numbers = Numbers::new(37);
    let mut turn = 0_u64;
    let go = |from: usize, pages: usize, to: usize| {
        let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        sys!(mremap(super::pointer(from), pages * PAGE, pages * PAGE, how, super::pointer(to))).map(drop)
    };
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            turn += 1;
            let (first, n) = (below(&mut numbers, PAGES - 64), 1 + below(&mut numbers, 32));
            match turn % 8 {
                // Still there for all.
                0 => patch.advise(first, n, libc::MADV_DONTNEED)?,
                1 if turn % 24 == 1 => {
                    patch.advise(first, n, libc::MADV_REMOVE)?;
                    patch.pages[first..first + n].fill(Page::Zero);
                    patch.write(first);
                }
                2 => {
                    go(patch.address(first), n, spare)?;
                    let mut away = Patch::at(spare, n, Page::Zero);
                    away.pages.copy_from_slice(&patch.pages[first..first + n]);
                    away.check(kit, "shared memory at another place", n / 2);
                    go(spare, n, patch.address(first))?;
                    map_at(spare, 64, PRIVATE, -1)?;
                }
                3 => {
                    let page = below(&mut numbers, PAGES);
                    let seed = super::SEED.fetch_add(1, Ordering::Relaxed);
                    let child = sys!(fork())?;
                    if child == 0 {
                        let well = (0..8).all(|_| {
                            let page = below(&mut numbers, PAGES);
                            match patch.pages[page] {
                                Page::Seed(seed) => holds(patch.address(page), seed),
                                _ => is_zero(patch.address(page)),
                            }
                        });
                        fill(patch.address(page), seed);
                        sys0!(_exit(i32::from(!well)));
                    }
                    let mut status = 0;
                    sys!(waitpid(child, &raw mut status, 0))?;
                    kit.equal("what a child says of shared memory", status, 0);
                    patch.pages[page] = Page::Seed(seed);
                }
                4 => {
                    let from = super::pointer(patch.address(first));
                    if sys0!(mlock(from, n * PAGE)) == 0 {
                        sys!(munlock(from, n * PAGE))?;
                    }
                }
                5 => {
                    patch.protect(first, n, READ)?;
                    patch.check(kit, "shared memory without the right to write", first);
                    patch.protect(first, n, BOTH)?;
                }
                6 => drop(patch.advise(first, n, MADV_POPULATE_WRITE)),
                _ => patch.write(below(&mut numbers, PAGES)),
            }
            patch.check(kit, "shared memory that was just treated", first);
        }
        patch.look(kit, "shared memory", call, &mut numbers);
        Ok(())
    }))
}

/// Shared memory of which mremap(2) makes a second mapping now and then, without telling anybody.
fn doubled() -> io::Result<Trap> {
    const PAGES: usize = 6144;
    let mut patch = Patch::filled(PAGES, SHARED)?;
    let mut numbers = Numbers::new(38);
    let mut turn = 0_u64;
    Ok(Box::new(move |kit, call| {
        turn += 1;
        if call == Call::Step && turn % 64 == 40 {
            let (first, n) = (below(&mut numbers, PAGES - 64), 1 + below(&mut numbers, 32));
            let from = super::pointer(patch.address(first));
            let second = sys!(mremap(from, 0, n * PAGE, libc::MREMAP_MAYMOVE))? as usize;
            let mut second = Patch::at(second, n, Page::Zero);
            second.pages.copy_from_slice(&patch.pages[first..first + n]);
            second.check_all(kit, "the second mapping of shared memory");
            second.write(n / 2);
            patch.pages[first + n / 2] = second.pages[n / 2];
            unmap(second.at, n)?;
        }
        patch.write(below(&mut numbers, PAGES));
        patch.look(kit, "shared memory that is mapped twice now and then", call, &mut numbers);
        Ok(())
    }))
}

/// At one place, in turn: private memory, shared memory, a memfd, a file.
fn other_backing(kit: &mut Kit) -> io::Result<Trap> {
    let (file, fd) = (open_file(kit)?, memfd(32)?);
    kit.ignore(format!("fdinfo {fd}:"));
    let view = map_at(0, 32, libc::MAP_SHARED, fd)?;
    let mut object = Patch::at(view, 32, Page::Zero);
    let mut patch = Patch::map(32, PRIVATE)?;
    let (mut turn, mut numbers) = (0_u64, Numbers::new(35));
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            turn += 1;
            let (flags, fd, holds) = match turn % 4 {
                0 => (PRIVATE, -1, Page::Zero),
                1 => (SHARED, -1, Page::Zero),
                2 => (libc::MAP_SHARED, fd, Page::Unknown),
                _ => (libc::MAP_PRIVATE, file, Page::Base),
            };
            if turn % 8 < 4 {
                unmap(patch.at, 32)?;
            }
            map_at(patch.at, 32, flags, fd)?;
            patch.pages.fill(holds);
            if turn % 4 == 2 {
                patch.pages.clone_from(&object.pages);
            }
            (0..32).step_by(5).for_each(|p| patch.write(p));
            if turn % 4 == 2 {
                object.pages.clone_from(&patch.pages);
            }
            if turn % 3 == 0 {
                sys!(mprotect(super::pointer(patch.at), PAGE, BOTH))?;
            }
        }
        patch.look(kit, "a place with changing mappings", call, &mut numbers);
        object.look(kit, "the memfd that is mapped there now and then", call, &mut numbers);
        Ok(())
    }))
}

/// A userfaultfd of the program's own, with a range.
fn userfaultfd() -> io::Result<Trap> {
    let fd = sys!(syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK))? as i32;
    let mut api = [0xaa_u64, 0, 0];
    sys!(ioctl(fd, 0xc018_aa3f, api.as_mut_ptr()))?;
    let patch = Patch::map(4, PRIVATE)?;
    // struct uffdio_register: start, length, mode (missing), what it answers.
    let mut register = [patch.at as u64, (4 * PAGE) as u64, 1, 0];
    sys!(ioctl(fd, 0xc020_aa00, register.as_mut_ptr()))?;
    let mut page = vec![0_u64; PAGE / 8];
    fill(page.as_mut_ptr() as usize, 77);
    // struct uffdio_copy: to, from, length, mode, bytes copied.
    let mut copy = [patch.at as u64, page.as_ptr() as u64, PAGE as u64, 0, 0];
    sys!(ioctl(fd, 0xc028_aa03, copy.as_mut_ptr()))?;
    Ok(Box::new(move |kit, _| {
        kit.check(holds(patch.at, 77), "the page that was copied in differs");
        Ok(())
    }))
}

//! Private memory: what becomes of mappings, of their rights, and of pages that are given back.

use super::{BOTH, Call, PRIVATE, Patch, READ, Trap, below, map_at, pointer, unmap};
use crate::{
    kit::{Kit, Numbers, sys, sys0},
    memory::PAGE,
    soak::model::{Page, fill, holds},
};
use std::{collections::VecDeque, io, time::Duration};

/// The kinds of this file.
pub fn kind(name: &str) -> Option<io::Result<Trap>> {
    Some(match name {
        "new" => new(),
        "moved" => moved(),
        "swapped" => swapped(),
        "moved-together" => moved_together(false),
        "moved-together-or-in-part" => moved_together(true),
        "moved-beside" => moved_beside(),
        "left-behind" => left_behind(),
        "replaced" => replaced(true),
        "mapped-over" => replaced(false),
        "grown" => grown(),
        "brk" => brk(),
        "stack" => stack(),
        "protected" => protected(),
        "dropped" => dropped(),
        "freed" => freed(),
        "huge" => huge(),
        "fork-advice" => fork_advice(),
        _ => return None,
    })
}

/// mremap(2) to exactly there.
fn shift(from: usize, pages: usize, to: usize, more: i32) -> io::Result<()> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | more;
    sys!(mremap(pointer(from), pages * PAGE, pages * PAGE, flags, pointer(to))).map(drop)
}

/// New mappings appear, old ones are gone for good.
fn new() -> io::Result<Trap> {
    let mut all: VecDeque<Patch> = VecDeque::new();
    let mut gone: VecDeque<(usize, usize)> = VecDeque::new();
    let mut numbers = Numbers::new(11);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let patch = Patch::filled(1 + below(&mut numbers, 24), PRIVATE)?;
            gone.retain(|(at, pages)| *at >= patch.address(patch.len()) || patch.at >= at + pages * PAGE);
            // One page between two keeps the kernel from making them one mapping.
            patch.protect(0, 1, READ)?;
            all.push_back(patch);
        }
        for patch in &mut all {
            patch.look(kit, "a new mapping", call, &mut numbers);
        }
        while all.len() > 40 {
            let Some(old) = all.pop_front() else { break };
            unmap(old.at, old.len())?;
            gone.push_back((old.at, old.len()));
        }
        while gone.len() > 60 {
            gone.pop_front();
        }
        if call == Call::Verify {
            for (at, pages) in &gone {
                let mut there = vec![0_u8; *pages];
                let answer = sys!(mincore(pointer(*at), pages * PAGE, there.as_mut_ptr()));
                let none = answer.is_err_and(|e| e.raw_os_error() == Some(libc::ENOMEM));
                kit.check(none, format!("{at:x}, which was unmapped, is mapped"));
            }
        }
        Ok(())
    }))
}

/// Whether all of these pages are mapped.
fn mapped(at: usize, pages: usize) -> bool {
    let mut there = vec![0_u8; pages];
    sys!(mincore(pointer(at), pages * PAGE, there.as_mut_ptr())).is_ok()
}

/// One mapping wanders between two places, and is written now and then.
fn moved() -> io::Result<Trap> {
    let mut patch = Patch::filled(64, PRIVATE)?;
    let mut other = map_at(0, 64, PRIVATE | libc::MAP_NORESERVE, -1)?;
    let mut numbers = Numbers::new(12);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let from = patch.at;
            shift(from, 64, other, 0)?;
            patch.at = other;
            other = map_at(from, 64, PRIVATE, -1)?;
            let page = below(&mut numbers, 64);
            patch.write(page);
        }
        patch.look(kit, "a mapping that moves", call, &mut numbers);
        Ok(())
    }))
}

/// Two mappings change places.
fn swapped() -> io::Result<Trap> {
    let mut both = [Patch::filled(32, PRIVATE)?, Patch::filled(32, PRIVATE)?];
    let aside = map_at(0, 32, PRIVATE | libc::MAP_NORESERVE, -1)?;
    let mut numbers = Numbers::new(13);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let (a, b) = (both[0].at, both[1].at);
            shift(a, 32, aside, 0)?;
            shift(b, 32, a, 0)?;
            shift(aside, 32, b, 0)?;
            map_at(aside, 32, PRIVATE | libc::MAP_NORESERVE, -1)?;
            (both[0].at, both[1].at) = (b, a);
        }
        both.iter_mut()
            .for_each(|p| p.look(kit, "one of two mappings that change places", call, &mut numbers));
        Ok(())
    }))
}

/// Half of a mapping goes away for some rounds and comes back for some. The kernel makes both one again, and in that forgets who watched the other half, where
/// all the writing is done.
fn moved_beside() -> io::Result<Trap> {
    const HALF: usize = 48;
    // Made as one; a page with other rights at each end keeps it apart from its neighbours.
    let whole = Patch::map(2 * HALF + 2, PRIVATE)?;
    whole.protect(0, 1, READ)?;
    whole.protect(2 * HALF + 1, 1, READ)?;
    let home = whole.address(1 + HALF);
    let aside = map_at(0, HALF, PRIVATE | libc::MAP_NORESERVE, -1)?;
    let mut both = [whole.address(1), home].map(|at| Patch::at(at, HALF, Page::Zero));
    both.iter_mut().for_each(|p| (0..HALF).for_each(|page| p.write(page)));
    let mut numbers = Numbers::new(25);
    let mut steps = 0_u32;
    Ok(Box::new(move |kit, call| {
        let [near, far] = &mut both;
        if call == Call::Step {
            steps += 1;
            if steps.is_multiple_of(100) {
                let to = if far.at == home { aside } else { home };
                shift(far.at, HALF, to, 0)?;
                far.at = to;
            }
            let page = below(&mut numbers, HALF);
            near.write(page);
        }
        near.look(kit, "a mapping whose other half moves", call, &mut numbers);
        far.look(kit, "the half that moves", call, &mut numbers);
        Ok(())
    }))
}

/// Mappings in a row, of which every other one cannot be touched and has no pages, move by one call. Where the kernel refuses that, nothing
/// has moved; or, `in_part`, perhaps those before the one that it refuses.
fn moved_together(in_part: bool) -> io::Result<Trap> {
    const RUN: usize = 8;
    let mut patch = Patch::map(8 * RUN, PRIVATE)?;
    for first in (RUN..patch.len()).step_by(2 * RUN) {
        patch.protect(first - RUN, RUN, libc::PROT_NONE)?;
        (first..first + RUN).for_each(|p| patch.write(p));
    }
    let mut other = map_at(0, patch.len(), PRIVATE | libc::MAP_NORESERVE, -1)?;
    let mut numbers = Numbers::new(24);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let (from, len) = (patch.at, patch.len());
            // Whoever reads /proc/self/mem there leaves the page of zeros behind: the portrait does.
            for first in (0..len).step_by(2 * RUN) {
                patch.advise(first, RUN, libc::MADV_DONTNEED)?;
            }
            // By one, then from the second on, which are the full ones.
            let first = below(&mut numbers, 2) * RUN;
            let part = |at: usize| at + first * PAGE;
            match shift(part(from), len - first, part(other), 0) {
                Ok(()) => {
                    if first > 0 {
                        shift(from, first, other, 0)?;
                    }
                    patch.at = other;
                    other = map_at(from, len, PRIVATE | libc::MAP_NORESERVE, -1)?;
                }
                Err(e) if e.raw_os_error() == Some(libc::EFAULT) && in_part => {
                    // A stop between the two calls of the step before may have had the later mappings registered, and not the first.
                    for at in (0..len).step_by(RUN) {
                        if mapped(from + at * PAGE, RUN) {
                            shift(from + at * PAGE, RUN, other + at * PAGE, 0)?;
                        }
                    }
                    patch.at = other;
                    other = map_at(from, len, PRIVATE | libc::MAP_NORESERVE, -1)?;
                }
                Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {
                    kit.check(mapped(from, len), "mappings that could not move together have moved in part");
                    map_at(other, len, PRIVATE | libc::MAP_NORESERVE, -1)?;
                }
                Err(e) => return Err(e),
            }
        }
        // The others stay untouched.
        let first = RUN * (1 + 2 * below(&mut numbers, 4));
        (first..first + RUN).for_each(|p| patch.check(kit, "mappings that move together", p));
        Ok(())
    }))
}

/// Pages move away and leave an empty mapping behind (MREMAP_DONTUNMAP), of which some are written.
fn left_behind() -> io::Result<Trap> {
    let (mut full, mut empty) = (Patch::filled(32, PRIVATE)?, Patch::map(32, PRIVATE)?);
    let mut numbers = Numbers::new(14);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            shift(full.at, 32, empty.at, 4)?;
            std::mem::swap(&mut full.at, &mut empty.at);
            empty.pages.fill(Page::Zero);
            let page = below(&mut numbers, 32);
            empty.write(page);
        }
        full.look(kit, "pages that moved away", call, &mut numbers);
        empty.look(kit, "the mapping they left", call, &mut numbers);
        Ok(())
    }))
}

/// Another mapping at the same place, which holds zeros but for what was written since.
fn replaced(with_unmap: bool) -> io::Result<Trap> {
    let mut patch = Patch::filled(96, PRIVATE)?;
    let mut numbers = Numbers::new(15);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let (first, n) = (below(&mut numbers, 64), 1 + below(&mut numbers, 32));
            if with_unmap {
                unmap(patch.address(first), n)?;
            }
            map_at(patch.address(first), n, PRIVATE, -1)?;
            patch.pages[first..first + n].fill(Page::Zero);
            (first..first + n).step_by(3).for_each(|p| patch.write(p));
        }
        patch.look(kit, "a mapping that was replaced", call, &mut numbers);
        Ok(())
    }))
}

/// Grows and shrinks; what was cut off comes back as zeros.
fn grown() -> io::Result<Trap> {
    let mut patch = Patch::filled(16, PRIVATE)?;
    let mut numbers = Numbers::new(16);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let before = patch.len();
            let len = if before > 400 || below(&mut numbers, 4) == 0 {
                1 + below(&mut numbers, before)
            } else {
                before + 1 + below(&mut numbers, 32)
            };
            let got = sys!(mremap(pointer(patch.at), before * PAGE, len * PAGE, libc::MREMAP_MAYMOVE))?;
            patch.at = got as usize;
            patch.pages.resize(len, Page::Zero);
            (before..len).step_by(2).for_each(|p| patch.write(p));
        }
        patch.look(kit, "a mapping that grows and shrinks", call, &mut numbers);
        Ok(())
    }))
}

/// The same with the break.
fn brk() -> io::Result<Trap> {
    let now = sys0!(sbrk(0)) as usize;
    let start = now.next_multiple_of(PAGE);
    sys!(sbrk((start - now) as isize))?;
    let mut patch = Patch::at(start, 0, Page::Zero);
    let mut numbers = Numbers::new(17);
    Ok(Box::new(move |kit, call| {
        let before = patch.len();
        let ours = sys0!(sbrk(0)) as usize == patch.address(before);
        if call == Call::Step && ours {
            let len = if before > 400 || (before > 0 && below(&mut numbers, 4) == 0) {
                below(&mut numbers, before)
            } else {
                before + 1 + below(&mut numbers, 32)
            };
            sys!(sbrk((len as isize - before as isize) * PAGE as isize))?;
            patch.pages.resize(len, Page::Zero);
            (before..len).step_by(2).for_each(|p| patch.write(p));
        }
        if patch.len() > 0 {
            patch.look(kit, "the heap", call, &mut numbers);
        }
        Ok(())
    }))
}

/// Deeper and deeper, with something in every frame, and a rest at the bottom.
fn stack() -> io::Result<Trap> {
    let mut depth = 0;
    Ok(Box::new(move |kit, call| {
        depth = if depth > 600 { 10 } else { depth + 7 };
        let wrong = descend(depth, super::SEED.fetch_add(1, std::sync::atomic::Ordering::Relaxed), call);
        kit.equal("stack frames that differ", wrong, 0);
        Ok(())
    }))
}

/// Frames of two pages; how many are not what they should be on the way back.
#[inline(never)]
fn descend(levels: u64, seed: u64, call: Call) -> u64 {
    let mut frame = std::hint::black_box([0_u64; 2 * PAGE / 8]);
    let at = (frame.as_mut_ptr() as usize).next_multiple_of(PAGE);
    fill(at, seed ^ (levels << 48));
    let mut wrong = 0;
    if levels > 1 {
        wrong = descend(levels - 1, seed, call);
    } else if call == Call::Step {
        std::thread::sleep(Duration::from_millis(3));
    }
    wrong + u64::from(!holds(at, seed ^ (levels << 48)))
}

/// Written, then read-only, or without rights; opened again to be looked at.
fn protected() -> io::Result<Trap> {
    let mut patch = Patch::filled(128, PRIVATE)?;
    let mut rights = vec![BOTH; 128];
    let mut numbers = Numbers::new(18);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let (first, n) = (below(&mut numbers, 96), 1 + below(&mut numbers, 32));
            let prot = [libc::PROT_NONE, READ, BOTH][below(&mut numbers, 3)];
            patch.protect(first, n, BOTH)?;
            (first..first + n).step_by(2).for_each(|p| patch.write(p));
            patch.protect(first, n, prot)?;
            rights[first..first + n].fill(prot);
            let page = below(&mut numbers, 128);
            if rights[page] != libc::PROT_NONE {
                patch.check(kit, "memory whose rights change", page);
            }
            return Ok(());
        }
        for (page, prot) in rights.iter().enumerate() {
            // What must not be written must not be: the kernel answers for the process, without a signal.
            let file = sys!(open(c"/dev/zero".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC))?;
            if *prot != BOTH {
                let wrote = sys!(read(file, pointer(patch.address(page)), 8));
                kit.check(wrote.is_err(), format!("page {page} can be written, and had rights {prot}"));
            }
            sys!(close(file))?;
        }
        patch.protect(0, 128, READ)?;
        patch.check_all(kit, "memory whose rights change");
        for (page, prot) in rights.iter().enumerate() {
            patch.protect(page, 1, *prot)?;
        }
        Ok(())
    }))
}

/// MADV_DONTNEED: zeros from then on, until written.
fn dropped() -> io::Result<Trap> {
    let mut patch = Patch::filled(128, PRIVATE)?;
    let mut numbers = Numbers::new(19);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let (first, n) = (below(&mut numbers, 96), 1 + below(&mut numbers, 32));
            patch.advise(first, n, libc::MADV_DONTNEED)?;
            patch.pages[first..first + n].fill(Page::Zero);
            let (first, n) = (below(&mut numbers, 96), 1 + below(&mut numbers, 16));
            (first..first + n).for_each(|p| patch.write(p));
        }
        patch.look(kit, "dropped pages", call, &mut numbers);
        Ok(())
    }))
}

/// MADV_FREE: what it was or zeros, and never again what it was after zeros were seen.
fn freed() -> io::Result<Trap> {
    let mut patch = Patch::filled(128, PRIVATE)?;
    let mut numbers = Numbers::new(20);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let (first, n) = (below(&mut numbers, 96), 1 + below(&mut numbers, 32));
            patch.advise(first, n, libc::MADV_FREE)?;
            for page in &mut patch.pages[first..first + n] {
                if let Page::Seed(seed) = *page {
                    *page = Page::Freed(seed);
                }
            }
            // The kernel gives them back at once when asked to.
            let _ = patch.advise(first, n / 2, libc::MADV_PAGEOUT);
            let (first, n) = (below(&mut numbers, 96), 1 + below(&mut numbers, 16));
            (first..first + n).for_each(|p| patch.write(p));
        }
        patch.look(kit, "freed pages", call, &mut numbers);
        Ok(())
    }))
}

/// Huge pages: written page by page, dropped as a whole, and made again.
fn huge() -> io::Result<Trap> {
    const HUGE: usize = 512;
    let place = map_at(0, 5 * HUGE, PRIVATE, -1)?;
    let at = place.next_multiple_of(HUGE * PAGE);
    let mut patch = Patch::at(at, 4 * HUGE, Page::Zero);
    patch.advise(0, 4 * HUGE, libc::MADV_HUGEPAGE)?;
    (0..2 * HUGE).for_each(|p| patch.write(p));
    let mut numbers = Numbers::new(21);
    let mut turn = 0_u64;
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            turn += 1;
            let page = below(&mut numbers, 4 * HUGE);
            patch.write(page);
            let first = below(&mut numbers, 4) * HUGE;
            match turn % 16 {
                3 => {
                    patch.advise(first, HUGE, libc::MADV_DONTNEED)?;
                    patch.pages[first..first + HUGE].fill(Page::Zero);
                    // One write makes all 512 present.
                    patch.write(first + 5);
                }
                // And read only: the huge zero page.
                5 => {
                    patch.advise(first, HUGE, libc::MADV_DONTNEED)?;
                    patch.pages[first..first + HUGE].fill(Page::Zero);
                    patch.check(kit, "a huge page that was dropped", first + 9);
                }
                7 => {
                    let _ = patch.advise(first, HUGE, 25);
                }
                11 => {
                    let one = first + below(&mut numbers, HUGE);
                    patch.advise(one, 1, libc::MADV_DONTNEED)?;
                    patch.pages[one] = Page::Zero;
                }
                _ => {}
            }
        }
        patch.look(kit, "huge pages", call, &mut numbers);
        Ok(())
    }))
}

/// What a fork would do with a mapping changes all the time, and nothing else about it does.
fn fork_advice() -> io::Result<Trap> {
    const ADVICE: [(i32, i32, &str); 2] = [
        (libc::MADV_DONTFORK, libc::MADV_DOFORK, "dc"),
        (libc::MADV_WIPEONFORK, libc::MADV_KEEPONFORK, "wf"),
    ];
    let mut patches = [Patch::filled(4, PRIVATE)?, Patch::filled(4, PRIVATE)?];
    let mut on = false;
    Ok(Box::new(move |kit: &mut Kit, call| {
        if call == Call::Step {
            on = !on;
            for (patch, (set, unset, _)) in patches.iter().zip(ADVICE) {
                patch.advise(0, 4, if on { set } else { unset })?;
            }
            return Ok(());
        }
        let smaps = std::fs::read_to_string("/proc/self/smaps")?;
        for (patch, (.., flag)) in patches.iter_mut().zip(ADVICE) {
            patch.check_all(kit, "memory with advice");
            let mut inside = false;
            let flags = smaps.lines().find_map(|line| {
                let range = line.split(' ').next().and_then(|r| r.split_once('-'));
                if let Some((Ok(a), Ok(b))) = range.map(|(a, b)| (usize::from_str_radix(a, 16), usize::from_str_radix(b, 16))) {
                    inside = a <= patch.at && patch.at < b;
                }
                line.strip_prefix("VmFlags:").filter(|_| inside)
            });
            let has = flags.is_some_and(|f| f.split(' ').any(|f| f == flag));
            kit.equal(&format!("advice {flag} at {:x}", patch.at), has, on);
        }
        Ok(())
    }))
}

//! Restartable sequences (rseq(2)): two threads on one cpu count together without a lock. It is right only because whoever is preempted in the middle begins
//! anew.

use crate::kit::{self, Kit, sys};
use std::{
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

/// Turns that a sequence spins between reading and writing: some tens of microseconds.
const SPIN: u64 = 50_000;

#[derive(Default)]
struct Shared {
    /// What both count.
    counter: AtomicU64,
    /// What each has counted.
    own: [AtomicU64; 2],
    /// How often each had to begin anew.
    aborts: [AtomicU64; 2],
    rest: AtomicBool,
    resting: [AtomicBool; 2],
    stop: AtomicBool,
}

/// `struct rseq_cs` of `linux/rseq.h`: version, flags, start, length up to the commit, abort handler. Filled in where the section begins.
#[repr(C, align(32))]
#[derive(Default)]
struct Section([u64; 4]);

/// Counts one up. False: it was interrupted, and nothing has happened.
fn count(area: *mut u8, section: &mut Section, counter: &AtomicU64) -> bool {
    let done: u64;
    // SAFETY: the sequence reads and writes the counter alone; the abort handler behind the C library's signature leads to its end.
    unsafe {
        std::arch::asm!(
            "lea {a}, [rip + 2f]",
            "mov [{section} + 8], {a}",
            "lea {b}, [rip + 3f]",
            "sub {b}, {a}",
            "mov [{section} + 16], {b}",
            "lea {a}, [rip + 4f]",
            "mov [{section} + 24], {a}",
            "mov [{area} + 8], {section}",
            "2:",
            "mov {a}, [{counter}]",
            "mov {b}, {spin}",
            "5:",
            "dec {b}",
            "jnz 5b",
            "inc {a}",
            "mov [{counter}], {a}",
            "3:",
            "mov {done}, 1",
            "jmp 6f",
            ".long 0x53053053",
            "4:",
            "xor {done:e}, {done:e}",
            "6:",
            "mov qword ptr [{area} + 8], 0",
            a = out(reg) _,
            b = out(reg) _,
            done = out(reg) done,
            area = in(reg) area,
            section = in(reg) section,
            counter = in(reg) counter.as_ptr(),
            spin = in(reg) SPIN,
            options(nostack),
        );
    }
    done == 1
}

fn work(number: usize, shared: &Shared) -> io::Result<()> {
    // Both on the first cpu there is.
    let mut all: libc::cpu_set_t = kit::zeroed();
    sys!(sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut all))?;
    // SAFETY: plain bit sets.
    let first = (0..libc::CPU_SETSIZE as usize).find(|cpu| unsafe { libc::CPU_ISSET(*cpu, &all) });
    kit::bind(first.unwrap_or(0))?;
    kit::yield_to_others();
    let area = kit::rseq_area().ok_or_else(|| io::Error::other("this C library registers no rseq area"))?;
    let mut section = Section::default();
    while !shared.stop.load(Ordering::Relaxed) {
        if shared.rest.load(Ordering::SeqCst) {
            shared.resting[number].store(true, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        shared.resting[number].store(false, Ordering::SeqCst);
        let counted = count(area, &mut section, &shared.counter);
        let to = if counted { &shared.own } else { &shared.aborts };
        to[number].fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Two threads, one counter.
pub fn rseq(mut kit: Kit) -> io::Result<ExitCode> {
    let shared = Arc::new(Shared::default());
    let workers: Vec<_> = (0..2)
        .map(|number| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || work(number, &shared))
        })
        .collect();
    let of = |list: &[AtomicU64; 2]| list.iter().map(|n| n.load(Ordering::SeqCst)).sum::<u64>();
    // What they do to themselves at first is in the picture that is compared later.
    let begun = || shared.own.iter().all(|n| n.load(Ordering::SeqCst) > 0);
    let interrupted = kit::within(Duration::from_secs(20), || begun() && of(&shared.aborts) > 0);
    kit.check(interrupted, "no sequence was ever interrupted");
    kit.ready()?;
    let code = kit.run(
        |_| {},
        |kit| {
            shared.rest.store(true, Ordering::SeqCst);
            let both = || shared.resting.iter().all(|r| r.load(Ordering::SeqCst));
            kit.check(kit::within(Duration::from_secs(10), both), "the threads do not come to rest");
            kit.equal(
                "counted together, one by one",
                shared.counter.load(Ordering::SeqCst),
                of(&shared.own),
            );
            shared.rest.store(false, Ordering::SeqCst);
        },
    );
    shared.stop.store(true, Ordering::Relaxed);
    for w in workers {
        w.join().map_err(|_| io::Error::other("a thread panicked"))??;
    }
    Ok(code)
}

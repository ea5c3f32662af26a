//! A program that is in its signal handlers much of the time, with every signal blocked there, and a thread that never takes any. Their stacks grow and shrink all
//! the time, so that nobody may be given the registers of a moment ago.

use crate::kit::{Kit, set_of, sys, within, zeroed};
use std::{
    hint::black_box,
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

static HANDLED: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

/// Goes down so many calls and back, each with something of its own on the stack. False: it has changed.
#[inline(never)]
fn down(calls: u64, seed: u64) -> bool {
    let expected = || seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ calls;
    let own = black_box([expected(); 8]);
    let below = calls == 0 || down(black_box(calls - 1), seed);
    below && black_box(own).iter().all(|w| *w == expected())
}

fn every_signal() -> libc::sigset_t {
    set_of(&(1..=64).collect::<Vec<_>>())
}

fn walk(number: u64) {
    if !down(number % 97, number) {
        WRONG.fetch_add(1, Ordering::Relaxed);
    }
}

extern "C" fn handler(_: i32) {
    let number = HANDLED.fetch_add(1, Ordering::Relaxed);
    for k in 0..20 {
        walk(number + k);
    }
}

/// With `thread`: a thread beside it that blocks all signals for good.
pub fn masked(mut kit: Kit, threads: bool) -> io::Result<ExitCode> {
    let stop = Arc::new(AtomicBool::new(false));
    let walked = Arc::new(AtomicU64::new(0));
    let worker = threads.then(|| {
        let (stop, walked) = (stop.clone(), walked.clone());
        thread::spawn(move || -> io::Result<()> {
            sys!(pthread_sigmask(libc::SIG_BLOCK, &every_signal(), std::ptr::null_mut()))?;
            while !stop.load(Ordering::Relaxed) {
                walk(walked.fetch_add(1, Ordering::Relaxed));
            }
            Ok(())
        })
    });
    let mut action: libc::sigaction = zeroed();
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_RESTART;
    action.sa_mask = every_signal();
    sys!(sigaction(libc::SIGALRM, &action, std::ptr::null_mut()))?;
    let every = libc::timeval { tv_sec: 0, tv_usec: 100 };
    let timer = libc::itimerval {
        it_interval: every,
        it_value: every,
    };
    sys!(setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()))?;
    within(Duration::from_secs(10), || !threads || walked.load(Ordering::SeqCst) > 0);
    // The timer's signal waits, or it does not.
    kit.ignore("process status ShdPnd");
    for task in std::fs::read_dir("/proc/self/task")? {
        kit.ignore(format!("task {} status ShdPnd", task?.file_name().display()));
    }
    kit.ready()?;
    let mut number = 0;
    let code = kit.run(
        |_| {
            for _ in 0..200 {
                number += 1;
                walk(number);
            }
        },
        |kit| {
            kit.equal("stacks that were found changed", WRONG.load(Ordering::SeqCst), 0);
            let both = || (HANDLED.load(Ordering::SeqCst), walked.load(Ordering::SeqCst));
            let (handled, walked) = both();
            let more = |now: (u64, u64)| now.0 > handled && (now.1 > walked || !threads);
            let on = within(Duration::from_secs(10), || more(both()));
            kit.check(on, "the handler, or the thread, has stopped");
        },
    );
    stop.store(true, Ordering::Relaxed);
    if let Some(w) = worker {
        w.join().map_err(|_| io::Error::other("a thread panicked"))??;
    }
    Ok(code)
}

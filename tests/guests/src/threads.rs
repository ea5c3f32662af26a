//! Threads that wait for each other, with storage of their own.

use crate::kit::{Kit, Options, set_of, sys, sys0};
use std::{
    cell::Cell,
    io,
    process::ExitCode,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

thread_local! {
    static OWN: Cell<u64> = const { Cell::new(0) };
}

#[derive(Default)]
struct Round {
    number: Mutex<u64>,
    began: Condvar,
    answers: AtomicU64,
    wrong: Mutex<Vec<String>>,
    /// Spinning threads count here, to be seen running.
    spins: AtomicU64,
    stop: AtomicBool,
}

fn tid() -> i64 {
    sys0!(syscall(libc::SYS_gettid))
}

/// What one thread knows of itself, asked from the kernel and the C library each time.
fn self_image() -> String {
    let mut mask = crate::kit::empty_set();
    sys0!(pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut mask));
    let blocked: Vec<i32> = (1..=64).filter(|s| sys0!(sigismember(&mask, *s)) == 1).collect();
    let mut stack: libc::stack_t = crate::kit::zeroed();
    sys0!(sigaltstack(std::ptr::null(), &mut stack));
    let me = sys0!(pthread_self());
    let own = OWN.with(Cell::get);
    let (altstack, altlen) = (stack.ss_sp, stack.ss_size);
    format!(
        "tid {} self {me:x} tls {own} blocked {blocked:?} altstack {altstack:p}+{altlen} name {:?}",
        tid(),
        thread::current().name()
    )
}

/// Is the rseq area of this thread alive? The kernel writes the cpu number there on each return to user mode after a move.
fn rseq_works() -> Result<(), String> {
    let Some(area) = crate::kit::rseq_area() else {
        return Ok(());
    };
    let mut before: libc::cpu_set_t = crate::kit::zeroed();
    sys!(sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut before)).map_err(|e| e.to_string())?;
    let mut result = Ok(());
    for cpu in 0..libc::CPU_SETSIZE as usize {
        // SAFETY: plain bit sets.
        if !unsafe { libc::CPU_ISSET(cpu, &before) } {
            continue;
        }
        crate::kit::bind(cpu).map_err(|e| e.to_string())?;
        // SAFETY: the area is readable for as long as the thread lives.
        let said = unsafe { area.cast::<u32>().add(1).read_volatile() };
        if said as usize != cpu {
            result = Err(format!("rseq says cpu {said}, the thread is bound to {cpu}"));
        }
    }
    sys!(sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &before)).map_err(|e| e.to_string())?;
    result
}

fn work(number: u64, round: &Round, spin: bool) {
    OWN.with(|o| o.set(number * 1_000_003));
    let set = set_of(&[libc::SIGUSR2, 34 + (number % 30) as i32]);
    sys0!(pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()));
    let before = self_image();
    let mut seen = 0;
    round.answers.fetch_add(1, Ordering::SeqCst);
    loop {
        if spin {
            while *round.number.lock().unwrap_or_else(|e| e.into_inner()) == seen {
                for _ in 0..1000 {
                    round.spins.fetch_add(1, Ordering::Relaxed);
                }
            }
            seen += 1;
        } else {
            let guard = round.number.lock().unwrap_or_else(|e| e.into_inner());
            let guard = round.began.wait_while(guard, |n| *n == seen).unwrap_or_else(|e| e.into_inner());
            seen = *guard;
        }
        let now = self_image();
        let mut wrong = Vec::new();
        if now != before {
            wrong.push(format!("thread {number}: now {now}; before {before}"));
        }
        if let Err(e) = rseq_works() {
            wrong.push(format!("thread {number}: {e}"));
        }
        round.wrong.lock().unwrap_or_else(|e| e.into_inner()).extend(wrong);
        round.answers.fetch_add(1, Ordering::SeqCst);
        if round.stop.load(Ordering::SeqCst) {
            return;
        }
    }
}

/// A lock that its holder dies with: the kernel must still know the thread's list of robust locks.
struct Robust(Box<libc::pthread_mutex_t>);
// SAFETY: a process-private mutex may be used from any thread.
unsafe impl Send for Robust {}
// SAFETY: as above.
unsafe impl Sync for Robust {}

impl Robust {
    fn new() -> Robust {
        let mut lock = Box::new(libc::PTHREAD_MUTEX_INITIALIZER);
        // SAFETY: attribute and mutex are initialised before use.
        unsafe {
            let mut attr: libc::pthread_mutexattr_t = std::mem::zeroed();
            libc::pthread_mutexattr_init(&mut attr);
            libc::pthread_mutexattr_setrobust(&mut attr, libc::PTHREAD_MUTEX_ROBUST);
            libc::pthread_mutex_init(&mut *lock, &attr);
        }
        Robust(lock)
    }
    fn lock(&self) -> i32 {
        let limit = libc::timespec {
            tv_sec: i64::from(u32::MAX),
            tv_nsec: 0,
        };
        sys0!(pthread_mutex_timedlock(std::ptr::from_ref(&*self.0).cast_mut(), &limit))
    }
}

/// `--count N` threads, of which two spin and the others wait.
pub fn threads(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let count = options.number("count", 16);
    let spinning = options.number("spinning", 2);
    let round = Arc::new(Round::default());
    let start = |number: u64| -> io::Result<thread::JoinHandle<()>> {
        let round = Arc::clone(&round);
        let spin = number < spinning;
        thread::Builder::new()
            .name(format!("worker-{number}"))
            .stack_size(256 << 10)
            .spawn(move || work(number, &round, spin))
    };
    let mut workers: Vec<_> = (0..count).map(start).collect::<Result<_, _>>()?;
    let robust = Arc::new(Robust::new());
    let dying = {
        let (robust, round) = (Arc::clone(&robust), Arc::clone(&round));
        thread::Builder::new().name("holder".into()).spawn(move || {
            robust.lock();
            round.answers.fetch_add(1, Ordering::SeqCst);
            let guard = round.number.lock().unwrap_or_else(|e| e.into_inner());
            let _guard = round.began.wait_while(guard, |n| *n == 0);
        })?
    };
    let wait_for = |answers: u64| {
        crate::kit::within(Duration::from_secs(30), || round.answers.load(Ordering::SeqCst) >= answers);
        round.answers.load(Ordering::SeqCst)
    };
    wait_for(count + 1);
    // All but the spinning ones are in their futex by now, or nearly.
    thread::sleep(Duration::from_millis(50));
    let main_image = self_image();
    kit.ready()?;
    let mut dying = Some(dying);
    let mut robust_taken = false;
    let code = kit.run(
        |_| {},
        |kit| {
            if spinning > 0 {
                let spins = round.spins.load(Ordering::Relaxed);
                let on = || round.spins.load(Ordering::Relaxed) != spins;
                kit.check(crate::kit::within(Duration::from_secs(10), on), "spinning threads stand still");
            }
            kit.equal("main thread", self_image(), main_image.clone());
            if let Err(e) = rseq_works() {
                kit.differs(format!("main thread: {e}"));
            }
            let already = round.answers.load(Ordering::SeqCst);
            *round.number.lock().unwrap_or_else(|e| e.into_inner()) += 1;
            round.began.notify_all();
            let answers = wait_for(already + count);
            kit.equal("threads that answered", answers - already, count);
            for wrong in round.wrong.lock().unwrap_or_else(|e| e.into_inner()).drain(..) {
                kit.differs(wrong);
            }
            if let Some(dying) = dying.take() {
                // The join waits for the kernel to clear the tid address.
                kit.check(dying.join().is_ok(), "the holder of the robust lock panicked");
            }
            if !robust_taken {
                robust_taken = true;
                kit.equal("robust lock of a dead thread", robust.lock(), libc::EOWNERDEAD);
            }
        },
    );
    round.stop.store(true, Ordering::SeqCst);
    *round.number.lock().unwrap_or_else(|e| e.into_inner()) += 1;
    round.began.notify_all();
    workers.drain(..).for_each(|w| drop(w.join()));
    Ok(code)
}

//! Threads that do nothing but look at clocks, by functions of the vdso that they looked up once.

use crate::kit::{Kit, Options, sys, sys0};
use std::{
    ffi::CStr,
    io,
    process::{Child, Command, ExitCode},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

type Clock = extern "C" fn(i32, *mut libc::timespec) -> i32;
type Day = extern "C" fn(*mut libc::timeval, *mut u8) -> i32;
type Seconds = extern "C" fn(*mut i64) -> i64;
type Cpu = extern "C" fn(*mut u32, *mut u32, *mut u8) -> i64;
type Random = extern "C" fn(*mut u8, usize, u32, *mut u8, usize) -> isize;

/// The functions, as a program that started before the move knows them.
#[derive(Clone, Copy)]
struct Functions {
    clock: Clock,
    resolution: Clock,
    day: Day,
    seconds: Seconds,
    cpu: Cpu,
    /// Absent before Linux 6.11.
    random: Option<Random>,
}

fn look_up(name: &CStr) -> *mut libc::c_void {
    let vdso = sys0!(dlopen(c"linux-vdso.so.1".as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_NOW));
    sys0!(dlsym(vdso, name.as_ptr()))
}

impl Functions {
    fn find() -> io::Result<Functions> {
        let need = |name: &CStr| {
            let f = look_up(name);
            if f.is_null() {
                return Err(io::Error::other(format!("no {name:?} in the vdso")));
            }
            Ok(f)
        };
        let random = look_up(c"__vdso_getrandom");
        // SAFETY: the functions that vdso(7) describes, with their types.
        unsafe {
            Ok(Functions {
                clock: std::mem::transmute::<*mut libc::c_void, Clock>(need(c"__vdso_clock_gettime")?),
                resolution: std::mem::transmute::<*mut libc::c_void, Clock>(need(c"__vdso_clock_getres")?),
                day: std::mem::transmute::<*mut libc::c_void, Day>(need(c"__vdso_gettimeofday")?),
                seconds: std::mem::transmute::<*mut libc::c_void, Seconds>(need(c"__vdso_time")?),
                cpu: std::mem::transmute::<*mut libc::c_void, Cpu>(need(c"__vdso_getcpu")?),
                random: (!random.is_null()).then(|| std::mem::transmute::<*mut libc::c_void, Random>(random)),
            })
        }
    }
}

// SAFETY: used by the one thread it is given to.
unsafe impl Send for RandomState {}

/// User memory of the vdso's getrandom, made as the kernel says that it must be.
struct RandomState {
    at: *mut u8,
    size: usize,
}

impl RandomState {
    fn new(random: Random) -> io::Result<RandomState> {
        let mut params = [0u32; 16];
        if random(std::ptr::null_mut(), 0, 0, params.as_mut_ptr().cast(), usize::MAX) != 0 {
            return Err(io::Error::other("getrandom does not tell the size of its state"));
        }
        let [size, prot, flags, ..] = params;
        let flags = if flags & 0xf == 0 {
            flags | libc::MAP_PRIVATE as u32
        } else {
            flags
        };
        let at = sys!(mmap(std::ptr::null_mut(), 4096, prot as i32, flags as i32, -1, 0))?;
        Ok(RandomState {
            at: at.cast(),
            size: size as usize,
        })
    }
}

#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    /// The tight thread has its mask.
    tight: AtomicBool,
    /// Threads with their state for getrandom.
    started: AtomicU64,
    rounds: AtomicU64,
    /// The latest reading of each clock, by any thread.
    latest: [AtomicI64; 5],
    wrong: Mutex<Vec<String>>,
}

impl Seen {
    fn wrong(&self, what: String) {
        let mut w = self.wrong.lock().unwrap_or_else(|e| e.into_inner());
        if w.len() < 20 {
            w.push(what);
        }
    }

    /// A reading may not be before what any thread had read when it began, nor an hour after it.
    fn reading(&self, which: usize, name: &str, slack: i64, read: impl FnOnce() -> i64) {
        let before = self.latest[which].load(Ordering::SeqCst);
        let now = read();
        if now < before - slack || before != 0 && now > before + 3_600_000_000_000 {
            self.wrong(format!("{name}: {now} after {before}"));
        }
        self.latest[which].fetch_max(now, Ordering::SeqCst);
    }
}

fn ns(t: &libc::timespec) -> i64 {
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

fn spin(f: Functions, state: Option<RandomState>, seen: &Seen) {
    seen.started.fetch_add(1, Ordering::SeqCst);
    let clock = |id: i32| {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let r = (f.clock)(id, &mut t);
        if r != 0 {
            seen.wrong(format!("clock {id}: {r}"));
        }
        ns(&t)
    };
    let mut last = [0u8; 16];
    while !seen.stop.load(Ordering::Relaxed) {
        for _ in 0..100 {
            seen.reading(0, "CLOCK_MONOTONIC", 0, || clock(libc::CLOCK_MONOTONIC));
            seen.reading(1, "CLOCK_BOOTTIME", 0, || clock(libc::CLOCK_BOOTTIME));
            // Somebody may set the time of day while the test runs, but not by much.
            seen.reading(2, "CLOCK_REALTIME", 2_000_000_000, || clock(libc::CLOCK_REALTIME));
            seen.reading(3, "gettimeofday", 2_000_000_000, || {
                let mut t = libc::timeval { tv_sec: 0, tv_usec: 0 };
                (f.day)(&mut t, std::ptr::null_mut());
                t.tv_sec * 1_000_000_000 + t.tv_usec * 1000
            });
            seen.reading(4, "time", 2_000_000_000, || (f.seconds)(std::ptr::null_mut()) * 1_000_000_000);
            let mut cpu = u32::MAX;
            if (f.cpu)(&mut cpu, std::ptr::null_mut(), std::ptr::null_mut()) != 0 || cpu > 4096 {
                seen.wrong(format!("getcpu: {cpu}"));
            }
        }
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        if (f.resolution)(libc::CLOCK_MONOTONIC, &mut t) != 0 || t.tv_sec != 0 || t.tv_nsec == 0 {
            seen.wrong(format!("clock_getres: {}", ns(&t)));
        }
        if let (Some(random), Some(state)) = (f.random, &state) {
            let mut b = [0u8; 16];
            let n = random(b.as_mut_ptr(), b.len(), 0, state.at, state.size);
            if n != 16 || b == last || b == [0; 16] {
                seen.wrong(format!("getrandom: {n} {b:?} after {last:?}"));
            }
            last = b;
        }
        seen.rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// `--threads N` of them, and one that asks for nothing but CLOCK_MONOTONIC with every signal blocked. From the first look on there is a child
/// that was started after a move.
pub fn clocks(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let f = Functions::find()?;
    let seen = Arc::new(Seen::default());
    let count = options.number("threads", 2);
    let mut threads = Vec::new();
    for _ in 0..count {
        let state = f.random.map(RandomState::new).transpose()?;
        if let Some(state) = &state {
            // Droppable memory, which a kernel before 6.11 does not have: it becomes memory like any other there.
            kit.ignore(format!("mapping {:016x}", state.at.addr()));
        }
        let seen = Arc::clone(&seen);
        threads.push(thread::spawn(move || {
            crate::kit::yield_to_others();
            spin(f, state, &seen);
        }));
    }
    let tight = Arc::clone(&seen);
    threads.push(thread::spawn(move || {
        let mut all = crate::kit::empty_set();
        sys0!(sigfillset(&mut all));
        sys0!(pthread_sigmask(libc::SIG_BLOCK, &all, std::ptr::null_mut()));
        tight.tight.store(true, Ordering::SeqCst);
        let mut last = 0;
        while !tight.stop.load(Ordering::Relaxed) {
            let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            (f.clock)(libc::CLOCK_MONOTONIC, &mut t);
            if ns(&t) < last {
                tight.wrong(format!("CLOCK_MONOTONIC of the tight thread: {} after {last}", ns(&t)));
            }
            last = ns(&t);
        }
    }));
    let begun = Instant::now();
    let spun =
        || seen.rounds.load(Ordering::Relaxed) >= 10 && seen.started.load(Ordering::SeqCst) == count && seen.tight.load(Ordering::SeqCst);
    while !spun() && begun.elapsed() < Duration::from_secs(20) {
        thread::sleep(Duration::from_millis(1));
    }
    let auxv = sys0!(getauxval(libc::AT_SYSINFO_EHDR));
    let mut child: Option<Child> = None;
    kit.ready()?;
    let code = kit.run(
        |_| {},
        |kit| {
            let rounds = seen.rounds.load(Ordering::Relaxed);
            let on = || seen.rounds.load(Ordering::Relaxed) >= rounds + 3;
            kit.check(crate::kit::within(Duration::from_secs(20), on), "the threads stand still");
            for wrong in seen.wrong.lock().unwrap_or_else(|e| e.into_inner()).drain(..) {
                kit.differs(wrong);
            }
            kit.equal("AT_SYSINFO_EHDR", sys0!(getauxval(libc::AT_SYSINFO_EHDR)), auxv);
            // Looked up anew it is where it was, and what the C library knows agrees with it.
            match Functions::find() {
                Ok(now) => kit.equal("__vdso_clock_gettime", now.clock as usize, f.clock as usize),
                Err(e) => kit.differs(format!("the vdso cannot be read any more: {e}")),
            }
            let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            sys0!(clock_gettime(libc::CLOCK_MONOTONIC, &mut t));
            let from_libc = ns(&t);
            sys0!(syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut t));
            kit.check(
                (from_libc..from_libc + 1_000_000_000).contains(&ns(&t)),
                format!("libc says {from_libc}, the kernel {}", ns(&t)),
            );
            if child.is_none() {
                child = kit.expect("a child", Command::new("sleep").arg("1000").spawn());
            }
        },
    );
    seen.stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|t| drop(t.join()));
    if let Some(mut c) = child {
        let _ = c.kill();
        let _ = c.wait();
    }
    Ok(code)
}

//! What every guest shares: system calls with checked results, the beat, the record of what differs.

use crate::control::{Control, Request, State};
use crate::portrait::Portrait;
use std::{
    fmt::Debug,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

/// A libc call whose -1 is an error.
macro_rules! sys {
    ($($call:tt)*) => {{
        // SAFETY: guests hand the kernel pointers to live locals and mappings of their own; a guest that got one wrong fails its test.
        #[allow(unused_unsafe)]
        let result = unsafe { libc::$($call)* };
        $crate::kit::checked(result)
    }};
}
/// A libc call whose result says nothing, or is looked at by hand.
macro_rules! sys0 {
    ($($call:tt)*) => {{
        // SAFETY: as in `sys!`.
        #[allow(unused_unsafe)]
        unsafe { libc::$($call)* }
    }};
}
pub(crate) use {sys, sys0};

/// Results of system calls.
pub trait Returned: Copy {
    /// It is -1.
    fn failed(self) -> bool;
}
impl Returned for i32 {
    fn failed(self) -> bool {
        self == -1
    }
}
impl Returned for i64 {
    fn failed(self) -> bool {
        self == -1
    }
}
impl Returned for isize {
    fn failed(self) -> bool {
        self == -1
    }
}
impl<T> Returned for *mut T {
    fn failed(self) -> bool {
        self.addr() == usize::MAX
    }
}

/// -1 becomes errno.
pub fn checked<T: Returned>(result: T) -> io::Result<T> {
    if result.failed() {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A structure of the C library, all zeros.
pub fn zeroed<T: Plain>() -> T {
    // SAFETY: `Plain` is implemented for C structures for which zeros are a value.
    unsafe { std::mem::zeroed() }
}

/// C structures that may be all zeros.
pub trait Plain {}
macro_rules! plain {
    ($($t:ty),*) => { $(impl Plain for $t {})* };
}
plain!(
    libc::msghdr,
    libc::sigset_t,
    libc::siginfo_t,
    libc::sigaction,
    libc::stack_t,
    libc::rlimit,
    libc::itimerval,
    libc::itimerspec,
    libc::timespec,
    libc::timeval,
    libc::stat,
    libc::sockaddr_in,
    libc::sockaddr_in6,
    libc::sockaddr_un,
    libc::epoll_event,
    libc::sched_param,
    libc::sigevent,
    libc::fd_set,
    libc::signalfd_siginfo,
    libc::cpu_set_t,
    libc::utsname,
    libc::pollfd
);

/// The empty signal set.
pub fn empty_set() -> libc::sigset_t {
    let mut set = zeroed();
    sys0!(sigemptyset(&mut set));
    set
}

/// A set of some signals.
pub fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = empty_set();
    for s in signals {
        sys0!(sigaddset(&mut set, *s));
    }
    set
}

/// CLOCK_MONOTONIC, nanoseconds.
pub fn now_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut t: libc::timespec = zeroed();
    sys0!(clock_gettime(clock, &mut t));
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Of the host it is on just now; uname(2) costs a fraction of a microsecond.
fn host_name() -> [libc::c_char; 65] {
    let mut names: libc::utsname = zeroed();
    sys0!(uname(&mut names));
    names.nodename
}

/// The rseq area that the C library has registered for this thread; `None`: it has not. The kernel writes the cpu number into its second word.
pub fn rseq_area() -> Option<*mut u8> {
    // SAFETY: the area lies at this offset from the thread pointer, for as long as the thread lives.
    unsafe {
        unsafe extern "C" {
            static __rseq_offset: isize;
            static __rseq_size: u32;
        }
        if __rseq_size == 0 {
            return None;
        }
        let thread_pointer: *mut u8;
        std::arch::asm!("mov {}, fs:0", out(reg) thread_pointer);
        Some(thread_pointer.offset(__rseq_offset))
    }
}

/// This thread runs on one cpu only from now on.
pub fn bind(cpu: usize) -> io::Result<()> {
    let mut one: libc::cpu_set_t = zeroed();
    // SAFETY: a plain bit set.
    unsafe { libc::CPU_SET(cpu, &mut one) };
    sys!(sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &one)).map(drop)
}

/// This thread, and those that it starts, run only on the cpu where it runs now. Four threads that spin beside six that sleep a millisecond at a time, on two cpus and in
/// a session of their own, kept the kernel's own threads off both of them for minutes on Linux 6.18 (sched_autogroup_enabled; the weight of such a session changes
/// with every tick, and with it its share starts anew): ksoftirqd among them, so that the network was dead. On one cpu the weight stays what it is.
pub fn bind_here() -> io::Result<()> {
    // SAFETY: no pointers.
    let cpu = sys!(sched_getcpu())?;
    bind(cpu as usize)
}

/// Lets everything else go first: a thread that spins would keep the kernel's own threads (and with them the network) off a machine with few cores.
pub fn yield_to_others() {
    // SAFETY: no pointers; 0 is this thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
}

/// Does it become true in time?
pub fn within(limit: Duration, holds: impl Fn() -> bool) -> bool {
    let since = Instant::now();
    while !holds() && since.elapsed() < limit {
        std::thread::sleep(Duration::from_millis(1));
    }
    holds()
}

/// Sleeps; a signal handler that ran does not end the sleep.
pub fn pause(d: Duration) {
    std::thread::sleep(d);
}

/// The same numbers for the same seed, fast.
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// A stream of its own for each seed.
    pub fn new(seed: u64) -> Numbers {
        Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    /// The next one.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// Options after the subcommand: `--key value` pairs.
#[derive(Debug, Clone)]
pub struct Options(Vec<(String, String)>);

impl Options {
    /// Parses what is left of the command line.
    pub fn parse(args: &[String]) -> Options {
        Options(
            args.chunks(2)
                .filter(|p| p.len() == 2)
                .map(|p| (p[0].trim_start_matches("--").to_string(), p[1].clone()))
                .collect(),
        )
    }
    /// A text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
    /// A number, or the default.
    pub fn number(&self, key: &str, default: u64) -> u64 {
        self.text(key).and_then(|v| v.parse().ok()).unwrap_or(default)
    }
}

/// A guest's connection to its test, and its record of what differs.
pub struct Kit {
    dir: Option<PathBuf>,
    control: Control,
    problems: Vec<String>,
    beats: u64,
    longest_ns: u64,
    last_ns: u64,
    /// What the gaps are measured by.
    clock: libc::clockid_t,
    pid: u64,
    failed_before: bool,
    rest: Duration,
    portrait: Option<Portrait>,
    /// Whether one is taken.
    portraits: bool,
    moving: Vec<String>,
    /// Name of the host at the last beat.
    host: [libc::c_char; 65],
}

impl Kit {
    /// `--dir` names the directory with the control file. Without one it is a memfd, for a guest that is asked over the network.
    pub fn new(options: &Options) -> io::Result<Kit> {
        let dir = options.text("dir").map(PathBuf::from);
        // One heap that only grows by brk, so that the list of mappings changes only where a guest means it to.
        sys0!(mallopt(libc::M_MMAP_THRESHOLD, 1 << 30));
        sys0!(mallopt(libc::M_TRIM_THRESHOLD, i32::MAX));
        sys0!(mallopt(libc::M_ARENA_MAX, 1));
        let control = match &dir {
            Some(dir) => Control::open(&dir.join("control"))?,
            None => {
                let fd = sys!(memfd_create(c"control".as_ptr(), libc::MFD_CLOEXEC))?;
                // SAFETY: nobody else has this descriptor.
                Control::of(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })?
            }
        };
        control.state(State::Starting)?;
        Ok(Kit {
            control,
            dir,
            problems: Vec::new(),
            beats: 0,
            longest_ns: 0,
            last_ns: now_ns(),
            clock: libc::CLOCK_MONOTONIC,
            pid: u64::from(std::process::id()),
            failed_before: false,
            rest: Duration::from_micros(options.number("rest-us", 500)),
            portrait: None,
            portraits: true,
            moving: Vec::new(),
            host: host_name(),
        })
    }

    /// The test's directory; without one, that of the process.
    pub fn dir(&self) -> &Path {
        self.dir.as_deref().unwrap_or(Path::new("."))
    }

    /// The control file, for a thread that answers in the kit's name.
    pub fn control(&self) -> io::Result<Control> {
        self.control.again()
    }

    /// Notes a difference.
    pub fn differs(&mut self, what: impl Into<String>) {
        let what = what.into();
        eprintln!("differs: {what}");
        if self.problems.len() < 200 {
            self.problems.push(what);
        }
    }

    /// The offset of this descriptor changes while the guest runs: what /proc says of it is no difference.
    pub fn moves(&mut self, fd: &impl std::os::fd::AsRawFd) {
        self.ignore(format!("fdinfo {}:", fd.as_raw_fd()));
    }

    /// Lines of the portrait that begin with this change while the guest runs.
    pub fn ignore(&mut self, line: impl Into<String>) {
        self.moving.push(line.into());
    }

    /// For a guest that others may move too: CRIU gives it a CLOCK_MONOTONIC of its own, which leaves out much of the time that it stood still. Of the time of day there
    /// is only one.
    pub fn by_the_time_of_day(&mut self) {
        self.clock = libc::CLOCK_REALTIME;
    }

    /// For a guest whose threads open and map things all the time: what /proc says of it is not compared.
    pub fn without_portrait(&mut self) {
        self.portraits = false;
    }

    /// Notes a difference unless the condition holds.
    pub fn check(&mut self, holds: bool, what: impl Into<String>) {
        if !holds {
            self.differs(what);
        }
    }

    /// Notes a difference unless both are equal.
    pub fn equal<T: PartialEq + Debug>(&mut self, what: &str, now: T, before: T) {
        if now != before {
            self.differs(format!("{what}: now {now:?}, before {before:?}"));
        }
    }

    /// Notes an error as a difference.
    pub fn expect<T>(&mut self, what: &str, result: io::Result<T>) -> Option<T> {
        match result {
            Ok(v) => Some(v),
            Err(e) => {
                self.differs(format!("{what}: {e}"));
                None
            }
        }
    }

    /// The set-up is done: takes the portrait that [`Kit::run`] compares with and says "ready".
    pub fn ready(&mut self) -> io::Result<()> {
        // The first one makes the heap as large as taking one needs; the second is kept.
        if self.portraits {
            drop(Portrait::take());
            self.portrait = Some(Portrait::take());
        }
        self.last_ns = clock_ns(self.clock);
        self.control.beat(0, self.last_ns, 0, self.pid)?;
        self.control.state(State::Ready)?;
        println!("ready");
        let _ = io::stdout().flush();
        Ok(())
    }

    /// Records that the guest is alive.
    pub fn beat(&mut self) {
        let now = clock_ns(self.clock);
        let gap = now.saturating_sub(self.last_ns);
        self.last_ns = now;
        self.longest_ns = self.longest_ns.max(gap);
        self.beats += 1;
        let host = host_name();
        if host != self.host {
            self.host = host;
            let result = self.control.moved(gap);
            self.expect("control file", result);
        }
        let result = self.control.beat(self.longest_ns, now, self.beats, self.pid);
        self.expect("control file", result);
    }

    /// Tells how many operations there were so far.
    pub fn operations(&mut self, number: u64) {
        let result = self.control.operations(number);
        self.expect("control file", result);
    }

    /// Between two beats it rests for this long, or not at all.
    pub fn rest(&mut self, time: Duration) {
        self.rest = time;
    }

    /// The longest time between two beats so far, nanoseconds.
    pub fn longest_gap_ns(&self) -> u64 {
        self.longest_ns
    }

    /// Beats, takes requests, and calls `step` each time round and `verify` when asked; returns the exit code.
    pub fn run(&mut self, mut step: impl FnMut(&mut Kit), mut verify: impl FnMut(&mut Kit)) -> ExitCode {
        loop {
            self.beat();
            step(self);
            match self.control.pending() {
                Ok(None) => {}
                Ok(Some((number, request))) => {
                    match request {
                        Request::Verify => {
                            self.compare_portrait();
                            verify(self);
                            // What verifying changed on purpose is the new "before".
                            self.portrait = self.portraits.then(Portrait::take);
                            self.verdict();
                            self.last_ns = clock_ns(self.clock);
                        }
                        Request::ResetGap => {
                            self.longest_ns = 0;
                            self.beat();
                        }
                        Request::Quit | Request::None => {}
                    }
                    let done = self.control.done(number);
                    self.expect("control file", done);
                    if request == Request::Quit {
                        return if self.failed_before || !self.problems.is_empty() {
                            ExitCode::FAILURE
                        } else {
                            ExitCode::SUCCESS
                        };
                    }
                }
                Err(e) => self.differs(format!("control file: {e}")),
            }
            if !self.rest.is_zero() {
                pause(self.rest);
            }
        }
    }

    fn compare_portrait(&mut self) {
        if let Some(before) = self.portrait.take() {
            for line in before.differences(&Portrait::take()) {
                if !self.moving.iter().any(|m| line.starts_with(m)) {
                    self.differs(line);
                }
            }
            self.portrait = Some(before);
        }
    }

    fn verdict(&mut self) {
        let text = if self.problems.is_empty() {
            "ok\n".to_string()
        } else {
            self.problems.iter().map(|p| format!("differs: {p}\n")).collect()
        };
        let state = if self.problems.is_empty() { State::Ok } else { State::Differs };
        self.failed_before |= !self.problems.is_empty();
        if let Some(dir) = &self.dir {
            let _ = std::fs::write(dir.join("verdict"), &text);
        } else {
            let _ = self.control.verdict(&text);
        }
        let _ = self.control.state(state);
        if self.problems.is_empty() {
            println!("ok");
        }
        self.problems.clear();
    }
}

//! A random workload on memory, with its own idea of what every page must hold: mappings come, go, move, grow, shrink, change their rights, are
//! dropped, punched and written to, by this process, its threads and its children.
//!
//! `--seed N` `--mib N` (cap) `--regions N` (cap) `--ops-per-second N` (0: as fast as it goes) `--children 0|1` `--threads 0|1`
//! While there is a file `busy` in its directory it goes as fast as it can, whatever the rate.
//! `--others-rest-us N` (microseconds that children and threads rest between two operations; 100 with a rate, else 0)
//! `--only map,unmap,...` (see [`OPS`]). The same seed draws the same operations, up to the instants at which threads and children end.

pub mod lane;
pub mod model;
pub mod ops;

use crate::kit::{Kit, Numbers, Options, now_ns, sys, sys0};
use lane::Lane;
use ops::{Size, World, make_file};
use std::{
    ffi::CString,
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicPtr, AtomicU64, Ordering},
    thread::JoinHandle,
};

const LANE_PAGES: usize = 64;
/// Forked children at a time, beside the two that write to the shared lanes.
const CHILDREN: usize = 3;
/// A batch between two beats lasts about this long.
const BATCH_NS: u64 = 1_000_000;
/// How often the file `busy` is looked for.
const ASK_NS: u64 = 100_000_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Op {
    Map,
    Unmap,
    Replace,
    Remap,
    Protect,
    DontNeed,
    Free,
    Huge,
    Punch,
    Pwrite,
    Close,
    Write,
    Brk,
    Stack,
    Fork,
    Exec,
    Thread,
}

/// Name and weight.
const OPS: &[(Op, &str, u64)] = &[
    (Op::Map, "map", 700),
    (Op::Unmap, "unmap", 400),
    (Op::Replace, "replace", 200),
    (Op::Remap, "remap", 500),
    (Op::Protect, "protect", 600),
    (Op::DontNeed, "dontneed", 400),
    (Op::Free, "free", 200),
    (Op::Huge, "huge", 100),
    (Op::Punch, "punch", 300),
    (Op::Pwrite, "pwrite", 400),
    (Op::Close, "close", 30),
    (Op::Write, "write", 5800),
    (Op::Brk, "brk", 200),
    (Op::Stack, "stack", 60),
    (Op::Fork, "fork", 6),
    (Op::Exec, "exec", 2),
    (Op::Thread, "thread", 30),
];

/// What draws the operations: those asked for, with their weights.
#[derive(Clone)]
struct Choice(Vec<(Op, u64)>);

impl Choice {
    fn new(only: Option<&str>, but: &[Op]) -> io::Result<Choice> {
        let names: Vec<&str> = only.map(|o| o.split(',').collect()).unwrap_or_default();
        if let Some(unknown) = names.iter().find(|n| !OPS.iter().any(|(_, name, _)| name == *n)) {
            return Err(io::Error::other(format!("no operation is called {unknown:?}")));
        }
        let wanted = |name: &&str| names.is_empty() || names.contains(name);
        let all = OPS.iter().filter(|(op, name, _)| wanted(name) && !but.contains(op));
        Ok(Choice(all.map(|(op, _, weight)| (*op, *weight)).collect()))
    }

    fn draw(&self, numbers: &mut Numbers) -> Option<Op> {
        let sum: u64 = self.0.iter().map(|c| c.1).sum();
        let mut at = (numbers.draw() >> 16) % sum.max(1);
        for (op, weight) in &self.0 {
            match at.checked_sub(*weight) {
                None => return Some(*op),
                Some(rest) => at = rest,
            }
        }
        None
    }
}

/// One operation on memory, and a look at a page. Those that make tasks are not done here.
fn once(world: &mut World, op: Op) {
    world.model.op += 1;
    match op {
        Op::Map => world.map(),
        Op::Unmap => world.unmap(),
        Op::Replace => world.replace(),
        Op::Remap => world.remap(),
        Op::Protect => world.protect(),
        Op::DontNeed => world.dont_need(),
        Op::Free => world.free(),
        Op::Huge => world.huge(),
        Op::Punch => world.punch(),
        Op::Pwrite => world.write_descriptor(),
        Op::Close => world.close(),
        Op::Write => world.write(),
        Op::Brk => world.heap(),
        Op::Stack => world.stack(),
        Op::Fork | Op::Exec | Op::Thread => {}
    }
    world.look();
}

/// A life of some operations, then everything is compared; what differs.
fn live(world: &mut World, choice: &Choice, operations: u64, rest_us: u64) -> Vec<String> {
    let parent = sys0!(getppid());
    for _ in 0..operations {
        // The whole tree ends with its root, however that ends.
        if sys0!(getppid()) != parent {
            sys0!(_exit(1));
        }
        if let Some(op) = choice.draw(&mut world.numbers) {
            once(world, op);
        }
        if rest_us > 0 {
            std::thread::sleep(std::time::Duration::from_micros(rest_us));
        }
    }
    world.model.verify();
    std::mem::take(&mut world.model.problems)
}

/// A child's end: what differed goes to a file, which its parent reads.
fn end(dir: &Path, problems: &[String]) -> ! {
    if !problems.is_empty() {
        let _ = std::fs::write(dir.join(format!("child-{}", std::process::id())), problems.join("\n"));
    }
    sys0!(_exit(i32::from(!problems.is_empty())))
}

/// `migrate-guest soak-child`: a child that executed itself again.
pub fn again(options: &Options) -> ExitCode {
    let dir = PathBuf::from(options.text("dir").unwrap_or("."));
    let size = Size { pages: 2048, regions: 40 };
    let (seed, rest_us) = (options.number("seed", 1), options.number("rest-us", 0));
    let problems = World::new(seed, 1, size, &dir.join("file"), rest_us > 0)
        .and_then(|mut world| {
            watch(&mut world);
            let choice = Choice::new(None, &[Op::Fork, Op::Exec, Op::Thread])?;
            Ok(live(&mut world, &choice, options.number("ops", 200), rest_us))
        })
        .unwrap_or_else(|e| vec![e.to_string()]);
    end(&dir, &problems)
}

static WATCHED: AtomicPtr<World> = AtomicPtr::new(std::ptr::null_mut());

/// A fault says what was done to its address, then ends the process.
fn watch(world: &mut World) {
    WATCHED.store(world, Ordering::SeqCst);
    let mut action: libc::sigaction = crate::kit::zeroed();
    action.sa_sigaction = faulted as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        sys0!(sigaction(signal, &action, std::ptr::null_mut()));
    }
}

extern "C" fn faulted(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands in a valid siginfo and context; the world lives as long as the process, which ends here.
    let (at, code, context, world) = unsafe {
        let context = &*context.cast::<libc::ucontext_t>();
        (
            (*info).si_addr() as usize,
            (*info).si_code,
            context,
            WATCHED.load(Ordering::SeqCst).as_ref(),
        )
    };
    let [rip, rsp] = [libc::REG_RIP, libc::REG_RSP].map(|r| context.uc_mcontext.gregs[r as usize] as usize);
    eprintln!(
        "thread {} of {}, code {code}, registers {:x?}, at\n{}stack at\n{}",
        sys0!(gettid()),
        sys0!(getpid()),
        context.uc_mcontext.gregs,
        model::mapped_around(rip, 0),
        model::mapped_around(rsp, 0)
    );
    let said = world.map(|w| {
        format!(
            "at operation {}\n{}{}",
            w.model.op,
            w.model.explain(at),
            model::mapped_around(at, 1)
        )
    });
    eprintln!("differs: signal {signal} at {at:x} {}", said.unwrap_or_default());
    sys0!(_exit(9));
}

/// A thread that writes to its lane.
type Writing = JoinHandle<Result<(), String>>;

struct Soak {
    world: World,
    choice: Choice,
    dir: PathBuf,
    exe: CString,
    rest_us: u64,
    threads: Vec<(Lane, Option<Writing>)>,
    shared: Vec<(Lane, i32)>,
    children: Vec<i32>,
    /// Counts operations of the children; shared with them.
    total: &'static AtomicU64,
    mine: u64,
    born: u64,
}

impl Soak {
    fn fork(&mut self, exec: bool) -> io::Result<()> {
        if self.children.len() >= CHILDREN {
            return Ok(());
        }
        self.born += 1;
        let seed = self.world.numbers.draw();
        let operations = 50 + seed % 300;
        let arguments: Vec<CString> = [
            "migrate-guest",
            "soak-child",
            "--dir",
            &self.dir.display().to_string(),
            "--seed",
            &seed.to_string(),
            "--ops",
            &operations.to_string(),
            "--rest-us",
            &self.rest_us.to_string(),
        ]
        .into_iter()
        .map(CString::new)
        .collect::<Result<_, _>>()?;
        let mut pointers: Vec<*const libc::c_char> = arguments.iter().map(|a| a.as_ptr()).collect();
        pointers.push(std::ptr::null());
        let pid = sys!(fork())?;
        if pid != 0 {
            self.children.push(pid);
            return Ok(());
        }
        if exec {
            self.total.fetch_add(operations, Ordering::SeqCst);
            sys0!(execv(self.exe.as_ptr(), pointers.as_ptr()));
            sys0!(_exit(2));
        }
        let world = &mut self.world;
        world.numbers = Numbers::new(seed);
        world.model.op = self.born << 32;
        world.model.problems.clear();
        world.leave_shared();
        let problems = live(world, &self.choice, operations, self.rest_us);
        self.total.fetch_add(operations, Ordering::SeqCst);
        end(&self.dir, &problems);
    }

    /// A child that does nothing but write to a lane.
    fn writer(&mut self, which: usize) -> io::Result<()> {
        let (lane, seed) = (self.shared[which].0, self.world.numbers.draw());
        let parent = sys0!(getpid());
        let rest = self.rest_us.max(256);
        let pid = sys!(fork())?;
        if pid == 0 {
            // It rests even when this process does not: it would take the processor away.
            let result = lane.work(seed, 500 + seed % 3000, rest, || sys0!(getppid()) == parent);
            end(&self.dir, &result.err().into_iter().collect::<Vec<_>>());
        }
        self.shared[which].1 = pid;
        Ok(())
    }

    fn thread(&mut self) -> io::Result<()> {
        let seed = self.world.numbers.draw();
        let rest = self.rest_us * 5 / 2;
        for (lane, thread) in &mut self.threads {
            if let Some(ended) = thread.take_if(|t| t.is_finished()) {
                let result = ended.join().unwrap_or_else(|_| Err("a thread panicked".into()));
                let wrong = result.err().into_iter().chain(lane.check_all());
                wrong.for_each(|w| self.world.model.differs(w));
            }
        }
        let free = self.threads.iter().position(|t| t.1.is_none());
        if let Some((lane, thread)) = free.and_then(|i| self.threads.get_mut(i)) {
            let lane = *lane;
            let start = std::thread::Builder::new().stack_size(128 << 10);
            *thread = Some(start.spawn(move || lane.work(seed, 20 + seed % 200, rest, || true))?);
        }
        Ok(())
    }

    /// Waits for what has ended; the writers are born again.
    fn reap(&mut self) -> io::Result<()> {
        let mut status = 0;
        for pid in self.children.clone() {
            if sys!(waitpid(pid, &mut status, libc::WNOHANG))? == pid {
                self.children.retain(|c| *c != pid);
                self.ended(pid, status);
            }
        }
        for which in 0..self.shared.len() {
            let pid = self.shared[which].1;
            if pid == 0 {
                self.writer(which)?;
            } else if sys!(waitpid(pid, &mut status, libc::WNOHANG))? == pid {
                self.ended(pid, status);
                let wrong = self.shared[which].0.check_all();
                wrong.into_iter().for_each(|w| self.world.model.differs(w));
                self.writer(which)?;
            }
        }
        Ok(())
    }

    fn ended(&mut self, pid: i32, status: i32) {
        if status != 0 {
            let said = std::fs::read_to_string(self.dir.join(format!("child-{pid}"))).unwrap_or_default();
            self.world
                .model
                .differs(format!("child {pid} ended with status {status:#x}: {said}"));
        }
    }

    fn step(&mut self) -> io::Result<()> {
        self.mine += 1;
        let Some(op) = self.choice.draw(&mut self.world.numbers) else {
            return Ok(());
        };
        once(&mut self.world, op);
        match op {
            Op::Fork => self.fork(false)?,
            Op::Exec => self.fork(true)?,
            Op::Thread => self.thread()?,
            _ => {}
        }
        if self.mine.is_multiple_of(16) {
            let page = self.world.below(LANE_PAGES);
            let lanes = self.threads.iter().map(|t| t.0).chain(self.shared.iter().map(|s| s.0));
            let wrong: Vec<String> = lanes.filter_map(|l| l.check(page).err()).collect();
            wrong.into_iter().for_each(|w| self.world.model.differs(w));
        }
        if self.mine.is_multiple_of(256) {
            self.reap()?;
        }
        Ok(())
    }

    /// For the end: nobody is left behind.
    fn stop(&mut self) {
        for pid in self.children.drain(..).chain(self.shared.iter().map(|s| s.1).filter(|p| *p > 0)) {
            sys0!(kill(pid, libc::SIGKILL));
            sys0!(waitpid(pid, std::ptr::null_mut(), 0));
        }
        for thread in self.threads.iter_mut().filter_map(|t| t.1.take()) {
            let _ = thread.join();
        }
    }
}

/// Mappings of this process.
fn mappings() -> Vec<(usize, usize)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let range = |line: &str| {
        let (a, b) = line.split_whitespace().next()?.split_once('-')?;
        Some((usize::from_str_radix(a, 16).ok()?, usize::from_str_radix(b, 16).ok()?))
    };
    // The stack grows below what is known of it, and the heap of the C library above.
    let stretch = |line: &str, (a, b)| match line {
        l if l.ends_with("[stack]") => (a - (9 << 20), b),
        l if l.ends_with("[heap]") => (a, b + (64 << 20)),
        _ => (a, b),
    };
    maps.lines().filter_map(|l| Some(stretch(l, range(l)?))).collect()
}

/// The guest.
pub fn soak(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let (private, shared) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::MAP_SHARED);
    let (with_children, with_threads) = (options.number("children", 1) != 0, options.number("threads", 1) != 0);
    let rate = options.number("ops-per-second", 0);
    let dir = kit.dir().to_path_buf();
    make_file(&dir.join("file"))?;
    // The C library finds this on its heap later, so that the break above it is ours alone.
    drop(std::hint::black_box(Vec::<u8>::with_capacity(32 << 20)));

    let mut but = Vec::new();
    if !with_children {
        but.extend([Op::Fork, Op::Exec]);
    }
    if !with_threads {
        but.push(Op::Thread);
    }
    let size = Size {
        pages: options.number("mib", 64) as usize * 256,
        regions: options.number("regions", 200) as usize,
    };
    let total = lane_word()?;
    let mut soak = Soak {
        world: World::new(options.number("seed", 1), 1, size, &dir.join("file"), rate > 0)?,
        choice: Choice::new(options.text("only"), &but)?,
        exe: CString::new(std::env::current_exe()?.as_os_str().as_bytes())?,
        dir,
        // Children rest as well when this process does.
        rest_us: options.number("others-rest-us", if rate > 0 { 100 } else { 0 }),
        threads: Vec::new(),
        shared: Vec::new(),
        children: Vec::new(),
        total,
        mine: 0,
        born: 0,
    };
    if with_threads {
        for number in 0..3 {
            soak.threads.push((Lane::new(number, LANE_PAGES, private, -1)?, None));
        }
        // The first one makes the C library catch a signal of its own.
        soak.thread()?;
    }
    if with_children {
        let fd = sys!(memfd_create(c"lane".as_ptr(), libc::MFD_CLOEXEC))?;
        sys!(ftruncate(fd, (LANE_PAGES * 4096) as i64))?;
        soak.shared.push((Lane::new(8, LANE_PAGES, shared | libc::MAP_ANONYMOUS, -1)?, 0));
        soak.shared.push((Lane::new(9, LANE_PAGES, shared, fd)?, 0));
    }
    // Stacks of threads come and go as the C library likes.
    let known = (!with_threads).then(mappings);
    // Enough to begin with, of each kind.
    for _ in 0..50 {
        soak.world.map();
        soak.world.model.op += 1;
        soak.world.write();
    }
    soak.world.heap();
    // Of these the portrait only knows how they were.
    for changes in ["mapping ", "process status Threads", "fd ", "fdinfo ", "task "] {
        kit.ignore(changes);
    }
    kit.rest(std::time::Duration::ZERO);
    let soak = std::cell::RefCell::new(soak);
    watch(&mut soak.borrow_mut().world);
    kit.ready()?;

    let mut owed = 0.0;
    let mut last = now_ns();
    let busy = soak.borrow().dir.join("busy");
    let (mut asked, mut asked_at) = (rate, 0);
    let code = kit.run(
        |kit| {
            let soak = &mut *soak.borrow_mut();
            let begin = now_ns();
            if rate > 0 && begin.saturating_sub(asked_at) > ASK_NS {
                asked = if busy.exists() { 0 } else { rate };
                asked_at = begin;
            }
            let rate = asked;
            if rate > 0 {
                // What a freeze took is made up for, but not for more than a tenth of a second.
                owed += (begin.saturating_sub(last)) as f64 * 1e-9 * rate as f64;
                owed = f64::min(owed, rate as f64 / 10.0);
                last = begin;
                if owed < 1.0 {
                    std::thread::sleep(std::time::Duration::from_micros(500));
                    return;
                }
            }
            while (rate == 0 || owed >= 1.0) && now_ns() - begin < BATCH_NS {
                owed -= 1.0;
                let done = soak.step();
                kit.expect("soak", done);
            }
            kit.operations(soak.mine + soak.total.load(Ordering::SeqCst));
            soak.world.model.problems.drain(..).for_each(|p| kit.differs(p));
        },
        |kit| {
            let soak = &mut *soak.borrow_mut();
            soak.world.model.verify();
            soak.world.model.verify_mappings(known.as_deref());
            let lanes = soak.threads.iter().map(|t| t.0).chain(soak.shared.iter().map(|s| s.0));
            lanes.flat_map(Lane::check_all).for_each(|w| kit.differs(w));
            soak.world.model.problems.drain(..).for_each(|p| kit.differs(p));
            let (regions, pages) = (soak.world.model.regions.len(), soak.world.model.mapped_pages());
            println!(
                "{} operations, {} failed calls, {} children, {regions} regions, {pages} pages",
                soak.mine, soak.world.failed, soak.born
            );
        },
    );
    soak.borrow_mut().stop();
    Ok(code)
}

/// A word that children share.
fn lane_word() -> io::Result<&'static AtomicU64> {
    let (rw, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    let area = crate::memory::Area::map(4096, rw, shared, -1, 0)?;
    // SAFETY: mapped for the rest of the process's life, aligned, zero.
    Ok(unsafe { AtomicU64::from_ptr(area.at) })
}

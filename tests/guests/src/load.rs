//! The workload of `migrate bench`: memory that is written at a rate and in a pattern, threads, processes, mappings and open files, and a server that clients ask.

use crate::{
    control::{Control, Request, State},
    kit::{Kit, Numbers, Options, sys, sys0},
    memory::{Area, PAGE},
};
use std::{
    fs::File,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

const MIB: usize = 1 << 20;
const WORDS: usize = PAGE / 8;
/// What a pause has kept it from writing is made up for only this far.
const ARREARS: Duration = Duration::from_millis(2);
/// Pages that are written between two beats when there is no rate.
const AT_ONCE: usize = 16;
/// Threads and children do nothing: what counts is that they are there.
const STACK: usize = 64 << 10;

/// Which page is written next.
#[derive(Debug, Clone, Copy)]
enum Pattern {
    /// Each as likely as any other.
    Uniform,
    /// The n-th most popular one n times as seldom as the first (Zipf's law with an exponent of one), the popular ones anywhere.
    Zipf,
    /// One after the other, over and over.
    Sequential,
}

/// Memory of which each page holds numbers drawn from its own number and how often it was written; the first word says how often.
struct Written {
    area: Area,
    pages: usize,
    pattern: Pattern,
    turn: Numbers,
    next: usize,
    /// Pages a second; infinite: as fast as they can be written.
    rate: f64,
    due: f64,
    last: Instant,
    /// How often any of them was written.
    times: u64,
    /// The pages that are this writer's: of so many neighbours the one with this number. Writers of one memory share it out.
    mine: (usize, usize),
}

impl Written {
    fn make(options: &Options) -> io::Result<Written> {
        let pages = (options.number("mib", 64) as usize * MIB / PAGE).max(1);
        let kind = [libc::MAP_PRIVATE, libc::MAP_SHARED][usize::from(options.number("shared", 0) != 0)];
        let area = Area::map(pages * PAGE, libc::PROT_READ | libc::PROT_WRITE, kind | libc::MAP_ANONYMOUS, -1, 0)?;
        let mut written = Written {
            area,
            pages,
            pattern: match options.text("pattern").unwrap_or("uniform") {
                "uniform" => Pattern::Uniform,
                "zipf" => Pattern::Zipf,
                "sequential" => Pattern::Sequential,
                other => return Err(io::Error::other(format!("no such pattern: {other}"))),
            },
            turn: Numbers::new(7),
            next: 0,
            rate: match options.text("rate") {
                Some("max") => f64::INFINITY,
                _ => options.number("rate", 0) as f64 * 1e6 / PAGE as f64,
            },
            due: 0.0,
            last: Instant::now(),
            times: 0,
            mine: (0, 1),
        };
        (0..pages).for_each(|page| written.write(page, 0));
        Ok(written)
    }

    fn write(&mut self, page: usize, version: u64) {
        let mut numbers = Numbers::new(seed(page, version));
        let at = page * WORDS;
        self.area.set(at, version);
        (1..WORDS).for_each(|i| self.area.set(at + i, numbers.draw()));
    }

    fn holds(&self, page: usize) -> bool {
        let at = page * WORDS;
        let mut numbers = Numbers::new(seed(page, self.area.word(at)));
        (1..WORDS).all(|i| self.area.word(at + i) == numbers.draw())
    }

    fn pick(&mut self) -> usize {
        let page = self.any();
        let (number, of) = self.mine;
        let page = page - page % of + number;
        if page < self.pages { page } else { number }
    }

    fn any(&mut self) -> usize {
        match self.pattern {
            Pattern::Uniform => self.turn.draw() as usize % self.pages,
            Pattern::Zipf => {
                let share = (self.turn.draw() >> 11) as f64 / (1_u64 << 53) as f64;
                let rank = (self.pages as f64).powf(share) as usize - 1;
                // A large prime, so that no two ranks share a page.
                rank.wrapping_mul(2_654_435_761) % self.pages
            }
            Pattern::Sequential => {
                self.next = (self.next + 1) % self.pages;
                self.next
            }
        }
    }

    /// Writes what is due.
    fn step(&mut self) {
        let now = if self.rate.is_infinite() {
            AT_ONCE
        } else {
            self.due += self.rate * self.last.elapsed().min(ARREARS).as_secs_f64();
            self.last = Instant::now();
            let now = self.due as usize;
            self.due -= now as f64;
            now
        };
        for _ in 0..now {
            let page = self.pick();
            let version = self.area.word(page * WORDS) + 1;
            self.write(page, version);
            self.times += 1;
        }
    }

    /// Pages that are not what they say, and writes that are lost.
    fn verify(&self, kit: &mut Kit) {
        let mine = || (self.mine.0..self.pages).step_by(self.mine.1);
        let wrong = mine().filter(|p| !self.holds(*p)).count();
        kit.equal("pages that differ", wrong, 0);
        let sum: u64 = mine().map(|p| self.area.word(p * WORDS)).sum();
        kit.equal("writes", sum, self.times);
    }
}

fn seed(page: usize, version: u64) -> u64 {
    ((page as u64) << 32) ^ version
}

/// A child that writes its own copy of the memory until its parent is gone; it ends when a page is not what it was.
fn forked(mut written: Written, rest: Duration) -> ! {
    loop {
        written.step();
        let page = written.pick();
        if !written.holds(page) || sys0!(getppid()) == 1 {
            sys0!(_exit(1));
        }
        thread::sleep(rest);
    }
}

/// Children that do what they are told and never come back.
fn children(count: u64, mut life: impl FnMut(u64)) -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    for number in 0..count {
        let pid = sys!(fork())?;
        if pid == 0 {
            life(number);
            sys0!(_exit(0));
        }
        pids.push(pid);
    }
    Ok(pids)
}

/// Answers one request: `GET /` counts, `/pulse` tells how it is in words and numbers, `/verdict` what differs, `/reset`, `/verify` and `/quit` ask for what they say.
fn answer(mut stream: TcpStream, control: &Control, count: &mut u64) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut request = Vec::new();
    let mut bytes = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") && request.len() < 8192 {
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            n => request.extend_from_slice(&bytes[..n]),
        }
    }
    let text = String::from_utf8_lossy(&request);
    let ask = |what: Request| control.ask(what).map(|number| format!("asked {number}\n"));
    let body = match text.split_whitespace().nth(1) {
        Some("/pulse") => {
            let pulse = control.pulse()?;
            format!(
                "{} {} {} {} {}\n",
                if pulse.state == State::Differs { "differs" } else { "well" },
                pulse.done,
                pulse.longest_gap_ns,
                pulse.gap_at_move_ns,
                pulse.beats
            )
        }
        Some("/verdict") => control.said()?,
        Some("/reset") => ask(Request::ResetGap)?,
        Some("/verify") => ask(Request::Verify)?,
        Some("/quit") => ask(Request::Quit)?,
        _ => {
            *count += 1;
            format!("count {count}\n")
        }
    };
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes())
}

fn serve(listener: &TcpListener, control: &Control) {
    let mut count = 0;
    for stream in listener.incoming().flatten() {
        // A client that went away, or whose connection did not come along: it asks again.
        let _ = answer(stream, control, &mut count);
    }
}

/// `--mib N` of memory, of which `--rate N` megabytes a second (or `max`) are written in a `--pattern`; `--shared 1`; `--forked N` children that write copies of their
/// own at the same rate, or their part of it if it is shared; `--threads`, `--processes`, `--vmas`, `--fds` so many more of these; `--port P` of the server; `--alone 1`: it leads a session of its own.
pub fn load(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    if options.number("alone", 0) != 0 {
        sys!(setsid())?;
    }
    let mut written = Written::make(options)?;
    let rest = Duration::from_micros(options.number("rest-us", 50));
    if written.rate.is_infinite() {
        kit.rest(Duration::ZERO);
    }

    let vmas = options.number("vmas", 0) as usize;
    if vmas > 0 {
        let all = Area::read_write(vmas * PAGE)?;
        for page in 0..vmas {
            let one = Area {
                at: all.at.wrapping_add(page * WORDS),
                len: PAGE,
            };
            one.set(0, page as u64);
            if page % 2 == 0 {
                one.protect(libc::PROT_READ)?;
            }
        }
    }
    let fds = options.number("fds", 0);
    if fds > 0 {
        let limit = libc::rlimit {
            rlim_cur: fds + 1000,
            rlim_max: fds + 1000,
        };
        sys!(setrlimit(libc::RLIMIT_NOFILE, &limit))?;
    }
    let files: Vec<File> = (0..fds).map(|_| File::open("/dev/null")).collect::<io::Result<_>>()?;

    // Before the threads: a child of many threads may only do little.
    let mut ended = children(options.number("processes", 0), |_| {
        while sys0!(getppid()) != 1 {
            thread::sleep(Duration::from_millis(500));
        }
    })?;
    let copies = options.number("forked", 0) as usize;
    let shared = options.number("shared", 0) != 0;
    if shared {
        written.mine = (0, copies + 1);
    }
    for number in 0..copies {
        let pid = sys!(fork())?;
        if pid == 0 {
            if shared {
                written.mine = (number + 1, copies + 1);
            }
            forked(written, rest);
        }
        ended.push(pid);
    }
    for _ in 0..options.number("threads", 0) {
        thread::Builder::new().stack_size(STACK).spawn(|| {
            loop {
                thread::park();
            }
        })?;
    }
    if let Some(port) = options.text("port") {
        let port: u16 = port.parse().map_err(io::Error::other)?;
        let listener = TcpListener::bind(("0.0.0.0", port))?;
        let control = kit.control()?;
        // It has a connection open as often as not.
        kit.without_portrait();
        thread::Builder::new()
            .stack_size(4 * STACK)
            .spawn(move || serve(&listener, &control))?;
    }
    written.last = Instant::now();
    kit.by_the_time_of_day();
    kit.ready()?;
    let written = std::cell::RefCell::new(written);
    let mut steps = 0;
    let code = kit.run(
        |kit| {
            let mut written = written.borrow_mut();
            written.step();
            let page = written.pick();
            kit.check(written.holds(page), format!("page {page} differs"));
            steps += 1;
            kit.operations(steps);
        },
        |kit| {
            written.borrow().verify(kit);
            for pid in &ended {
                let gone = sys!(waitpid(*pid, std::ptr::null_mut(), libc::WNOHANG));
                kit.check(gone.is_ok_and(|p| p == 0), format!("child {pid} has ended"));
            }
        },
    );
    drop(files);
    ended.iter().for_each(|pid| drop(sys!(kill(*pid, libc::SIGKILL))));
    Ok(code)
}

//! System calls run inside a stopped process, many at a time, such that the death of the agent at any instant leaves the process healthy.
//!
//! See [`crate::arch::inject_stub`] for the code that runs there. One injector serves one process: the stub goes to the zero tail of its
//! `[vdso]`, the tables to a shared mapping that the agent reaches through /proc/PID/map_files. Each task has a slice of that mapping:
//! records, room for results, and the return frame with a signal frame's room below it.

use crate::{
    arch::{
        self,
        inject_stub::{self, Mark},
        pilot::{RECORD, Record},
    },
    image::Regs,
    procfs::{
        self, maps,
        status::{self, Status},
    },
    sys::{mem::Mem, ptrace, region::Region},
    tracer::{Frozen, Proc, Task},
};
use std::{
    fs::OpenOptions,
    io,
    time::{Duration, Instant},
};

/// A slice of the table: its bytes, and where in it the records, the results and the return frame are.
#[derive(Debug, Clone, Copy)]
struct Slice {
    len: usize,
    records: usize,
    out: usize,
    frame: usize,
}

const LEADER: Slice = Slice {
    len: 256 << 10,
    records: 0,
    out: 8 << 10,
    frame: (32 << 10) - 512,
};
/// Of another thread, which is asked little: all of it in one page, the last, since each page has to be found by the kernel. What lies below is only room for a
/// signal frame, whose way may go over the records, too: by then the agent is dead.
const THREAD: Slice = Slice {
    len: 32 << 10,
    records: 28 << 10,
    out: 30 << 10,
    frame: (32 << 10) - 512,
};
/// First bytes of a table, by which a leaked one is recognised.
pub const MAGIC: &[u8; 16] = b"migrate-table-1\0";
const HEAD: usize = 4096;

/// Why an injection failed. The task's own registers are back in every case.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// A signal came in between: deliver it and try again.
    #[error("signal {signal} arrived at task {tid}")]
    Signal {
        /// Task.
        tid: i32,
        /// Signal.
        signal: i32,
    },
    /// The process cannot carry the stub.
    #[error("process {pid}: {reason}")]
    Unfit {
        /// Process.
        pid: i32,
        /// Why.
        reason: String,
    },
    /// A system call of ours failed.
    #[error("process {pid}: {what}: {source}")]
    Io {
        /// Process.
        pid: i32,
        /// What was tried.
        what: &'static str,
        /// Reason.
        source: io::Error,
    },
}

/// Runs batches in one process.
#[derive(Debug)]
pub struct Injector {
    site: Site,
    tids: Vec<(i32, i32)>,
    /// How each task tells that it has come to the end of its batch.
    marks: Vec<Mark>,
    region: Region,
}

/// Results of a task's batch.
pub struct Results<'a> {
    region: &'a Region,
    out: usize,
    /// One per record.
    pub ret: Vec<i64>,
}

impl Results<'_> {
    /// Reads a u64 from the result area.
    pub fn u64(&self, offset: usize) -> u64 {
        self.region.read_u64(self.out + offset)
    }
}

impl Injector {
    /// Puts the stub and the table into a stopped process. `states` are those of its tasks, leader first.
    pub fn attach(p: &Proc, maps: &[maps::Mapping], states: &[Status]) -> Result<Injector, InjectError> {
        let pid = p.pid;
        let io = |what| move |source| InjectError::Io { pid, what, source };
        let marks: Vec<Mark> = states.iter().map(pick).collect();
        let site = Site::of(pid, maps, states[0].inner_pid(), marks[0])?;
        let leader = &p.tasks[0];
        let len = (HEAD + LEADER.len + THREAD.len * (p.tasks.len() - 1)) as u64;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let back = arch::restart_in_place(&leader.regs);
        let made = site.call(leader, &back, libc::SYS_mmap, [0, len, prot as u64, flags as u64, u64::MAX, 0])?;
        if let Some(signal) = made.signal {
            return Err(InjectError::Signal { tid: leader.tid, signal });
        }
        let table = match made.ret {
            Some(r) if r < 0 && r > -4096 => return Err(io("map the shared table")(io::Error::from_raw_os_error(-r as i32))),
            r => r.unwrap_or_default() as u64,
        };
        let path = procfs::mapped(pid, table, table + len);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(io("open /proc/PID/map_files of the shared table"))?;
        let region = Region::map(&file, len as usize, table).map_err(io("map the shared table here"))?;
        region.write(0, MAGIC);
        let tids = p.tasks.iter().map(|t| t.tid).zip(states.iter().map(Status::inner_pid)).collect();
        Ok(Injector { site, tids, marks, region })
    }

    /// The one in `place`, which gets one if there is none. `states` as for [`Injector::attach`], of now: a signal that was delivered may have led a task into a
    /// handler, which blocks others.
    pub fn keep<'i>(
        place: &'i mut Option<Injector>,
        p: &Proc,
        maps: &[maps::Mapping],
        states: &[Status],
    ) -> Result<&'i Injector, InjectError> {
        match place {
            Some(inj) => {
                inj.renew(states);
                Ok(inj)
            }
            none => Ok(none.insert(Injector::attach(p, maps, states)?)),
        }
    }

    fn renew(&mut self, states: &[Status]) {
        self.marks = states.iter().map(pick).collect();
        self.site.mark = self.marks[0];
    }

    /// The shared table's range in the process.
    pub fn table(&self) -> (u64, u64) {
        (self.region.remote, self.region.remote + self.region.len() as u64)
    }

    /// The same: where it begins, and its length.
    fn mapped(&self) -> (u64, u64) {
        (self.region.remote, self.region.len() as u64)
    }

    /// Where the records, the results and the return frame of a task are.
    fn slice(task: usize) -> Slice {
        let (at, slice) = match task.checked_sub(1) {
            None => (HEAD, LEADER),
            Some(k) => (HEAD + LEADER.len + THREAD.len * k, THREAD),
        };
        Slice {
            len: slice.len,
            records: at + slice.records,
            out: at + slice.out,
            frame: at + slice.frame,
        }
    }

    /// Address in the process of a task's result area.
    pub fn out_addr(&self, task: usize) -> u64 {
        self.region.addr(Self::slice(task).out)
    }

    /// Reads a u64 from a task's result area.
    pub fn out_u64(&self, task: usize, offset: usize) -> u64 {
        self.region.read_u64(Self::slice(task).out + offset)
    }

    /// What record `k` of a task's last batch returned, though the batch as a whole failed; None: it was not run.
    pub fn returned(&self, task: usize, k: usize) -> Option<i64> {
        let ret = self.region.read_u64(Self::slice(task).records + k * RECORD + 56) as i64;
        (ret != i64::MIN).then_some(ret)
    }

    /// A record that stops a task in the middle of its batch, for [`Injector::run_with`]; when the agent is dead by then, the batch goes on as if it
    /// were not there.
    pub fn pause(&self, task: usize) -> Record {
        self.marks[task].record(self.site.inner_tgid, self.tids[task].1)
    }

    /// Runs one batch in each task at once. `batches[i]` belongs to task i and may be empty.
    pub fn run(&self, tasks: &[Task], batches: &[Vec<Record>]) -> Result<Vec<Results<'_>>, InjectError> {
        self.run_with(tasks, batches, None)
    }

    /// The same; record `pause.0` of the first task's batch is a [`Injector::pause`], at which the other is called.
    pub fn run_with(
        &self,
        tasks: &[Task],
        batches: &[Vec<Record>],
        mut pause: Option<(usize, &mut dyn FnMut())>,
    ) -> Result<Vec<Results<'_>>, InjectError> {
        let pid = self.site.pid;
        let io = |what| move |source| InjectError::Io { pid, what, source };
        let fits = |(i, b): &(usize, &Vec<Record>)| (b.len() + 1) * RECORD <= Self::slice(*i).out - Self::slice(*i).records;
        if let Some((_, long)) = batches.iter().enumerate().find(|b| !fits(b)) {
            let reason = format!("a batch of {} calls does not fit", long.len());
            return Err(InjectError::Unfit { pid, reason });
        }
        // The way back, where each task is by now, and of the table.
        if let Some(leader) = tasks.first() {
            self.site.put(&arch::restart_in_place(&leader.regs), self.mapped())?;
        }
        let mut failure = None;
        let asked = |i: &usize| !batches[*i].is_empty();
        // Those whose calls have to be followed need this agent all the time: one at a time, after the others.
        let (together, alone): (Vec<usize>, Vec<usize>) = (0..batches.len()).filter(asked).partition(|&i| self.marks[i] != Mark::Call);
        let alone = alone.iter().map(std::slice::from_ref);
        for group in std::iter::once(together.as_slice()).chain(alone) {
            let mut started = Vec::new();
            for &i in group {
                match self.begin(i, &tasks[i], &batches[i], tasks.len() > 1) {
                    Ok(()) => started.push(i),
                    Err(e) => {
                        failure.get_or_insert(io("start the stub")(e));
                        break;
                    }
                }
            }
            for i in started {
                let tid = self.tids[i].0;
                let mark = self.marks[i];
                let at = |record: usize| {
                    let record = self.region.addr(Self::slice(i).records + record * RECORD);
                    move |r: &Regs| r.r12 == record
                };
                let paused = match pause.take_if(|_| i == 0) {
                    Some((record, f)) => until(tid, mark, at(record)).and_then(|()| {
                        f();
                        resume(tid, mark).map_err(WaitError::Io)
                    }),
                    None => Ok(()),
                };
                let ended = paused.and_then(|()| until(tid, mark, at(batches[i].len())));
                if let Err(e) = ended {
                    failure.get_or_insert(e.into_inject(pid));
                }
                ptrace::set_regs(tid, &tasks[i].regs).map_err(io("restore registers"))?;
            }
            if failure.is_some() {
                break;
            }
        }
        if let Some(f) = failure {
            return Err(f);
        }
        Ok(batches
            .iter()
            .enumerate()
            .map(|(i, b)| {
                let slice = Self::slice(i);
                let ret = (0..b.len())
                    .map(|k| self.region.read_u64(slice.records + k * RECORD + 56) as i64)
                    .collect();
                Results {
                    region: &self.region,
                    out: slice.out,
                    ret,
                }
            })
            .collect())
    }

    /// Sets a task off on its batch.
    fn begin(&self, i: usize, task: &Task, batch: &[Record], many: bool) -> io::Result<()> {
        let slice = Self::slice(i);
        let records = batch.iter().copied().chain([self.pause(i)]);
        for (k, record) in records.enumerate() {
            self.region.write(slice.records + k * RECORD, &record.to_bytes());
        }
        // A lone thread leaves through the immediates; several may not unmap the table under each other.
        let frame = if many {
            let frame = inject_stub::iret_frame(&arch::restart_in_place(&task.regs));
            self.region.write(slice.frame, &frame);
            self.region.addr(slice.frame)
        } else {
            0
        };
        let mut r = task.regs;
        r.rip = self.site.base;
        r.r12 = self.region.addr(slice.records);
        r.r13 = batch.len() as u64 + 1;
        r.r15 = frame;
        r.orig_rax = u64::MAX;
        start(task, &r, self.marks[i])
    }

    /// Unmaps the table. Nobody is in the stub then, and every task of the tree is stopped where it was, or where a signal that came meanwhile has led it.
    ///
    /// Until then the table stays mapped, which is harmless in a tree that is going to be killed.
    pub fn leave(mut self, f: &mut Frozen) -> Result<(), InjectError> {
        let pid = self.site.pid;
        let failed = |what, source| InjectError::Io { pid, what, source };
        for _ in 0..100 {
            let leader = f.procs.iter().find(|p| p.pid == pid).and_then(|p| p.tasks.first());
            // Ended, with all its memory.
            let Some(leader) = leader.filter(|t| t.tid == pid) else {
                return Ok(());
            };
            let unmapped = self.site.unmap(leader, &arch::restart_in_place(&leader.regs), self.table())?;
            if let Some(signal) = unmapped.signal {
                f.deliver(pid, signal).map_err(|e| failed("deliver a signal", e))?;
            }
            if unmapped.done {
                return Ok(());
            }
            let status = status::read_task(pid, pid).map_err(|e| failed("read /proc/PID/status", e))?;
            self.site.mark = pick(&status);
        }
        Err(failed("unmap the shared table", io::Error::other("signals kept coming")))
    }

    /// For a tree that must not run any more on this agent's account: leaves the leader with registers that unmap the table, and then go on where it was, if
    /// somebody lets it go on one day.
    pub fn leave_behind(self, leader: &mut Task) -> Result<(), InjectError> {
        let stub = self.site.put(&arch::restart_in_place(&leader.regs), self.mapped())?;
        leader.regs.rip = self.site.base + stub.exit;
        leader.regs.orig_rax = u64::MAX;
        Ok(())
    }
}

/// A stopped process, and the place of the stub in it.
#[derive(Debug)]
struct Site {
    pid: i32,
    inner_tgid: i32,
    mem: Mem,
    base: u64,
    /// How the leader tells that it has made a call.
    mark: Mark,
}

/// What became of a single call.
struct Called {
    /// What it returned; `None`: it was not made.
    ret: Option<i64>,
    /// A signal that came instead of the end or before it. It has not been delivered.
    signal: Option<i32>,
}

/// What became of [`unmap`].
#[derive(Debug)]
pub struct Unmapped {
    /// It was done; else a signal came before it.
    pub done: bool,
    /// A signal that came meanwhile, and has to be delivered.
    pub signal: Option<i32>,
}

impl Site {
    /// Finds the place.
    fn of(pid: i32, maps: &[maps::Mapping], inner_tgid: i32, mark: Mark) -> Result<Site, InjectError> {
        let io = |what| move |source| InjectError::Io { pid, what, source };
        let unfit = |reason: &str| InjectError::Unfit {
            pid,
            reason: reason.into(),
        };
        let vdso = maps.iter().find(|m| m.name == b"[vdso]");
        let vdso = vdso.ok_or_else(|| unfit("has no [vdso] mapping to run the stub in"))?;
        let mem = Mem::open(pid).map_err(io("open /proc/PID/mem"))?;
        let base = stub_base(&mem, vdso.start, vdso.end).map_err(io("read the vdso"))?;
        let base = base.ok_or_else(|| unfit("its vdso has no room for the stub"))?;
        Ok(Site {
            pid,
            inner_tgid,
            mem,
            base,
            mark,
        })
    }

    /// Puts the stub there, for a leader that goes on at `back`. `table`: its address and length.
    fn put(&self, back: &Regs, table: (u64, u64)) -> Result<inject_stub::Stub, InjectError> {
        let stub = inject_stub::build(self.base, back, table.0, table.1, self.mark);
        let written = self.mem.write(self.base, &stub.code);
        written.map(|()| stub).map_err(|source| InjectError::Io {
            pid: self.pid,
            what: "write the stub",
            source,
        })
    }

    /// Has the leader make one call. Whatever comes of it, it is stopped afterwards with the registers that it had. `back`: how it goes on if this agent dies
    /// meanwhile.
    fn call(&self, leader: &Task, back: &Regs, nr: i64, args: [u64; 6]) -> Result<Called, InjectError> {
        let pid = self.pid;
        let io = |what| move |source| InjectError::Io { pid, what, source };
        let stub = self.put(back, (0, 0))?;
        let begin = self.base + stub.boot;
        let mut r = leader.regs;
        r.rip = begin;
        r.rax = nr as u64;
        [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] = args;
        r.r12 = self.inner_tgid as u64;
        r.r13 = self.inner_tgid as u64;
        r.orig_rax = u64::MAX;
        start(leader, &r, self.mark).map_err(io("start the stub"))?;
        let end = self.base + stub.boot_end;
        let stop = until(leader.tid, self.mark, |r| r.rip == end);
        let after = ptrace::regs(leader.tid);
        ptrace::set_regs(leader.tid, &leader.regs).map_err(io("restore registers"))?;
        let signal = match stop {
            Ok(()) => None,
            Err(WaitError::Signal(_, signal)) => Some(signal),
            Err(e) => return Err(e.into_inject(pid)),
        };
        let after = after.map_err(io("read registers"))?;
        // A signal is delivered on the way out of the call, or before it has begun.
        let ret = match signal {
            None => Some(after.r14 as i64),
            Some(_) if after.rip == begin => None,
            Some(_) if after.rip == begin + SYSCALL => Some(after.rax as i64),
            Some(_) => Some(after.r14 as i64),
        };
        Ok(Called { ret, signal })
    }

    /// Has the leader unmap a range, (start, end), that nobody uses.
    fn unmap(&self, leader: &Task, back: &Regs, range: (u64, u64)) -> Result<Unmapped, InjectError> {
        let made = self.call(leader, back, libc::SYS_munmap, [range.0, range.1 - range.0, 0, 0, 0, 0])?;
        match made.ret {
            Some(r) if r < 0 => Err(InjectError::Io {
                pid: self.pid,
                what: "unmap what was mapped for the move",
                source: io::Error::from_raw_os_error(-r as i32),
            }),
            ret => Ok(Unmapped {
                done: ret.is_some(),
                signal: made.signal,
            }),
        }
    }
}

/// Bytes of the instruction.
const SYSCALL: u64 = 2;

/// Has the leader of a process, of which at least this task is stopped by a trace of this thread, unmap a range that nobody uses. It is stopped where it was
/// afterwards. `back`: how it goes on if this agent dies meanwhile.
pub fn unmap(pid: i32, regs: &Regs, back: &Regs, range: (u64, u64)) -> Result<Unmapped, InjectError> {
    let io = |what| move |source| InjectError::Io { pid, what, source };
    let maps = maps::maps(pid).map_err(io("read /proc/PID/maps"))?;
    let status = status::read_task(pid, pid).map_err(io("read /proc/PID/status"))?;
    let leader = Task {
        tid: pid,
        regs: *regs,
        group_stopped: false,
    };
    Site::of(pid, &maps, status.inner_pid(), pick(&status))?.unmap(&leader, back, range)
}

fn start(task: &Task, r: &Regs, mark: Mark) -> io::Result<()> {
    ptrace::set_regs(task.tid, r)?;
    resume(task.tid, mark)
}

fn resume(tid: i32, mark: Mark) -> io::Result<()> {
    match mark {
        Mark::Signal(_) => ptrace::cont(tid, 0),
        Mark::Call => ptrace::cont_to_call(tid),
    }
}

enum WaitError {
    Signal(i32, i32),
    Io(io::Error),
}

impl WaitError {
    fn into_inject(self, pid: i32) -> InjectError {
        match self {
            WaitError::Signal(tid, signal) => InjectError::Signal { tid, signal },
            WaitError::Io(source) => InjectError::Io {
                pid,
                what: "wait for the stub",
                source,
            },
        }
    }
}

/// Waits for a task in the stub to come to the mark of which `reached` tells. Any signal stop but a mark's ends the batch; the stub's calls are queries and can
/// be run again.
fn until(tid: i32, mark: Mark, reached: impl Fn(&Regs) -> bool) -> Result<(), WaitError> {
    let there = || ptrace::regs(tid).map(|r| reached(&r)).map_err(WaitError::Io);
    loop {
        match (stop(tid)?, mark) {
            (Stop::Signal(s), Mark::Signal(own)) if s == own => {
                if there()? {
                    return Ok(());
                }
                // Somebody else's, and ignored: it would never have been seen.
            }
            (Stop::Signal(s), _) => return Err(WaitError::Signal(tid, s)),
            (Stop::Call, _) => {
                if there()? {
                    // What it goes on with can only be chosen where a signal would be delivered: at the end of this call, before anything else is run.
                    ptrace::interrupt(tid).map_err(WaitError::Io)?;
                    ptrace::cont(tid, 0).map_err(WaitError::Io)?;
                    return match stop(tid)? {
                        Stop::Other => Ok(()),
                        Stop::Signal(s) => Err(WaitError::Signal(tid, s)),
                        Stop::Call => Err(WaitError::Io(io::Error::other(format!("task {tid} makes another call")))),
                    };
                }
            }
            (Stop::Other, _) => {}
        }
        resume(tid, mark).map_err(WaitError::Io)?;
    }
}

/// A stop of a traced task.
enum Stop {
    /// At the delivery of a signal.
    Signal(i32),
    /// At the begin or the end of a system call.
    Call,
    /// On request, or by job control.
    Other,
}

/// Waits for the next stop.
fn stop(tid: i32) -> Result<Stop, WaitError> {
    let end = Instant::now() + Duration::from_secs(5);
    let mut spins = 0u32;
    loop {
        match ptrace::poll(tid).map_err(WaitError::Io)? {
            Some(ptrace::Change::Stopped {
                signal: ptrace::CALL_STOP,
                event: 0,
            }) => return Ok(Stop::Call),
            Some(ptrace::Change::Stopped { signal, event: 0 }) => return Ok(Stop::Signal(signal)),
            Some(ptrace::Change::Stopped { .. }) => return Ok(Stop::Other),
            Some(ptrace::Change::Gone(status)) => {
                return Err(WaitError::Io(io::Error::other(format!(
                    "task {tid} ended with wait status {status:#x}"
                ))));
            }
            None => {
                spins += 1;
                if spins > 2000 {
                    std::thread::sleep(Duration::from_micros(20));
                }
                if Instant::now() > end {
                    let _ = ptrace::interrupt(tid);
                    return Err(WaitError::Io(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("task {tid} does not come back"),
                    )));
                }
            }
        }
    }
}

/// Where in the vdso the stub fits: the zeros behind its last byte of content.
fn stub_base(mem: &Mem, start: u64, end: u64) -> io::Result<Option<u64>> {
    let own = crate::dump::vdso::own()?;
    let mut page = vec![0u8; (end - start) as usize];
    mem.read(start, &mut page)?;
    // A stub left from before stands in the tail: trust the length of our own vdso where the code before it is the same.
    let used = match own.used {
        used if own.vdso.code.len() == page.len() && own.vdso.code[..used] == page[..used] => used,
        _ => page.iter().rposition(|&b| b != 0).map_or(0, |p| p + 1),
    };
    let at = (used + 63) & !63;
    Ok((at + inject_stub::MAX <= page.len()).then_some(start + at as u64))
}

/// A signal that is ignored by default, not handled by the process and not blocked by the task, or else a call.
fn pick(s: &Status) -> Mark {
    let taken = s.sig_blocked | s.sig_caught;
    let mut ignored = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD].into_iter();
    ignored.find(|s| taken >> (s - 1) & 1 == 0).map_or(Mark::Call, Mark::Signal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dump::{self, mm::Cache, tree::DumpError},
        sys::{check, misc},
        vacate::{left_inside, tests::Child},
    };
    use std::sync::atomic::Ordering;

    /// What a child and its parent count in.
    fn page() -> Region {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        Region::map(&file, 4096, 0).unwrap()
    }

    extern "C" fn nothing(_: i32) {}

    /// Counts, and is interrupted by its own timer all the time; in the handler every signal is blocked.
    fn counting(page: &Region) -> Child {
        let mut began = false;
        Child::new(|| {
            if !std::mem::replace(&mut began, true) {
                let every = libc::timeval { tv_sec: 0, tv_usec: 150 };
                let timer = libc::itimerval {
                    it_interval: every,
                    it_value: every,
                };
                // SAFETY: the handler does nothing; all zeros is a value of a sigaction; what is pointed to outlives the calls.
                unsafe {
                    let mut action: libc::sigaction = std::mem::zeroed();
                    action.sa_sigaction = nothing as extern "C" fn(i32) as libc::sighandler_t;
                    libc::sigfillset(&mut action.sa_mask);
                    check(i64::from(libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut()))).unwrap();
                    check(i64::from(libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()))).unwrap();
                }
            }
            page.word(0).fetch_add(1, Ordering::SeqCst);
        })
    }

    fn goes_on(page: &Region) {
        let now = || page.word(0).load(Ordering::SeqCst);
        let (before, end) = (now(), Instant::now() + Duration::from_secs(10));
        while now() < before + 100 {
            assert!(Instant::now() < end, "it stands still");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn attached(f: &mut Frozen) -> Injector {
        loop {
            let p = &f.procs[0];
            let state = status::read_task(p.pid, p.pid).unwrap();
            match Injector::attach(p, &maps::maps(p.pid).unwrap(), &[state]) {
                Err(InjectError::Signal { tid, signal }) => f.deliver(tid, signal).unwrap(),
                r => break r.unwrap(),
            }
        }
    }

    /// Nobody is in the stub when a process is let go, so that the next may overwrite it at once, whatever signals come in between.
    #[test]
    fn a_process_is_left_outside_the_stub() {
        let page = page();
        let child = counting(&page);
        for _ in 0..300 {
            let Some(mut f) = stopped(&child) else { return };
            let inj = attached(&mut f);
            let table = inj.table();
            inj.leave(&mut f).unwrap();
            assert_eq!(left_inside(&f.procs[0]), None);
            assert!(
                !maps::maps(child.0).unwrap().iter().any(|m| m.start == table.0),
                "the table is gone"
            );
        }
        goes_on(&page);
    }

    /// None: there is no right to trace it, and the test that asks is skipped.
    fn stopped(child: &Child) -> Option<Frozen> {
        let f = Frozen::freeze(child.0, Duration::from_secs(5));
        let skip = |e: &_| eprintln!("SKIP {}: {e}", std::thread::current().name().unwrap_or_default());
        f.inspect_err(skip).ok()
    }

    /// Runs a batch with a pause in it, at which `f` is called; returns what its calls returned.
    fn run_with_pause(f: &Frozen, inj: &Injector, mut at_pause: impl FnMut()) -> Vec<i64> {
        let ask = Record::new(libc::SYS_getppid, &[]);
        let batch = vec![ask, inj.pause(0), ask, ask];
        let results = inj.run_with(&f.procs[0].tasks, &[batch], Some((1, &mut at_pause))).unwrap();
        results[0].ret.clone()
    }

    /// An agent that is kept from its cpu for as long as it may be finds the task where it left it.
    #[test]
    fn a_task_that_blocks_every_signal_waits_for_its_agent() {
        let page = page();
        let mut began = false;
        let child = Child::new(|| {
            if !std::mem::replace(&mut began, true) {
                misc::block_all_signals();
            }
            page.word(0).fetch_add(1, Ordering::SeqCst);
        });
        goes_on(&page);
        let me = i64::from(std::process::id());
        for _ in 0..20 {
            let Some(mut f) = stopped(&child) else { return };
            let inj = attached(&mut f);
            assert_eq!(inj.marks, [Mark::Call]);
            let now = || page.word(0).load(Ordering::SeqCst);
            let before = now();
            let ret = run_with_pause(&f, &inj, || std::thread::sleep(Duration::from_millis(50)));
            assert_eq!((now(), ret[0], ret[2], ret[3]), (before, me, me, me));
            assert_eq!(ptrace::regs(child.0).unwrap(), f.procs[0].tasks[0].regs);
            inj.leave(&mut f).unwrap();
            assert_eq!(now(), before);
            drop(f);
            goes_on(&page);
        }
    }

    /// A window changes its size: the signal is not the one by which the stub tells that it has come to its end.
    #[test]
    fn a_signal_of_somebody_else_ends_no_batch() {
        let page = page();
        let child = Child::new(|| {
            page.word(0).fetch_add(1, Ordering::SeqCst);
        });
        let Some(mut f) = stopped(&child) else { return };
        let inj = attached(&mut f);
        assert_eq!(inj.marks, [Mark::Signal(libc::SIGURG)]);
        let me = i64::from(std::process::id());
        let ret = run_with_pause(&f, &inj, || misc::kill(child.0, libc::SIGURG).unwrap());
        assert_eq!((ret[0], ret[2], ret[3]), (me, me, me));
        inj.leave(&mut f).unwrap();
        drop(f);
        goes_on(&page);
    }

    /// A signal comes in the middle of a batch, and leads into a handler in which the mark of before is blocked.
    #[test]
    fn a_batch_begins_anew_after_a_signal() {
        let page = page();
        let child = counting(&page);
        goes_on(&page);
        let me = i64::from(std::process::id());
        for _ in 0..20 {
            let Some(mut f) = stopped(&child) else { return };
            let mut inj = attached(&mut f);
            let ask = Record::new(libc::SYS_getppid, &[]);
            let batch = [vec![ask, inj.pause(0), ask]];
            let mut at_pause = || misc::kill(child.0, libc::SIGALRM).unwrap();
            let first = inj.run_with(&f.procs[0].tasks, &batch, Some((1, &mut at_pause)));
            match first.map(|r| r[0].ret.clone()) {
                Err(InjectError::Signal { tid, signal }) => {
                    assert_eq!(inj.marks, [Mark::Signal(libc::SIGURG)]);
                    f.deliver(tid, signal).unwrap();
                    inj.renew(&[status::read_task(child.0, child.0).unwrap()]);
                    assert_eq!(inj.marks, [Mark::Call]);
                }
                // It was in its handler already.
                Ok(ret) => assert_eq!((inj.marks.as_slice(), ret[2]), ([Mark::Call].as_slice(), me)),
                Err(e) => panic!("{e}"),
            }
            let again = inj.run(&f.procs[0].tasks, &[vec![ask; 60]]).unwrap();
            assert_eq!(again[0].ret, [me; 60]);
            drop(again);
            inj.leave(&mut f).unwrap();
        }
        goes_on(&page);
    }

    /// What a dead agent may leave: a leader on its way out of the stub. Asked then, it would go round in it for ever.
    #[test]
    fn a_leader_in_the_stub_is_asked_nothing() {
        let page = page();
        let child = counting(&page);
        let Some(mut f) = stopped(&child) else { return };
        let inj = attached(&mut f);
        inj.leave_behind(&mut f.procs[0].tasks[0]).unwrap();
        let asked = dump::tree::frozen(&mut f, &mut Vec::new(), dump::host::host().unwrap(), &mut Cache::default(), |_| ());
        assert!(matches!(asked, Err(DumpError::Inside(_))), "{:?}", asked.map(|_| ()));
        drop(f);
        goes_on(&page);
    }
}

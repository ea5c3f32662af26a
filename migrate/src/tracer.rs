//! Stopping a whole process tree, and letting it go again.
//!
//! A [`Frozen`] tree is a guard: dropping it thaws. It is bound to the thread that made it, because ptrace is; [`Tracer`] is the
//! named thread that owns it, and async code posts closures to it.
//!
//! Tasks are SEIZEd and INTERRUPTed. Nothing stays traced outside a freeze: a signal stop that an agent handles while it is
//! killed loses that signal. PTRACE_O_EXITKILL is never set here.
//!
//! The freeze repeats its search until a pass finds no task that is not stopped, so that a fork in the middle of it is caught. A parent inside
//! vfork(2) does not stop until its child execs; then everything is let go for a moment and tried again.

use crate::{
    arch,
    image::Regs,
    procfs::{
        self, stat,
        status::{self, Status},
    },
    rseq,
    sys::{misc, ptrace},
    vacate,
};
use std::{
    cell::Cell,
    collections::BTreeMap,
    io,
    marker::PhantomData,
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Why a tree could not be stopped.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The root is gone.
    #[error("process {0} does not exist")]
    Gone(i32),
    /// A task does not stop.
    #[error("task {tid} of process {pid} did not stop within {ms} ms (state {state}); it may hang in the kernel")]
    Stuck {
        /// Process.
        pid: i32,
        /// Task.
        tid: i32,
        /// Waited.
        ms: u128,
        /// State letter.
        state: char,
    },
    /// ptrace was refused.
    #[error("cannot trace task {tid}: {source}")]
    Trace {
        /// Task.
        tid: i32,
        /// Reason.
        source: io::Error,
    },
    /// /proc failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A stopped thread.
#[derive(Debug, Clone)]
pub struct Task {
    /// Thread id, the agent's namespace.
    pub tid: i32,
    /// Registers at the stop.
    pub regs: Regs,
    /// It was stopped by job control before.
    pub group_stopped: bool,
}

/// A process of a frozen tree.
#[derive(Debug)]
pub struct Proc {
    /// Process id, the agent's namespace.
    pub pid: i32,
    /// Index of its parent in the tree.
    pub parent: Option<usize>,
    /// The thread of the parent it is a child of, the agent's namespace; 0 for the root.
    pub parent_tid: i32,
    /// Its threads, the leader first; none for a zombie.
    pub tasks: Vec<Task>,
    /// /proc/PID/stat at discovery.
    pub stat: stat::Stat,
}

impl Proc {
    /// Exited, not waited for.
    pub fn is_zombie(&self) -> bool {
        self.tasks.is_empty()
    }

    /// What /proc/PID/task/TID/status tells of its threads, the leader first.
    pub fn states(&self) -> io::Result<Vec<Status>> {
        self.tasks.iter().map(|t| status::read_task(self.pid, t.tid)).collect()
    }
}

/// A stopped tree. Thaws when dropped.
#[derive(Debug)]
pub struct Frozen {
    /// Processes, parents first.
    pub procs: Vec<Proc>,
    /// When the first task was asked to stop.
    pub since: Instant,
    /// A task has run for a moment since the stop, to take a signal.
    pub has_run: Rc<Cell<bool>>,
    /// SIGSTOP was sent, so that the tree outlives the agent's death stopped.
    held: Arc<AtomicBool>,
    _thread: PhantomData<*const ()>,
}

/// Keeps a frozen tree stopped beyond the death of this agent.
#[derive(Debug, Clone)]
pub struct Holder {
    pids: Vec<i32>,
    held: Arc<AtomicBool>,
}

impl Holder {
    /// Sends SIGSTOP to every process. Undone by [`Frozen::thaw`].
    pub fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
        for pid in &self.pids {
            let _ = misc::kill(*pid, libc::SIGSTOP);
        }
    }
}

/// A process of a tree that runs.
#[derive(Debug)]
pub struct Discovered {
    /// Its id.
    pub pid: i32,
    /// Index of its parent among those discovered.
    pub parent: Option<usize>,
    /// The parent's thread that it is a child of; 0 for the root.
    pub parent_tid: i32,
    /// Its threads, ascending; none if it ended before it could be looked at.
    pub tids: Vec<i32>,
}

/// The processes below and with a root, parents first.
pub fn discover(root: i32) -> io::Result<Vec<Discovered>> {
    let new = |pid, parent, parent_tid| Discovered {
        pid,
        parent,
        parent_tid,
        tids: Vec::new(),
    };
    let mut found = vec![new(root, None, 0)];
    let mut i = 0;
    while i < found.len() {
        match procfs::family(found[i].pid) {
            Ok(procfs::Family { tids, children }) => {
                found[i].tids = tids;
                found.extend(children.into_iter().map(|(child, tid)| new(child, Some(i), tid)));
            }
            Err(e) if e.kind() == io::ErrorKind::Unsupported => return Err(e),
            // Gone between two reads, most likely; its zombie shows in the next pass or it was reaped.
            Err(_) if i > 0 => found[i].tids = procfs::tasks(found[i].pid).unwrap_or_default(),
            Err(e) => return Err(e),
        }
        i += 1;
    }
    Ok(found)
}

impl Frozen {
    /// Stops `root` and all its descendants; gives up after `limit`.
    pub fn freeze(root: i32, limit: Duration) -> Result<Frozen, FreezeError> {
        let deadline = Instant::now() + limit;
        loop {
            match Self::attempt(root, deadline) {
                Ok(Some(f)) => return Ok(f),
                Ok(None) => std::thread::sleep(Duration::from_millis(1)),
                Err(e) => return Err(e),
            }
        }
    }

    fn attempt(root: i32, deadline: Instant) -> Result<Option<Frozen>, FreezeError> {
        let mut f = Frozen {
            procs: Vec::new(),
            since: Instant::now(),
            has_run: Rc::default(),
            held: Arc::default(),
            _thread: PhantomData,
        };
        let mut patience = None;
        loop {
            let mut fresh: Vec<(usize, i32)> = Vec::new();
            for Discovered {
                pid,
                parent,
                parent_tid,
                tids,
            } in discover(root).map_err(|_| FreezeError::Gone(root))?
            {
                let Ok(st) = stat::read(pid) else {
                    if pid == root {
                        return Err(FreezeError::Gone(root));
                    }
                    continue;
                };
                let parent = parent.and_then(|p| {
                    let pp = discover_pid(&f.procs, st.ppid);
                    pp.or(Some(p))
                });
                let at = match f.procs.iter().position(|p| p.pid == pid) {
                    Some(at) => at,
                    None => {
                        f.procs.push(Proc {
                            pid,
                            parent,
                            parent_tid,
                            tasks: Vec::new(),
                            stat: st.clone(),
                        });
                        f.procs.len() - 1
                    }
                };
                f.procs[at].stat = st;
                f.procs[at].parent_tid = parent_tid;
                for tid in tids {
                    if f.procs[at].tasks.iter().any(|t| t.tid == tid) || fresh.iter().any(|(_, t)| *t == tid) {
                        continue;
                    }
                    match ptrace::seize(tid) {
                        Ok(()) => {
                            let _ = ptrace::interrupt(tid);
                            fresh.push((at, tid));
                        }
                        // A zombie cannot be traced (EPERM), a task that just ended is not there.
                        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                        Err(_) if is_dead(pid, tid) => {}
                        Err(source) => return Err(FreezeError::Trace { tid, source }),
                    }
                }
            }
            if fresh.is_empty() {
                // Nobody may be in the middle of the vdso. Those who were have run since, and may have made others.
                match vacate::pass(&mut f.procs, patience.get_or_insert_with(vacate::Patience::new))? {
                    None => break,
                    Some(late) => fresh = late,
                }
            }
            if !f.collect_stops(fresh, deadline)? {
                return Ok(None);
            }
        }
        for t in f.procs.iter_mut().flat_map(|p| &mut p.tasks) {
            rseq::abort(t.tid, &mut t.regs);
        }
        // Children are found per pass; order them parents first and index their parents.
        f.order(root);
        Ok(Some(f))
    }

    /// Waits for fresh stops. False: something hangs in vfork, all was let go.
    fn collect_stops(&mut self, fresh: Vec<(usize, i32)>, deadline: Instant) -> Result<bool, FreezeError> {
        let patience = Instant::now() + Duration::from_millis(50);
        let mut waiting = fresh;
        let mut spins = 0u32;
        while !waiting.is_empty() {
            waiting.retain(|&(at, tid)| match wait_stop_once(tid) {
                Ok(None) => true,
                Ok(Some(stop)) => {
                    if let Some(group_stopped) = stop
                        && let Ok(regs) = ptrace::regs(tid)
                    {
                        note_call(tid, &regs);
                        self.procs[at].tasks.push(Task { tid, regs, group_stopped });
                    }
                    false
                }
                Err(_) => false,
            });
            if waiting.is_empty() {
                break;
            }
            spins += 1;
            if spins > 200 {
                std::thread::sleep(Duration::from_micros(50));
            } else {
                std::thread::yield_now();
            }
            if Instant::now() > patience {
                let (at, tid) = waiting[0];
                let pid = self.procs[at].pid;
                let since = self.since;
                // Let everything go; the hanging ones stop as soon as their child execs, and are let go then.
                self.thaw();
                while !waiting.is_empty() && Instant::now() < deadline {
                    waiting.retain(|&(_, tid)| match wait_stop_once(tid) {
                        Ok(None) => true,
                        Ok(Some(Some(_))) => {
                            if let Ok(r) = ptrace::regs(tid) {
                                let _ = ptrace::set_regs(tid, &arch::resume_traced(&r));
                            }
                            let _ = ptrace::detach(tid, 0);
                            false
                        }
                        _ => false,
                    });
                    std::thread::sleep(Duration::from_micros(100));
                }
                if waiting.is_empty() && Instant::now() < deadline {
                    return Ok(false);
                }
                let state = stat::read(tid).map_or('?', |s| s.state as char);
                return Err(FreezeError::Stuck {
                    pid,
                    tid,
                    ms: since.elapsed().as_millis(),
                    state,
                });
            }
        }
        Ok(true)
    }

    fn order(&mut self, root: i32) {
        // Drop processes that vanished altogether during the freeze.
        self.procs
            .retain(|p| !p.tasks.is_empty() || stat::read(p.pid).is_ok_and(|s| s.state == b'Z'));
        for p in &mut self.procs {
            p.tasks.sort_by_key(|t| (t.tid != p.pid, t.tid));
            if let Ok(s) = stat::read(p.pid) {
                p.stat = s;
            }
        }
        let mut out: Vec<Proc> = Vec::new();
        let mut rest = std::mem::take(&mut self.procs);
        if let Some(i) = rest.iter().position(|p| p.pid == root) {
            let mut r = rest.swap_remove(i);
            r.parent = None;
            out.push(r);
        }
        rest.sort_by_key(|p| p.stat.start_time);
        let mut i = 0;
        while i < out.len() {
            let pid = out[i].pid;
            let mut k = 0;
            while k < rest.len() {
                if rest[k].stat.ppid == pid {
                    let mut p = rest.remove(k);
                    p.parent = Some(i);
                    out.push(p);
                } else {
                    k += 1;
                }
            }
            i += 1;
        }
        self.procs = out;
    }

    /// What holds the tree, from any thread.
    pub fn holder(&self) -> Holder {
        Holder {
            pids: self.procs.iter().filter(|p| !p.is_zombie()).map(|p| p.pid).collect(),
            held: Arc::clone(&self.held),
        }
    }

    /// Takes back what [`Holder::hold`] has done: a pending SIGSTOP is discarded by SIGCONT, so that no task ever stops by it.
    pub fn unhold(&mut self) {
        if self.held.swap(false, Ordering::SeqCst) {
            for p in self.procs.iter().filter(|p| !p.is_zombie()) {
                let _ = misc::kill(p.pid, libc::SIGCONT);
            }
        }
    }

    /// Lets every task go on where it was.
    pub fn thaw(&mut self) {
        self.unhold();
        for p in &mut self.procs {
            // Threads first: a leader that was left behind by its injector unmaps the shared table on its way.
            for t in p.tasks.drain(..).rev() {
                let _ = ptrace::set_regs(t.tid, &arch::resume_traced(&t.regs));
                let _ = ptrace::detach(t.tid, 0);
            }
        }
    }

    /// Kills every process of the tree: the originals of a finished migration. Their parents inside the tree never see it.
    pub fn kill(mut self) {
        for p in &self.procs {
            if !p.is_zombie() {
                let _ = misc::kill(p.pid, libc::SIGKILL);
            }
        }
        let end = Instant::now() + Duration::from_secs(10);
        // Threads before leaders, or the wait for a leader hangs.
        for p in &mut self.procs {
            for t in p.tasks.drain(..).rev() {
                while let Ok(c) = ptrace::poll(t.tid) {
                    match c {
                        Some(ptrace::Change::Gone(_)) => break,
                        _ if Instant::now() > end => break,
                        _ => std::thread::sleep(Duration::from_micros(50)),
                    }
                }
            }
        }
        self.procs.clear();
    }

    /// A tree of no processes.
    pub fn nothing() -> Frozen {
        Frozen {
            procs: Vec::new(),
            since: Instant::now(),
            has_run: Rc::default(),
            held: Arc::default(),
            _thread: PhantomData,
        }
    }

    /// Ends the tracing without thawing: a held tree stays stopped by SIGSTOP.
    pub fn let_go_stopped(mut self) {
        self.held.store(false, Ordering::SeqCst);
        self.thaw();
    }

    /// Threads in all.
    pub fn task_count(&self) -> usize {
        self.procs.iter().map(|p| p.tasks.len()).sum()
    }

    /// Lets a task take a signal that arrived while it was being used, and stops it again. One that does not stop is no part of the tree any more: it runs, and
    /// the registers that it had are of the past.
    pub fn deliver(&mut self, tid: i32, signal: i32) -> io::Result<()> {
        let tasks = self.procs.iter_mut().map(|p| &mut p.tasks);
        let found = tasks
            .filter_map(|tasks| tasks.iter().position(|t| t.tid == tid).map(|at| (tasks, at)))
            .next();
        let (tasks, at) = found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("task {tid} is not part of the tree")))?;
        self.has_run.set(true);
        let stopped = taken(tid, &tasks[at].regs, signal);
        match &stopped {
            Ok(regs) => tasks[at].regs = *regs,
            Err(_) => drop(tasks.remove(at)),
        }
        stopped.map(drop)
    }
}

/// Has a stopped task go on from these registers with a signal, and stops it again; its registers then.
fn taken(tid: i32, regs: &Regs, signal: i32) -> io::Result<Regs> {
    ptrace::set_regs(tid, regs)?;
    ptrace::interrupt(tid)?;
    ptrace::cont(tid, signal)?;
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match wait_stop_once(tid)? {
            Some(Some(_)) => return ptrace::regs(tid),
            Some(None) => return Err(io::Error::other(format!("task {tid} ended by signal {signal} during the freeze"))),
            None if Instant::now() > end => {
                return Err(io::Error::other(format!("task {tid} does not stop again after signal {signal}")));
            }
            None => std::thread::sleep(Duration::from_micros(20)),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.thaw();
    }
}

fn discover_pid(procs: &[Proc], pid: i32) -> Option<usize> {
    procs.iter().position(|p| p.pid == pid)
}

fn is_dead(pid: i32, tid: i32) -> bool {
    status::read_task(pid, tid).map_or(true, |s| matches!(s.state, b'Z' | b'X'))
}

/// One look at a task: `None` still running; `Some(None)` it ended; `Some(Some(group))` it is in a ptrace stop, `group` by job control.
///
/// A signal that comes first is delivered, and the interrupt stop follows before the handler's first instruction.
pub fn wait_stop_once(tid: i32) -> io::Result<Option<Option<bool>>> {
    match ptrace::poll(tid)? {
        None => Ok(None),
        Some(ptrace::Change::Gone(_)) => Ok(Some(None)),
        Some(ptrace::Change::Stopped { signal, event }) if event == ptrace::EVENT_STOP => Ok(Some(Some(signal != libc::SIGTRAP))),
        Some(ptrace::Change::Stopped { signal, event }) => {
            ptrace::cont(tid, if event == 0 { signal } else { 0 })?;
            Ok(None)
        }
    }
}

/// Calls with a restart block that tasks were stopped in: (task, instruction and stack pointer) to the call's number.
///
/// A task that is let go on after a freeze that failed is inside restart_syscall(2), and no register says any more what it had called.
static CALLS: Mutex<BTreeMap<(i32, u64, u64), u64>> = Mutex::new(BTreeMap::new());
const RESTART_SYSCALL: u64 = 219;

pub(crate) fn note_call(tid: i32, r: &Regs) {
    if r.rax as i64 == -516
        && r.orig_rax != RESTART_SYSCALL
        && let Ok(mut calls) = CALLS.lock()
    {
        calls.insert((tid, r.rip, r.rsp), r.orig_rax);
    }
}

/// The call that a task in restart_syscall(2) goes on with, when an earlier freeze of this agent saw it.
pub fn interrupted_call(tid: i32, r: &Regs) -> Option<u64> {
    CALLS.lock().ok()?.get(&(tid, r.rip, r.rsp)).copied()
}

type Job = Box<dyn FnOnce() + Send>;

/// The thread that owns everything traced.
#[derive(Debug)]
pub struct Tracer {
    jobs: Option<std::sync::mpsc::Sender<Job>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Name of a tracer's thread.
const THREAD: &str = "tracer";

/// Whether a thread of this process is a tracer's.
pub fn is_tracer(tid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/self/task/{tid}/comm")).is_ok_and(|name| name.trim_end() == THREAD)
}

impl Tracer {
    /// Starts it. Its jobs keep what they own in thread-local state of their own making.
    pub fn start() -> io::Result<Tracer> {
        let (tx, rx) = std::sync::mpsc::channel::<Job>();
        let thread = std::thread::Builder::new().name(THREAD.into()).spawn(move || {
            // Children that are cloned from this thread start with every signal blocked.
            misc::block_all_signals();
            for job in rx {
                job();
            }
        })?;
        Ok(Tracer {
            jobs: Some(tx),
            thread: Some(thread),
        })
    }

    /// Runs a closure there and returns what it returns.
    pub async fn call<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> io::Result<R> {
        let (tx, rx) = tokio::sync::oneshot::channel();
        self.post(Box::new(move || {
            let _ = tx.send(f());
        }))?;
        rx.await.map_err(|_| io::Error::other("the tracer thread panicked"))
    }

    /// The same for callers outside a runtime.
    pub fn call_blocking<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> io::Result<R> {
        let (tx, rx) = std::sync::mpsc::channel();
        self.post(Box::new(move || {
            let _ = tx.send(f());
        }))?;
        rx.recv().map_err(|_| io::Error::other("the tracer thread panicked"))
    }

    fn post(&self, job: Job) -> io::Result<()> {
        self.jobs
            .as_ref()
            .and_then(|j| j.send(job).ok())
            .ok_or_else(|| io::Error::other("the tracer thread has ended"))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.jobs.take();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

//! A whole tree: the inventory of a running one for preflight, and the full state of a frozen one.

use super::{fds, files, mm, objects::ObjectTable, task, vdso};
use crate::{
    blocker::Blocker,
    image::{Clocks, Host, Mm, Process, SigInfo, Thread, Tree},
    inject::{InjectError, Injector},
    laps::Laps,
    procfs::{
        self, maps, stat,
        status::{self, Status},
        timens,
    },
    sys::misc::{self, Shared},
    tracer::{Discovered, Frozen, Proc, Task, discover},
    vacate,
};
use std::{
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
    sync::OnceLock,
};

/// Why a tree could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// /proc or a descriptor could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A question could not be asked inside a process.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// A descriptor could not be read.
    #[error(transparent)]
    Fds(#[from] fds::DumpError),
    /// Threads are in the middle of the vdso, from where the processes cannot be asked.
    #[error("threads are in the middle of the kernel's vdso")]
    Inside(Vec<Blocker>),
}

impl DumpError {
    /// See [`procfs::vanished`].
    pub fn vanished(&self) -> bool {
        matches!(self, DumpError::Io(e) if procfs::vanished(e))
    }
}

/// A tree as read, with what the reader still needs beside it.
#[derive(Debug)]
pub struct Dumped {
    /// The plain state.
    pub tree: Tree,
    /// Agent-side pids of `tree.processes`, same order.
    pub pids: Vec<i32>,
    /// A descriptor for reading each of `tree.objects`.
    pub object_fds: Vec<OwnedFd>,
    /// (device, inode) of each of them.
    pub object_keys: Vec<(u64, u64)>,
    /// Start time of each process, in clock ticks: with the pid it names a process for good.
    pub started: Vec<u64>,
    /// Everything that cannot move.
    pub blockers: Vec<Blocker>,
}

/// "pid 42 (redis-server)".
pub fn place(pid: i32) -> String {
    let comm = procfs::read(pid, "comm").unwrap_or_default();
    format!("pid {pid} ({})", String::from_utf8_lossy(comm.trim_ascii_end()))
}

/// Looks at a running tree without stopping anything.
pub fn inventory(root: i32, host: Host, cache: &mut mm::Cache) -> Result<Dumped, DumpError> {
    look(root, host, cache, fds::Mode::Inventory)
}

/// The same without descriptors: processes, threads, mappings and the objects behind them, for the skeleton.
pub fn outline(root: i32, host: Host, cache: &mut mm::Cache) -> Result<Dumped, DumpError> {
    look(root, host, cache, fds::Mode::Outline)
}

fn look(root: i32, host: Host, cache: &mut mm::Cache, mode: fds::Mode) -> Result<Dumped, DumpError> {
    let mut procs = Vec::new();
    // Where each that was discovered is in the list; one that has ended since is not, nor is what is below it.
    let mut place: Vec<Option<usize>> = Vec::new();
    for Discovered {
        pid,
        parent,
        parent_tid,
        tids,
    } in discover(root)?
    {
        let parent = parent.map(|i| place[i]);
        let (Ok(stat), false) = (stat::read(pid), parent == Some(None)) else {
            place.push(None);
            continue;
        };
        let parent = parent.flatten();
        place.push(Some(procs.len()));
        let tids = if stat.state == b'Z' { Vec::new() } else { tids };
        let mut tasks: Vec<Task> = tids
            .into_iter()
            .map(|tid| Task {
                tid,
                regs: Default::default(),
                group_stopped: false,
            })
            .collect();
        tasks.sort_by_key(|t| (t.tid != pid, t.tid));
        procs.push(Proc {
            pid,
            parent,
            parent_tid,
            tasks,
            stat,
        });
    }
    if procs.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("process {root} has ended")).into());
    }
    // Processes end under the look: without them, and what is below them, it is tried again.
    loop {
        match collect(&procs, None, host.clone(), mode, cache) {
            Err(e) if drop_ended(&mut procs) == 0 || procs.is_empty() => return Err(e),
            Err(_) => {}
            r => return r,
        }
    }
}

/// Takes processes out of a list that have ended since, with their descendants; the others keep their order. Returns how many.
fn drop_ended(procs: &mut Vec<Proc>) -> usize {
    let before = procs.len();
    let mut place: Vec<Option<usize>> = Vec::with_capacity(before);
    let mut kept = Vec::with_capacity(before);
    for mut p in std::mem::take(procs) {
        let now = stat::read(p.pid);
        let same = now.is_ok_and(|s| s.start_time == p.stat.start_time && (s.state == b'Z') == p.is_zombie());
        let parent = p.parent.map(|i| place[i]);
        if !same || parent == Some(None) {
            place.push(None);
            continue;
        }
        p.parent = parent.flatten();
        place.push(Some(kept.len()));
        kept.push(p);
    }
    *procs = kept;
    before - procs.len()
}

/// What a frozen tree was found to be.
#[derive(Debug)]
pub struct Found<R> {
    /// Everything but the pages.
    pub dumped: Dumped,
    /// What the caller's own look gave; `None` where something is in the way.
    pub also: Option<R>,
}

/// What only the tracer's thread can learn of a process.
#[derive(Debug, Default)]
struct Inner {
    asked: task::Asked,
    threads: Vec<Thread>,
    pending: Vec<SigInfo>,
}

/// What /proc told of a stopped process.
#[derive(Debug)]
struct Read {
    maps: Vec<maps::Mapping>,
    /// Of its tasks, leader first.
    states: Vec<Status>,
}

/// Reads everything of a frozen tree but the pages; `also` is the caller's look at their tables, once the rest is known and nothing is in the way. Signals that
/// arrive in between are delivered and the question is asked again. `injectors` gets what was put into the processes, for a thaw that leaves no trace.
///
/// Asking and reading at once, on two threads, did not pay: on two cores the stub waited for one of them, and 0.3 ms became 1.3 as often as not.
pub fn frozen<R>(
    f: &mut Frozen,
    injectors: &mut Vec<Option<Injector>>,
    host: Host,
    cache: &mut mm::Cache,
    also: impl FnOnce(&mut Dumped) -> R,
) -> Result<Found<R>, DumpError> {
    // One of them may be on its way out of a stub that a dead agent has left, whose code the questions would overwrite under it.
    let inside: Vec<Blocker> = f.procs.iter().filter_map(in_the_vdso).collect();
    if !inside.is_empty() {
        return Err(DumpError::Inside(inside));
    }
    let (inner, read) = ask_all(f, injectors)?.into_iter().unzip();
    let mut d = collect(&f.procs, Some(read), host, fds::Mode::Frozen, cache)?;
    fill(&mut d, &f.procs, inner);
    for (p, place) in f.procs.iter().map(|p| (p, place(p.pid))) {
        if !p.is_zombie() && p.tasks[0].tid != p.pid {
            d.blockers.push(Blocker::new(
                place,
                "its leading thread has ended while others go on",
                "wait until it ends",
            ));
        } else if p.tasks.iter().any(|t| t.group_stopped) {
            d.blockers.push(Blocker::new(
                place,
                "it is stopped by job control",
                format!("let it go on first: kill -CONT {}", p.pid),
            ));
        } else if p.tasks.iter().any(|t| t.regs.cs != 0x33) {
            d.blockers
                .push(Blocker::new(place, "it runs 32-bit code", "32-bit programs cannot move"));
        }
    }
    let also = d.blockers.is_empty().then(|| also(&mut d));
    Ok(Found { dumped: d, also })
}

/// Asks every process, and reads what ptrace shows of its threads.
fn ask_all(f: &mut Frozen, injectors: &mut Vec<Option<Injector>>) -> Result<Vec<(Inner, Read)>, DumpError> {
    let mut laps = Laps::start();
    let all_cpus = online_cpus();
    let mut out = Vec::new();
    injectors.resize_with(f.procs.len(), || None);
    for (i, place) in injectors.iter_mut().enumerate() {
        let mut tries = 0;
        let (asked, read) = loop {
            let p = &f.procs[i];
            let states = p.states()?;
            let mut maps = maps::maps(p.pid)?;
            if p.is_zombie() || p.tasks[0].tid != p.pid {
                break (task::Asked::default(), Read { maps, states });
            }
            match task::ask(p, place, &maps, &states) {
                Ok(asked) => {
                    // There already if this is not the first try.
                    maps.retain(|m| (m.start, m.end) != asked.table);
                    break (asked, Read { maps, states });
                }
                Err(InjectError::Signal { tid, signal }) if tries < 100 => {
                    tries += 1;
                    f.deliver(tid, signal)?;
                }
                Err(e) => return Err(e.into()),
            }
        };
        laps.lap("ask");
        let p = &f.procs[i];
        let mut inner = Inner { asked, ..Inner::default() };
        if place.is_some() && read.states[0].vm_lck_kb > 0 {
            // A new mapping shows what mlockall(MCL_FUTURE) does to new mappings.
            let table = inner.asked.table;
            if let Some(t) = maps::smaps(p.pid)?.iter().find(|m| (m.start, m.end) == table) {
                inner.asked.mlock_future = if t.has(b"lf") { 2 } else { u8::from(t.has(b"lo")) };
            }
        }
        for (k, (t, state)) in p.tasks.iter().zip(&read.states).enumerate() {
            let asked = inner.asked.threads.get(k).cloned().unwrap_or_default();
            inner.threads.push(task::thread(p.pid, t, state, &asked, &all_cpus)?);
        }
        if let Some(leader) = p.tasks.first() {
            inner.pending = task::pending(leader.tid, true)?;
        }
        laps.lap("threads");
        out.push((inner, read));
    }
    laps.log("ask");
    Ok(out)
}

/// Puts what the processes told into what was read beside them.
fn fill(d: &mut Dumped, procs: &[Proc], inner: Vec<Inner>) {
    if let Some(first) = inner.first() {
        d.tree.clocks = Clocks {
            monotonic_ns: first.asked.clocks.0,
            boottime_ns: first.asked.clocks.1,
            realtime_ns: misc::clock_ns(libc::CLOCK_REALTIME),
        };
    }
    for ((process, p), i) in d.tree.processes.iter_mut().zip(procs).zip(inner) {
        if p.is_zombie() {
            continue;
        }
        let Inner { asked, threads, pending } = i;
        if asked.threads.iter().any(|t| t.mempolicy) {
            d.blockers.push(Blocker::new(
                place(p.pid),
                "it has a NUMA memory policy",
                "start it without numactl",
            ));
        }
        let mm = &mut d.tree.mms[process.mm as usize];
        mm.layout = task::layout(p, asked.brk);
        mm.dumpable = asked.dumpable;
        mm.thp_disable = asked.thp_disable;
        mm.membarrier = asked.membarrier;
        mm.xcomp_perm = asked.xcomp_perm;
        mm.mlock_future = asked.mlock_future;
        process.threads = threads;
        process.pending = pending;
        process.sigactions = asked.sigactions;
        process.itimers = asked.itimers;
        process.timers = asked.timers;
        process.subreaper = asked.subreaper;
    }
}

/// A thread that the freeze found in the middle of the vdso: it could not go on there on another kernel.
fn in_the_vdso(p: &Proc) -> Option<Blocker> {
    let tid = vacate::left_inside(p)?;
    let what = format!("{} thread {tid}", place(p.pid));
    Some(Blocker::new(what, "it is in the middle of a function of the kernel's vdso", "try again").transient())
}

/// Reads what /proc tells of a tree. `read`: of each process, what was read before.
fn collect(procs: &[Proc], read: Option<Vec<Read>>, host: Host, mode: fds::Mode, cache: &mut mm::Cache) -> Result<Dumped, DumpError> {
    cache.begin();
    let mut read = read.map(Vec::into_iter);
    let mut blockers = Vec::new();
    let mut objects = ObjectTable::default();
    let all_cpus = online_cpus();
    let frozen = matches!(mode, fds::Mode::Frozen);
    let mut laps = Laps::start();
    let mut processes = Vec::new();
    let mut mms = Vec::new();
    let mut vdsos = Vec::new();
    let mut sources = Vec::new();
    let root_spaces = Namespaces::of(procs[0].pid);
    for (i, p) in procs.iter().enumerate() {
        let (list, mut states) = match read.as_mut().and_then(Iterator::next) {
            Some(Read { maps, states }) => (Some(maps), states),
            None => (None, Vec::new()),
        };
        if states.is_empty() {
            // Gone since the search of a running tree: the caller looks again.
            states.push(status::read(p.pid)?);
            let others = p.tasks.iter().skip(1).map(|t| status::read_task(p.pid, t.tid).unwrap_or_default());
            states.extend(others);
        }
        let st = &states[0];
        if p.is_zombie() {
            processes.push(zombie(p, st, procs));
            continue;
        }
        let here = place(p.pid);
        process_blockers(p, &states, &here, procs, i, &root_spaces, &mut blockers);
        laps.lap("blockers");
        let list = match list {
            Some(l) => l,
            None => maps::maps(p.pid)?,
        };
        let maps = cache.mappings(p.pid, list, st.vm_lck_kb > 0, frozen)?;
        if !maps.iter().any(|m| m.name == b"[vdso]") {
            // For an instant true of any process in the middle of an execve(2).
            let fix = "let it keep the mapping that the kernel gave it, or boot without vdso=0";
            blockers.push(Blocker::new(&here, "it has no [vdso], in which migrate's code would run", fix).transient());
        }
        let auxv = procfs::read(p.pid, "auxv")?;
        let (maps, vdso) = vdso::original(p.pid, &auxv, maps, &mut vdsos)?;
        let vmas = mm::vmas(p.pid, &here, &maps, !frozen, &mut objects, cache, &mut blockers)?;
        laps.lap("mappings");
        let pkeys = vmas.iter().fold(0u16, |k, v| k | 1 << v.pkey) & !1;
        let exe = std::fs::read_link(procfs::path(p.pid, "exe"))?;
        let exe_meta = rustix::fs::stat(procfs::path(p.pid, "exe")).map_err(io::Error::from)?;
        if exe_meta.st_nlink == 0 {
            blockers.push(Blocker::new(
                &here,
                format!("its executable {} was deleted or replaced", exe.display()),
                "restart it from the present file",
            ));
        }
        let exe = files::file_id(exe.as_os_str().as_bytes(), &exe_meta);
        let number = |name: &str| procfs::read(p.pid, name).map(|b| String::from_utf8_lossy(&b).trim().to_owned());
        mms.push(Mm {
            vmas,
            layout: task::layout(p, 0),
            auxv,
            exe,
            vdso,
            dumpable: 0,
            thp_disable: false,
            membarrier: 0,
            xcomp_perm: 0,
            pkeys,
            mlock_future: 0,
            coredump_filter: number("coredump_filter")
                .ok()
                .and_then(|s| u32::from_str_radix(&s, 16).ok())
                .unwrap_or(0x33),
            oom_score_adj: number("oom_score_adj").ok().and_then(|s| s.parse().ok()).unwrap_or(0),
        });
        let threads = match frozen {
            // They come from the tracer.
            true => Vec::new(),
            false => p.tasks.iter().filter_map(|t| bare_thread(p.pid, t.tid, &all_cpus).ok()).collect(),
        };
        laps.lap("threads");
        let cwd = std::fs::read_link(procfs::path(p.pid, "cwd"))?;
        let cwd_meta = rustix::fs::stat(procfs::path(p.pid, "cwd")).map_err(io::Error::from)?;
        if cwd_meta.st_nlink == 0 {
            blockers.push(Blocker::new(
                &here,
                "its working directory was deleted",
                "let it change to a directory that exists",
            ));
        }
        sources.push((
            processes.len(),
            fds::Source {
                pid: p.pid,
                inner_pid: st.inner_tgid(),
            },
        ));
        processes.push(Process {
            pid: st.inner_tgid(),
            parent: p.parent.map(|x| x as u32),
            parent_tid: inner_parent(p, procs),
            pgid: st.ns_pgid.last().copied().unwrap_or(0),
            sid: st.ns_sid.last().copied().unwrap_or(0),
            zombie: None,
            comm: st.name.clone(),
            threads,
            mm: mms.len() as u32 - 1,
            fds: Vec::new(),
            cwd: files::file_id(cwd.as_os_str().as_bytes(), &cwd_meta),
            umask: st.umask,
            sigactions: Vec::new(),
            pending: Vec::new(),
            itimers: Default::default(),
            timers: Vec::new(),
            rlimits: task::rlimits(p.pid)?,
            subreaper: false,
            exit_signal: p.stat.exit_signal,
        });
    }
    let only: Vec<fds::Source> = sources.iter().map(|(_, s)| *s).collect();
    let tables = fds::dump(&only, &mut objects, mode, &mut cache.known, &mut blockers)?;
    laps.lap("descriptors");
    if frozen {
        laps.log("read");
    }
    for ((at, _), fds) in sources.iter().zip(tables.fds) {
        processes[*at].fds = fds;
    }
    let (objects, object_fds, object_keys) = objects.into_parts();
    let tree = Tree {
        host,
        clocks: if frozen { Clocks::default() } else { clocks_of(procs[0].pid)? },
        processes,
        mms,
        vdsos,
        objects,
        descriptions: tables.descriptions,
        pipes: tables.pipes,
    };
    if let Err(reason) = crate::restore::plan::sessions(&tree.processes) {
        blockers.push(Blocker::new(
            place(procs[0].pid),
            reason,
            "wait until the processes concerned have ended",
        ));
    }
    Ok(Dumped {
        tree,
        pids: procs.iter().map(|p| p.pid).collect(),
        object_fds,
        object_keys,
        started: procs.iter().map(|p| p.stat.start_time).collect(),
        blockers,
    })
}

/// The clocks a process sees, without asking it: a skeleton's time namespace is made of them, before the freeze.
fn clocks_of(pid: i32) -> io::Result<Clocks> {
    let (ours, theirs) = (timens::offsets(std::process::id() as i32)?, timens::offsets(pid)?);
    let seen = |clock, ours: i128, theirs: i128| u64::try_from(i128::from(misc::clock_ns(clock)) - ours + theirs).unwrap_or(0);
    Ok(Clocks {
        monotonic_ns: seen(libc::CLOCK_MONOTONIC, ours.monotonic, theirs.monotonic),
        boottime_ns: seen(libc::CLOCK_BOOTTIME, ours.boottime, theirs.boottime),
        realtime_ns: misc::clock_ns(libc::CLOCK_REALTIME),
    })
}

fn online_cpus() -> Vec<u64> {
    // What an unrestricted task of this host is allowed to use.
    misc::affinity(1).or_else(|_| misc::affinity(0)).unwrap_or_default()
}

/// The parent's thread, as the tree numbers it.
fn inner_parent(p: &Proc, procs: &[Proc]) -> i32 {
    let Some(parent) = p.parent.and_then(|i| procs.get(i)) else {
        return 0;
    };
    status::read_task(parent.pid, p.parent_tid).map_or(0, |s| s.inner_pid())
}

fn zombie(p: &Proc, st: &status::Status, procs: &[Proc]) -> Process {
    Process {
        pid: st.inner_tgid(),
        parent: p.parent.map(|x| x as u32),
        parent_tid: inner_parent(p, procs),
        pgid: st.ns_pgid.last().copied().unwrap_or(0),
        sid: st.ns_sid.last().copied().unwrap_or(0),
        zombie: Some(p.stat.exit_code),
        comm: st.name.clone(),
        threads: Vec::new(),
        mm: 0,
        fds: Vec::new(),
        cwd: Default::default(),
        umask: 0,
        sigactions: Vec::new(),
        pending: Vec::new(),
        itimers: Default::default(),
        timers: Vec::new(),
        rlimits: Vec::new(),
        subreaper: false,
        exit_signal: p.stat.exit_signal,
    }
}

fn bare_thread(pid: i32, tid: i32, all_cpus: &[u64]) -> io::Result<Thread> {
    let st = status::read_task(pid, tid)?;
    Ok(Thread {
        tid: st.inner_pid(),
        regs: Default::default(),
        xstate: Vec::new(),
        sigmask: st.sig_blocked,
        pending: Vec::new(),
        altstack: Default::default(),
        tid_address: 0,
        robust_list: (0, 0),
        rseq: None,
        comm: st.name.clone(),
        creds: crate::image::Creds {
            uids: st.uids,
            gids: st.gids,
            groups: st.groups,
            caps: st.caps,
            securebits: 0,
            no_new_privs: st.no_new_privs,
        },
        sched: misc::sched(tid, all_cpus)?,
        pdeathsig: 0,
        personality: 0,
        timerslack_ns: 0,
        tsc: 1,
        cpuid_enabled: true,
    })
}

/// What of a process as a whole cannot move.
/// `states`: of its tasks, leader first.
fn process_blockers(p: &Proc, states: &[Status], here: &str, procs: &[Proc], i: usize, root: &Namespaces, blockers: &mut Vec<Blocker>) {
    let Some(st) = states.first() else { return };
    let mut block = |reason: String, fix: &str| blockers.push(Blocker::new(here, reason, fix));
    const PF_KTHREAD: u32 = 0x0020_0000;
    if p.stat.flags & PF_KTHREAD != 0 || st.kernel_thread {
        block("it is a kernel thread".into(), "name a user process");
        return;
    }
    if st.tracer != 0 && st.tracer != std::process::id() as i32 && !is_own_thread(st.tracer) {
        block(
            format!("it is traced by pid {} ({})", st.tracer, comm(st.tracer)),
            "end the debugger or strace first",
        );
    }
    if st.seccomp != 0 {
        block(
            "it runs under a seccomp filter".into(),
            "start it without one; filters cannot move yet",
        );
    }
    if matches!(st.state, b'T') && st.tracer == 0 {
        block(
            "it is stopped by job control".into(),
            &format!("let it go on first: kill -CONT {}", p.pid),
        );
    }
    match elf_class(p.pid) {
        Ok(1) => block("it is a 32-bit program".into(), "32-bit programs cannot move"),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            block(format!("its executable cannot be read: {e}"), "run migrate as root")
        }
        Err(_) => {}
    }
    let own = (i > 0).then(|| Namespaces::of(p.pid));
    let theirs = own.as_ref().unwrap_or(root);
    let ours = Namespaces::ours();
    for (a, b, what) in [
        (&theirs.net, &ours.net, "network"),
        (&theirs.ipc, &ours.ipc, "IPC"),
        (&theirs.uts, &ours.uts, "UTS"),
        (&theirs.user, &ours.user, "user"),
        (&theirs.cgroup, &ours.cgroup, "cgroup"),
    ] {
        if let (Some(a), Some(b)) = (a, b)
            && a != b
        {
            block(
                format!("it is in another {what} namespace than this agent"),
                "run migrate inside that namespace (nsenter)",
            );
        }
    }
    // A pid namespace made by an earlier migration comes with a mount namespace of its own, and the whole tree is in both.
    for (a, b, what) in [
        (&theirs.mnt, &root.mnt, "mount"),
        (&theirs.pid, &root.pid, "pid"),
        (&theirs.time, &root.time, "time"),
    ] {
        if a != b {
            block(
                format!("it is in another {what} namespace than the root of the tree"),
                "migrate it as a tree of its own",
            );
        }
    }
    if i == 0 && theirs.mnt != ours.mnt && theirs.pid == ours.pid {
        block(
            "it is in another mount namespace than this agent".into(),
            "run migrate inside that namespace (nsenter -m)",
        );
    }
    if theirs.pid_for_children != theirs.pid {
        block(
            "its children would be born into another pid namespace (unshare)".into(),
            "such programs cannot move",
        );
    }
    if let Ok(root) = procfs::link(p.pid, "root")
        && root != b"/"
    {
        block(
            format!("its root directory is {}", String::from_utf8_lossy(&root)),
            "run migrate inside the same chroot",
        );
    }
    if let Some(parent) = p.parent
        && let Some(pp) = procs.get(parent)
    {
        for (what, name) in [
            (Shared::Vm, "memory"),
            (Shared::Files, "descriptors"),
            (Shared::Fs, "working directory"),
            (Shared::Sighand, "handlers"),
        ] {
            if misc::shares(p.pid, pp.pid, what).unwrap_or(false) {
                blockers.push(
                    Blocker::new(
                        here,
                        format!("it shares its {name} with its parent (vfork or clone)"),
                        "it passes when the child execs",
                    )
                    .transient(),
                );
            }
        }
    }
    for (t, s) in p.tasks.iter().zip(states).skip(1) {
        let place = || format!("{here} thread {}", t.tid);
        if s.seccomp != 0 {
            blockers.push(Blocker::new(
                place(),
                "it runs under a seccomp filter",
                "start it without one; filters cannot move yet",
            ));
        }
        if s.tracer != 0 && !is_own_thread(s.tracer) {
            blockers.push(Blocker::new(
                place(),
                format!("it is traced by pid {} ({})", s.tracer, comm(s.tracer)),
                "end the debugger or strace first",
            ));
        }
        for (what, name) in [(Shared::Files, "descriptors"), (Shared::Fs, "working directory")] {
            if !misc::shares(p.pid, t.tid, what).unwrap_or(true) {
                blockers.push(Blocker::new(
                    place(),
                    format!("it has {name} of its own (unshare)"),
                    "such threads cannot move",
                ));
            }
        }
    }
}

/// Which namespaces(7) a process is in, each a number; `None` where that cannot be read.
#[derive(Debug)]
struct Namespaces {
    net: Option<Vec<u8>>,
    ipc: Option<Vec<u8>>,
    uts: Option<Vec<u8>>,
    user: Option<Vec<u8>>,
    cgroup: Option<Vec<u8>>,
    mnt: Option<Vec<u8>>,
    pid: Option<Vec<u8>>,
    time: Option<Vec<u8>>,
    pid_for_children: Option<Vec<u8>>,
}

impl Namespaces {
    /// Each link takes 2 to 3 microseconds of a freeze: none is read twice.
    fn of(pid: i32) -> Namespaces {
        let link = |name: &str| procfs::link(pid, &format!("ns/{name}")).ok();
        Namespaces {
            net: link("net"),
            ipc: link("ipc"),
            uts: link("uts"),
            user: link("user"),
            cgroup: link("cgroup"),
            mnt: link("mnt"),
            pid: link("pid"),
            time: link("time"),
            pid_for_children: link("pid_for_children"),
        }
    }

    /// This agent's, which stays where it was started.
    fn ours() -> &'static Namespaces {
        static OURS: OnceLock<Namespaces> = OnceLock::new();
        OURS.get_or_init(|| Namespaces::of(std::process::id() as i32))
    }
}

fn is_own_thread(tid: i32) -> bool {
    // In a freeze it is nearly always this one.
    tid == misc::gettid() || Path::new(&format!("/proc/self/task/{tid}")).exists()
}

fn comm(pid: i32) -> String {
    procfs::read(pid, "comm")
        .map(|b| String::from_utf8_lossy(b.trim_ascii_end()).into_owned())
        .unwrap_or_default()
}

fn elf_class(pid: i32) -> io::Result<u8> {
    use std::io::Read;
    let mut head = [0u8; 5];
    std::fs::File::open(procfs::path(pid, "exe"))?.read_exact(&mut head)?;
    Ok(head[4])
}

/// A process that must not be moved because the agent itself depends on it: itself, an ancestor of it, init.
pub fn own_ancestor(pid: i32) -> io::Result<bool> {
    let mut p = std::process::id() as i32;
    while p > 0 {
        if p == pid {
            return Ok(true);
        }
        p = stat::read(p)?.ppid;
    }
    Ok(false)
}

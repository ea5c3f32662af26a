//! A whole tree: the inventory of a running one for preflight, and the full state of a frozen one.

use super::{fds, files, mm, objects::ObjectTable, task, vdso};
use crate::{
    blocker::Blocker,
    image::{Clocks, Host, Mm, Process, Thread, Tree},
    inject::{InjectError, Injector},
    procfs::{self, maps, stat, status, timens},
    sys::misc::{self, Shared},
    tracer::{Frozen, Proc, Task, discover},
    vacate,
};
use std::{
    collections::HashMap,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
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
    for (pid, parent, parent_tid) in discover(root)? {
        let Ok(stat) = stat::read(pid) else { continue };
        let tids = if stat.state == b'Z' {
            Vec::new()
        } else {
            procfs::tasks(pid).unwrap_or_default()
        };
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
    // Processes end under the look: without them, and what is below them, it is tried again.
    loop {
        let mut asked: Vec<_> = procs.iter().map(|_| task::Asked::default()).collect();
        match collect(&procs, &mut asked, host.clone(), mode, cache) {
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

/// Reads everything of a frozen tree but the pages.
///
/// Signals that arrive in between are delivered and the question asked again. The injectors are returned so that a thaw leaves no trace.
pub fn frozen(f: &mut Frozen, host: Host, cache: &mut mm::Cache) -> Result<(Dumped, Vec<Option<Injector>>), DumpError> {
    let mut asked = Vec::new();
    let mut injectors = Vec::new();
    let inside: Vec<Blocker> = f.procs.iter().filter_map(in_the_vdso).collect();
    for i in 0..f.procs.len() {
        if f.procs[i].is_zombie() {
            asked.push(task::Asked::default());
            injectors.push(None);
            continue;
        }
        let mut tries = 0;
        loop {
            let p = &f.procs[i];
            if p.tasks[0].tid != p.pid {
                asked.push(task::Asked::default());
                injectors.push(None);
                break;
            }
            let inner: Vec<i32> = p
                .tasks
                .iter()
                .map(|t| status::read_task(p.pid, t.tid).map(|s| s.inner_pid()))
                .collect::<Result<_, _>>()?;
            let tid_map: HashMap<i32, i32> = p.tasks.iter().map(|t| t.tid).zip(inner.iter().copied()).collect();
            let maps = maps::maps(p.pid)?;
            match task::ask(p, &maps, &inner, &tid_map) {
                Ok((a, inj)) => {
                    asked.push(a);
                    injectors.push(Some(inj));
                    break;
                }
                Err(InjectError::Signal { tid, signal }) if tries < 100 => {
                    tries += 1;
                    f.deliver(tid, signal)?;
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
    let mut d = collect(&f.procs, &mut asked, host, fds::Mode::Frozen, cache)?;
    d.blockers.extend(inside);
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
    Ok((d, injectors))
}

/// A thread that the freeze found in the middle of the vdso: it could not go on there on another kernel.
fn in_the_vdso(p: &Proc) -> Option<Blocker> {
    let tid = vacate::left_inside(p)?;
    let what = format!("{} thread {tid}", place(p.pid));
    Some(Blocker::new(what, "it is in the middle of a function of the kernel's vdso", "try again").transient())
}

fn collect(procs: &[Proc], asked: &mut [task::Asked], host: Host, mode: fds::Mode, cache: &mut mm::Cache) -> Result<Dumped, DumpError> {
    let mut blockers = Vec::new();
    let mut objects = ObjectTable::default();
    let all_cpus = online_cpus();
    let frozen = matches!(mode, fds::Mode::Frozen);
    let mut processes = Vec::new();
    let mut mms = Vec::new();
    let mut vdsos = Vec::new();
    let mut sources = Vec::new();
    for (i, p) in procs.iter().enumerate() {
        // Gone since the search of a running tree: the caller looks again.
        let st = status::read(p.pid)?;
        if p.is_zombie() {
            processes.push(zombie(p, &st, procs));
            continue;
        }
        let here = place(p.pid);
        process_blockers(p, &st, &here, procs, asked, i, &mut blockers);
        let a = &mut asked[i];
        let maps = cache.mappings(p.pid, st.vm_lck_kb > 0, frozen)?;
        if let Some(t) = maps.iter().find(|m| (m.start, m.end) == a.table && a.table.1 != 0) {
            // A new mapping shows what mlockall(MCL_FUTURE) does to new mappings.
            a.mlock_future = if t.has(b"lf") { 2 } else { u8::from(t.has(b"lo")) };
        }
        let auxv = procfs::read(p.pid, "auxv")?;
        let (maps, vdso) = vdso::original(p.pid, &auxv, maps, &mut vdsos)?;
        let vmas = mm::vmas(p.pid, &here, &maps, a.table, !frozen, &mut objects, cache, &mut blockers)?;
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
            layout: task::layout(p, a.brk),
            auxv,
            exe,
            vdso,
            dumpable: a.dumpable,
            thp_disable: a.thp_disable,
            membarrier: a.membarrier,
            xcomp_perm: a.xcomp_perm,
            pkeys,
            mlock_future: a.mlock_future,
            coredump_filter: number("coredump_filter")
                .ok()
                .and_then(|s| u32::from_str_radix(&s, 16).ok())
                .unwrap_or(0x33),
            oom_score_adj: number("oom_score_adj").ok().and_then(|s| s.parse().ok()).unwrap_or(0),
        });
        let threads = p
            .tasks
            .iter()
            .enumerate()
            .filter_map(|(k, t)| {
                if frozen {
                    let a = a.threads.get(k).cloned().unwrap_or_default();
                    Some(task::thread(p.pid, t, &a, &all_cpus))
                } else {
                    bare_thread(p.pid, t.tid, &all_cpus).ok().map(Ok)
                }
            })
            .collect::<io::Result<Vec<_>>>()?;
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
            sigactions: std::mem::take(&mut a.sigactions),
            pending: if frozen { task::pending(p.tasks[0].tid, true)? } else { Vec::new() },
            itimers: a.itimers,
            timers: std::mem::take(&mut a.timers),
            rlimits: task::rlimits(p.pid)?,
            subreaper: a.subreaper,
            exit_signal: p.stat.exit_signal,
        });
    }
    let only: Vec<fds::Source> = sources.iter().map(|(_, s)| *s).collect();
    let tables = fds::dump(&only, &mut objects, mode, &mut blockers)?;
    for ((at, _), fds) in sources.iter().zip(tables.fds) {
        processes[*at].fds = fds;
    }
    let (objects, object_fds, object_keys) = objects.into_parts();
    let tree = Tree {
        host,
        clocks: match asked.first() {
            Some(a) if frozen => Clocks {
                monotonic_ns: a.clocks.0,
                boottime_ns: a.clocks.1,
                realtime_ns: misc::clock_ns(libc::CLOCK_REALTIME),
            },
            _ => clocks_of(procs[0].pid)?,
        },
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
fn process_blockers(
    p: &Proc,
    st: &status::Status,
    here: &str,
    procs: &[Proc],
    asked: &[task::Asked],
    i: usize,
    blockers: &mut Vec<Blocker>,
) {
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
    for (ns, what) in [
        ("net", "network"),
        ("ipc", "IPC"),
        ("uts", "UTS"),
        ("user", "user"),
        ("cgroup", "cgroup"),
    ] {
        let (theirs, ours) = (
            procfs::link(p.pid, &format!("ns/{ns}")),
            procfs::link(std::process::id() as i32, &format!("ns/{ns}")),
        );
        if let (Ok(a), Ok(b)) = (theirs, ours)
            && a != b
        {
            block(
                format!("it is in another {what} namespace than this agent"),
                "run migrate inside that namespace (nsenter)",
            );
        }
    }
    // A pid namespace made by an earlier migration comes with a mount namespace of its own, and the whole tree is in both.
    let ns = |pid: i32, name: &str| procfs::link(pid, &format!("ns/{name}")).ok();
    let me = std::process::id() as i32;
    for (name, what) in [("mnt", "mount"), ("pid", "pid"), ("time", "time")] {
        if ns(p.pid, name) != ns(procs[0].pid, name) {
            block(
                format!("it is in another {what} namespace than the root of the tree"),
                "migrate it as a tree of its own",
            );
        }
    }
    if i == 0 && ns(p.pid, "mnt") != ns(me, "mnt") && ns(p.pid, "pid") == ns(me, "pid") {
        block(
            "it is in another mount namespace than this agent".into(),
            "run migrate inside that namespace (nsenter -m)",
        );
    }
    if ns(p.pid, "pid_for_children") != ns(p.pid, "pid") {
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
    for t in p.tasks.iter().skip(1) {
        if let Ok(s) = status::read_task(p.pid, t.tid) {
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
        }
        for (what, name) in [(Shared::Files, "descriptors"), (Shared::Fs, "working directory")] {
            if !misc::shares(p.pid, t.tid, what).unwrap_or(true) {
                blockers.push(Blocker::new(
                    format!("{here} thread {}", t.tid),
                    format!("it has {name} of its own (unshare)"),
                    "such threads cannot move",
                ));
            }
        }
    }
    if asked[i].threads.iter().any(|t| t.mempolicy) {
        blockers.push(Blocker::new(here, "it has a NUMA memory policy", "start it without numactl"));
    }
}

fn is_own_thread(tid: i32) -> bool {
    Path::new(&format!("/proc/self/task/{tid}")).exists()
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

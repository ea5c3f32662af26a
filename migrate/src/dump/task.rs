//! Threads and processes: what ptrace and /proc tell, and what only the process itself can ask the kernel.

use crate::{
    arch::pilot::Record,
    image::{AltStack, Creds, ITimer, Layout, PosixTimer, Rseq, SigAction, SigInfo, Thread},
    inject::{InjectError, Injector, Results},
    procfs::{self, maps::Mapping, status::Status, timers},
    sys::{misc, ptrace},
    tracer::Proc,
};
use std::{collections::HashMap, io};

// Offsets in a task's result area.
const TID_ADDR: usize = 0;
const ALT: usize = 16;
const PDEATH: usize = 48;
const TSC: usize = 56;
const MEMPOLICY: usize = 64;
// Of the leader only.
const ITIMERS: usize = 128;
const SUBREAPER: usize = 240;
const XCOMP: usize = 248;
const CLOCKS: usize = 256;
const SIGACTIONS: usize = 512;
const TIMERS: usize = SIGACTIONS + 64 * 32;
/// POSIX timers whose times fit the result area; a process with more is refused.
pub const MAX_TIMERS: usize = 600;
/// Timers asked in one batch.
const TIMER_BATCH: usize = 60;

const PR_GET_PDEATHSIG: u64 = 2;
const PR_GET_DUMPABLE: u64 = 3;
const PR_GET_TSC: u64 = 25;
const PR_GET_SECUREBITS: u64 = 27;
const PR_GET_TIMERSLACK: u64 = 30;
const PR_GET_CHILD_SUBREAPER: u64 = 37;
const PR_GET_TID_ADDRESS: u64 = 40;
const PR_GET_THP_DISABLE: u64 = 42;
/// personality(2): only asks.
const SAME_PERSONALITY: u64 = 0xffff_ffff;
const ARCH_GET_CPUID: u64 = 0x1011;
const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
const MEMBARRIER_GET_REGISTRATIONS: u64 = 1 << 9;

/// What the process itself was asked.
#[derive(Debug, Default)]
pub struct Asked {
    /// Handlers of signals 1 to 64.
    pub sigactions: Vec<SigAction>,
    /// Interval timers.
    pub itimers: [ITimer; 3],
    /// POSIX timers.
    pub timers: Vec<PosixTimer>,
    /// Current program break.
    pub brk: u64,
    /// PR_GET_DUMPABLE.
    pub dumpable: u8,
    /// PR_GET_CHILD_SUBREAPER.
    pub subreaper: bool,
    /// PR_GET_THP_DISABLE.
    pub thp_disable: bool,
    /// membarrier(2) registrations.
    pub membarrier: u32,
    /// ARCH_GET_XCOMP_PERM.
    pub xcomp_perm: u64,
    /// CLOCK_MONOTONIC and CLOCK_BOOTTIME as the tree sees them.
    pub clocks: (u64, u64),
    /// Per thread.
    pub threads: Vec<AskedThread>,
    /// The shared table, to be left out of the mappings.
    pub table: (u64, u64),
    /// mlockall(MCL_FUTURE) in effect: 1, with MCL_ONFAULT 2.
    pub mlock_future: u8,
}

/// What each thread was asked.
#[derive(Debug, Default, Clone)]
pub struct AskedThread {
    tid_address: u64,
    altstack: AltStack,
    pdeathsig: i32,
    securebits: u32,
    timerslack_ns: u64,
    tsc: u8,
    cpuid_enabled: bool,
    personality: u32,
    /// NUMA policy differs from the default.
    pub mempolicy: bool,
}

/// Asks the process. The injector stays in `place`, whatever comes of it: it serves the next try, and can leave the process properly.
pub fn ask(p: &Proc, place: &mut Option<Injector>, maps: &[Mapping], states: &[Status]) -> Result<Asked, InjectError> {
    let pid = p.pid;
    let io = |what| move |source| InjectError::Io { pid, what, source };
    let listed = procfs::read(pid, "timers")
        .and_then(|b| Ok(timers::parse(&b)?))
        .map_err(io("read /proc/PID/timers"))?;
    if listed.len() > MAX_TIMERS {
        return Err(InjectError::Unfit {
            pid,
            reason: format!("it has {} POSIX timers, more than {MAX_TIMERS}", listed.len()),
        });
    }
    let inj = Injector::keep(place, p, maps, states)?;
    let tid_map = p.tasks.iter().map(|t| t.tid).zip(states.iter().map(Status::inner_pid)).collect();
    let sys = |nr: i64, args: &[u64]| Record::new(nr, args);
    let mut batches = Vec::new();
    for (i, _) in p.tasks.iter().enumerate() {
        let out = inj.out_addr(i);
        let at = |o: usize| out + o as u64;
        let mut b = vec![
            sys(libc::SYS_prctl, &[PR_GET_TID_ADDRESS, at(TID_ADDR)]),
            sys(libc::SYS_sigaltstack, &[0, at(ALT)]),
            sys(libc::SYS_prctl, &[PR_GET_PDEATHSIG, at(PDEATH)]),
            sys(libc::SYS_prctl, &[PR_GET_TSC, at(TSC)]),
            sys(libc::SYS_prctl, &[PR_GET_SECUREBITS]),
            sys(libc::SYS_prctl, &[PR_GET_TIMERSLACK]),
            sys(libc::SYS_arch_prctl, &[ARCH_GET_CPUID]),
            sys(libc::SYS_get_mempolicy, &[at(MEMPOLICY), 0, 0, 0, 0]),
            sys(libc::SYS_personality, &[SAME_PERSONALITY]),
        ];
        if i == 0 {
            b.push(sys(libc::SYS_brk, &[0]));
            b.push(sys(libc::SYS_prctl, &[PR_GET_DUMPABLE]));
            b.push(sys(libc::SYS_prctl, &[PR_GET_CHILD_SUBREAPER, at(SUBREAPER)]));
            b.push(sys(libc::SYS_prctl, &[PR_GET_THP_DISABLE]));
            b.push(sys(libc::SYS_membarrier, &[MEMBARRIER_GET_REGISTRATIONS]));
            b.push(sys(libc::SYS_arch_prctl, &[ARCH_GET_XCOMP_PERM, at(XCOMP)]));
            b.push(sys(libc::SYS_clock_gettime, &[libc::CLOCK_MONOTONIC as u64, at(CLOCKS)]));
            b.push(sys(libc::SYS_clock_gettime, &[libc::CLOCK_BOOTTIME as u64, at(CLOCKS + 16)]));
            for w in 0..3 {
                b.push(sys(libc::SYS_getitimer, &[w, at(ITIMERS + w as usize * 32)]));
            }
            for s in 1..=64u64 {
                b.push(sys(libc::SYS_rt_sigaction, &[s, 0, at(SIGACTIONS + (s as usize - 1) * 32), 8]));
            }
        }
        batches.push(b);
    }
    let asked = {
        let res = inj.run(&p.tasks, &batches)?;
        for (i, r) in res.iter().enumerate() {
            for (what, k) in [("PR_GET_TID_ADDRESS (CONFIG_CHECKPOINT_RESTORE)", 0), ("sigaltstack", 1)] {
                if r.ret[k] < 0 {
                    return Err(InjectError::Unfit {
                        pid,
                        reason: format!(
                            "{what} in task {}: {}",
                            p.tasks[i].tid,
                            io::Error::from_raw_os_error(-r.ret[k] as i32)
                        ),
                    });
                }
            }
        }
        let mut overruns = Vec::with_capacity(listed.len());
        let results = read_results(&res);
        drop(res);
        for (n, group) in listed.chunks(TIMER_BATCH).enumerate() {
            let mut b = Vec::new();
            for (k, t) in group.iter().enumerate() {
                let at = inj.out_addr(0) + (TIMERS + (n * TIMER_BATCH + k) * 32) as u64;
                b.push(sys(libc::SYS_timer_gettime, &[t.id as u64, at]));
                b.push(sys(libc::SYS_timer_getoverrun, &[t.id as u64]));
            }
            let r = inj.run(&p.tasks, &[b])?;
            overruns.extend(r[0].ret.chunks(2).map(|c| c[1] as i32));
        }
        let mut results = results;
        results.timers = posix_timers(inj, &listed, &overruns, &tid_map);
        results
    };
    let mut asked = asked;
    asked.table = inj.table();
    Ok(asked)
}

fn read_results(res: &[Results<'_>]) -> Asked {
    let threads = res
        .iter()
        .map(|r| AskedThread {
            tid_address: r.u64(TID_ADDR),
            // SS_ONSTACK says where the stack pointer is, not how the stack was set.
            altstack: AltStack {
                sp: r.u64(ALT),
                flags: r.u64(ALT + 8) as i32 & !1,
                size: r.u64(ALT + 16),
            },
            pdeathsig: r.u64(PDEATH) as i32,
            securebits: r.ret[4].max(0) as u32,
            timerslack_ns: r.ret[5].max(0) as u64,
            tsc: r.u64(TSC) as u8,
            cpuid_enabled: r.ret[6] != 0,
            personality: r.ret[8].max(0) as u32,
            mempolicy: r.ret[7] == 0 && r.u64(MEMPOLICY) as i32 != 0,
        })
        .collect();
    let l = &res[0];
    let ts = |at: usize| l.u64(at) * 1_000_000_000 + l.u64(at + 8);
    let us = |at: usize| l.u64(at) * 1_000_000 + l.u64(at + 8);
    const FIXED: usize = 9;
    let mut itimers = [ITimer::default(); 3];
    for (w, t) in itimers.iter_mut().enumerate() {
        *t = ITimer {
            interval_us: us(ITIMERS + w * 32),
            value_us: us(ITIMERS + w * 32 + 16),
        };
    }
    let sigactions = (0..64)
        .map(|s| {
            let at = SIGACTIONS + s * 32;
            SigAction {
                handler: l.u64(at),
                flags: l.u64(at + 8),
                restorer: l.u64(at + 16),
                mask: l.u64(at + 24),
            }
        })
        .collect();
    Asked {
        sigactions,
        itimers,
        timers: Vec::new(),
        brk: l.ret[FIXED] as u64,
        dumpable: l.ret[FIXED + 1].max(0) as u8,
        subreaper: l.u64(SUBREAPER) as i32 != 0 && l.ret[FIXED + 2] == 0,
        thp_disable: l.ret[FIXED + 3] == 1,
        membarrier: l.ret[FIXED + 4].max(0) as u32,
        xcomp_perm: if l.ret[FIXED + 5] == 0 { l.u64(XCOMP) } else { 0 },
        clocks: (ts(CLOCKS), ts(CLOCKS + 16)),
        threads,
        table: (0, 0),
        mlock_future: 0,
    }
}

fn posix_timers(inj: &Injector, listed: &[timers::Timer], overruns: &[i32], tid_map: &HashMap<i32, i32>) -> Vec<PosixTimer> {
    let ts = |at: usize| inj.out_u64(0, at) * 1_000_000_000 + inj.out_u64(0, at + 8);
    let each = listed.iter().zip(overruns).enumerate();
    each.map(|(k, (t, &overrun))| PosixTimer {
        id: t.id,
        clock: t.clock,
        notify: t.notify,
        signal: t.signal,
        sigval: t.value,
        tid: if t.notify & 4 != 0 {
            tid_map.get(&t.target).copied().unwrap_or(t.target)
        } else {
            0
        },
        interval_ns: ts(TIMERS + k * 32),
        value_ns: ts(TIMERS + k * 32 + 16),
        overrun,
    })
    .collect()
}

/// Queued signals, as the image keeps them.
pub fn pending(tid: i32, shared: bool) -> io::Result<Vec<SigInfo>> {
    Ok(ptrace::peek_signals(tid, shared)?
        .into_iter()
        .map(|s| SigInfo(s.to_vec()))
        .collect())
}

/// A thread from its stop, its /proc files and what it was asked.
pub fn thread(pid: i32, task: &crate::tracer::Task, st: &Status, asked: &AskedThread, all_cpus: &[u64]) -> io::Result<Thread> {
    let tid = task.tid;
    if st.seccomp != 0 {
        return Err(io::Error::other(format!(
            "task {tid} runs under a seccomp filter, which cannot move"
        )));
    }
    let (ptr, size, sig) = ptrace::rseq(tid).unwrap_or_default();
    let mut regs = task.regs;
    const RESTART_SYSCALL: u64 = 219;
    if regs.rax as i64 == -516 && regs.orig_rax == RESTART_SYSCALL {
        let mut code = [0u8; 48];
        let read = || {
            let at = regs.rip.wrapping_sub(48);
            crate::sys::mem::read(pid, at, &mut code)
                .ok()
                .and_then(|()| crate::arch::restarted_call(&code))
        };
        match crate::tracer::interrupted_call(tid, &regs).or_else(read) {
            Some(nr) => regs.orig_rax = nr,
            // What the kernel itself answers when it has lost the restart block.
            None => regs.rax = -i64::from(libc::EINTR) as u64,
        }
    }
    Ok(Thread {
        tid: st.inner_pid(),
        regs,
        xstate: ptrace::xstate(tid)?,
        sigmask: ptrace::sigmask(tid)?,
        pending: pending(tid, false)?,
        altstack: asked.altstack,
        tid_address: asked.tid_address,
        robust_list: misc::robust_list(tid).unwrap_or_default(),
        rseq: (ptr != 0).then_some(Rseq {
            address: ptr,
            len: size,
            signature: sig,
        }),
        comm: st.name.clone(),
        creds: Creds {
            uids: st.uids,
            gids: st.gids,
            groups: st.groups.clone(),
            caps: st.caps,
            securebits: asked.securebits,
            no_new_privs: st.no_new_privs,
        },
        sched: misc::sched(tid, all_cpus)?,
        pdeathsig: asked.pdeathsig,
        personality: asked.personality,
        timerslack_ns: asked.timerslack_ns,
        tsc: asked.tsc,
        cpuid_enabled: asked.cpuid_enabled,
    })
}

/// The address-space layout with the current break; 0 when it is not known, as only the process itself can be asked for it.
pub fn layout(p: &Proc, brk: u64) -> Layout {
    Layout {
        brk: brk.max(p.stat.layout.start_brk),
        ..p.stat.layout
    }
}

/// /proc/PID/limits.
pub fn rlimits(pid: i32) -> io::Result<Vec<(u64, u64)>> {
    Ok(timers::limits(&procfs::read(pid, "limits")?)?)
}

//! Threads and processes of the copy: everything the kernel keeps of them, set from the inside.

use super::pilots::Batch;
use crate::{
    arch,
    image::{ITimer, Process, SigInfo, Thread, Tree},
    sys::misc::SchedAttr,
};

const PR_SET_NAME: u64 = 15;
const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_DUMPABLE: u64 = 4;
const PR_CAPBSET_DROP: u64 = 24;
const PR_SET_TSC: u64 = 26;
const PR_SET_SECUREBITS: u64 = 28;
const PR_SET_TIMERSLACK: u64 = 29;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const PR_CAP_AMBIENT: u64 = 47;
const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_SET_CPUID: u64 = 0x1012;
const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
/// SECBIT_NO_SETUID_FIXUP | SECBIT_KEEP_CAPS: uids may change without the kernel adjusting capabilities.
const SECBITS_WHILE: u64 = 4 | 16;

/// What belongs to the process, run by its leader. `zombies`: children that were just ended and left a SIGCHLD.
pub fn process(p: &Process, tree: &Tree, zombies: usize) -> Batch {
    let mut b = Batch::new();
    let mut path = p.cwd.path.clone();
    path.push(0);
    let cwd = b.data(&path);
    b.call(format!("chdir {}", String::from_utf8_lossy(&p.cwd.path)), libc::SYS_chdir, &[cwd]);
    b.call("umask", libc::SYS_umask, &[p.umask as u64]);
    if p.subreaper {
        b.call("PR_SET_CHILD_SUBREAPER", libc::SYS_prctl, &[PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0]);
    }
    let mm = &tree.mms[p.mm as usize];
    if mm.xcomp_perm & arch::XFEATURE_AMX != 0 {
        b.call("ARCH_REQ_XCOMP_PERM for AMX", libc::SYS_arch_prctl, &[ARCH_REQ_XCOMP_PERM, 18]);
    }
    if zombies > 0 {
        let all = b.data(&u64::MAX.to_le_bytes());
        let now = b.data(&[0; 16]);
        for _ in 0..zombies {
            b.try_call("drain SIGCHLD", libc::SYS_rt_sigtimedwait, &[all, 0, now, 8]);
        }
    }
    for (i, a) in p.sigactions.iter().enumerate() {
        let signal = i as u64 + 1;
        // Default ones too: the pilots inherit the agent's.
        if matches!(signal as i32, libc::SIGKILL | libc::SIGSTOP) {
            continue;
        }
        let mut s = Vec::with_capacity(32);
        for v in [a.handler, a.flags, a.restorer, a.mask] {
            s.extend_from_slice(&v.to_le_bytes());
        }
        let at = b.data(&s);
        b.call(format!("rt_sigaction {signal}"), libc::SYS_rt_sigaction, &[signal, at, 0, 8]);
    }
    for info in &p.pending {
        if let Some((signal, at)) = queueable(&mut b, info) {
            b.call("queue a signal", libc::SYS_rt_sigqueueinfo, &[p.pid as u64, signal, at]);
        }
    }
    timers(&mut b, p);
    for t in p.timers.iter().filter(|t| t.value_ns != 0) {
        let spec = b.data(&timespecs(&[t.interval_ns, t.value_ns]));
        b.call("timer_settime", libc::SYS_timer_settime, &[t.id as u64, 0, spec, 0]);
    }
    for (i, t) in p.itimers.iter().enumerate() {
        let Some(value_us) = due(i, t) else { continue };
        let mut s = Vec::new();
        for us in [t.interval_us, value_us] {
            s.extend_from_slice(&(us / 1_000_000).to_le_bytes());
            s.extend_from_slice(&(us % 1_000_000).to_le_bytes());
        }
        let at = b.data(&s);
        b.call("setitimer", libc::SYS_setitimer, &[i as u64, at, 0]);
    }
    for (i, (soft, hard)) in p.rlimits.iter().enumerate() {
        let at = b.data(&[soft.to_le_bytes(), hard.to_le_bytes()].concat());
        b.call(format!("prlimit {i}"), libc::SYS_prlimit64, &[0, i as u64, at, 0]);
    }
    b
}

/// When an interval timer goes off next, in microseconds; `None` for one that is not armed.
///
/// ITIMER_REAL has no time left while its signal waits to be taken: the kernel starts the next interval only then. Set to the shortest time
/// it goes off at once, its signal is one with the waiting one that was queued before, and the next interval starts when that is taken.
fn due(which: usize, t: &ITimer) -> Option<u64> {
    const ITIMER_REAL: usize = libc::ITIMER_REAL as usize;
    match t.value_us {
        0 if which == ITIMER_REAL && t.interval_us != 0 => Some(1),
        0 => None,
        value => Some(value),
    }
}

/// PR_TIMER_CREATE_RESTORE_IDS, Linux 6.16: timer_create takes the id it is given.
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

/// Whether this kernel can make a timer with a given id at once.
pub fn timer_ids_can_be_chosen() -> bool {
    crate::sys::misc::prctl(PR_TIMER_CREATE_RESTORE_IDS as i32, 2) >= 0
}

/// Highest timer id that can be reached by making and deleting all before it, on kernels without [`timer_ids_can_be_chosen`].
pub const MAX_COUNTED_TIMER: i32 = 4096;

/// Makes the timers under their ids.
fn timers(b: &mut Batch, p: &Process) {
    let Some(last) = p.timers.iter().map(|t| t.id).max() else { return };
    let chosen = timer_ids_can_be_chosen();
    // Ascending, as they were made: /proc/PID/timers shows the order.
    let mut ids: Vec<i32> = if chosen {
        p.timers.iter().map(|t| t.id).collect()
    } else {
        (0..=last).collect()
    };
    ids.sort_unstable();
    if chosen {
        b.call("choose timer ids", libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0]);
    }
    // Without it the kernel counts a process's timers from 0: make them all, keep the wanted.
    for &id in &ids {
        let t = p.timers.iter().find(|t| t.id == id);
        let mut ev = Vec::with_capacity(64);
        ev.extend_from_slice(&t.map_or(0, |t| t.sigval).to_le_bytes());
        ev.extend_from_slice(&t.map_or(0, |t| t.signal).to_le_bytes());
        ev.extend_from_slice(&t.map_or(1, |t| t.notify).to_le_bytes());
        ev.extend_from_slice(&t.map_or(0, |t| t.tid).to_le_bytes());
        ev.resize(64, 0);
        let ev = b.data(&ev);
        let out = b.data(&(id as u64).to_le_bytes());
        let clock = t.map_or(libc::CLOCK_MONOTONIC, |t| t.clock);
        b.call(
            format!("timer_create {id}"),
            libc::SYS_timer_create,
            &[clock as u32 as u64, ev, out],
        );
    }
    if chosen {
        b.call("count timer ids again", libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0]);
    }
    for id in ids.into_iter().filter(|id| !p.timers.iter().any(|t| t.id == *id)) {
        b.call("timer_delete", libc::SYS_timer_delete, &[id as u64]);
    }
}

fn timespecs(ns: &[u64]) -> Vec<u8> {
    ns.iter()
        .flat_map(|n| [(n / 1_000_000_000).to_le_bytes(), (n % 1_000_000_000).to_le_bytes()].concat())
        .collect()
}

fn queueable(b: &mut Batch, info: &SigInfo) -> Option<(u64, u64)> {
    let signal = i32::from_le_bytes(info.0.get(..4)?.try_into().ok()?);
    if info.0.len() != 128 || !(1..=64).contains(&signal) || matches!(signal, libc::SIGKILL | libc::SIGSTOP) {
        return None;
    }
    Some((signal as u64, b.data(&info.0)))
}

/// What belongs to a thread, run by itself. Its credentials come last, because everything before may need root's.
pub fn thread(t: &Thread, p: &Process, last_cap: u32, bounding: u64, leader: bool, dumpable: u8) -> Batch {
    let mut b = Batch::new();
    let mut comm = t.comm.clone().into_bytes();
    comm.resize(16, 0);
    comm[15] = 0;
    let comm = b.data(&comm);
    b.call("PR_SET_NAME", libc::SYS_prctl, &[PR_SET_NAME, comm]);
    b.call("ARCH_SET_FS", libc::SYS_arch_prctl, &[ARCH_SET_FS, t.regs.fs_base]);
    b.call("ARCH_SET_GS", libc::SYS_arch_prctl, &[ARCH_SET_GS, t.regs.gs_base]);
    b.call("set_tid_address", libc::SYS_set_tid_address, &[t.tid_address]);
    if t.robust_list.0 != 0 {
        b.call("set_robust_list", libc::SYS_set_robust_list, &[t.robust_list.0, t.robust_list.1]);
    }
    if let Some(r) = &t.rseq {
        // Tried elsewhere: the real one is registered after the release, when nobody can take it back any more.
        const RSEQ_FLAG_UNREGISTER: u64 = 1;
        let area = b.data_aligned(&vec![0; r.len.min(4096) as usize], 32);
        for (what, flags) in [("register rseq", 0), ("unregister rseq", RSEQ_FLAG_UNREGISTER)] {
            b.call(what, libc::SYS_rseq, &[area, r.len as u64, flags, r.signature as u64]);
        }
    }
    let s = &t.sched;
    let attr = SchedAttr {
        size: 48,
        policy: s.policy,
        // Only SCHED_FLAG_RESET_ON_FORK and the deadline flags are states; the others are commands.
        flags: s.flags & 7,
        nice: s.nice,
        priority: s.priority,
        runtime: if s.policy == 6 { s.deadline.0 } else { 0 },
        deadline: s.deadline.1,
        period: s.deadline.2,
    };
    let at = b.data(&attr.to_bytes());
    b.call("sched_setattr", libc::SYS_sched_setattr, &[0, at, 0]);
    if !matches!(s.policy as i32, libc::SCHED_OTHER | libc::SCHED_BATCH) {
        // The niceness does not count now, and is left as it is by the call before.
        b.call("setpriority", libc::SYS_setpriority, &[libc::PRIO_PROCESS as u64, 0, s.nice as u64]);
    }
    if s.ioprio != 0 {
        b.call("ioprio_set", libc::SYS_ioprio_set, &[1, 0, s.ioprio as u64]);
    }
    {
        // "All" is every cpu of this host, not what this agent happens to be bound to.
        let bytes: Vec<u8> = s
            .affinity
            .as_ref()
            .map_or_else(|| vec![0xff; 128], |mask| mask.iter().flat_map(|w| w.to_le_bytes()).collect());
        let at = b.data(&bytes);
        b.call("sched_setaffinity", libc::SYS_sched_setaffinity, &[0, bytes.len() as u64, at]);
    }
    if t.timerslack_ns != 0 {
        b.call("PR_SET_TIMERSLACK", libc::SYS_prctl, &[PR_SET_TIMERSLACK, t.timerslack_ns]);
    }
    if t.tsc == 2 {
        b.call("PR_SET_TSC", libc::SYS_prctl, &[PR_SET_TSC, 2]);
    }
    if !t.cpuid_enabled {
        b.call("ARCH_SET_CPUID", libc::SYS_arch_prctl, &[ARCH_SET_CPUID, 0]);
    }
    b.call("personality", libc::SYS_personality, &[t.personality as u64]);
    for info in &t.pending {
        if let Some((signal, at)) = queueable(&mut b, info) {
            b.call(
                "queue a signal",
                libc::SYS_rt_tgsigqueueinfo,
                &[p.pid as u64, t.tid as u64, signal, at],
            );
        }
    }
    if arch::xstate_bv(&t.xstate) & arch::XFEATURE_AMX != 0 {
        // struct tile_config: palette 1, tile 0 of 1 row, 64 bytes.
        let mut cfg = [0u8; 64];
        cfg[0] = 1;
        cfg[16] = 64;
        cfg[48] = 1;
        let at = b.data(&cfg);
        b.pseudo("allocate AMX state", arch::pilot::AMX, at);
    }
    creds(&mut b, t, last_cap, bounding);
    if leader && dumpable < 2 {
        b.call("PR_SET_DUMPABLE", libc::SYS_prctl, &[PR_SET_DUMPABLE, dumpable as u64]);
    }
    // Any change of credentials clears it, so it comes after them.
    // The root's parent stays behind; armed here, it would end the program together with this agent.
    if t.pdeathsig != 0 && p.parent.is_some() {
        b.call("PR_SET_PDEATHSIG", libc::SYS_prctl, &[PR_SET_PDEATHSIG, t.pdeathsig as u64]);
    }
    b
}

fn creds(b: &mut Batch, t: &Thread, last_cap: u32, bounding: u64) {
    let c = &t.creds;
    let groups: Vec<u8> = c.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
    let at = b.data(&groups);
    b.call("setgroups", libc::SYS_setgroups, &[c.groups.len() as u64, at]);
    b.call("set securebits", libc::SYS_prctl, &[PR_SET_SECUREBITS, SECBITS_WHILE]);
    for cap in (0..=last_cap as u64).filter(|cap| bounding & !c.caps[3] & 1 << cap != 0) {
        b.call(
            format!("drop capability {cap} from the bounding set"),
            libc::SYS_prctl,
            &[PR_CAPBSET_DROP, cap],
        );
    }
    let id = |v: u32| v as u64;
    b.call("setresgid", libc::SYS_setresgid, &[id(c.gids[0]), id(c.gids[1]), id(c.gids[2])]);
    b.try_call("setfsgid", libc::SYS_setfsgid, &[id(c.gids[3])]);
    b.call("setresuid", libc::SYS_setresuid, &[id(c.uids[0]), id(c.uids[1]), id(c.uids[2])]);
    b.try_call("setfsuid", libc::SYS_setfsuid, &[id(c.uids[3])]);
    // _LINUX_CAPABILITY_VERSION_3, this thread
    let header = b.data(&[0x2008_0522u32.to_le_bytes(), 0u32.to_le_bytes()].concat());
    let capset = |b: &mut Batch, what: &str, eff: u64, perm: u64, inh: u64| {
        let mut d = Vec::with_capacity(24);
        for half in [0, 32] {
            for v in [eff, perm, inh] {
                d.extend_from_slice(&((v >> half) as u32).to_le_bytes());
            }
        }
        let d = b.data(&d);
        b.call(what, libc::SYS_capset, &[header, d]);
    };
    // CAP_SETPCAP is needed until the securebits are final.
    const SETPCAP: u64 = 1 << 8;
    let [inh, perm, eff, _, ambient] = c.caps;
    capset(b, "set inheritable capabilities", eff | SETPCAP, perm | SETPCAP, inh);
    for cap in (0..=last_cap as u64).filter(|cap| ambient & 1 << cap != 0) {
        b.call("raise an ambient capability", libc::SYS_prctl, &[PR_CAP_AMBIENT, 2, cap, 0, 0]);
    }
    b.call("set securebits", libc::SYS_prctl, &[PR_SET_SECUREBITS, c.securebits as u64]);
    capset(b, "set capabilities", eff, perm, inh);
    if c.no_new_privs {
        b.call("PR_SET_NO_NEW_PRIVS", libc::SYS_prctl, &[PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_whose_signal_waits_goes_on() {
        let timer = |value_us, interval_us| ITimer { value_us, interval_us };
        assert_eq!(due(0, &timer(0, 20_000)), Some(1));
        // The kernel forgets the interval of a disarmed ITIMER_REAL, and keeps that of the others.
        assert_eq!(due(0, &timer(0, 0)), None);
        assert_eq!(due(1, &timer(0, 20_000)), None);
        assert_eq!(due(2, &timer(5, 20_000)), Some(5));
    }
}

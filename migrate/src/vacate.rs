//! Getting the threads of a stopped tree out of the vdso before they are read.
//!
//! Code of the vdso reads data of its kernel, so a thread may not be stopped in the middle of it when it goes on on another kernel. Nearly always
//! it is enough to let such a thread go on for some microseconds, but a program that does nothing but look at the clock is inside again each
//! time. So meanwhile the functions are turned into plain system calls: what is inside runs to its end, and what calls anew is either in
//! the kernel or in one of a few instructions from which it can be taken back or forth ([`crate::arch::vdso::settle`]).
//!
//! Tried on paper and dropped: single steps. A task whose tracer dies in the middle of one is killed by the SIGTRAP that is left; and a step in
//! a task that blocks or ignores SIGTRAP changes its mask and its handler. What is done here leaves a healthy program at every instant: an
//! agent that is killed leaves slower clocks behind, and the next freeze puts them right.
//!
//! Threads run here after they had been stopped, so the freeze has to search the tree again afterwards.

use crate::{
    arch::vdso::{self, Detour, HEAD, Head, Spot},
    dump::vdso::{Own, head, known_at, own},
    image::Regs,
    procfs,
    sys::{
        mem::{self, Mem},
        ptrace,
    },
    tracer::{Proc, Task, note_call, wait_stop_once},
};
use std::{
    io,
    time::{Duration, Instant},
};

/// How long threads are let go on again and again when none comes out. After it the freeze fails with a blocker that passes by itself.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long they run each time, at first.
const MOMENT: Duration = Duration::from_micros(20);
/// How long they may take to stop again.
const SOON: Duration = Duration::from_millis(5);
/// How many are let go on at once: more would wait for a cpu, and run no instruction before they are stopped again.
const AT_ONCE: usize = 8;

/// When to give up.
#[derive(Debug)]
pub struct Patience(Instant);

impl Patience {
    /// From now on.
    pub fn new() -> Self {
        Patience(Instant::now() + PATIENCE)
    }
    fn renew(&mut self) {
        *self = Self::new();
    }
    fn ended(&self) -> bool {
        Instant::now() > self.0
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self::new()
    }
}

enum Kind {
    /// The vdso of this kernel; the detour, if it has room for one, and the bytes that it replaces.
    Native(Option<Detour>),
    /// The proxy of another's, with the real one beside it.
    Proxy(Head),
}

/// What there is of a vdso in a process.
struct Place {
    pid: i32,
    at: u64,
    kind: Kind,
    /// Ranges in which a thread may not be.
    inside: Vec<(u64, u64)>,
    /// Addresses in them where it may: the first instruction of a function.
    entries: Vec<u64>,
    spots: Vec<Spot>,
    /// The functions are system calls at present.
    diverted: bool,
}

/// Reads a process's vdso. `None`: it has none that this kernel or an earlier migration gave it.
fn examine(pid: i32, own: &Own) -> Option<Place> {
    let functions = own.functions.as_ref().ok()?;
    let at = known_at(&procfs::read(pid, "auxv").ok()?)?;
    let len = own.vdso.code.len();
    if let Some(head) = head(pid, at) {
        let diverted = head.entries.iter().any(|e| {
            let fallback = at - HEAD + e.fallback as u64;
            e.leads_to == fallback && e.name.is_some_and(|n| functions.iter().any(|f| f.name == n))
        });
        return Some(Place {
            pid,
            at,
            inside: vec![(at - HEAD, at + head.layout[2]), (head.real, head.real + len as u64)],
            entries: head.entries.iter().map(|e| at + u64::from(e.at)).collect(),
            spots: head.spots(at),
            kind: Kind::Proxy(head),
            diverted,
        });
    }
    let mut code = vec![0; len];
    mem::read(pid, at, &mut code).ok()?;
    let (mut like, mut diverted) = (code.clone(), false);
    for f in functions.iter().filter(|f| f.has_call()) {
        let r = f.at as usize..f.at as usize + vdso::JUMP;
        diverted |= code[r.clone()] != own.vdso.code[r.clone()];
        like[r.clone()].copy_from_slice(&own.vdso.code[r]);
    }
    if like[..own.used] != own.vdso.code[..own.used] {
        return None;
    }
    // The stub of the injector has its place before the detour's.
    let room = own.used.next_multiple_of(64) + crate::arch::inject_stub::MAX + vdso::DETOUR <= len;
    let detour = room.then(|| vdso::detour(len, functions));
    Some(Place {
        pid,
        at,
        inside: vec![(at, at + len as u64)],
        entries: functions.iter().map(|f| at + u64::from(f.at)).collect(),
        spots: detour.as_ref().map_or_else(Vec::new, |d| d.spots(at)),
        kind: Kind::Native(detour),
        diverted,
    })
}

impl Place {
    fn is_inside(&self, rip: u64) -> bool {
        self.inside.iter().any(|r| (r.0..r.1).contains(&rip)) && !self.entries.contains(&rip)
    }

    /// Turns functions into system calls. Every thread of the process is stopped. False: not now, or not here.
    fn divert(&self, tasks: &[Task], own: &Own) -> io::Result<bool> {
        let mem = Mem::open(self.pid)?;
        match &self.kind {
            Kind::Native(None) => return Ok(false),
            Kind::Native(Some(d)) => {
                let at = |o: u64| self.at + o;
                // Nobody may be in the bytes that change: those of the jumps, and the stub by which an earlier injection leaves.
                let taken = |rip: u64| {
                    let jump = |j: &(u32, _)| (at(j.0.into()) + 1..at(j.0.into()) + vdso::JUMP as u64).contains(&rip);
                    d.jumps.iter().any(jump) || (at(own.used as u64)..at(own.vdso.layout[2])).contains(&rip)
                };
                if tasks.iter().any(|t| taken(t.regs.rip)) {
                    return Ok(false);
                }
                mem.write(at(d.stubs.0 as u64), &d.stubs.1)?;
                for (f, jump) in &d.jumps {
                    mem.write(at((*f).into()), jump)?;
                }
            }
            Kind::Proxy(h) => {
                for e in &h.entries {
                    let fallback = self.at - HEAD + e.fallback as u64;
                    if e.name.is_some() {
                        mem.write(self.at - HEAD + e.target as u64, &fallback.to_le_bytes())?;
                    }
                }
            }
        }
        Ok(true)
    }

    /// Undoes it. The stubs stay, should a signal handler return to them.
    fn undo(&self, own: &Own) -> io::Result<()> {
        let mem = Mem::open(self.pid)?;
        for f in own.functions.iter().flatten().filter(|f| f.has_call()) {
            match &self.kind {
                Kind::Native(_) => {
                    let r = f.at as usize..f.at as usize + vdso::JUMP;
                    mem.write(self.at + u64::from(f.at), &own.vdso.code[r])?;
                }
                Kind::Proxy(h) => {
                    for e in h.entries.iter().filter(|e| e.name == Some(f.name.as_str())) {
                        let target = h.real + u64::from(f.at);
                        mem.write(self.at - HEAD + e.target as u64, &target.to_le_bytes())?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Gets everyone out. `None`: nobody was inside, and every vdso is as it was. Else threads have run meanwhile, so the tree has to be searched
/// again; those that did not stop again soon are taken off the list of their process and returned with its index, for the caller to wait for.
pub fn pass(procs: &mut [Proc], patience: &mut Patience) -> io::Result<Option<Vec<(usize, i32)>>> {
    let own = own()?;
    let mut ran = false;
    let mut late = Vec::new();
    for (i, p) in procs.iter_mut().enumerate() {
        let mut moment = MOMENT;
        while let Some(place) = (!p.is_zombie()).then(|| examine(p.pid, own)).flatten() {
            let inside = settle(p, &place)?;
            if inside.is_empty() || patience.ended() {
                if place.diverted {
                    place.undo(own)?;
                }
                break;
            }
            if !place.diverted {
                place.divert(&p.tasks, own)?;
            }
            ran = true;
            let slow = let_on(p, &inside[..inside.len().min(AT_ONCE)], moment);
            late.extend(slow.into_iter().map(|tid| (i, tid)));
            let still = settle(p, &place)?;
            if still.len() < inside.len() {
                patience.renew();
            } else {
                // It may not have got a cpu yet.
                moment = (moment * 2).min(MOMENT * 64);
            }
        }
    }
    Ok(ran.then_some(late))
}

/// Puts those right that can be, and returns the threads that are inside still.
fn settle(p: &mut Proc, place: &Place) -> io::Result<Vec<i32>> {
    let mut inside = Vec::new();
    for t in p.tasks.iter_mut().filter(|t| native(&t.regs)) {
        if let Some(r) = vdso::settle(&t.regs, &place.spots, |sp| mem::word(place.pid, sp)) {
            ptrace::set_regs(t.tid, &r)?;
            t.regs = r;
        }
        if !t.group_stopped && place.is_inside(t.regs.rip) {
            inside.push(t.tid);
        }
    }
    Ok(inside)
}

/// Lets threads go on for a moment and stops them again. Those that have ended are taken off the list, and so are those that do not stop soon
/// (in vfork, for example), which are returned.
fn let_on(p: &mut Proc, tids: &[i32], moment: Duration) -> Vec<i32> {
    let mut waiting: Vec<i32> = tids.iter().copied().filter(|tid| ptrace::cont(*tid, 0).is_ok()).collect();
    let end = Instant::now() + moment;
    while Instant::now() < end {
        std::thread::yield_now();
    }
    for tid in &waiting {
        let _ = ptrace::interrupt(*tid);
    }
    let end = Instant::now() + SOON;
    while !waiting.is_empty() && Instant::now() < end {
        waiting.retain(|&tid| {
            let stop = wait_stop_once(tid).unwrap_or(Some(None));
            let Some(stop) = stop else { return true };
            let now = stop.and_then(|group| Some((group, ptrace::regs(tid).ok()?)));
            match (now, p.tasks.iter_mut().find(|t| t.tid == tid)) {
                (Some((group_stopped, regs)), Some(t)) => {
                    note_call(tid, &regs);
                    (t.regs, t.group_stopped) = (regs, group_stopped);
                }
                _ => p.tasks.retain(|t| t.tid != tid),
            }
            false
        });
        std::thread::yield_now();
    }
    p.tasks.retain(|t| !waiting.contains(&t.tid));
    waiting
}

fn native(r: &Regs) -> bool {
    r.cs == 0x33
}

/// Whether a thread of a stopped process is inside after all, or is about to run a signal handler that returns there.
///
/// Handlers that have gone further are not looked for: their frame lies anywhere on a stack. See docs/internals.md for what they meet.
pub fn left_inside(p: &Proc) -> Option<i32> {
    let place = examine(p.pid, own().ok()?)?;
    // struct rt_sigframe at rsp: return address, ucontext; in it rip and, two words on, cs and ss of the interrupted code.
    const RIP: u64 = 176;
    let frame = |r: &Regs| -> Option<u64> {
        let mut b = [0; 24];
        mem::read(p.pid, r.rsp + RIP, &mut b).ok()?;
        (b[16..18] == [0x33, 0] && b[22..] == [0x2b, 0]).then(|| u64::from_le_bytes(b[..8].try_into().unwrap_or_default()))
    };
    let inside = |t: &&Task| native(&t.regs) && (place.is_inside(t.regs.rip) || frame(&t.regs).is_some_and(|rip| place.is_inside(rip)));
    p.tasks.iter().find(inside).map(|t| t.tid)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{dump::vdso::own, procfs::maps, tracer::Frozen};

    /// A child of this process that calls a function for ever, ended when dropped.
    pub(crate) struct Child(pub i32);

    impl Child {
        pub fn new(mut f: impl FnMut()) -> Child {
            // SAFETY: the child calls nothing but `f`, which makes system calls and takes no lock.
            match unsafe { libc::fork() } {
                0 => loop {
                    f();
                },
                pid => Child(pid),
            }
        }
    }

    impl Drop for Child {
        fn drop(&mut self) {
            let _ = crate::sys::misc::kill(self.0, libc::SIGKILL);
            let _ = crate::sys::misc::reap(self.0);
        }
    }

    fn look_at_the_clock() {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: t outlives the call.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
        std::hint::black_box(t);
    }

    fn vdso_of(pid: i32) -> (u64, Vec<u8>) {
        let m = maps::maps(pid).unwrap().into_iter().find(|m| m.name == b"[vdso]").unwrap();
        let mut code = vec![0; (m.end - m.start) as usize];
        mem::read(pid, m.start, &mut code).unwrap();
        (m.start, code)
    }

    #[test]
    fn nobody_is_stopped_in_the_middle() {
        let child = Child::new(look_at_the_clock);
        let own = own().unwrap();
        let entries: Vec<u64> = own.functions.iter().flatten().map(|f| f.at.into()).collect();
        let mut worst = Duration::ZERO;
        for _ in 0..300 {
            let since = Instant::now();
            let f = match Frozen::freeze(child.0, Duration::from_secs(5)) {
                Ok(f) => f,
                // No right to trace.
                Err(e) => return eprintln!("skipped: {e}"),
            };
            worst = worst.max(since.elapsed());
            let (at, code) = vdso_of(child.0);
            let rip = f.procs[0].tasks[0].regs.rip;
            let inside = (at..at + code.len() as u64).contains(&rip) && !entries.contains(&rip.wrapping_sub(at));
            assert!(!inside, "at {:#x} of the vdso", rip - at);
            assert_eq!(left_inside(&f.procs[0]), None);
            assert!(code[..own.used] == own.vdso.code[..own.used], "the vdso is as it was");
            drop(f);
        }
        eprintln!("300 freezes, the longest {worst:?}");
    }

    /// An agent died after it had turned the functions into system calls: the program runs, and the next freeze puts them right.
    #[test]
    fn what_a_dead_agent_left_is_put_right() {
        let child = Child::new(look_at_the_clock);
        let own = own().unwrap();
        let Ok(mut f) = Frozen::freeze(child.0, Duration::from_secs(5)) else {
            return;
        };
        let place = examine(child.0, own).unwrap();
        if !place.divert(&f.procs[0].tasks, own).unwrap() {
            return;
        }
        f.thaw();
        drop(f);
        std::thread::sleep(Duration::from_millis(20));
        assert!(examine(child.0, own).unwrap().diverted);
        let f = Frozen::freeze(child.0, Duration::from_secs(5)).unwrap();
        assert!(!examine(child.0, own).unwrap().diverted);
        assert_eq!(left_inside(&f.procs[0]), None);
    }

    /// Not a test: what [`agents_die_while_they_freeze_it`] kills.
    #[test]
    #[ignore = "run by another test"]
    fn agent() {
        let Some(pid) = std::env::var("MIGRATE_TEST_FREEZE").ok().and_then(|p| p.parse().ok()) else {
            return;
        };
        while let Ok(f) = Frozen::freeze(pid, Duration::from_secs(5)) {
            drop(f);
        }
    }

    /// A page that this process shares with its children.
    fn shared() -> &'static [std::sync::atomic::AtomicU64; 2] {
        // SAFETY: a fresh page of zeros that stays mapped.
        unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            let p = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(p, libc::MAP_FAILED);
            &*p.cast()
        }
    }

    #[test]
    fn agents_die_while_they_freeze_it() {
        use std::sync::atomic::Ordering::SeqCst;
        let [rounds, wrong] = shared();
        let mut last = 0;
        let child = Child::new(move || {
            let now = crate::sys::misc::clock_ns(libc::CLOCK_MONOTONIC);
            if now < last {
                wrong.store(now, SeqCst);
            }
            last = now;
            rounds.fetch_add(1, SeqCst);
        });
        if Frozen::freeze(child.0, Duration::from_secs(5)).is_err() {
            return;
        }
        let mut seed = u64::from(std::process::id()) | 1;
        for n in 0..60 {
            let mut agent = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "vacate::tests::agent"])
                .env("MIGRATE_TEST_FREEZE", child.0.to_string())
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            std::thread::sleep(Duration::from_millis(20) + Duration::from_micros(seed >> 50));
            let _ = agent.kill();
            let _ = agent.wait();
            let before = rounds.load(SeqCst);
            let end = Instant::now() + Duration::from_secs(10);
            while rounds.load(SeqCst) < before + 100 && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(
                rounds.load(SeqCst) >= before + 100,
                "after {n} agents it does not go on: {:?}",
                procfs::read(child.0, "status")
            );
            assert_eq!(wrong.load(SeqCst), 0, "its clock went back");
        }
        // What the last one left is put right.
        drop(Frozen::freeze(child.0, Duration::from_secs(5)).unwrap());
        assert!(!examine(child.0, own().unwrap()).unwrap().diverted);
    }
}

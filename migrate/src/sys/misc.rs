//! Small calls about tasks and about this process.

use super::check;
use crate::image::Sched;
use std::io;

/// get_robust_list(2).
pub fn robust_list(tid: i32) -> io::Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both out-pointers outlive the call.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) })?;
    Ok((head, len))
}

/// `struct sched_attr` (sched_setattr(2)), first version.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct SchedAttr {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}
const _: () = assert!(size_of::<SchedAttr>() == 48);

impl SchedAttr {
    /// Bytes as the kernel reads them.
    pub fn to_bytes(self) -> [u8; 48] {
        let mut b = [0; 48];
        b[0..4].copy_from_slice(&self.size.to_le_bytes());
        b[4..8].copy_from_slice(&self.policy.to_le_bytes());
        b[8..16].copy_from_slice(&self.flags.to_le_bytes());
        b[16..20].copy_from_slice(&self.nice.to_le_bytes());
        b[20..24].copy_from_slice(&self.priority.to_le_bytes());
        b[24..32].copy_from_slice(&self.runtime.to_le_bytes());
        b[32..40].copy_from_slice(&self.deadline.to_le_bytes());
        b[40..48].copy_from_slice(&self.period.to_le_bytes());
        b
    }
}

/// sched_setattr(2).
pub fn set_sched(tid: i32, attr: SchedAttr) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes of `attr` as its size says.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const attr, 0) }).map(drop)
}

/// Scheduling of a task: sched_getattr(2), getpriority(2), ioprio_get(2), sched_getaffinity(2).
pub fn sched(tid: i32, all_cpus: &[u64]) -> io::Result<Sched> {
    let mut a = SchedAttr::default();
    // SAFETY: the kernel writes at most 48 bytes into `a`.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut a, 48, 0) })?;
    // A policy of real time has a niceness too, for when it ends, of which sched_getattr(2) says nothing. The system call answers 20 less it.
    // SAFETY: no pointers.
    let nice = 20 - check(unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid) })? as i32;
    // SAFETY: no pointers.
    let ioprio = check(unsafe { libc::syscall(libc::SYS_ioprio_get, 1, tid) }).unwrap_or(0) as u32;
    let mask = affinity(tid)?;
    let affinity = if mask == all_cpus { None } else { Some(mask) };
    Ok(Sched {
        policy: a.policy,
        flags: a.flags,
        nice,
        priority: a.priority,
        deadline: (a.runtime, a.deadline, a.period),
        ioprio,
        affinity,
    })
}

/// sched_getaffinity(2), trailing zero words trimmed.
pub fn affinity(tid: i32) -> io::Result<Vec<u64>> {
    let mut mask = [0u64; 128];
    // SAFETY: the kernel writes at most the given number of bytes.
    let n = check(unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, size_of_val(&mask), mask.as_mut_ptr()) })? as usize;
    let mut v = mask[..n.div_ceil(8)].to_vec();
    while v.last() == Some(&0) {
        v.pop();
    }
    Ok(v)
}

/// clock_gettime(2), nanoseconds.
pub fn clock_ns(clock: i32) -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: t outlives the call.
    unsafe { libc::clock_gettime(clock, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// kill(2).
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    assert!(pid > 0, "signals go to one process at a time");
    // SAFETY: no pointers.
    check(unsafe { libc::kill(pid, signal) } as i64).map(drop)
}

/// waitpid(2) with WNOHANG for a child of this process: its wait status when it has ended.
pub fn reap(pid: i32) -> io::Result<Option<i32>> {
    let mut status = 0;
    // SAFETY: status outlives the call.
    let r = check(unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG | libc::__WALL) } as i64)?;
    Ok((r != 0).then_some(status))
}

/// Blocks every signal of the calling thread; children it makes inherit that.
pub fn block_all_signals() {
    // SAFETY: set is initialised by sigfillset.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigfillset(&mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// The calling thread's id.
pub fn gettid() -> i32 {
    // SAFETY: no pointers.
    unsafe { libc::gettid() }
}

/// Peak resident memory of this process, bytes.
pub fn peak_rss() -> u64 {
    // SAFETY: a zeroed rusage is valid and outlives the call.
    unsafe {
        let mut u: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut u);
        u.ru_maxrss as u64 * 1024
    }
}

/// Offset of the calling thread's rseq area from its thread pointer, and its length, when glibc registered one.
pub fn own_rseq() -> Option<(u64, u32)> {
    // SAFETY: dlsym of two data symbols that glibc 2.35 and later export; absent ones give null.
    unsafe {
        let off = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()).cast::<u32>();
        if off.is_null() || size.is_null() || *size == 0 {
            return None;
        }
        let tp: u64;
        std::arch::asm!("mov {}, fs:0", out(reg) tp);
        // glibc registers 32 bytes at least, whatever part of them it reports as in use.
        Some((tp.wrapping_add_signed(*off as i64), (*size).max(32)))
    }
}

/// What kcmp(2) compares between two tasks.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Shared {
    Vm = 1,
    Files = 2,
    Fs = 3,
    Sighand = 4,
}

/// kcmp(2): whether two tasks share a resource.
pub fn shares(a: i32, b: i32, what: Shared) -> io::Result<bool> {
    // SAFETY: no pointers for these types.
    check(unsafe { libc::syscall(libc::SYS_kcmp, a, b, what as i32, 0, 0) }).map(|r| r == 0)
}

/// unshare(2).
pub fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::unshare(flags) } as i64).map(drop)
}

/// waitpid(2) for a child of this process, until it ends. A process that is no child returns at once.
pub fn wait(pid: i32) {
    let mut status = 0;
    // SAFETY: status outlives the call.
    while unsafe { libc::waitpid(pid, &mut status, libc::__WALL) } == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) {
    }
}

/// prctl(2) without pointers: its result, or -1.
pub fn prctl(option: i32, arg: u64) -> i32 {
    // SAFETY: used with options that take plain numbers.
    unsafe { libc::prctl(option, arg, 0, 0, 0) }
}

/// Whether this kernel knows MAP_DROPPABLE (Linux 6.11).
pub fn droppable_works() -> bool {
    const MAP_DROPPABLE: i32 = 0x08;
    let flags = MAP_DROPPABLE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping that nobody uses, given back at once.
    unsafe {
        let p = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, flags, -1, 0);
        p != libc::MAP_FAILED && libc::munmap(p, 4096) == 0
    }
}

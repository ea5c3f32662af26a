//! Processes and threads.

use serde::{Deserialize, Serialize};

/// A process: a thread group and what its threads share.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// Thread-group id.
    pub pid: i32,
    /// Index of the parent in [`super::Tree::processes`]; `None` for the root.
    pub parent: Option<u32>,
    /// The thread of the parent that made it, which PR_SET_PDEATHSIG and __WNOTHREAD go by; 0 for the root.
    pub parent_tid: i32,
    /// Process group; 0 when its leader is outside the tree's pid namespace.
    pub pgid: i32,
    /// Session; 0 when its leader is outside the tree's pid namespace.
    pub sid: i32,
    /// The wait status of a process that has exited and was not waited for. Nothing else of it but `pid`, `pgid`, `sid`, `comm` counts.
    pub zombie: Option<i32>,
    /// comm of the leader.
    pub comm: String,
    /// Threads, the leader first.
    pub threads: Vec<Thread>,
    /// Address space.
    pub mm: u32,
    /// File descriptors in ascending order.
    pub fds: Vec<super::Fd>,
    /// Working directory.
    pub cwd: super::FileId,
    /// umask(2).
    pub umask: u32,
    /// Handlers of signals 1 to 64, as rt_sigaction(2) gives them.
    pub sigactions: Vec<SigAction>,
    /// Queued signals of the process, in order.
    pub pending: Vec<SigInfo>,
    /// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
    pub itimers: [ITimer; 3],
    /// POSIX timers (timer_create(2)).
    pub timers: Vec<PosixTimer>,
    /// Resource limits 0 to 15, (soft, hard); u64::MAX is infinity.
    pub rlimits: Vec<(u64, u64)>,
    /// PR_GET_CHILD_SUBREAPER.
    pub subreaper: bool,
    /// Signal sent to the parent at exit (normally SIGCHLD).
    pub exit_signal: i32,
}

/// A thread.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Thread {
    /// Thread id.
    pub tid: i32,
    /// General-purpose registers at the user/kernel border, before any system-call restart was applied.
    pub regs: Regs,
    /// The uncompacted XSAVE area (PTRACE_GETREGSET, NT_X86_XSTATE).
    #[serde(with = "serde_bytes")]
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub sigmask: u64,
    /// Queued signals of the thread, in order.
    pub pending: Vec<SigInfo>,
    /// Alternate signal stack.
    pub altstack: AltStack,
    /// The address set_tid_address(2) or CLONE_CHILD_CLEARTID left.
    pub tid_address: u64,
    /// get_robust_list(2): head and length.
    pub robust_list: (u64, u64),
    /// rseq(2) registration.
    pub rseq: Option<Rseq>,
    /// comm.
    pub comm: String,
    /// Credentials.
    pub creds: Creds,
    /// Scheduling.
    pub sched: Sched,
    /// PR_GET_PDEATHSIG.
    pub pdeathsig: i32,
    /// personality(2).
    pub personality: u32,
    /// PR_GET_TIMERSLACK, nanoseconds.
    pub timerslack_ns: u64,
    /// PR_GET_TSC: 1 enabled, 2 raises SIGSEGV.
    pub tsc: u8,
    /// arch_prctl(ARCH_GET_CPUID).
    pub cpuid_enabled: bool,
}

/// `struct user_regs_struct` of x86-64 (sys/user.h), same names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Regs {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// The kernel's `struct sigaction` (rt_sigaction(2)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SigAction {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// A queued `siginfo_t`, all 128 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigInfo(#[serde(with = "serde_bytes")] pub Vec<u8>);

/// sigaltstack(2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct AltStack {
    pub sp: u64,
    pub flags: i32,
    pub size: u64,
}

/// An rseq(2) registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Rseq {
    pub address: u64,
    pub len: u32,
    pub signature: u32,
}

/// An interval timer: microseconds left and between expiries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ITimer {
    pub value_us: u64,
    pub interval_us: u64,
}

/// A POSIX timer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// timer_t as the kernel numbers it.
    pub id: i32,
    /// Clock id.
    pub clock: i32,
    /// `sigev_notify`: 0 SIGEV_SIGNAL, 1 SIGEV_NONE, 4 SIGEV_THREAD_ID.
    pub notify: i32,
    /// Signal.
    pub signal: i32,
    /// `sigev_value`.
    pub sigval: u64,
    /// Target thread of SIGEV_THREAD_ID, else 0.
    pub tid: i32,
    /// Nanoseconds to the next expiry, 0 when disarmed.
    pub value_ns: u64,
    /// Nanoseconds between expiries.
    pub interval_ns: u64,
    /// timer_getoverrun(2) at the freeze; not restorable, for the report.
    pub overrun: i32,
}

/// Credentials of a thread (credentials(7), capabilities(7)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Creds {
    /// Real, effective, saved and file-system uid.
    pub uids: [u32; 4],
    /// Real, effective, saved and file-system gid.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding and ambient capability sets.
    pub caps: [u64; 5],
    /// PR_GET_SECUREBITS.
    pub securebits: u32,
    /// PR_GET_NO_NEW_PRIVS.
    pub no_new_privs: bool,
}

/// Scheduling of a thread (sched(7)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sched {
    /// Policy: 0 other, 1 fifo, 2 rr, 3 batch, 5 idle, 6 deadline.
    pub policy: u32,
    /// SCHED_FLAG_*.
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Real-time priority.
    pub priority: u32,
    /// Deadline parameters: runtime, deadline, period, in nanoseconds.
    pub deadline: (u64, u64, u64),
    /// ioprio_get(2).
    pub ioprio: u32,
    /// Affinity mask, `None` when every cpu of the host was allowed.
    pub affinity: Option<Vec<u64>>,
}

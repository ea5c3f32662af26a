//! The stub that runs system calls inside a live target, and brings it back by itself if the agent dies.
//!
//! It lives in the zero tail of the target's `[vdso]` page, so no stack of the target is touched. A batch is a table of records in a page that
//! target and agent share. The last record is a *mark*, at which the agent stops the task: `tgkill(self, SIGURG)` or another signal that is ignored by
//! default. Traced it is a stop that hands control to the agent; untraced it does nothing. A task that blocks or handles all such signals makes a call that
//! does nothing instead, and the agent follows its calls (PTRACE_SYSCALL). In either case, if no agent comes, the stub goes on to bring the original context
//! back:
//!
//! - *jump*: munmap the shared table, load every register from immediates, `jmp`. FPU state, signal mask and restart block are
//!   untouched, so even an interrupted nanosleep goes on. One copy of the immediates fits in the tail: it belongs to the leader.
//! - *iret*: the other threads pop their registers from a frame in the shared table and leave with iretq, which restores flags, stack
//!   pointer and instruction pointer at once (Intel SDM vol. 2A, IRET). The table stays mapped then.
//!
//! Tried and dropped:
//!
//! - rt_sigreturn instead of the jump works too but clears the restart block, so a relative sleep would start anew.
//! - A task that blocked all signals *lingered*: it spun for some tens of milliseconds, in which the agent interrupted it. On a busy host the agent was
//!   kept from its cpu for longer, the task went home, and then it was given the registers that it had had before: a stack pointer of the past, and a
//!   return to whatever lay there. Every handler that runs with all signals blocked is such a task. (A futex to wait on would clobber the restart block.)

use super::pilot::Record;
use crate::image::Regs;

/// Bytes of zeros the stub needs at the end of the vdso.
pub const MAX: usize = 512;

/// Machine code and its entry points (offsets from its start).
#[derive(Debug)]
pub struct Stub {
    /// Code.
    pub code: Vec<u8>,
    /// Runs a table: r12 table, r13 records, r15 return frame or 0 for the jump.
    pub run: u64,
    /// One system call with registers as set, its result in r14; then the mark, with tgid r12 and tid r13 if it is a signal; then the jump without munmap.
    pub boot: u64,
    /// Where the mark of boot has been made.
    pub boot_end: u64,
    /// munmap of the table and the jump: the regular way out of the last thread.
    pub exit: u64,
}

/// How a task tells the agent that it has come to a certain point. Nothing comes of it in a task that is not traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// By a signal to itself, which it neither blocks nor handles, and which is ignored by default.
    Signal(i32),
    /// By getpid(2), of an agent who follows its system calls.
    Call,
}

impl Mark {
    /// The system call, by a task with these ids in its own pid namespace.
    pub fn record(self, tgid: i32, tid: i32) -> Record {
        match self {
            Mark::Signal(signal) => Record::new(libc::SYS_tgkill, &[tgid as u64, tid as u64, signal as u64]),
            Mark::Call => Record::new(libc::SYS_getpid, &[]),
        }
    }
}

/// Builds the stub to live at `base`, returning to `back` (already fixed for a restart), with the table at `table`.
pub fn build(base: u64, back: &Regs, table: u64, table_len: u64, mark: Mark) -> Stub {
    let mut c: Vec<u8> = Vec::with_capacity(MAX);
    let imm = |c: &mut Vec<u8>, op: [u8; 2], v: u64| {
        c.extend_from_slice(&op);
        c.extend_from_slice(&v.to_le_bytes());
    };
    let run = 0;
    // run: test r13,r13; jz ret
    c.extend_from_slice(&[0x4d, 0x85, 0xed, 0x74, 0]);
    let jz_ret = c.len();
    // mov rax,[r12]; rdi,[r12+8]; rsi,+16; rdx,+24; r10,+32; r8,+40; r9,+48; syscall; mov [r12+56],rax; add r12,64; dec r13; jmp run
    c.extend_from_slice(&[
        0x49, 0x8b, 0x04, 0x24, 0x49, 0x8b, 0x7c, 0x24, 8, 0x49, 0x8b, 0x74, 0x24, 16, 0x49, 0x8b, 0x54, 0x24, 24,
    ]);
    c.extend_from_slice(&[
        0x4d, 0x8b, 0x54, 0x24, 32, 0x4d, 0x8b, 0x44, 0x24, 40, 0x4d, 0x8b, 0x4c, 0x24, 48, 0x0f, 0x05,
    ]);
    c.extend_from_slice(&[0x49, 0x89, 0x44, 0x24, 56, 0x49, 0x83, 0xc4, 64, 0x49, 0xff, 0xcd, 0xeb]);
    let here = c.len() + 1;
    c.push((run as i64 - here as i64) as i8 as u8);
    c[jz_ret - 1] = (c.len() - jz_ret) as u8;
    // ret: test r15,r15; jz exit
    c.extend_from_slice(&[0x4d, 0x85, 0xff, 0x74, 0]);
    let jz_exit = c.len();
    // mov rsp,r15; pop r15 r14 r13 r12 r11 r10 r9 r8 rbp rdi rsi rdx rcx rbx rax; iretq
    c.extend_from_slice(&[
        0x4c, 0x89, 0xfc, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x41, 0x5b, 0x41, 0x5a, 0x41, 0x59, 0x41, 0x58,
    ]);
    c.extend_from_slice(&[0x5d, 0x5f, 0x5e, 0x5a, 0x59, 0x5b, 0x58, 0x48, 0xcf]);
    c[jz_exit - 1] = (c.len() - jz_exit) as u8;
    // exit: mov eax,11; mov rdi,table; mov rsi,len; syscall; jmp load
    let exit = c.len() as u64;
    c.extend_from_slice(&[0xb8, 11, 0, 0, 0]);
    imm(&mut c, [0x48, 0xbf], table);
    imm(&mut c, [0x48, 0xbe], table_len);
    c.extend_from_slice(&[0x0f, 0x05, 0xeb, 0]);
    let jmp_load = c.len();
    // boot: syscall; mov r14,rax; mov eax,mark; mov rdi,r12; mov rsi,r13; mov edx,signal; syscall
    let boot = c.len() as u64;
    let mark = mark.record(0, 0);
    c.extend_from_slice(&[0x0f, 0x05, 0x49, 0x89, 0xc6, 0xb8]);
    c.extend_from_slice(&(mark.nr as u32).to_le_bytes());
    c.extend_from_slice(&[0x4c, 0x89, 0xe7, 0x4c, 0x89, 0xee, 0xba]);
    c.extend_from_slice(&(mark.args[2] as u32).to_le_bytes());
    c.extend_from_slice(&[0x0f, 0x05]);
    let boot_end = c.len() as u64;
    c[jmp_load - 1] = (c.len() - jmp_load) as u8;
    // load: every register from an immediate
    for (op, v) in [
        ([0x48, 0xb8], back.rax),
        ([0x48, 0xbb], back.rbx),
        ([0x48, 0xb9], back.rcx),
        ([0x48, 0xba], back.rdx),
        ([0x48, 0xbe], back.rsi),
        ([0x48, 0xbf], back.rdi),
        ([0x48, 0xbd], back.rbp),
        ([0x49, 0xb8], back.r8),
        ([0x49, 0xb9], back.r9),
        ([0x49, 0xba], back.r10),
        ([0x49, 0xbb], back.r11),
        ([0x49, 0xbc], back.r12),
        ([0x49, 0xbd], back.r13),
        ([0x49, 0xbe], back.r14),
        ([0x49, 0xbf], back.r15),
    ] {
        imm(&mut c, op, v);
    }
    // lea rsp,[rip+flags]; popfq; mov rsp,imm; jmp [rip+0]; <rip>; align; <flags>
    c.extend_from_slice(&[0x48, 0x8d, 0x25, 0, 0, 0, 0]);
    let lea = c.len();
    c.push(0x9d);
    imm(&mut c, [0x48, 0xbc], back.rsp);
    c.extend_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
    c.extend_from_slice(&back.rip.to_le_bytes());
    while !(base + c.len() as u64).is_multiple_of(8) {
        c.push(0);
    }
    let disp = (c.len() - lea) as i32;
    c[lea - 4..lea].copy_from_slice(&disp.to_le_bytes());
    c.extend_from_slice(&back.eflags.to_le_bytes());
    debug_assert!(c.len() <= MAX);
    Stub {
        code: c,
        run,
        boot,
        boot_end,
        exit,
    }
}

/// The frame that the *iret* way pops: registers in the order of the pops, then rip, cs, flags, rsp, ss.
pub fn iret_frame(r: &Regs) -> [u8; 160] {
    let v = [
        r.r15, r.r14, r.r13, r.r12, r.r11, r.r10, r.r9, r.r8, r.rbp, r.rdi, r.rsi, r.rdx, r.rcx, r.rbx, r.rax, r.rip, r.cs, r.eflags,
        r.rsp, r.ss,
    ];
    let mut b = [0; 160];
    for (i, x) in v.iter().enumerate() {
        b[i * 8..i * 8 + 8].copy_from_slice(&x.to_le_bytes());
    }
    b
}

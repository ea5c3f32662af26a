//! ptrace(2) and waitpid(2), by task. Every call must come from the thread that seized the task.
//!
//! nix's waitpid refuses real-time signals and its register sets lack XSTATE, hence libc.

use super::check;
use crate::image::Regs;
use std::{io, mem::MaybeUninit};

const GETREGSET: u32 = 0x4204;
const SEIZE: u32 = 0x4206;
const INTERRUPT: u32 = 0x4207;
const PEEKSIGINFO: u32 = 0x4209;
const GETSIGMASK: u32 = 0x420a;
const GET_RSEQ: u32 = 0x420f;
const NT_X86_XSTATE: usize = 0x202;
/// Event number of a PTRACE_INTERRUPT stop or group stop of a seized task.
pub const EVENT_STOP: i32 = 128;
/// Signal number of a stop at a system call.
pub const CALL_STOP: i32 = libc::SIGTRAP | 0x80;

fn call(request: u32, tid: i32, addr: usize, data: usize) -> io::Result<i64> {
    // SAFETY: the requests used here read or write only memory that the callers of this private function own for the call.
    check(unsafe { libc::ptrace(request as _, tid, addr, data) })
}

/// PTRACE_SEIZE: the task runs on. The one option is that stops at system calls can be told from signals.
pub fn seize(tid: i32) -> io::Result<()> {
    call(SEIZE, tid, 0, libc::PTRACE_O_TRACESYSGOOD as usize).map(drop)
}

/// PTRACE_INTERRUPT.
pub fn interrupt(tid: i32) -> io::Result<()> {
    call(INTERRUPT, tid, 0, 0).map(drop)
}

/// PTRACE_CONT with a signal to deliver, 0 for none.
pub fn cont(tid: i32, signal: i32) -> io::Result<()> {
    call(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// PTRACE_SYSCALL: goes on to the begin or the end of the next system call, where it stops with [`CALL_STOP`].
pub fn cont_to_call(tid: i32) -> io::Result<()> {
    call(libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// PTRACE_DETACH.
pub fn detach(tid: i32, signal: i32) -> io::Result<()> {
    call(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// A state change that waitpid reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Stopped; `event` is PTRACE_EVENT_* or 0 for a signal-delivery stop.
    Stopped {
        /// Signal of the stop.
        signal: i32,
        /// Event.
        event: i32,
    },
    /// Gone, with its wait status.
    Gone(i32),
}

/// waitpid(tid, __WALL | WNOHANG).
pub fn poll(tid: i32) -> io::Result<Option<Change>> {
    let mut status = 0;
    // SAFETY: status outlives the call.
    let r = check(unsafe { libc::waitpid(tid, &mut status, libc::__WALL | libc::WNOHANG) } as i64)?;
    if r == 0 {
        return Ok(None);
    }
    Ok(Some(if libc::WIFSTOPPED(status) {
        Change::Stopped {
            signal: libc::WSTOPSIG(status),
            event: status >> 16,
        }
    } else {
        Change::Gone(status)
    }))
}

/// PTRACE_GETREGS.
pub fn regs(tid: i32) -> io::Result<Regs> {
    let mut r = MaybeUninit::<libc::user_regs_struct>::uninit();
    call(libc::PTRACE_GETREGS, tid, 0, r.as_mut_ptr() as usize)?;
    // SAFETY: PTRACE_GETREGS filled the whole struct.
    let r = unsafe { r.assume_init() };
    Ok(Regs {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        rbp: r.rbp,
        rbx: r.rbx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        rax: r.rax,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        orig_rax: r.orig_rax,
        rip: r.rip,
        cs: r.cs,
        eflags: r.eflags,
        rsp: r.rsp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
    })
}

/// PTRACE_SETREGS.
pub fn set_regs(tid: i32, r: &Regs) -> io::Result<()> {
    let u = libc::user_regs_struct {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        rbp: r.rbp,
        rbx: r.rbx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        rax: r.rax,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        orig_rax: r.orig_rax,
        rip: r.rip,
        cs: r.cs,
        eflags: r.eflags,
        rsp: r.rsp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
    };
    call(libc::PTRACE_SETREGS, tid, 0, &raw const u as usize).map(drop)
}

/// The uncompacted XSAVE area.
pub fn xstate(tid: i32) -> io::Result<Vec<u8>> {
    let mut buf = vec![0u8; 16384];
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    call(GETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize)?;
    buf.truncate(iov.iov_len);
    Ok(buf)
}

/// PTRACE_GETSIGMASK.
pub fn sigmask(tid: i32) -> io::Result<u64> {
    let mut m = 0u64;
    call(GETSIGMASK, tid, 8, &raw mut m as usize)?;
    Ok(m)
}

/// PTRACE_PEEKSIGINFO: queued signals of the process (`shared`) or the thread, in order.
pub fn peek_signals(tid: i32, shared: bool) -> io::Result<Vec<[u8; 128]>> {
    #[repr(C)]
    struct Args {
        off: u64,
        flags: u32,
        nr: i32,
    }
    let mut out = Vec::new();
    loop {
        let mut buf = [[0u8; 128]; 32];
        let args = Args {
            off: out.len() as u64,
            flags: u32::from(shared),
            nr: 32,
        };
        let n = call(PEEKSIGINFO, tid, &raw const args as usize, buf.as_mut_ptr() as usize)?;
        out.extend_from_slice(&buf[..n as usize]);
        if n < 32 {
            return Ok(out);
        }
    }
}

/// PTRACE_GET_RSEQ_CONFIGURATION: (address, size, signature), address 0 when none is registered.
pub fn rseq(tid: i32) -> io::Result<(u64, u32, u32)> {
    #[repr(C)]
    #[derive(Default)]
    struct Conf {
        ptr: u64,
        size: u32,
        sig: u32,
        flags: u32,
        pad: u32,
    }
    let mut c = Conf::default();
    call(GET_RSEQ, tid, size_of::<Conf>(), &raw mut c as usize)?;
    Ok((c.ptr, c.size, c.sig))
}

//! x86-64: system-call restart, the XSAVE area and rt_sigreturn frames.

use crate::image::{AltStack, Regs};

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
const NR_RESTART_SYSCALL: u64 = 219;

/// Whether a task stopped by PTRACE_INTERRUPT shows -EINTR of a call that the stop alone broke off.
///
/// Some calls answer EINTR to any pending work instead of a restart code (signal(7), "Interruption of system calls and library functions by
/// stop signals"). They had done nothing yet, so they may be called again: epoll_wait, epoll_pwait, epoll_pwait2, rt_sigtimedwait,
/// io_getevents, semtimedop, and socket reads and accepts with a timeout.
fn broken_off(nr: u64, rax: i64) -> bool {
    const EINTR: i64 = -4;
    // read recvfrom recvmsg accept accept4 recvmmsg semop semtimedop rt_sigtimedwait epoll_wait epoll_pwait epoll_pwait2 io_getevents io_pgetevents
    // msgrcv msgsnd
    const CALLS: [u64; 16] = [0, 45, 47, 43, 288, 299, 65, 220, 128, 232, 281, 441, 208, 333, 70, 69];
    rax == EINTR && CALLS.contains(&nr)
}

/// Registers as a ptrace stop showed them, made to continue where they are without the kernel's own restart logic: in the copy.
///
/// The restart block does not move, so calls that would go on through restart_syscall(2) start anew; nanosleep(2) with one timespec for both
/// arguments, as libc's sleep makes it, then sleeps only what was left, because the kernel has written that there.
pub fn restart_anew(r: &Regs) -> Regs {
    let mut r = *r;
    let nr = r.orig_rax;
    if (nr as i64) >= 0 {
        let rax = r.rax as i64;
        if matches!(rax, ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND | ERESTART_RESTARTBLOCK) || broken_off(nr, rax) {
            r.rax = nr;
            r.rip = r.rip.wrapping_sub(2);
        }
    }
    r.orig_rax = u64::MAX;
    r
}

/// The number of the call that a task goes on with in restart_syscall(2), from the code in front of its instruction pointer.
///
/// A task that was interrupted once and let go on is inside restart_syscall, whose state the copy does not have, and the number of the
/// call it stands for is in no register. Nearly all code loads it as a constant right before: `mov eax, imm32`.
pub fn restarted_call(code: &[u8]) -> Option<u64> {
    const NANOSLEEP: u32 = 35;
    const CALLS: [u32; 4] = [NANOSLEEP, 230, 7, 202];
    let code = code.strip_suffix(&[0x0f, 0x05])?;
    let at = code
        .windows(5)
        .rposition(|w| w[0] == 0xb8 && CALLS.contains(&u32::from_le_bytes([w[1], w[2], w[3], w[4]])))?;
    Some(u64::from(u32::from_le_bytes(code[at + 1..at + 5].try_into().ok()?)))
}

/// The same for the original task itself, whose restart block is intact.
pub fn restart_in_place(r: &Regs) -> Regs {
    let mut out = restart_anew(r);
    if (r.orig_rax as i64) >= 0 && r.rax as i64 == ERESTART_RESTARTBLOCK {
        out.rax = NR_RESTART_SYSCALL;
    }
    out
}

/// Registers to resume a stopped task with through ptrace, where the kernel restarts the call itself; only `broken_off` calls need help.
pub fn resume_traced(r: &Regs) -> Regs {
    let mut out = *r;
    if (r.orig_rax as i64) >= 0 && broken_off(r.orig_rax, r.rax as i64) {
        out.rax = ERESTARTNOHAND as u64;
    }
    out
}

/// XSTATE_BV of an uncompacted XSAVE area: the components that are not in their initial state.
pub fn xstate_bv(xstate: &[u8]) -> u64 {
    xstate.get(512..520).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap()))
}

/// Component bit of AMX tile data, which the kernel allocates on demand (Documentation/arch/x86/xstate.rst).
pub const XFEATURE_AMX: u64 = 1 << 18;
const AMX_BITS: u64 = 3 << 17;

fn cpuid(leaf: u32, sub: u32) -> std::arch::x86_64::CpuidResult {
    std::arch::x86_64::__cpuid_count(leaf, sub)
}

/// XCR0 as the kernel enabled it.
pub fn xcr0() -> u64 {
    let r = cpuid(0xd, 0);
    // The XSAVE area in a process reports XCR0 in the software bytes, but CPUID gives what is supported and, with XGETBV, what is on.
    let (lo, hi): (u32, u32);
    // SAFETY: XGETBV of register 0 is allowed at any privilege once OSXSAVE is set, as on every CPU this crate targets.
    unsafe { std::arch::asm!("xgetbv", in("ecx") 0, out("eax") lo, out("edx") hi) };
    ((r.edx as u64) << 32 | r.eax as u64) & ((hi as u64) << 32 | lo as u64)
}

/// Bytes of the uncompacted XSAVE area that holds the components of `features` (CPUID leaf 0xD).
pub fn xsave_size(features: u64) -> u32 {
    (2..63)
        .filter(|i| features >> i & 1 != 0)
        .map(|i| {
            let r = cpuid(0xd, i);
            r.eax + r.ebx
        })
        .max()
        .unwrap_or(0)
        .max(576)
}

/// Bytes of a task's rt_sigframe with `xstate` at most, with alignment.
pub const SIGFRAME_MAX: usize = 512 + 12288 + 64;

/// Builds an rt_sigframe that rt_sigreturn(2) loads: registers, extended state, signal mask and alternate stack.
///
/// `base` is the address the frame will have, 64-byte aligned. Returns the bytes and the stack pointer to enter rt_sigreturn with.
/// Layout: [ucontext at +8][fpstate at +512]. The extended state is cut to the size a task without live AMX tiles has in the kernel, because a
/// frame of another size is refused or loses state (KERNEL notes: 2,696 or 11,008 bytes).
pub fn sigframe(base: u64, regs: &Regs, xstate: &[u8], sigmask: u64, alt: &AltStack) -> (Vec<u8>, u64) {
    let live_amx = xstate_bv(xstate) & XFEATURE_AMX != 0;
    let mut features = xcr0();
    if !live_amx {
        features &= !AMX_BITS;
    }
    let size = (xsave_size(features) as usize).min(xstate.len());
    let mut f = vec![0u8; 512 + size + 4];
    let put = |f: &mut [u8], at: usize, v: u64| f[at..at + 8].copy_from_slice(&v.to_le_bytes());
    // struct ucontext at 8: flags, link, stack{sp, flags, size}, sigcontext, sigmask.
    const UC: usize = 8;
    // UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    put(&mut f, UC, 7);
    put(&mut f, UC + 16, alt.sp);
    put(&mut f, UC + 24, alt.flags as u32 as u64);
    put(&mut f, UC + 32, alt.size);
    let m = UC + 40;
    let r = regs;
    let gprs = [
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx, r.rsp, r.rip, r.eflags,
    ];
    for (i, v) in gprs.iter().enumerate() {
        put(&mut f, m + i * 8, *v);
    }
    // cs, gs, fs, ss as 16-bit selectors
    put(&mut f, m + 18 * 8, r.cs & 0xffff | (r.ss & 0xffff) << 48);
    put(&mut f, m + 23 * 8, base + 512);
    put(&mut f, UC + 296, sigmask);
    // struct _fpstate with the software bytes at 464: magic1, extended_size, features, size.
    f[512..512 + size].copy_from_slice(&xstate[..size]);
    if !live_amx {
        let bv = xstate_bv(xstate) & !AMX_BITS;
        put(&mut f, 512 + 512, bv);
    }
    let sw = 512 + 464;
    f[sw..sw + 48].fill(0);
    f[sw..sw + 4].copy_from_slice(&0x4650_5853u32.to_le_bytes());
    f[sw + 4..sw + 8].copy_from_slice(&(size as u32 + 4).to_le_bytes());
    put(&mut f, sw + 8, features);
    f[sw + 16..sw + 20].copy_from_slice(&(size as u32).to_le_bytes());
    f[512 + size..].copy_from_slice(&0x4650_5845u32.to_le_bytes());
    (f, base + UC as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_backs_up_over_the_instruction() {
        let r = Regs {
            rax: -512i64 as u64,
            orig_rax: 0,
            rip: 100,
            ..Default::default()
        };
        let a = restart_anew(&r);
        assert_eq!((a.rax, a.rip, a.orig_rax), (0, 98, u64::MAX));
        // Not in a system call: nothing moves.
        let r = Regs {
            rax: -512i64 as u64,
            orig_rax: u64::MAX,
            rip: 100,
            ..Default::default()
        };
        assert_eq!(restart_anew(&r), r);
        // A real EINTR of a call that does not belong to the list stays.
        let r = Regs {
            rax: -4i64 as u64,
            orig_rax: 35,
            rip: 100,
            ..Default::default()
        };
        assert_eq!(restart_anew(&r).rax, -4i64 as u64);
        let r = Regs {
            rax: -4i64 as u64,
            orig_rax: 232,
            rip: 100,
            ..Default::default()
        };
        assert_eq!((restart_anew(&r).rax, restart_anew(&r).rip), (232, 98));
        let r = Regs {
            rax: -516i64 as u64,
            orig_rax: 35,
            rip: 100,
            ..Default::default()
        };
        assert_eq!(restart_in_place(&r).rax, 219);
        assert_eq!(restart_anew(&r).rax, 35);
    }

    #[test]
    fn the_call_behind_a_restart() {
        assert_eq!(restarted_call(&[0x90, 0xb8, 230, 0, 0, 0, 0x0f, 0x05]), Some(230));
        assert_eq!(restarted_call(&[0xb8, 7, 0, 0, 0, 0x48, 0x89, 0xf7, 0x0f, 0x05]), Some(7));
        assert_eq!(restarted_call(&[0xb8, 9, 0, 0, 0, 0x0f, 0x05]), None);
        assert_eq!(restarted_call(&[]), None);
    }

    #[test]
    fn frame_has_its_magics() {
        let size = xsave_size(xcr0() & !AMX_BITS) as usize;
        let x = vec![0u8; size];
        let (f, sp) = sigframe(
            0x10000,
            &Regs {
                rip: 7,
                ..Default::default()
            },
            &x,
            5,
            &AltStack::default(),
        );
        assert_eq!(sp, 0x10008);
        assert_eq!(f.len(), 512 + size + 4);
        assert_eq!(&f[512 + 464..512 + 468], b"SXPF");
        assert!(f.len() <= SIGFRAME_MAX);
    }
}

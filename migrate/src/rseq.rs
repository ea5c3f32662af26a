//! Restartable sequences of a stopped thread (rseq(2), `linux/rseq.h`).
//!
//! A program may register an area in which it names the critical section that it is in. When the kernel has preempted or moved the thread there, it sends it to
//! the section's abort handler on its way back to the program; it looks at where the thread is then. A thread that has run a stub meanwhile is somewhere else, so the
//! kernel only forgets the section, and afterwards the thread would go on in the middle of it: on another cpu, beside threads that it believes to have to
//! itself. The copy at the destination would, too. So the freeze does what the kernel would have done.

use crate::{
    image::Regs,
    sys::{mem, ptrace},
};

/// `struct rseq`: where the address of the descriptor of the present section is.
const SECTION: u64 = 8;

/// Has a stopped thread that is in the middle of a critical section go on at the section's abort handler.
pub fn abort(tid: i32, regs: &mut Regs) {
    if let Some(handler) = handler(tid, regs.rip) {
        regs.rip = handler;
    }
}

/// The abort handler of the section that a thread is in. None: it is in none, or in one that the kernel would not accept.
fn handler(tid: i32, rip: u64) -> Option<u64> {
    let (area, _, signature) = ptrace::rseq(tid).ok().filter(|a| a.0 != 0)?;
    let section = mem::word(tid, area.wrapping_add(SECTION)).filter(|s| *s != 0)?;
    // struct rseq_cs: version, flags, start, length up to the commit, abort handler.
    let mut cs = [0; 32];
    mem::read(tid, section, &mut cs).ok()?;
    let field = |at: usize| u64::from_le_bytes(cs[at..at + 8].try_into().unwrap_or_default());
    let (version, start, len, handler) = (field(0) as u32, field(8), field(16), field(24));
    let inside = |ip: u64| ip.wrapping_sub(start) < len;
    if version != 0 || !inside(rip) || inside(handler) {
        return None;
    }
    let mut before = [0; 4];
    mem::read(tid, handler.wrapping_sub(4), &mut before).ok()?;
    (u32::from_le_bytes(before) == signature).then_some(handler)
}

//! The system calls that no safe crate offers: the only unsafe code besides `arch`.

pub mod awake;
pub mod fdcalls;
pub mod mem;
pub mod misc;
pub mod pagemap;
pub mod priority;
pub mod ptrace;
pub mod region;
pub mod uffd;

use std::io;

/// `-1` with errno to `Err`.
pub(crate) fn check(r: libc::c_long) -> io::Result<libc::c_long> {
    if r == -1 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

/// Numbers below what is asked for, always the same for a seed.
#[cfg(test)]
pub(crate) fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % below
    }
}

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

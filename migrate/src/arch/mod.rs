//! What depends on the architecture: registers, extended state, signal frames and the two stubs.

#[cfg(not(target_arch = "x86_64"))]
compile_error!("migrate runs on x86-64 only so far");

pub mod inject_stub;
pub mod pilot;
pub mod vdso;
pub mod x86_64;
pub use x86_64::*;

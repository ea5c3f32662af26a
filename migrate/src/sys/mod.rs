//! The system calls no safe wrapper covers: the only unsafe code.
pub mod fdcalls;

//! Rebuilding a tree: the other halves of `dump`.

pub mod fds;
pub mod follow;
pub mod init;
mod lazy;
pub mod mm;
pub mod pilots;
pub mod plan;
pub mod rebuild;
pub mod room;
pub mod shape;
pub mod sink;
pub mod task;
pub mod vdso;

//! Rebuilding a tree: one file a resource kind.
pub mod fds;

//! Reading a tree: one file a resource kind.
pub mod fds;
pub mod files;
pub mod objects;

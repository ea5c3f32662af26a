//! Reading a tree: one file a resource kind; `restore` has the other half of each under the same name.

pub mod fds;
pub mod files;
pub mod host;
pub mod mm;
pub mod objects;
pub mod outsiders;
pub mod pages;
pub mod task;
pub mod tree;
pub mod vdso;

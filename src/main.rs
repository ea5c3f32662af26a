//! `migrate`: live migration of a running Linux process tree from one host to another.
fn main() {}

//! The engine of `migrate`: it freezes a running process tree, carries it to another host or into a file, and rebuilds it there.
//!
//! ```text
//!  source                                                    destination
//!  inventory   dump::tree::inventory, nothing is stopped       |
//!    |------------------- Inventory -------------------------->|  preflight::tree: every blocker named, nothing created
//!    |<------------------ Accept | Refuse ---------------------|
//!  freeze      tracer::Frozen, inject, dump::tree::frozen      |
//!    |------------------- State ------------------------------>|  restore::rebuild: processes, mappings, descriptors, threads (pilots)
//!  last look   track::ahead, source::rounds                    |
//!    |------------------- Memory ----------------------------->|
//!    |=================== pages ==============================>|  restore::sink: straight into the copy's memory
//!    |------------------- Handover --------------------------->|  then one store releases every task
//!    |<------------------ Running | Aborted -------------------|
//!  kill the originals, or thaw                                 |
//! ```
//!
//! # The handover rule
//!
//! Before [`wire::Message::Handover`] the source owns the tree: any error, a dead agent on either side, a cut link or Ctrl-C lets it go on where it
//! was. After it the destination decides, by one compare-and-swap on the *decision word* in its [`journal`], which every task of the copy maps:
//! 1 releases all of them at once, 2 ends all of them. The source keeps the originals stopped (SIGSTOP as well as ptrace) and asks until it hears
//! which it was. A destination that knows nothing of a migration answers Aborted, and remembers that it did.
//!
//! # Layout
//!
//! [`source`] and [`destination`] are the two drivers, [`checkpoint`] is both with a file between them. `dump` and `restore` have a file for each
//! kind of resource under the same name. [`image`] is the state as plain types. [`sys`] and [`arch`] hold all unsafe code.
//!
//! # What a rebuilt task is not
//!
//! No restorer binary and no ptrace is involved at the destination: each task runs [`arch::pilot`] in memory shared with the agent, executes the
//! system calls it finds there, and at last loads its own context with rt_sigreturn(2).
#![deny(missing_docs)]

pub mod arch;
pub mod blocker;
pub mod check;
pub mod checkpoint;
pub mod destination;
pub mod door;
pub mod dump;
pub mod image;
pub mod inject;
pub mod journal;
pub mod laps;
pub mod lazy;
pub mod oracle;
pub mod pages;
pub mod patient;
pub mod plan;
pub mod preflight;
pub mod procfs;
pub mod report;
pub mod restore;
pub mod rseq;
pub mod source;
pub mod steps;
pub mod sys;
pub mod tracer;
pub mod track;
pub mod vacate;
pub mod wire;

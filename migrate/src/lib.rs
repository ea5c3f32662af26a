//! Engine.
pub mod arch;
pub mod blocker;
pub mod checkpoint;
pub mod destination;
pub mod dump;
pub mod image;
pub mod inject;
pub mod journal;
pub mod oracle;
pub mod preflight;
pub mod procfs;
pub mod report;
pub mod restore;
pub mod source;
pub mod sys;
pub mod tracer;
pub mod wire;

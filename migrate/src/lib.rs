//! Engine.
pub mod arch;
pub mod blocker;
pub mod image;
pub mod inject;
pub mod procfs;
pub mod report;
pub mod sys;
pub mod tracer;

//! Engine.
pub mod blocker;
pub mod dump;
pub mod image;
pub mod procfs;
pub mod report;
pub mod restore;
pub mod sys;

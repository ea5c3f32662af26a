//! Engine.
pub mod blocker;
pub mod image;
pub mod report;

//! Engine.
pub mod blocker;
pub mod image;

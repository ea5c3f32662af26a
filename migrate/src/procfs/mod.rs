//! /proc files to types: pure functions of bytes.
pub mod fdinfo;

//! Devices without state.

use super::{Failed, FileUse, Tried, file::open_flags, same_file};
use crate::image::{Description, FileId};
use rustix::fs::{CWD, Mode, openat};
use std::{io, os::fd::OwnedFd};

/// Opens the device again.
pub(super) fn build(d: &Description, file: &FileId) -> Result<OwnedFd, Failed> {
    let name = || format!("open {}", String::from_utf8_lossy(&file.path));
    same_file(file, FileUse::Read).map_err(io::Error::other).tried(name)?;
    openat(CWD, &file.path, open_flags(d.flags), Mode::empty()).tried(name)
}

//! signalfd(2).

use super::{Failed, Tried, set_status};
use crate::{image::Description, sys::fdcalls};
use std::os::fd::OwnedFd;

/// Makes one with the same mask. It reads the signals of whoever reads it, so the agent may make it.
pub(super) fn build(d: &Description, mask: u64) -> Result<OwnedFd, Failed> {
    let fd = fdcalls::signalfd(mask).tried(|| "signalfd".into())?;
    set_status(&fd, d.flags)?;
    Ok(fd)
}

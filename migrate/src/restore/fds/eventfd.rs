//! eventfd(2).

use super::{Failed, Tried};
use crate::image::Description;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;

/// Makes one with the same count.
pub(super) fn build(d: &Description, count: u64, semaphore: bool) -> Result<OwnedFd, Failed> {
    let mut flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    if semaphore {
        flags |= EventfdFlags::SEMAPHORE;
    }
    let fd = eventfd(0, flags).tried(|| "eventfd".into())?;
    if count != 0 {
        rustix::io::write(&fd, &count.to_ne_bytes()).tried(|| format!("write {count} to an eventfd"))?;
    }
    super::set_status(&fd, d.flags)?;
    Ok(fd)
}

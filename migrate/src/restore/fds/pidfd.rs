//! pidfd_open(2).

use super::{Built, Failed, RestoreError, Tried, error, set_status};
use crate::image::{Description, Kind};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::{io, os::fd::OwnedFd};

/// Opens the pidfds among the descriptions, once the processes exist. `pid_of` translates the tree's pids to the agent's namespace.
///
/// # Errors
/// A process that is not there.
pub fn open_pidfds(descriptions: &[Description], built: &mut Built, pid_of: impl Fn(i32) -> Option<i32>) -> Result<(), RestoreError> {
    for (i, (d, slot)) in descriptions.iter().zip(&mut built.fds).enumerate() {
        if let Kind::PidFd { pid } = d.kind {
            let made = open(d, pid_of(pid)).map_err(|e| error(format!("description {i} (pidfd of {pid})"), e))?;
            *slot = Some(made);
        }
    }
    Ok(())
}

fn open(d: &Description, pid: Option<i32>) -> Result<OwnedFd, Failed> {
    let pid = pid
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("no such process"))
        .tried(|| "pidfd_open".into())?;
    let fd = pidfd_open(pid, PidfdFlags::empty()).tried(|| "pidfd_open".into())?;
    set_status(&fd, d.flags)?;
    Ok(fd)
}

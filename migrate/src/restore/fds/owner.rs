//! Who is told about input and output: F_SETOWN, F_SETSIG, O_ASYNC (fcntl(2)).

use super::{Built, Failed, RestoreError, Tried, error};
use crate::{image::Description, sys::fdcalls};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::{io, os::fd::OwnedFd};

/// Sets owners and signals, once the processes exist. `pid_of` translates the tree's process and thread ids to the agent's namespace.
///
/// The kernel remembers the credentials of whoever sets an owner, here the agent's, which only allows more.
///
/// # Errors
/// An owner that is not there.
pub fn set_owners(descriptions: &[Description], built: &Built, pid_of: impl Fn(i32) -> Option<i32>) -> Result<(), RestoreError> {
    for (i, (d, fd)) in descriptions.iter().zip(&built.fds).enumerate() {
        if let Some(fd) = fd
            && (d.owner.is_some() || d.signal != 0)
        {
            set(d, fd, &pid_of).map_err(|e| error(format!("description {i}"), e))?;
        }
    }
    Ok(())
}

fn set(d: &Description, fd: &OwnedFd, pid_of: &impl Fn(i32) -> Option<i32>) -> Result<(), Failed> {
    if let Some((kind, id)) = d.owner {
        let pid = pid_of(id)
            .ok_or_else(|| io::Error::other("no such process"))
            .tried(|| format!("fcntl F_SETOWN_EX {id}"))?;
        fdcalls::set_owner(fd, kind, pid).tried(|| format!("fcntl F_SETOWN_EX {id}"))?;
    }
    fdcalls::set_signal(fd, d.signal).tried(|| format!("fcntl F_SETSIG {}", d.signal))?;
    if d.flags & libc::O_ASYNC as u32 != 0 {
        let flags = fcntl_getfl(fd).tried(|| "fcntl F_GETFL".into())?;
        fcntl_setfl(fd, flags | OFlags::from_bits_retain(libc::O_ASYNC as u32)).tried(|| "fcntl F_SETFL O_ASYNC".into())?;
    }
    Ok(())
}

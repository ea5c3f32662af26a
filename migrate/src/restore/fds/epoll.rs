//! epoll(7).
//!
//! An entry is a number and a file, as the registering process had them. The agent can register any file under any number without that
//! process, in a thread with a descriptor table of its own ([`fdcalls::register`]).

use super::{Built, Failed, RestoreError, Tried, error, set_status};
use crate::{
    image::{Description, Kind},
    sys::fdcalls::{self, Registration},
};
use rustix::event::epoll;
use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd, OwnedFd},
};

/// Makes an instance without entries.
pub(super) fn build(d: &Description) -> Result<OwnedFd, Failed> {
    let fd = epoll::create(epoll::CreateFlags::CLOEXEC).tried(|| "epoll_create1".into())?;
    set_status(&fd, d.flags)?;
    Ok(fd)
}

/// The descriptions that some epoll instance watches.
pub(super) fn polled(descriptions: &[Description]) -> HashSet<u32> {
    let entries = |d: &Description| match &d.kind {
        Kind::Epoll { entries } => entries.iter().map(|e| e.description).collect(),
        _ => Vec::new(),
    };
    descriptions.iter().flat_map(entries).collect()
}

/// Registers every entry of every epoll instance, when all descriptions are built (after [`super::open_pidfds`]).
///
/// A standard stream that cannot be polled here (a regular file, /dev/null) is left out. An entry that waits for an edge may report
/// once what it had reported before the move.
///
/// # Errors
/// epoll_ctl(2) refused an entry, or a description is missing.
pub fn fill_epoll(descriptions: &[Description], built: &Built) -> Result<(), RestoreError> {
    let missing = |i: usize| RestoreError {
        place: format!("description {i}"),
        what: "epoll_ctl".into(),
        source: io::Error::other("the description was not built"),
    };
    let of = |i: usize| {
        built
            .fds
            .get(i)
            .and_then(Option::as_ref)
            .map(OwnedFd::as_fd)
            .ok_or_else(|| missing(i))
    };
    let mut entries = Vec::new();
    let mut names = Vec::new();
    for (i, d) in descriptions.iter().enumerate() {
        let Kind::Epoll { entries: wanted } = &d.kind else { continue };
        for e in wanted {
            let target = e.description as usize;
            entries.push(Registration {
                epoll: of(i)?,
                target: of(target)?,
                number: e.fd,
                events: e.events,
                data: e.data,
            });
            let stdio = descriptions.get(target).is_some_and(|d| matches!(d.kind, Kind::Stdio { .. }));
            names.push((i, e.fd, stdio));
        }
    }
    if entries.is_empty() {
        return Ok(());
    }
    let results = fdcalls::register(&entries)
        .tried(|| "register epoll entries".into())
        .map_err(|e| error("epoll".into(), e))?;
    for (result, (i, fd, stdio)) in results.into_iter().zip(names) {
        match result {
            Err(e) if stdio && e.raw_os_error() == Some(libc::EPERM) => {}
            other => other
                .tried(|| "epoll_ctl".into())
                .map_err(|e| error(format!("epoll description {i}, entry of fd {fd}"), e))?,
        }
    }
    Ok(())
}

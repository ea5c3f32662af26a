//! epoll(7).
//!
//! An entry is a number and a file, as the registering process had them. The agent can register any file under any number without that
//! process: it takes a thread, gives it a descriptor table of its own (unshare(2), CLONE_FILES), and puts the file under the number there.

use super::{Built, Failed, RestoreError, Tried, error, set_status};
use crate::{
    image::{Description, EpollEntry, Kind},
    sys::fdcalls,
};
use rustix::{event::epoll, io::fcntl_dupfd_cloexec};
use std::{
    collections::{BTreeMap, HashSet},
    io,
    mem::ManuallyDrop,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
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
    let wanted: Vec<(usize, &[EpollEntry])> = descriptions
        .iter()
        .enumerate()
        .filter_map(|(i, d)| match &d.kind {
            Kind::Epoll { entries } if !entries.is_empty() => Some((i, entries.as_slice())),
            _ => None,
        })
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let run = || fill(descriptions, built, &wanted);
    std::thread::scope(|scope| match scope.spawn(run).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Runs in a thread of its own, whose descriptor table goes away with it.
fn fill(descriptions: &[Description], built: &Built, wanted: &[(usize, &[EpollEntry])]) -> Result<(), RestoreError> {
    let whole = |e: Failed| error("epoll".into(), e);
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES)
        .tried(|| "unshare CLONE_FILES".into())
        .map_err(whole)?;
    let highest = wanted.iter().flat_map(|(_, e)| e.iter()).map(|e| e.fd).max().unwrap_or(0);
    // Everything that is needed goes above the numbers that are about to be overwritten. Not dropped: these numbers end with the thread.
    let mut above: BTreeMap<usize, ManuallyDrop<OwnedFd>> = BTreeMap::new();
    for &(i, entries) in wanted {
        for i in std::iter::once(i).chain(entries.iter().map(|e| e.description as usize)) {
            if above.contains_key(&i) {
                continue;
            }
            let missing = || io::Error::other("description is missing");
            let fd = built.fds.get(i).and_then(Option::as_ref).ok_or_else(missing);
            let fd = fd.tried(|| format!("description {i}")).map_err(whole)?;
            let copy = fcntl_dupfd_cloexec(fd, highest + 1)
                .tried(|| "fcntl F_DUPFD_CLOEXEC".into())
                .map_err(whole)?;
            above.insert(i, ManuallyDrop::new(copy));
        }
    }
    for &(i, entries) in wanted {
        for entry in entries {
            let place = || format!("epoll description {i}, entry of fd {}", entry.fd);
            let (Some(instance), Some(target)) = (above.get(&i), above.get(&(entry.description as usize))) else {
                continue;
            };
            let stdio = matches!(descriptions.get(entry.description as usize), Some(d) if matches!(d.kind, Kind::Stdio { .. }));
            match add(instance.as_fd(), target.as_fd(), entry) {
                Err(e) if stdio && e.raw_os_error() == Some(libc::EPERM) => {}
                other => other.tried(|| "epoll_ctl".into()).map_err(|e| error(place(), e))?,
            }
        }
    }
    Ok(())
}

fn add(instance: BorrowedFd<'_>, target: BorrowedFd<'_>, entry: &EpollEntry) -> io::Result<()> {
    if entry.fd < 0 {
        return Err(io::Error::other("negative descriptor"));
    }
    // SAFETY: this thread has unshared its table, all it uses was moved above every `entry.fd`, and it drops nothing before it ends.
    unsafe { fdcalls::place(target, entry.fd)? };
    fdcalls::epoll_add(instance, entry.fd, entry.events, entry.data)
}

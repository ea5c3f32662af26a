//! epoll(7): which numbers an instance watches, and whether they still are the files that were registered.

use super::{DumpError, context::Context, sharing::Open};
use crate::{
    image::EpollEntry,
    procfs::fdinfo::{Target, sdev_to_dev},
    sys::fdcalls,
};
use std::collections::HashMap;

/// Translates the entries of an instance. `of_raw` is the description of each raw descriptor.
///
/// A number alone does not say what is watched: the process may have closed it while a duplicate lived on, or opened something else there.
/// Sockets have one description for their whole life, so that an equal inode settles it; the rest is asked of kcmp(2).
pub(super) fn entries(context: &mut Context<'_>, open: &Open, of_raw: &[Option<u32>]) -> Result<Vec<EpollEntry>, DumpError> {
    let targets = context.info(open).targets.clone();
    // (holder's process, number) -> raw index, for the processes that have the instance.
    let mut numbers: HashMap<(usize, i32), usize> = HashMap::new();
    let holders: Vec<(usize, i32)> = open
        .holders
        .iter()
        .map(|&h| (context.raws[h].process, context.raws[h].fd))
        .collect();
    for (i, raw) in context.raws.iter().enumerate() {
        if holders.iter().any(|&(p, _)| p == raw.process) {
            numbers.insert((raw.process, raw.fd), i);
        }
    }
    let mut seen: HashMap<i32, u32> = HashMap::new();
    let mut out = Vec::with_capacity(targets.len());
    for target in targets {
        let nth = *seen.entry(target.fd).and_modify(|n| *n += 1).or_insert(0);
        let mut found = None;
        for &(process, epoll) in &holders {
            if let Some(&raw) = numbers.get(&(process, target.fd))
                && is_watched(context, raw, epoll, &target, nth)
            {
                found = Some(raw);
                break;
            }
        }
        match found {
            Some(raw) => {
                // One that is blocked for itself was reported for itself.
                if let Some(description) = of_raw[raw] {
                    out.push(EpollEntry {
                        fd: target.fd,
                        description,
                        events: target.events,
                        data: target.data,
                    });
                }
            }
            None => {
                let reason = format!(
                    "epoll watches a file under number {}, which was closed or reused while a duplicate of the file stays open",
                    target.fd
                );
                context.refuse(open, reason, "remove descriptors from epoll before closing them");
            }
        }
    }
    Ok(out)
}

fn is_watched(context: &Context<'_>, raw: usize, epoll: i32, target: &Target, nth: u32) -> bool {
    let raw = &context.raws[raw];
    if target.inode != 0 && raw.info.inode != 0 {
        if target.inode != raw.info.inode {
            return false;
        }
        if raw.link.starts_with(b"socket:[") && sdev_to_dev(target.sdev) != 0 {
            return true;
        }
    }
    let pid = context.processes[raw.process].source.pid;
    fdcalls::is_epoll_target(pid, raw.fd, epoll, nth).unwrap_or(false)
}

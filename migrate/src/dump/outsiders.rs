//! Who else has the shared memory of a tree: a process outside it would go on with the original, cut off from the copy, and can write while the tree
//! is frozen, so that the copy would get neither what was before nor what is after.

use super::tree::{Dumped, place};
use crate::{blocker::Blocker, image::ObjectKind, procfs};
use rustix::fs::{fstat, makedev, stat};
use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
};

/// The inode of an object: device and number.
type Key = (u64, u64);

/// A blocker for each object that a process outside the tree maps or has open. Files with a name, and those that had one, are everybody's; a memfd
/// that is sealed against writing is the same on both sides for ever.
pub fn blockers(dumped: &Dumped) -> Vec<Blocker> {
    let mut keys = HashMap::new();
    for (i, (object, fd)) in dumped.tree.objects.iter().zip(&dumped.object_fds).enumerate() {
        let constant = object.seals & (libc::F_SEAL_WRITE as u32) != 0;
        let moves = matches!(object.kind, ObjectKind::SharedAnonymous | ObjectKind::Memfd(_));
        if let Ok(meta) = fstat(fd)
            && moves
            && !constant
        {
            keys.insert((meta.st_dev, meta.st_ino), i);
        }
    }
    let mut found = Vec::new();
    for (pid, object) in sharers(&dumped.pids, &keys, true) {
        let what = match &dumped.tree.objects[object].kind {
            ObjectKind::Memfd(name) => format!("memfd {:?}", String::from_utf8_lossy(name)),
            _ => "shared anonymous memory".to_string(),
        };
        found.push(Blocker::new(
            place(dumped.pids.first().copied().unwrap_or(0)),
            format!(
                "its shared memory ({what}) is also used by {}, which is outside the tree",
                place(pid)
            ),
            "end that process, or move the process that is the parent of both",
        ));
    }
    found
}

/// Of these sockets of a tree, each once, those that nobody outside it has. Agents do not count.
pub fn only_here(tree: &[i32], fds: Vec<OwnedFd>) -> Vec<OwnedFd> {
    // Several processes of the tree may have the same one.
    let by_inode = fds.into_iter().filter_map(|fd| fstat(&fd).ok().map(|m| ((m.st_dev, m.st_ino), fd)));
    let (keys, fds): (Vec<Key>, Vec<OwnedFd>) = by_inode.collect::<HashMap<_, _>>().into_iter().unzip();
    let others = sharers(tree, &keys.into_iter().zip(0..).collect(), false);
    let here = fds.into_iter().enumerate().filter(|(i, _)| !others.iter().any(|o| o.1 == *i));
    here.map(|(_, fd)| fd).collect()
}

/// Processes outside the tree with one of these objects, and each that they have. Agents do not count: they look at objects. `mapped`: they may be mapped.
fn sharers(tree: &[i32], keys: &HashMap<Key, usize>, mapped: bool) -> Vec<(i32, usize)> {
    if keys.is_empty() {
        return Vec::new();
    }
    let Ok(list) = fs::read_dir("/proc") else { return Vec::new() };
    let me = fs::metadata("/proc/self/exe").map(|m| (m.dev(), m.ino())).ok();
    let mut found = Vec::new();
    for pid in list.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok()) {
        let agent = || fs::metadata(procfs::path(pid, "exe")).map(|m| (m.dev(), m.ino())).ok() == me;
        // Its tables may be long.
        if descends(pid, tree) {
            continue;
        }
        let objects = has(pid, keys, mapped);
        // A child of the tree's that has ended meanwhile, or whose parent has, looks like nobody's: once more, and it has to be there still.
        let outside = || !descends(pid, tree) && procfs::stat::read(pid).is_ok();
        if !objects.is_empty() && !agent() && outside() && outside() {
            found.extend(objects.into_iter().map(|o| (pid, o)));
        }
    }
    found
}

/// Part of the tree, or born into it since it was listed.
fn descends(mut pid: i32, tree: &[i32]) -> bool {
    // As deep as a tree may be; pids are reused, so that a chain read while it changes could go on.
    for _ in 0..10_000 {
        if tree.contains(&pid) {
            return true;
        }
        match procfs::stat::read(pid) {
            Ok(stat) if stat.ppid > 0 => pid = stat.ppid,
            _ => return false,
        }
    }
    false
}

/// In a mapping, which the kernel lists with the inode, or behind a descriptor. A process that ends meanwhile has none.
fn has(pid: i32, keys: &HashMap<Key, usize>, mapped: bool) -> BTreeSet<usize> {
    let maps = if mapped {
        procfs::read(pid, "maps").unwrap_or_default()
    } else {
        Vec::new()
    };
    let mapped = maps.split(|b| *b == b'\n').filter_map(|line| keys.get(&inode(line)?));
    let fds = fs::read_dir(procfs::path(pid, "fd")).into_iter().flatten().flatten();
    let open = fds.filter_map(|fd| {
        let meta = stat(fd.path()).ok()?;
        keys.get(&(meta.st_dev, meta.st_ino))
    });
    mapped.chain(open).copied().collect()
}

/// Device and inode of a line of /proc/PID/maps: `7f00-7f10 rw-s 00000000 00:01 2077 /memfd:x (deleted)`.
fn inode(line: &[u8]) -> Option<Key> {
    let mut fields = std::str::from_utf8(line.get(..line.len().min(120))?)
        .or_else(|e| std::str::from_utf8(&line[..e.valid_up_to()]))
        .ok()?
        .split_ascii_whitespace()
        .skip(3);
    let (high, low) = fields.next()?.split_once(':')?;
    let ino: u64 = fields.next()?.parse().ok()?;
    let dev = makedev(u32::from_str_radix(high, 16).ok()?, u32::from_str_radix(low, 16).ok()?);
    (ino != 0).then_some((dev, ino))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::fd::AsRawFd, process::Command};

    #[test]
    fn lines_of_maps() {
        let line = b"7f0000000000-7f0000001000 rw-s 00000000 00:01 2077                       /memfd:x (deleted)";
        assert_eq!(inode(line), Some((1, 2077)));
        assert_eq!(inode(b"7f00-7f10 rw-p 00000000 00:00 0 "), None);
        assert_eq!(inode(b"7f00-7f10 rw-p 00000000 fe:00 12 /a\xff\xfe"), Some((makedev(0xfe, 0), 12)));
        for bad in [&b""[..], b"1 2 3", b"1 2 3 x:y 5", b"1 2 3 00:01 -5", b"\xff\xff"] {
            assert_eq!(inode(bad), None);
        }
    }

    #[test]
    fn a_descriptor_of_another_process() {
        let fd = rustix::fs::memfd_create("outsider", rustix::fs::MemfdFlags::empty()).unwrap();
        let meta = fstat(&fd).unwrap();
        let keys = HashMap::from([((meta.st_dev, meta.st_ino), 0)]);
        // It inherits the descriptor, which this process keeps open as well.
        let mut sleep = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = sleep.id() as i32;
        while !fs::read_link(procfs::path(pid, "exe")).is_ok_and(|e| e != fs::read_link("/proc/self/exe").unwrap()) {
            std::thread::yield_now();
        }
        assert_eq!(has(pid, &keys, true), BTreeSet::from([0]), "descriptor {}", fd.as_raw_fd());
        assert_eq!(
            sharers(&[1], &keys, true).iter().filter(|s| s.0 == pid).count(),
            usize::from(!descends(pid, &[1]))
        );
        let me = std::process::id() as i32;
        assert!(sharers(&[me], &keys, true).is_empty(), "a child of the tree");
        assert!(sharers(&[pid], &keys, true).is_empty(), "the tree itself");
        assert_eq!(sharers(&[pid + 1_000_000], &keys, true), [(pid, 0)]);
        sleep.kill().unwrap();
        sleep.wait().unwrap();
    }
}

//! Whether a tree can live on this host: looked at before anything is created, every obstacle named.

use crate::{
    blocker::Blocker,
    dump,
    image::{Backing, Host, Process, Tree},
    procfs::{self, status},
    restore::{fds, plan, rebuild, task, vdso},
};
use std::{collections::BTreeSet, fs, path::Path};

/// Instruction sets and features that programs use directly, as /proc/cpuinfo names them.
const USER_FLAGS: &[&str] = &[
    "fpu",
    "cx8",
    "cmov",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "pni",
    "pclmulqdq",
    "ssse3",
    "fma",
    "cx16",
    "sse4_1",
    "sse4_2",
    "movbe",
    "popcnt",
    "aes",
    "xsave",
    "avx",
    "f16c",
    "rdrand",
    "lahf_lm",
    "abm",
    "sse4a",
    "3dnowprefetch",
    "xop",
    "fma4",
    "tbm",
    "fsgsbase",
    "bmi1",
    "hle",
    "avx2",
    "bmi2",
    "erms",
    "rtm",
    "avx512f",
    "avx512dq",
    "rdseed",
    "adx",
    "avx512ifma",
    "clflushopt",
    "clwb",
    "avx512pf",
    "avx512er",
    "avx512cd",
    "sha_ni",
    "avx512bw",
    "avx512vl",
    "xsaveopt",
    "xsavec",
    "xgetbv1",
    "avx_vnni",
    "avx512_bf16",
    "avx512vbmi",
    "pku",
    "ospke",
    "avx512_vbmi2",
    "gfni",
    "vaes",
    "vpclmulqdq",
    "avx512_vnni",
    "avx512_bitalg",
    "avx512_vpopcntdq",
    "rdpid",
    "cldemote",
    "movdiri",
    "movdir64b",
    "fsrm",
    "serialize",
    "tsxldtrk",
    "amx_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "rdtscp",
    "clzero",
    "waitpkg",
];

/// What of the host a tree comes from this host lacks.
pub fn host(theirs: &Host, ours: &Host) -> Vec<Blocker> {
    let mut out = Vec::new();
    let place = format!("host {}", ours.hostname);
    let mut block = |reason: String, fix: &str| out.push(Blocker::new(&place, reason, fix));
    if theirs.page_size != ours.page_size {
        block(
            format!("pages are {} bytes here and {} there", ours.page_size, theirs.page_size),
            "choose a host with the same page size",
        );
    }
    let missing = theirs.xcr0 & !ours.xcr0;
    if missing != 0 {
        block(
            format!(
                "this cpu or kernel lacks extended state components {missing:#x} (XCR0 {:#x}, the source has {:#x})",
                ours.xcr0, theirs.xcr0
            ),
            "choose a host with the same or a newer cpu",
        );
    }
    let have: BTreeSet<&str> = ours.cpu_flags.iter().map(String::as_str).collect();
    let lack: Vec<&str> = theirs
        .cpu_flags
        .iter()
        .map(String::as_str)
        .filter(|f| USER_FLAGS.contains(f) && !have.contains(f))
        .collect();
    if !lack.is_empty() {
        block(
            format!("this cpu lacks {}", lack.join(", ")),
            "choose a host with the same or a newer cpu",
        );
    }
    out
}

/// Everything this host can tell about a tree that wants to come, and whether it would need a fresh pid namespace.
pub fn tree(tree: &Tree) -> (Vec<Blocker>, bool) {
    let mut out = match dump::host::host() {
        Ok(ours) => host(&tree.host, &ours),
        Err(e) => vec![Blocker::new(
            "this host",
            format!("cannot be examined: {e}"),
            "see whether /proc is mounted",
        )],
    };
    if let Err(reason) = plan::sessions(&tree.processes) {
        out.push(Blocker::new("the tree", reason, "wait until the processes concerned have ended"));
    }
    out.extend(vdso::preflight(tree));
    files(tree, &mut out);
    fds::preflight(tree.into(), &mut out);
    rights(tree, &mut out);
    let free = rebuild::pids_free(tree);
    (out, !free)
}

/// Memory for a tree with so many bytes, of what can be had here. None: enough, or not known.
pub fn memory(wanted: u64, left: Option<u64>) -> Option<Blocker> {
    let left = left.filter(|left| *left < wanted)?;
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    Some(Blocker::new(
        "the receiving host",
        format!(
            "the tree has {} MiB of memory with content, and {} MiB can be had here",
            mib(wanted),
            left >> 20
        ),
        "end something there, or give the receiver's cgroup a higher limit",
    ))
}

/// Bytes that this process and its children can have: of the host's memory and swap what is available (proc_meminfo(5)), and no more than the limit of the
/// process's cgroup leaves, in either version. The cgroups above it are not looked at.
pub fn memory_left() -> Option<u64> {
    let host = procfs::meminfo("MemAvailable")? + procfs::meminfo("SwapFree").unwrap_or(0);
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let path = path.trim_start_matches('/');
        if controllers.is_empty() {
            group_left(&Path::new("/sys/fs/cgroup").join(path), "memory.max", "memory.current")
        } else if controllers.split(',').any(|c| c == "memory") {
            let dir = Path::new("/sys/fs/cgroup/memory").join(path);
            group_left(&dir, "memory.limit_in_bytes", "memory.usage_in_bytes")
        } else {
            None
        }
    });
    Some(limits.fold(host, u64::min))
}

/// What the limit of a cgroup leaves: pages of files that it holds can be given up. None: it has no limit.
fn group_left(dir: &Path, limit: &str, used: &str) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(dir.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let files = read("memory.stat").unwrap_or_default();
    let files = files.lines().filter_map(|l| match l.split_once(' ')? {
        ("active_file" | "inactive_file", bytes) => bytes.parse::<u64>().ok(),
        _ => None,
    });
    let held = number(used)?.saturating_sub(files.sum());
    Some(number(limit)?.saturating_sub(held))
}

fn files(tree: &Tree, out: &mut Vec<Blocker>) {
    let mut seen = BTreeSet::new();
    for (p, mm) in tree
        .processes
        .iter()
        .filter(|p| p.zombie.is_none())
        .filter_map(|p| Some((p, tree.mms.get(p.mm as usize)?)))
    {
        let mut check = |what: &str, file: &crate::image::FileId, use_: fds::FileUse| {
            if seen.insert((file.path.clone(), file.ino))
                && let Err(reason) = fds::same_file(file, use_)
            {
                let path = String::from_utf8_lossy(&file.path);
                let fix = format!("put the same file at {path} on this host (package version, or rsync -a)");
                out.push(Blocker::new(format!("pid {} ({}) {what} {path}", p.pid, p.comm), reason, fix));
            }
        };
        check("executable", &mm.exe, fds::FileUse::Read);
        check("working directory", &p.cwd, fds::FileUse::Read);
        for v in &mm.vmas {
            if let Backing::File { file, writable, .. } = &v.backing {
                check(
                    "mapped file",
                    file,
                    if *writable && v.shared {
                        fds::FileUse::Write { frozen: false }
                    } else {
                        fds::FileUse::Read
                    },
                );
            }
        }
    }
}

/// Limits and capabilities that only a more privileged agent could give.
fn rights(tree: &Tree, out: &mut Vec<Blocker>) {
    let me = std::process::id() as i32;
    let Ok(own) = status::read(me) else { return };
    let limits = crate::dump::task::rlimits(me).unwrap_or_default();
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    const NAMES: [&str; 16] = [
        "CPU",
        "FSIZE",
        "DATA",
        "STACK",
        "CORE",
        "RSS",
        "NPROC",
        "NOFILE",
        "MEMLOCK",
        "AS",
        "LOCKS",
        "SIGPENDING",
        "MSGQUEUE",
        "NICE",
        "RTPRIO",
        "RTTIME",
    ];
    for p in tree.processes.iter().filter(|p| p.zombie.is_none()) {
        let place = place(p);
        let timer = p.timers.iter().map(|t| t.id).max().unwrap_or(0);
        if timer > task::MAX_COUNTED_TIMER && !task::timer_ids_can_be_chosen() {
            out.push(Blocker::new(
                &place,
                format!("its POSIX timer {timer} cannot be made under that id here"),
                "use Linux 6.16 or later",
            ));
        }
        if own.caps[2] & CAP_SYS_RESOURCE == 0 {
            for (i, ((_, hard), (_, ours))) in p.rlimits.iter().zip(&limits).enumerate() {
                if hard > ours {
                    out.push(Blocker::new(
                        &place,
                        format!(
                            "its hard limit RLIMIT_{} is above what this receiver may set ({ours})",
                            NAMES.get(i).unwrap_or(&"?")
                        ),
                        "start `migrate receive` with CAP_SYS_RESOURCE or a higher limit",
                    ));
                }
            }
        }
        for t in &p.threads {
            let missing = (t.creds.caps[1] & !own.caps[1]) | (t.creds.caps[3] & !own.caps[3]);
            if missing != 0 {
                out.push(Blocker::new(
                    &place,
                    format!("it holds capabilities that this receiver lacks (mask {missing:#x})"),
                    "start `migrate receive` as root with all capabilities",
                ));
                break;
            }
        }
    }
}

fn place(p: &Process) -> String {
    format!("pid {} ({})", p.pid, p.comm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_group_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let set = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let left = || group_left(dir.path(), "memory.max", "memory.current");
        assert_eq!(left(), None, "no such controller");
        set("memory.current", "5000\n");
        set("memory.max", "max\n");
        assert_eq!(left(), None, "no limit");
        set("memory.max", "8000\n");
        assert_eq!(left(), Some(3000));
        set("memory.stat", "anon 1000\nactive_file 1500\ninactive_file 500\nshmem 2000\n");
        assert_eq!(left(), Some(5000));
        set("memory.max", "1000\n");
        assert_eq!(left(), Some(0));
    }

    #[test]
    fn a_tree_that_does_not_fit_is_refused_by_name() {
        assert!(memory(100 << 20, Some(100 << 20)).is_none());
        assert!(memory(100 << 20, None).is_none());
        let b = memory(100 << 20, Some((99 << 20) + 5)).unwrap();
        assert!(b.reason.contains("100 MiB") && b.reason.contains(" 99 MiB"), "{b:?}");
        assert!(memory_left().is_some_and(|left| left > 0));
    }
}

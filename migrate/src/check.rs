//! What this host, this process and this pair of hosts can do, for `migrate check`.

use crate::{
    blocker::Blocker,
    dump::{self, tree::Dumped},
    image::{Backing, Host, Kind, Tree},
    procfs::status,
    report::Failure,
    source,
    sys::{misc, pagemap::Pagemap, uffd},
    track,
};
use serde::Serialize;
use std::path::Path;

/// Whether something is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckOk {
    /// It is.
    Yes,
    /// It is not, and nothing can be moved without it.
    No,
    /// It is not, or not wholly: migrations work, with the effect named.
    Degraded,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckItem {
    /// Its name: "soft-dirty".
    pub name: String,
    /// Whether it is there.
    pub ok: CheckOk,
    /// What was found.
    pub detail: String,
    /// What its absence means; empty when it is there.
    pub effect: String,
    /// What to do; empty when there is nothing.
    pub fix: String,
}

impl CheckItem {
    fn new(name: &str, present: bool, absent: CheckOk, detail: impl Into<String>, effect: &str, fix: &str) -> Self {
        let (effect, fix) = if present { ("", "") } else { (effect, fix) };
        CheckItem {
            name: name.into(),
            ok: if present { CheckOk::Yes } else { absent },
            detail: detail.into(),
            effect: effect.into(),
            fix: fix.into(),
        }
    }
}

/// What this host can do.
#[derive(Debug, Clone, Serialize)]
pub struct HostReport {
    /// Everything looked at.
    pub items: Vec<CheckItem>,
}

/// Something a task holds.
#[derive(Debug, Clone, Serialize)]
pub struct Holding {
    /// Where: "fd 7", "mapping 7f00-7f10".
    pub place: String,
    /// What is there.
    pub what: String,
    /// Whether it can be moved.
    pub movable: bool,
    /// Why not; empty when it can.
    pub reason: String,
}

/// A task and what it holds.
#[derive(Debug, Clone, Serialize)]
pub struct TaskHoldings {
    /// "pid 42 (redis-server)".
    pub task: String,
    /// What it holds.
    pub holdings: Vec<Holding>,
}

/// What a tree holds.
#[derive(Debug, Clone, Serialize)]
pub struct ProcessReport {
    /// Its root.
    pub pid: i32,
    /// Grouped by process, parents first.
    pub items: Vec<TaskHoldings>,
    /// What stands in the way, all of it.
    pub blockers: Vec<Blocker>,
}

/// What a pair of hosts can do.
#[derive(Debug, Clone, Serialize)]
pub struct PairReport {
    /// The receiver's name and kernel.
    pub peer: String,
    /// Everything compared.
    pub items: Vec<CheckItem>,
    /// What stands in the way of this tree there; empty without a pid.
    pub blockers: Vec<Blocker>,
}

const CAPS: [(u32, &str, CheckOk, &str); 8] = [
    (19, "CAP_SYS_PTRACE", CheckOk::No, "processes cannot be stopped and read"),
    (
        21,
        "CAP_SYS_ADMIN",
        CheckOk::No,
        "pids cannot be chosen, shared memory cannot be reached",
    ),
    (8, "CAP_SETPCAP", CheckOk::Degraded, "capabilities of the copy cannot be set"),
    (7, "CAP_SETUID", CheckOk::Degraded, "only programs of this user can be resumed"),
    (
        12,
        "CAP_NET_ADMIN",
        CheckOk::Degraded,
        "some socket options (SO_MARK, forced buffers) cannot be set",
    ),
    (
        23,
        "CAP_SYS_NICE",
        CheckOk::Degraded,
        "nice values below 0 and real-time policies cannot be set",
    ),
    (14, "CAP_IPC_LOCK", CheckOk::Degraded, "locked memory is limited by RLIMIT_MEMLOCK"),
    (
        24,
        "CAP_SYS_RESOURCE",
        CheckOk::Degraded,
        "programs with hard limits above this agent's are refused",
    ),
];

/// Looks at this host.
pub fn host() -> Result<HostReport, Failure> {
    use CheckOk::{Degraded, No};
    let fail = |e: std::io::Error| Failure::failed("check", 0, format!("cannot examine this host: {e}"));
    let host = dump::host::host().map_err(fail)?;
    let me = std::process::id() as i32;
    let own = status::read(me).map_err(fail)?;
    let mut items = vec![CheckItem::new(
        "kernel",
        true,
        No,
        format!("{} on {}", host.kernel, host.hostname),
        "",
        "",
    )];
    let uid = rustix::process::geteuid().as_raw();
    items.push(CheckItem::new(
        "root",
        uid == 0,
        Degraded,
        format!("uid {uid}"),
        "only processes of this user can be moved",
        "run migrate as root",
    ));
    let cap = |n: u32| own.caps[2] >> n & 1 == 1;
    for (n, name, absent, effect) in CAPS {
        items.push(CheckItem::new(
            name,
            cap(n),
            absent,
            if cap(n) { "effective" } else { "missing" },
            effect,
            "run migrate as root with this capability",
        ));
    }
    let set_tid = cap(40) || cap(21);
    items.push(CheckItem::new(
        "clone3 set_tid",
        set_tid,
        No,
        "CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN",
        "pids cannot be kept",
        "run migrate as root",
    ));
    let children = Path::new("/proc/thread-self/children").exists();
    items.push(CheckItem::new(
        "/proc children",
        children,
        No,
        "CONFIG_PROC_CHILDREN",
        "the tree below a process cannot be found",
        "use a kernel with it",
    ));
    let map_files = std::fs::read_dir("/proc/self/map_files").is_ok_and(|mut d| d.next().is_some());
    items.push(CheckItem::new(
        "/proc map_files",
        map_files,
        No,
        "",
        "shared memory cannot be reached",
        "run migrate as root",
    ));
    let kcmp = misc::shares(me, me, misc::Shared::Vm).is_ok();
    items.push(CheckItem::new(
        "kcmp",
        kcmp,
        No,
        "CONFIG_KCMP",
        "shared descriptors cannot be told from equal ones",
        "use a kernel with CONFIG_KCMP",
    ));
    let timens = Path::new("/proc/self/ns/time").exists();
    items.push(CheckItem::new(
        "time namespaces",
        timens,
        Degraded,
        "CONFIG_TIME_NS",
        "a program cannot come from a host that has been up for longer",
        "use a kernel with CONFIG_TIME_NS",
    ));
    let soft_dirty = track::soft_dirty::available();
    items.push(CheckItem::new(
        "soft-dirty",
        soft_dirty,
        Degraded,
        "CONFIG_MEM_SOFT_DIRTY",
        "pre-copy tracks writes by userfaultfd write-protection instead",
        "",
    ));
    let features = uffd::features();
    let uffd_detail = match &features {
        Ok(f) => format!("features {f:#x}"),
        Err(e) => e.to_string(),
    };
    items.push(CheckItem::new(
        "userfaultfd",
        features.is_ok(),
        Degraded,
        uffd_detail,
        "pages cannot be fetched on demand",
        "use a kernel with CONFIG_USERFAULTFD",
    ));
    let wp_async = features.as_ref().is_ok_and(|f| f & uffd::WP_ASYNC != 0);
    items.push(CheckItem::new(
        "userfaultfd WP_ASYNC",
        wp_async,
        if soft_dirty { Degraded } else { No },
        "Linux 6.7 and later",
        if soft_dirty {
            "pre-copy uses soft-dirty"
        } else {
            "writes cannot be tracked: only --mode stop works"
        },
        "use Linux 6.7 or later, or one with CONFIG_MEM_SOFT_DIRTY",
    ));
    if let Some(last) = items.last_mut()
        && last.ok == No
    {
        last.ok = Degraded;
    }
    let scan = Pagemap::open(me).is_ok_and(|p| p.scan_works());
    items.push(CheckItem::new(
        "PAGEMAP_SCAN",
        scan,
        Degraded,
        "Linux 6.7 and later",
        "page tables are read entry by entry, slower",
        "",
    ));
    let yama = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope")
        .ok()
        .and_then(|s| s.trim().parse::<u32>().ok())
        .unwrap_or(0);
    items.push(CheckItem::new(
        "yama",
        yama < 3,
        No,
        format!("ptrace_scope {yama}"),
        "nothing can be traced",
        "reboot with kernel.yama.ptrace_scope below 3",
    ));
    Ok(HostReport { items })
}

/// Looks at a tree, without stopping it.
pub fn process(pid: i32) -> Result<ProcessReport, Failure> {
    let Dumped { tree, pids, blockers, .. } = source::inventory(pid)?;
    let mut items: Vec<TaskHoldings> = Vec::new();
    for (p, agent) in tree.processes.iter().zip(&pids) {
        let mut holdings = Vec::new();
        let mut hold = |place: String, what: String| {
            holdings.push(Holding {
                place,
                what,
                movable: true,
                reason: String::new(),
            })
        };
        if let Some(code) = p.zombie {
            hold("state".into(), format!("zombie, wait status {code:#x}"));
        } else {
            hold("threads".into(), p.threads.len().to_string());
            for (place, what) in mappings(&tree, p.mm) {
                hold(place, what);
            }
            for f in &p.fds {
                let what = tree
                    .descriptions
                    .get(f.description as usize)
                    .map_or_else(String::new, |d| describe(&tree, &d.kind));
                hold(format!("fd {}", f.fd), what);
            }
        }
        let name = format!("pid {agent} ({})", p.comm);
        for b in blockers.iter().filter(|b| b.place.starts_with(&name)) {
            let place = b.place[name.len()..].trim().to_owned();
            holdings.push(Holding {
                place: if place.is_empty() { "process".into() } else { place },
                what: String::new(),
                movable: false,
                reason: format!("{}; {}", b.reason, b.fix),
            });
        }
        items.push(TaskHoldings { task: name, holdings });
    }
    Ok(ProcessReport { pid, items, blockers })
}

/// Mappings in groups of one kind, because a program has hundreds.
fn mappings(tree: &Tree, mm: u32) -> Vec<(String, String)> {
    let mut out: Vec<(String, u64, u32)> = Vec::new();
    let Some(mm) = tree.mms.get(mm as usize) else { return Vec::new() };
    for v in &mm.vmas {
        let key = match &v.backing {
            Backing::Anonymous => "anonymous memory".to_owned(),
            Backing::Special(n) => n.clone(),
            Backing::File { file, .. } => format!(
                "{}file {}",
                if v.shared { "shared " } else { "" },
                String::from_utf8_lossy(&file.path)
            ),
            Backing::Object { object, .. } => format!("shared object {object}"),
        };
        match out.iter_mut().find(|o| o.0 == key) {
            Some(o) => {
                o.1 += v.len();
                o.2 += 1;
            }
            None => out.push((key, v.len(), 1)),
        }
    }
    out.into_iter()
        .map(|(k, bytes, n)| {
            (
                format!("{n} mapping{}", if n == 1 { "" } else { "s" }),
                format!("{k}, {} KiB of addresses", bytes >> 10),
            )
        })
        .collect()
}

/// A description in a few words.
pub fn describe(tree: &Tree, k: &Kind) -> String {
    let path = |f: &crate::image::FileId| String::from_utf8_lossy(&f.path).into_owned();
    match k {
        Kind::File { file, pos } => format!("{} at {pos}", path(file)),
        Kind::Object { object, .. } => match tree.objects.get(*object as usize).map(|o| &o.kind) {
            Some(crate::image::ObjectKind::Memfd(n)) => format!("memfd {}", String::from_utf8_lossy(n)),
            Some(crate::image::ObjectKind::Unlinked { dir }) => format!("unlinked file of {}", String::from_utf8_lossy(dir)),
            _ => "shared memory".into(),
        },
        Kind::Device { file } => path(file),
        Kind::Pipe { pipe } => format!("pipe {pipe}"),
        Kind::Fifo { file, .. } => format!("fifo {}", path(file)),
        Kind::EventFd { .. } => "eventfd".into(),
        Kind::Epoll { entries } => format!("epoll of {}", entries.len()),
        Kind::SignalFd { .. } => "signalfd".into(),
        Kind::TimerFd { .. } => "timerfd".into(),
        Kind::Inotify { watches } => format!("inotify, {} watches", watches.len()),
        Kind::UnixPair { .. } => "unix socket pair".into(),
        Kind::Tcp { local, backlog, .. } => {
            let at = local.map_or_else(|| "unbound".into(), |a| a.to_string());
            if backlog.is_some() {
                format!("TCP listening on {at}")
            } else {
                format!("TCP {at}")
            }
        }
        Kind::Udp { local, .. } => format!("UDP {}", local.map_or_else(|| "unbound".into(), |a| a.to_string())),
        Kind::Stdio { was, stream } => format!("{was}: the receiver attaches its own stream {stream}"),
        Kind::PidFd { pid } => format!("pidfd of {pid}"),
    }
}

/// What two hosts have in common, for display.
pub fn compare(ours: &Host, theirs: &Host) -> Vec<CheckItem> {
    use CheckOk::No;
    let blocked = crate::preflight::host(ours, theirs);
    let same_vdso = (&theirs.vdso_hash, theirs.vdso_layout) == (&ours.vdso_hash, ours.vdso_layout);
    let has = |word: &str| !blocked.iter().any(|b| b.reason.contains(word));
    let fix = "choose a host that has it";
    vec![
        CheckItem::new(
            "page size",
            has("pages are"),
            No,
            format!("{} there", theirs.page_size),
            "memory cannot be laid out the same",
            fix,
        ),
        CheckItem::new(
            "extended state",
            has("XCR0"),
            No,
            format!(
                "XCR0 {:#x}, {} bytes there; {:#x}, {} bytes here",
                theirs.xcr0, theirs.xsave_size, ours.xcr0, ours.xsave_size
            ),
            "registers cannot be loaded",
            fix,
        ),
        CheckItem::new(
            "instruction sets",
            has("cpu lacks"),
            No,
            format!("{} cpu flags there", theirs.cpu_flags.len()),
            "programs that use them crash",
            fix,
        ),
        CheckItem::new(
            "kernel",
            same_vdso,
            CheckOk::Degraded,
            format!("{} there, {} here", theirs.kernel, ours.kernel),
            "another kernel: its vdso is replaced by jumps to this one's",
            "",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_kernel_is_noted_and_no_obstacle() {
        let ours = dump::host::host().unwrap();
        let mut theirs = ours.clone();
        let kernel = |theirs: &Host| compare(&ours, theirs).into_iter().find(|i| i.name == "kernel").unwrap();
        assert_eq!(kernel(&theirs).ok, CheckOk::Yes);
        theirs.kernel = "6.1.0".into();
        theirs.vdso_hash = "0".into();
        assert_eq!(kernel(&theirs).ok, CheckOk::Degraded);
        assert!(kernel(&theirs).effect.contains("its vdso is replaced"));
        assert!(compare(&ours, &theirs).iter().all(|i| i.ok != CheckOk::No));
    }
}

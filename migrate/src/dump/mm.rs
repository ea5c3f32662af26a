//! Address spaces: mappings classified, and everything that cannot move named.

use super::{fds::Known, files, objects::ObjectTable};
use crate::{
    blocker::Blocker,
    image::{Backing, FileId, Object, ObjectKind, Vma, VmaFlags},
    procfs::{
        self,
        maps::{self, Mapping},
    },
};
use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, ffi::OsStringExt, fs::OpenOptionsExt},
    },
    path::Path,
    time::{Duration, Instant},
};

/// The mapping of the pilots, behind the page with the decision word.
const PILOT: &[u8] = b"/memfd:migrate-pilot";

/// How old the properties of mappings may become while the tree runs, and how many times as long as it takes to read them.
const REFRESH: Duration = Duration::from_millis(250);
const REFRESH_SHARE: u32 = 20;

/// Device, inode and name of what is behind a mapping.
type FileKey = ((u32, u32), u64, Vec<u8>);

/// What one look at a tree saves the next: files already identified, and the properties of mappings, which only smaps tells and which cost a
/// walk over every page there (15 to 30 ms a GiB).
#[derive(Debug, Default)]
pub struct Cache {
    /// By device, inode, size, modification time and whether the build-id is wanted.
    files: HashMap<(u64, u64, i64, i64, bool), FileId>,
    /// smaps of each process, as read last.
    maps: HashMap<i32, Properties>,
    /// The tree is stopped just now: what is known has to do.
    pub stopped: bool,
    /// Files behind mappings, by device, inode and name, as seen in this look: a library is mapped in five pieces.
    seen: HashMap<FileKey, (rustix::fs::Stat, Vec<u8>)>,
    /// Of descriptors.
    pub known: Known,
    /// Ranges were registered with a userfaultfd of this agent: that the mappings say so is no obstacle.
    pub tracked: bool,
}

/// smaps of a process.
#[derive(Debug)]
struct Properties {
    /// When it was read, and how long that took.
    read: Instant,
    took: Duration,
    list: Vec<Mapping>,
}

impl Properties {
    /// Gives mappings their properties. Returns where the last one ends that is new, if there is one.
    fn apply(&self, pid: i32, now: &mut [Mapping]) -> Option<u64> {
        let old = &self.list;
        let (mut k, mut new) = (0, None);
        for m in now {
            while old.get(k).is_some_and(|o| o.end <= m.start) {
                k += 1;
            }
            // The kernel merges only what has equal properties, so any former mapping of the same thing in this range will do.
            let same = |o: &&Mapping| {
                let named = o.name == m.name || o.name.is_empty() || m.name.is_empty();
                (o.shared, o.dev, o.ino) == (m.shared, m.dev, m.ino) && named
            };
            match old[k..].iter().take_while(|o| o.start < m.end).find(same) {
                Some(o) => {
                    m.vm_flags.clone_from(&o.vm_flags);
                    m.pkey = o.pkey;
                }
                // Nothing of the program's: the injector's table.
                None if is_leaked_table(pid, m) => {}
                None => new = Some(m.end),
            }
        }
        new
    }

    /// Takes in what smaps tells of the mappings that begin before `end`.
    fn learn(&mut self, mut told: Vec<Mapping>, end: u64) {
        told.extend(self.list.drain(..).filter(|m| m.start >= end));
        self.list = told;
    }

    fn old(&self) -> bool {
        self.read.elapsed() > REFRESH.max(self.took * REFRESH_SHARE)
    }
}

impl Cache {
    /// Another look begins: what was seen of files in the last one does not count.
    pub fn begin(&mut self) {
        self.seen.clear();
    }

    /// Gives the mappings of a process (`now`, from maps) their properties. smaps is read when there is a mapping that was not there before, when
    /// something is locked, and, while the process runs, when the last time was a while ago. Otherwise a mapping that grew, shrank or was split keeps
    /// its properties. What madvise(2) changes on a whole mapping is seen at the next smaps.
    pub fn mappings(&mut self, pid: i32, mut now: Vec<Mapping>, locked: bool, frozen: bool) -> io::Result<Vec<Mapping>> {
        let frozen = frozen || self.stopped;
        if let Some(known) = self.maps.get_mut(&pid).filter(|k| !locked && (frozen || !k.old())) {
            let Some(end) = known.apply(pid, &mut now) else { return Ok(now) };
            // mmap(2) puts new mappings below those that are there, so large ones need not be walked for them as a rule.
            known.learn(maps::smaps_to(pid, end)?, end);
            if known.apply(pid, &mut now).is_none() {
                return Ok(now);
            }
        }
        let list = self.refresh(pid)?;
        if !frozen {
            return Ok(list);
        }
        // Nothing but a table of the injector's has come since.
        if self.maps.get(&pid).is_some_and(|k| k.apply(pid, &mut now).is_none()) {
            return Ok(now);
        }
        Err(io::Error::other(format!(
            "the mappings of process {pid} changed while it was stopped"
        )))
    }

    /// Reads smaps.
    pub fn refresh(&mut self, pid: i32) -> io::Result<Vec<Mapping>> {
        let began = Instant::now();
        let list = maps::smaps(pid)?;
        let known = Properties {
            read: Instant::now(),
            took: began.elapsed(),
            list: list.clone(),
        };
        self.maps.insert(pid, known);
        Ok(list)
    }

    /// Reads smaps of every process whose mappings were read a while ago: before a stop in which there is no time for it.
    pub fn freshen(&mut self) {
        let old: Vec<i32> = self.maps.iter().filter(|(_, k)| k.old()).map(|(pid, _)| *pid).collect();
        for pid in old {
            // It may have ended.
            let _ = self.refresh(pid);
        }
    }

    /// Forgets processes that are not among these.
    pub fn keep(&mut self, pids: &[i32]) {
        self.maps.retain(|pid, _| pids.contains(pid));
    }
}

/// Classifies the mappings of a process. While the process is `running` a mapping that has gone since `maps` was
/// read is left out: a program that maps and unmaps all the time could never be looked at otherwise.
pub fn vmas(
    pid: i32,
    place: &str,
    maps: &[Mapping],
    running: bool,
    objects: &mut ObjectTable,
    cache: &mut Cache,
    blockers: &mut Vec<Blocker>,
) -> io::Result<Vec<Vma>> {
    let mut out = Vec::with_capacity(maps.len());
    for m in maps {
        if m.name == b"[vsyscall]" {
            continue;
        }
        // What an agent that was killed left behind does not belong to the program.
        let word = m.shared && m.end - m.start == 4096 && maps.iter().any(|n| n.start == m.end && n.name.starts_with(PILOT));
        if word || m.name.starts_with(PILOT) || is_leaked_table(pid, m) {
            continue;
        }
        let place = || format!("{place} mapping {:x}-{:x} {}", m.start, m.end, String::from_utf8_lossy(&m.name));
        if m.has(b"um") {
            // After a migration every mapping that misses pages is registered until they have come; with the memory oracle for write protection as well.
            let reason =
                "pages of it are still arriving from the host it came from (or the program has a userfaultfd of its own registered here)";
            let fix = "wait until all have come: the agents say so; or end its use of userfaultfd";
            blockers.push(Blocker::new(place(), reason, fix).transient());
            continue;
        }
        if let Some(reason) = unsupported(m, cache.tracked) {
            blockers.push(Blocker::new(place(), reason, "end its use before migrating"));
            continue;
        }
        match backing(pid, m, objects, cache) {
            Ok(Some(backing)) => out.push(vma(m, backing)),
            Ok(None) => {}
            Err(Reason::Io(e)) if running && e.kind() == io::ErrorKind::NotFound => {}
            Err(Reason::Io(e)) => return Err(e),
            Err(Reason::Blocked(reason, fix)) => blockers.push(Blocker::new(place(), reason, fix)),
        }
    }
    Ok(out)
}

fn unsupported(m: &Mapping, tracked: bool) -> Option<&'static str> {
    let special = matches!(m.name.as_slice(), b"[vdso]" | b"[vvar]" | b"[vvar_vclock]");
    Some(match () {
        _ if special => return None,
        _ if m.has(b"ht") => "huge pages of hugetlbfs cannot move yet",
        _ if (m.has(b"uw") && !tracked) || m.has(b"ui") => "the program has a userfaultfd of its own registered here",
        _ if m.has(b"ss") => "a shadow stack (CET) cannot move yet",
        _ if m.has(b"sl") => "the mapping is sealed by mseal(2), which cannot be rebuilt yet",
        _ if m.has(b"pf") || m.has(b"io") => "it maps a device's memory",
        _ if m.has(b"mg") && m.has(b"ht") => "mergeable huge pages",
        _ if m.name == b"[uprobes]" => "a uprobe is attached to the program",
        _ if m.name.starts_with(b"/SYSV") => "System V shared memory cannot move yet",
        _ if m.name.starts_with(b"anon_inode:") => "a kernel object is mapped",
        _ if m.name.starts_with(b"socket:") => "a packet socket's ring is mapped",
        _ => return None,
    })
}

enum Reason {
    Io(io::Error),
    Blocked(String, String),
}

impl From<io::Error> for Reason {
    fn from(e: io::Error) -> Self {
        Reason::Io(e)
    }
}

/// What VmFlags says of a mapping.
pub fn flags(m: &Mapping) -> VmaFlags {
    VmaFlags {
        grows_down: m.has(b"gd"),
        no_reserve: m.has(b"nr"),
        locked: m.has(b"lo"),
        lock_on_fault: m.has(b"lf"),
        dont_fork: m.has(b"dc"),
        wipe_on_fork: m.has(b"wf"),
        dont_dump: m.has(b"dd"),
        sequential: m.has(b"sr"),
        random: m.has(b"rr"),
        mergeable: m.has(b"mg"),
        huge: m.has(b"hg"),
        no_huge: m.has(b"nh"),
        stack: m.has(b"gd"),
        droppable: m.has(b"dp"),
    }
}

fn vma(m: &Mapping, backing: Backing) -> Vma {
    let name = m
        .name
        .strip_prefix(b"[anon:")
        .or_else(|| m.name.strip_prefix(b"[anon_shmem:"))
        .and_then(|n| n.strip_suffix(b"]"))
        .map(|n| String::from_utf8_lossy(n).into_owned());
    Vma {
        start: m.start,
        end: m.end,
        prot: m.prot,
        shared: m.shared,
        backing,
        flags: flags(m),
        pkey: m.pkey,
        name,
    }
}

fn backing(pid: i32, m: &Mapping, objects: &mut ObjectTable, cache: &mut Cache) -> Result<Option<Backing>, Reason> {
    if m.name.starts_with(b"[v") {
        return Ok(Some(Backing::Special(String::from_utf8_lossy(&m.name).into_owned())));
    }
    if m.ino == 0 && !m.name.starts_with(b"/") {
        return Ok(Some(Backing::Anonymous));
    }
    let link = procfs::mapped(pid, m.start, m.end);
    let writable = m.has(b"mw");
    let gone = m.name.ends_with(b" (deleted)");
    if m.name == b"/dev/zero" && !m.shared {
        return Ok(Some(Backing::Anonymous));
    }
    if m.name == b"/dev/zero" || gone && (m.name == b"/dev/zero (deleted)" || m.name.starts_with(b"/memfd:")) {
        let object = shared_object(&link, m, objects)?;
        return Ok(Some(Backing::Object {
            object,
            offset: m.offset,
            writable,
        }));
    }
    let key = (m.dev, m.ino, m.name.clone());
    let (meta, path) = match cache.seen.get(&key) {
        Some(known) => known.clone(),
        None => {
            let found = (stat(&link)?, fs::read_link(&link)?.into_os_string().into_vec());
            cache.seen.insert(key, found.clone());
            found
        }
    };
    if meta.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(Reason::Blocked(
            "it maps a device".into(),
            "close the device before migrating".into(),
        ));
    }
    if meta.st_nlink == 0 {
        let dir = Path::new(OsStr::from_bytes(path.strip_suffix(b" (deleted)").unwrap_or(&path)))
            .parent()
            .unwrap_or(Path::new("/"))
            .to_owned();
        let object = objects.get_or_insert(meta.st_dev, meta.st_ino, || {
            let (fd, meta) = open(&link, &meta)?;
            Ok::<_, io::Error>((
                Object {
                    kind: ObjectKind::Unlinked {
                        dir: dir.into_os_string().into_vec(),
                    },
                    size: meta.st_size as u64,
                    owner: (meta.st_uid, meta.st_gid, meta.st_mode),
                    seals: 0,
                },
                fd,
            ))
        })?;
        return Ok(Some(Backing::Object {
            object,
            offset: m.offset,
            writable,
        }));
    }
    let exec = m.prot & 4 != 0;
    let key = (
        meta.st_dev,
        meta.st_ino,
        meta.st_size,
        meta.st_mtime * 1_000_000_000 + meta.st_mtime_nsec as i64,
        exec,
    );
    let file = match cache.files.get(&key).filter(|f| f.path == path) {
        Some(f) => f.clone(),
        None => {
            let here = procfs::path(pid, "root").join(OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(&path)));
            match rustix::fs::stat(&here) {
                Ok(p) if (p.st_dev, p.st_ino) == (meta.st_dev, meta.st_ino) => {}
                _ => {
                    return Err(Reason::Blocked(
                        "the file behind it was replaced or renamed since it was mapped".into(),
                        "restart the program so that it maps the present file".into(),
                    ));
                }
            }
            let mut f = files::file_id(&path, &meta);
            if exec {
                f.build_id = files::build_id(&link);
            }
            cache.files.insert(key, f.clone());
            f
        }
    };
    Ok(Some(Backing::File {
        file,
        offset: m.offset,
        writable,
    }))
}

fn stat(link: &Path) -> io::Result<rustix::fs::Stat> {
    rustix::fs::stat(link).map_err(|e| io::Error::new(io::Error::from(e).kind(), format!("{}: {e}", link.display())))
}

/// Opens what `meta` was told of. In a running process something else may be mapped there by now: that one is not found, then.
fn open(link: &Path, meta: &rustix::fs::Stat) -> io::Result<(OwnedFd, rustix::fs::Stat)> {
    let fd: OwnedFd = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(link)
        .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", link.display())))?
        .into();
    let now = rustix::fs::fstat(&fd)?;
    if (now.st_dev, now.st_ino) != (meta.st_dev, meta.st_ino) {
        return Err(another(link));
    }
    Ok((fd, now))
}

/// The process runs, and has mapped something else there since its list of mappings was read.
fn another(link: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{} is another file by now", link.display()))
}

fn shared_object(link: &Path, m: &Mapping, objects: &mut ObjectTable) -> Result<u32, Reason> {
    let meta = stat(link)?;
    if meta.st_ino != m.ino {
        return Err(another(link).into());
    }
    Ok(objects.get_or_insert(meta.st_dev, meta.st_ino, || {
        let (fd, meta) = open(link, &meta)?;
        let (kind, seals) = match m.name.strip_prefix(b"/memfd:") {
            Some(n) => {
                let seals = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GET_SEALS).unwrap_or(0) as u32;
                (ObjectKind::Memfd(n.strip_suffix(b" (deleted)").unwrap_or(n).to_vec()), seals)
            }
            None => (ObjectKind::SharedAnonymous, 0),
        };
        Ok::<_, io::Error>((
            Object {
                kind,
                size: meta.st_size as u64,
                owner: (meta.st_uid, meta.st_gid, meta.st_mode),
                seals,
            },
            fd,
        ))
    })?)
}

/// Whether a shared anonymous mapping is an injector's table that a killed agent left behind.
pub fn is_leaked_table(pid: i32, m: &Mapping) -> bool {
    if m.name != b"/dev/zero (deleted)" || !m.shared {
        return false;
    }
    let link = procfs::mapped(pid, m.start, m.end);
    let mut head = [0u8; 16];
    File::open(link)
        .and_then(|f| std::os::unix::fs::FileExt::read_exact_at(&f, &mut head, 0))
        .is_ok()
        && head == *crate::inject::MAGIC
}

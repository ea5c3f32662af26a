//! What has to outlive an agent: one small file a migration and side, in `STATE_DIR/journal`.
//!
//! ```text
//! +0   magic "migrate journal\n"     +64  decision word, little endian (destination: 0 undecided, 1 released, 2 dead)
//! +4096 JSON text
//! ```
//! The decision word of the destination's file is mapped into every task of the copy: the store that releases them *is* the journal entry, so no crash
//! of the agent can fall between the two. Nothing is synced to disk: whatever a journal speaks of dies with the host it ran on, and the boot
//! id in it tells.

use crate::{procfs::stat, restore::pilots::WORD};
use rustix::fs::{AtFlags, CWD, linkat};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

const MAGIC: &[u8; 16] = b"migrate journal\n";
const TEXT: u64 = 4096;
const MAX_TEXT: u64 = 16 << 20;

/// Which side wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The source, which holds the originals stopped.
    Source,
    /// The destination.
    Destination,
}

/// How far it had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Source: about to hand over, or handed over. Destination: committed.
    Committed,
    /// The copy runs.
    Running,
    /// The copy is dead or never was.
    Aborted,
}

/// The text of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Migration.
    pub id: String,
    /// Side.
    pub side: Side,
    /// Stage.
    pub stage: Stage,
    /// (pid, start time) of every process on this side: a process is the same only if both agree.
    pub processes: Vec<(i32, u64)>,
    /// The other agent's HOST:PORT, for the source.
    pub peer: String,
    /// Unix seconds.
    pub since: u64,
    /// /proc/sys/kernel/random/boot_id.
    pub boot_id: String,
    /// Source: processes that hold pages the copy does not have yet: (name of the address space, pid).
    #[serde(default)]
    pub spaces: Vec<(u32, i32)>,
    /// Source: shared memory of which the copy does not have all pages yet: (its name, a process that maps it, where).
    #[serde(default)]
    pub objects: Vec<(u32, i32, u64, u64)>,
}

/// An open journal file. It stays when dropped; [`Journal::remove`] ends it.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

fn dir(state_dir: &Path) -> PathBuf {
    state_dir.join("journal")
}

fn path(state_dir: &Path, id: &str, side: Side) -> PathBuf {
    let side = if side == Side::Source { "source" } else { "destination" };
    dir(state_dir).join(format!("{id}.{side}"))
}

/// Whether a string can be a migration's id: it becomes part of a file name.
pub fn valid_id(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The (pid, start time) of processes that exist.
pub fn identify(pids: &[i32]) -> Vec<(i32, u64)> {
    pids.iter().filter_map(|&p| stat::read(p).ok().map(|s| (p, s.start_time))).collect()
}

/// This boot.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|s| s.trim().to_owned())
        .unwrap_or_default()
}

/// A file, and the name that it has until it is whole, if it has one.
type Unfinished = (File, Option<PathBuf>);

/// A file in the directory of `path`, which it is to have when it is whole. It has no name until then, so that an agent that is killed leaves nothing (O_TMPFILE,
/// open(2)); where the file system has no such files it has another name, and [`Journal::prune`] removes what a killed agent left.
fn unfinished(path: &Path) -> io::Result<Unfinished> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(match nameless(dir)? {
        Some(file) => (file, None),
        None => named(path)?,
    })
}

/// A file in this directory that has no name, so that nothing is left of it unless somebody gives it one ([`give_name`]). None: the file system has no such
/// files.
pub(crate) fn nameless(dir: &Path) -> io::Result<Option<File>> {
    match writable().custom_flags(libc::O_TMPFILE).open(dir) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => Ok(None),
        opened => opened.map(Some),
    }
}

/// Gives an open file (another) name. Unlike a rename, a link never replaces: AlreadyExists.
pub(crate) fn give_name(fd: impl AsFd, path: &Path) -> io::Result<()> {
    let fd = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    Ok(linkat(CWD, fd, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

fn named(path: &Path) -> io::Result<Unfinished> {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let name = path.with_extension(format!("tmp-{}-{serial}", std::process::id()));
    Ok((writable().create(true).truncate(true).open(&name)?, Some(name)))
}

fn writable() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

impl Journal {
    /// Makes a journal, mode 0600, under its final name only when whole.
    pub fn create(state_dir: &Path, entry: &Entry) -> io::Result<Journal> {
        Self::create_in(state_dir, entry, unfinished)
    }

    fn create_in(state_dir: &Path, entry: &Entry, unfinished: fn(&Path) -> io::Result<Unfinished>) -> io::Result<Journal> {
        if !valid_id(&entry.id) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{:?} is not an id of a migration", entry.id),
            ));
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir(state_dir))?;
        let path = path(state_dir, &entry.id, entry.side);
        let (mut file, temporary) = unfinished(&path)?;
        file.set_len(TEXT)?;
        file.write_all(MAGIC)?;
        let mut j = Journal { path, file };
        j.update(entry)?;
        // Whoever comes first with an id has it.
        let linked = give_name(&j.file, &j.path);
        if let Some(name) = temporary {
            fs::remove_file(name)?;
        }
        linked?;
        Ok(j)
    }

    /// Decides against a migration this side has not begun, for good: a late beginning finds the id taken.
    pub fn refuse(state_dir: &Path, id: &str) -> io::Result<()> {
        let entry = Entry {
            id: id.to_owned(),
            side: Side::Destination,
            stage: Stage::Aborted,
            processes: Vec::new(),
            peer: String::new(),
            since: crate::sys::misc::clock_ns(libc::CLOCK_REALTIME) / 1_000_000_000,
            boot_id: boot_id(),
            spaces: Vec::new(),
            objects: Vec::new(),
        };
        let j = Self::create(state_dir, &entry)?;
        j.file.write_all_at(&2u32.to_le_bytes(), WORD as u64)
    }

    /// Rewrites the text; the decision word stays.
    pub fn update(&mut self, entry: &Entry) -> io::Result<()> {
        let text = serde_json::to_vec(entry)?;
        self.file.write_all_at(&text, TEXT)?;
        self.file.set_len(TEXT + text.len() as u64)
    }

    /// The file, whose first page holds the decision word.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The decision word.
    pub fn decision(&self) -> io::Result<u32> {
        let mut b = [0; 4];
        self.file.read_exact_at(&mut b, WORD as u64)?;
        Ok(u32::from_le_bytes(b))
    }

    /// Reads one.
    pub fn open(state_dir: &Path, id: &str, side: Side) -> io::Result<(Journal, Entry)> {
        if !valid_id(id) {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("{id:?} is not an id of a migration"),
            ));
        }
        Self::open_path(path(state_dir, id, side))
    }

    fn open_path(path: PathBuf) -> io::Result<(Journal, Entry)> {
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let len = file.metadata()?.len().saturating_sub(TEXT).min(MAX_TEXT);
        let mut magic = [0; 16];
        file.read_exact_at(&mut magic, 0)?;
        if &magic != MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} is not a journal", path.display()),
            ));
        }
        let mut text = vec![0; len as usize];
        file.read_exact_at(&mut text, TEXT)?;
        let entry = serde_json::from_slice(&text)?;
        Ok((Journal { path, file }, entry))
    }

    /// All journals of a state directory, damaged ones left out.
    pub fn list(state_dir: &Path) -> io::Result<Vec<Entry>> {
        let mut out = Vec::new();
        let entries = match fs::read_dir(dir(state_dir)) {
            Ok(e) => e,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(out),
            Err(e) => return Err(e),
        };
        for e in entries {
            let p = e?.path();
            if p.extension().is_some_and(|x| x == "source" || x == "destination")
                && let Ok((_, entry)) = Self::open_path(p)
            {
                out.push(entry);
            }
        }
        out.sort_by(|a, b| a.since.cmp(&b.since).then(a.id.cmp(&b.id)));
        Ok(out)
    }

    /// Removes what nobody will ask for any more: entries of an earlier boot, old ones without a living process, and unfinished files of agents that were killed.
    pub fn prune(state_dir: &Path) {
        const DAY: u64 = 24 * 3600;
        // Another agent may be writing one just now, which takes milliseconds.
        const UNFINISHED: Duration = Duration::from_secs(60);
        let now = crate::sys::misc::clock_ns(libc::CLOCK_REALTIME) / 1_000_000_000;
        for e in fs::read_dir(dir(state_dir)).into_iter().flatten().flatten() {
            let p = e.path();
            let name = e.file_name();
            if name.to_string_lossy().contains(".tmp-") {
                let age = e.metadata().and_then(|m| m.modified()).map(|t| t.elapsed().unwrap_or_default());
                if age.is_ok_and(|a| a > UNFINISHED) {
                    let _ = fs::remove_file(&p);
                }
            } else if let Ok((journal, entry)) = Self::open_path(p)
                && entry.alive().is_empty()
                && (entry.boot_id != boot_id() || now.saturating_sub(entry.since) > DAY)
            {
                let _ = journal.remove();
            }
        }
    }

    /// Ends it.
    pub fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

impl Entry {
    /// Processes of it that are still there.
    pub fn alive(&self) -> Vec<i32> {
        if self.boot_id != boot_id() {
            return Vec::new();
        }
        self.processes
            .iter()
            .filter(|(pid, start)| stat::read(*pid).is_ok_and(|s| s.start_time == *start))
            .map(|(p, _)| *p)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str) -> Entry {
        Entry {
            id: id.into(),
            side: Side::Source,
            stage: Stage::Committed,
            processes: identify(&[std::process::id() as i32]),
            peer: "h:1".into(),
            since: 7,
            boot_id: boot_id(),
            spaces: Vec::new(),
            objects: Vec::new(),
        }
    }

    #[test]
    fn a_journal_comes_back() {
        let d = tempfile::tempdir().unwrap();
        let id = "0123456789abcdef0123456789abcdef";
        let mut e = entry(id);
        let mut j = Journal::create(d.path(), &e).unwrap();
        assert_eq!(j.decision().unwrap(), 0);
        j.file().write_all_at(&1u32.to_le_bytes(), WORD as u64).unwrap();
        e.stage = Stage::Running;
        j.update(&e).unwrap();
        let (j, read) = Journal::open(d.path(), id, Side::Source).unwrap();
        assert_eq!((read.clone(), j.decision().unwrap()), (e, 1));
        assert_eq!(read.alive(), vec![std::process::id() as i32]);
        assert_eq!(Journal::list(d.path()).unwrap().len(), 1);
        j.remove().unwrap();
        assert!(Journal::list(d.path()).unwrap().is_empty());
    }

    #[test]
    fn whoever_comes_first_with_an_id_has_it() {
        let d = tempfile::tempdir().unwrap();
        let mut first = entry("0123456789abcdef0123456789abcdef");
        Journal::create(d.path(), &first).unwrap();
        first.since += 1;
        let second = Journal::create(d.path(), &first).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(Journal::list(d.path()).unwrap()[0].since, first.since - 1);
        assert_eq!(fs::read_dir(dir(d.path())).unwrap().count(), 1);
    }

    /// As on a file system without O_TMPFILE.
    #[test]
    fn one_that_had_a_name_before_it_was_whole_loses_it() {
        let d = tempfile::tempdir().unwrap();
        let e = entry("0123456789abcdef0123456789abcdef");
        let names = || -> Vec<_> { fs::read_dir(dir(d.path())).unwrap().map(|e| e.unwrap().file_name()).collect() };
        Journal::create_in(d.path(), &e, named).unwrap();
        assert_eq!(Journal::list(d.path()).unwrap()[0].id, e.id);
        let second = Journal::create_in(d.path(), &e, named).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(names().len(), 1);
        // What an agent left that was killed, and what one writes just now.
        let (left, left_name) = named(&path(d.path(), &e.id, e.side)).unwrap();
        let (_now, now_name) = named(&path(d.path(), &e.id, e.side)).unwrap();
        left.set_modified(std::time::SystemTime::now() - Duration::from_secs(3600)).unwrap();
        Journal::prune(d.path());
        assert!(!left_name.unwrap().exists());
        assert!(now_name.unwrap().exists());
        assert_eq!(Journal::list(d.path()).unwrap().len(), 1);
    }

    #[test]
    fn ids_cannot_leave_the_directory() {
        let d = tempfile::tempdir().unwrap();
        for id in ["../../etc/passwd", "", "0123456789abcdef0123456789abcde/"] {
            assert!(Journal::create(d.path(), &entry(id)).is_err());
            assert!(Journal::open(d.path(), id, Side::Source).is_err());
        }
    }
}

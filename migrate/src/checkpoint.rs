//! Checkpoints: a frozen tree in one file, and back.
//!
//! ```text
//! +0   magic "MIGRATE\x1a"   +8 version u32   +12 header length u32   header (JSON: who, when, how large; what `list` shows)
//! then u64 state length, state (a bincode section), and frames until one of no runs:
//!   u32 runs, u32 data pages, runs of 24 bytes {space u32, flags u32, start u64, pages u64}, data pages
//! last 32 bytes: blake3 of everything before
//! ```
//! Numbers are little endian. A file is written under a temporary name and renamed when whole and synced. With a parent, a page equal to the
//! parent's at the same place is written as a run with flag 2 and no data; the restore reads it from the parent, which `rm` then keeps.

use crate::{
    dump::pages,
    image::{PAGE, Tree, codec},
    pages::PageSet,
    report::{Downtime, Event, Events, Failure, Report, Round, Stdio},
    restore::{
        fds::StdioFds,
        rebuild::{Names, Pids, Rebuild, Setting},
    },
    source::{self, freeze::Snapshot},
    sys::misc,
    tracer::Tracer,
    wire::Ranges,
};
use bytes::Bytes;
use migrate_transport::{PageFrame, Run};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

const MAGIC: &[u8; 8] = b"MIGRATE\x1a";
/// The version this build writes and the newest it reads.
pub const VERSION: u32 = 1;
const SUFFIX: &str = "checkpoint";
const ZERO: u32 = 1;
const PARENT: u32 = 2;
const MAX_HEADER: u32 = 1 << 20;

/// What `checkpoint` was asked.
#[derive(Debug, Clone)]
pub struct CheckpointOptions {
    /// Root of the tree.
    pub pid: i32,
    /// Directory of the images.
    pub dir: PathBuf,
    /// Name; a number is chosen without.
    pub name: Option<String>,
    /// The program goes on.
    pub leave_running: bool,
    /// Only pages that differ from this checkpoint's are written.
    pub parent: Option<String>,
}

/// What `restore` was asked.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Directory of the images.
    pub dir: PathBuf,
    /// Name; the newest without.
    pub name: Option<String>,
    /// Standard streams.
    pub stdio: Stdio,
}

/// The header of an image: what `list` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Name.
    pub name: String,
    /// Unix seconds.
    pub created: u64,
    /// Root pid.
    pub pid: i32,
    /// Its command.
    pub command: String,
    /// Processes.
    pub processes: u32,
    /// Threads.
    pub threads: u32,
    /// Bytes of pages with content in the tree.
    pub bytes: u64,
    /// Checkpoint whose equal pages were left out.
    pub parent: Option<String>,
}

fn fail(phase: &'static str, pid: i32, m: impl std::fmt::Display) -> Failure {
    Failure::failed(phase, pid, m)
}

/// The file of a checkpoint. Names are one path component of letters, digits, `.`, `_` and `-`.
pub fn path(dir: &Path, name: &str) -> Result<PathBuf, Failure> {
    let fine = !name.is_empty()
        && name.len() <= 128
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if !fine {
        return Err(
            Failure::refused("usage", 0, format!("{name:?} cannot name a checkpoint"), Vec::new())
                .with_fix("use letters, digits, dots, dashes and underscores, at most 128"),
        );
    }
    Ok(dir.join(format!("{name}.{SUFFIX}")))
}

struct Hashing<W> {
    inner: W,
    hasher: blake3::Hasher,
    len: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, b: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(b)?;
        self.hasher.update(&b[..n]);
        self.len += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes a checkpoint of a running tree. The tree goes on, or is ended when everything is on disk.
pub fn checkpoint(options: &CheckpointOptions, events: &Events, cancel: &CancellationToken) -> Result<Report, Failure> {
    let start = Instant::now();
    let pid = options.pid;
    events(Event::Phase { phase: "inventory" });
    let inv = source::inventory(pid)?;
    if !inv.blockers.is_empty() {
        return Err(Failure::refused("preflight", pid, "the tree cannot be saved", inv.blockers));
    }
    fs::create_dir_all(&options.dir).map_err(|e| fail("preflight", pid, format!("cannot make {}: {e}", options.dir.display())))?;
    let name = match &options.name {
        Some(n) => n.clone(),
        None => next_name(&options.dir)?,
    };
    let target = path(&options.dir, &name)?;
    if target.exists() {
        return Err(
            Failure::refused("preflight", pid, format!("a checkpoint named {name} exists already"), Vec::new())
                .with_fix(format!("choose another name, or migrate rm --dir {} {name}", options.dir.display())),
        );
    }
    let parent = match &options.parent {
        Some(p) => Some(index(&options.dir, p)?),
        None => None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| fail("freeze", pid, e))?;
    let tracer = Tracer::start().map_err(|e| fail("freeze", pid, e))?;
    events(Event::Phase { phase: "freeze" });
    let snap = runtime.block_on(source::freeze::freeze(&tracer, pid, &inv.tree.host, cancel))?;
    events(Event::Phase { phase: "write" });
    let temporary = options.dir.join(format!(".{name}.{}.tmp", std::process::id()));
    let written = write(&temporary, &name, &snap, options.parent.clone(), parent, events, cancel);
    let round = match written {
        Ok(r) => r,
        Err(e) => {
            runtime.block_on(source::freeze::thaw(&tracer));
            let _ = fs::remove_file(&temporary);
            return Err(fail(
                "write",
                pid,
                format!("cannot write {}: {e}; the program runs on", target.display()),
            ));
        }
    };
    // A link does not replace another checkpoint that appeared meanwhile under the same name.
    if let Err(e) = fs::hard_link(&temporary, &target).and_then(|()| fs::remove_file(&temporary)) {
        runtime.block_on(source::freeze::thaw(&tracer));
        let _ = fs::remove_file(&temporary);
        return Err(fail(
            "write",
            pid,
            format!("cannot name {}: {e}; the program runs on", target.display()),
        ));
    }
    let _ = File::open(&options.dir).and_then(|d| d.sync_all());
    let downtime = snap.since.elapsed();
    if options.leave_running {
        runtime.block_on(source::freeze::thaw(&tracer));
    } else {
        runtime.block_on(source::freeze::kill(&tracer));
    }
    Ok(Report {
        outcome: "checkpointed".into(),
        id: name,
        pid,
        processes: snap.tree.processes.len() as u32,
        threads: threads(&snap.tree),
        rounds: vec![round],
        downtime_ms: downtime.as_secs_f64() * 1e3,
        downtime: Downtime {
            interrupt_ms: snap.interrupt.as_secs_f64() * 1e3,
            collect_ms: snap.collect.as_secs_f64() * 1e3,
            transfer_ms: round.ms,
            ..Default::default()
        },
        total_ms: start.elapsed().as_secs_f64() * 1e3,
        bytes_sent: round.bytes,
        pages_sent: round.pages,
        pages_zero: round.zero_pages,
        agent_peak_rss: misc::peak_rss(),
        ..Default::default()
    })
}

fn threads(t: &Tree) -> u32 {
    t.processes.iter().map(|p| p.threads.len() as u32).sum()
}

fn next_name(dir: &Path) -> Result<String, Failure> {
    for n in 1..1_000_000 {
        let name = n.to_string();
        if !path(dir, &name)?.exists() {
            return Ok(name);
        }
    }
    Err(fail("preflight", 0, "too many checkpoints"))
}

/// What an image has of a tree beside its pages. Always empty: `drops`, `later`, `narrowed`, `verify`, which belonged to the message that was sent like this when
/// the format was made.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    /// The frozen tree.
    pub tree: Tree,
    /// What its address spaces and objects are called in page runs.
    pub names: Names,
    drops: Vec<(u32, u64, u64)>,
    /// Guard regions by address space.
    pub guards: Vec<Vec<(u64, u64)>>,
    /// Bytes of pages that follow.
    pub bytes: u64,
    later: Vec<Ranges>,
    narrowed: bool,
    verify: bool,
}

type ParentIndex = HashMap<(u32, u64), [u8; 16]>;

fn page_hash(page: &[u8]) -> [u8; 16] {
    blake3::hash(page).as_bytes()[..16].try_into().unwrap()
}

fn write(
    to: &Path,
    name: &str,
    snap: &Snapshot,
    parent: Option<String>,
    known: Option<ParentIndex>,
    events: &Events,
    cancel: &CancellationToken,
) -> io::Result<Round> {
    let start = Instant::now();
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    let mut out = Hashing {
        inner: BufWriter::with_capacity(1 << 20, file),
        hasher: blake3::Hasher::new(),
        len: 0,
    };
    let total: u64 = snap.plans.iter().map(pages::SpacePlan::bytes).sum();
    let root = &snap.tree.processes[0];
    let command = crate::procfs::read(snap.pids[0], "cmdline").unwrap_or_default();
    let command = String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ");
    let info = ImageInfo {
        name: name.to_owned(),
        created: misc::clock_ns(libc::CLOCK_REALTIME) / 1_000_000_000,
        pid: root.pid,
        command: if command.is_empty() { root.comm.clone() } else { command },
        processes: snap.tree.processes.len() as u32,
        threads: threads(&snap.tree),
        bytes: total,
        parent,
    };
    let header = serde_json::to_vec(&info)?;
    out.write_all(MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&(header.len() as u32).to_le_bytes())?;
    out.write_all(&header)?;
    let state = Saved {
        tree: snap.tree.clone(),
        names: snap.names.clone(),
        drops: Vec::new(),
        guards: snap.guards.clone(),
        bytes: total,
        later: Vec::new(),
        narrowed: false,
        verify: false,
    };
    let state = codec::encode(&state).map_err(io::Error::other)?;
    out.write_all(&(state.len() as u64).to_le_bytes())?;
    out.write_all(&state)?;
    let mut round = Round::default();
    let mut failed = None;
    let mut last = Instant::now();
    for plan in &snap.plans {
        let reader = source::freeze::open_reader(plan.space, snap)?;
        pages::read_plan(plan, &reader, &mut |batch| {
            round.pages += batch.pages;
            round.zero_pages += batch.zero;
            if cancel.is_cancelled() {
                failed = Some(io::Error::new(io::ErrorKind::Interrupted, "interrupted"));
            } else if let Err(e) = write_frame(&mut out, &batch, known.as_ref()) {
                failed = Some(e);
            }
            if last.elapsed() > Duration::from_millis(100) {
                last = Instant::now();
                let bytes = (round.pages + round.zero_pages) * PAGE;
                events(Event::Progress {
                    round: 1,
                    bytes,
                    total,
                    rate: (bytes as f64 / start.elapsed().as_secs_f64()) as u64,
                });
            }
            failed.is_none()
        })?;
        if let Some(e) = failed {
            return Err(e);
        }
    }
    out.write_all(&[0; 8])?;
    let digest = out.hasher.finalize();
    out.inner.write_all(digest.as_bytes())?;
    out.inner.flush()?;
    out.inner.get_ref().sync_all()?;
    round.bytes = out.len + 32;
    round.ms = start.elapsed().as_secs_f64() * 1e3;
    events(Event::Round(round));
    Ok(round)
}

fn write_frame(out: &mut impl Write, batch: &pages::Batch, known: Option<&ParentIndex>) -> io::Result<()> {
    let mut runs: Vec<(u32, u32, u64, u64)> = Vec::new();
    let mut data: Vec<&[u8]> = Vec::new();
    let mut chunks = batch.data.iter();
    for r in &batch.runs {
        if r.zero {
            runs.push((r.space, ZERO, r.start, r.pages.into()));
            continue;
        }
        let chunk = chunks.next().map_or(&[][..], |c| &c[..]);
        let Some(known) = known else {
            runs.push((r.space, 0, r.start, r.pages.into()));
            data.push(chunk);
            continue;
        };
        for (k, page) in chunk.chunks(PAGE as usize).enumerate() {
            let at = r.start + k as u64 * PAGE;
            let same = known.get(&(r.space, at)).is_some_and(|h| *h == page_hash(page));
            let flag = if same { PARENT } else { 0 };
            match runs.last_mut() {
                Some(l) if l.0 == r.space && l.1 == flag && l.2 + l.3 * PAGE == at => l.3 += 1,
                _ => runs.push((r.space, flag, at, 1)),
            }
            if !same {
                data.push(page);
            }
        }
    }
    let bytes: usize = data.iter().map(|d| d.len()).sum();
    out.write_all(&(runs.len() as u32).to_le_bytes())?;
    out.write_all(&((bytes as u64 / PAGE) as u32).to_le_bytes())?;
    for (space, flags, start, pages) in runs {
        out.write_all(&space.to_le_bytes())?;
        out.write_all(&flags.to_le_bytes())?;
        out.write_all(&start.to_le_bytes())?;
        out.write_all(&pages.to_le_bytes())?;
    }
    data.iter().try_for_each(|d| out.write_all(d))
}

/// An image opened for reading, its header understood.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: BufReader<File>,
    /// Header.
    pub info: ImageInfo,
    body: u64,
}

struct RawFrame {
    runs: Vec<(Run, u32)>,
    data: Bytes,
}

impl Image {
    /// Opens an image and reads its header.
    pub fn open(dir: &Path, name: &str) -> Result<Image, Failure> {
        let path = path(dir, name)?;
        let refuse = |m: String| Failure::refused("image", 0, format!("{}: {m}", path.display()), Vec::new());
        let file = File::open(&path).map_err(|e| {
            let m = if e.kind() == io::ErrorKind::NotFound {
                "there is no such checkpoint".to_owned()
            } else {
                e.to_string()
            };
            refuse(m).with_fix(format!("see migrate list --dir {}", dir.display()))
        })?;
        let mut file = BufReader::with_capacity(1 << 20, file);
        let mut head = [0u8; 16];
        file.read_exact(&mut head).map_err(|_| refuse("the image is truncated".into()))?;
        if &head[..8] != MAGIC {
            return Err(refuse("not a checkpoint of migrate".into()));
        }
        let version = u32::from_le_bytes(head[8..12].try_into().unwrap());
        if version > VERSION {
            return Err(refuse(format!("the image has version {version}, this build reads up to {VERSION}"))
                .with_fix("use the migrate that wrote it"));
        }
        let len = u32::from_le_bytes(head[12..].try_into().unwrap());
        if version == 0 || len > MAX_HEADER {
            return Err(refuse("the image is damaged (header)".into()));
        }
        let mut header = vec![0; len as usize];
        file.read_exact(&mut header).map_err(|_| refuse("the image is truncated".into()))?;
        let info: ImageInfo = serde_json::from_slice(&header).map_err(|_| refuse("the image is damaged (header)".into()))?;
        Ok(Image {
            body: 16 + u64::from(len),
            path,
            file,
            info,
        })
    }

    fn refuse(&self, m: impl std::fmt::Display) -> Failure {
        Failure::refused("image", 0, format!("{}: {m}", self.path.display()), Vec::new())
    }

    /// Compares the checksum with every byte of the file.
    pub fn verify(&self) -> Result<(), Failure> {
        let bad = |e: io::Error| self.refuse(format!("cannot be read: {e}"));
        let mut f = File::open(&self.path).map_err(bad)?;
        let len = f.metadata().map_err(bad)?.len();
        let Some(content) = len.checked_sub(32) else {
            return Err(self.refuse("the image is truncated"));
        };
        let mut hasher = blake3::Hasher::new();
        let mut left = content;
        let mut buf = vec![0u8; content.min(1 << 20) as usize];
        while left > 0 {
            let n = (left as usize).min(buf.len());
            f.read_exact(&mut buf[..n]).map_err(bad)?;
            hasher.update(&buf[..n]);
            left -= n as u64;
        }
        let mut sum = [0u8; 32];
        f.read_exact(&mut sum).map_err(bad)?;
        if hasher.finalize() != blake3::Hash::from_bytes(sum) {
            return Err(self.refuse("the image is damaged or truncated: its checksum does not match"));
        }
        Ok(())
    }

    /// The state; the frames follow.
    pub fn state(&mut self) -> Result<Saved, Failure> {
        self.file.seek(SeekFrom::Start(self.body)).map_err(|e| self.refuse(e))?;
        let mut len = [0; 8];
        self.file.read_exact(&mut len).map_err(|_| self.refuse("the image is truncated"))?;
        let len = u64::from_le_bytes(len);
        if len > codec::LIMIT as u64 {
            return Err(self.refuse("the image is damaged (state)"));
        }
        let mut b = vec![0; len as usize];
        self.file.read_exact(&mut b).map_err(|_| self.refuse("the image is truncated"))?;
        let state: Saved = codec::decode(&b).map_err(|e| self.refuse(format!("the image is damaged: {e}")))?;
        state
            .tree
            .validate()
            .map_err(|e| self.refuse(format!("the image is damaged: {e}")))?;
        if state.tree.processes.is_empty() {
            return Err(self.refuse("the image is damaged: it holds no process"));
        }
        Ok(state)
    }

    fn frame(&mut self) -> io::Result<Option<RawFrame>> {
        let bad = |m: &str| io::Error::new(io::ErrorKind::InvalidData, m.to_owned());
        let mut head = [0; 8];
        self.file.read_exact(&mut head)?;
        let runs = u32::from_le_bytes(head[..4].try_into().unwrap());
        let pages = u32::from_le_bytes(head[4..].try_into().unwrap());
        if runs == 0 {
            return Ok(None);
        }
        if runs > 1 << 20 || pages > 1 << 16 {
            return Err(bad("a frame is too large"));
        }
        let mut list = Vec::with_capacity(runs as usize);
        let mut content = 0u64;
        for _ in 0..runs {
            let mut r = [0; 24];
            self.file.read_exact(&mut r)?;
            let space = u32::from_le_bytes(r[..4].try_into().unwrap());
            let flags = u32::from_le_bytes(r[4..8].try_into().unwrap());
            let start = u64::from_le_bytes(r[8..16].try_into().unwrap());
            let n = u64::from_le_bytes(r[16..].try_into().unwrap());
            let n = u32::try_from(n).map_err(|_| bad("a run is too long"))?;
            if flags == 0 {
                content += u64::from(n);
            }
            list.push((Run::new(space, start, n, flags == ZERO).map_err(io::Error::other)?, flags));
        }
        if content != u64::from(pages) {
            return Err(bad("a frame does not hold the pages of its runs"));
        }
        let mut data = vec![0; pages as usize * PAGE as usize];
        self.file.read_exact(&mut data)?;
        Ok(Some(RawFrame {
            runs: list,
            data: data.into(),
        }))
    }
}

/// Hashes of every page that a checkpoint and its own parents hold.
fn index(dir: &Path, name: &str) -> Result<ParentIndex, Failure> {
    let mut out = ParentIndex::new();
    pages_of(dir, name, &mut |run, data| {
        for (k, page) in data.chunks(PAGE as usize).enumerate() {
            out.insert((run.space, run.start + k as u64 * PAGE), page_hash(page));
        }
        Ok(())
    })?;
    Ok(out)
}

/// Every page with content of a checkpoint, those of its parents included. Err: it cannot be read, is damaged, or `sink` failed.
pub fn pages_of(dir: &Path, name: &str, sink: &mut dyn FnMut(&Run, Bytes) -> io::Result<()>) -> Result<(), Failure> {
    fn walk(
        dir: &Path,
        name: &str,
        seen: &mut Vec<String>,
        want: Option<&BTreeMap<u32, PageSet>>,
        sink: &mut dyn FnMut(&Run, Bytes) -> io::Result<()>,
    ) -> Result<(), Failure> {
        if seen.iter().any(|s| s == name) {
            let m = format!("the checkpoints {} are each other's parents", seen.join(", "));
            return Err(Failure::refused("image", 0, m, Vec::new()));
        }
        seen.push(name.to_owned());
        let mut image = Image::open(dir, name)?;
        image.verify()?;
        image.state()?;
        // Ranges rather than pages: a run of a few bytes may name a terabyte.
        let mut inherited: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
        let wanted = |space: u32, at: u64| want.and_then(|w| w.get(&space)).is_some_and(|s| s.contains(at));
        loop {
            let frame = image.frame().map_err(|e| image.refuse(format!("the image is damaged: {e}")))?;
            let Some(frame) = frame else { break };
            let mut at = 0usize;
            for (run, flags) in &frame.runs {
                let len = run.pages as usize * PAGE as usize;
                match *flags {
                    0 => {
                        let data = frame.data.slice(at..at + len);
                        at += len;
                        match want {
                            None => sink(run, data),
                            Some(_) => (0..u64::from(run.pages))
                                .map(|k| (k as usize, run.start + k * PAGE))
                                .filter(|&(_, page)| wanted(run.space, page))
                                .try_for_each(|(k, page)| {
                                    let one = Run::new(run.space, page, 1, false).map_err(io::Error::other)?;
                                    sink(&one, data.slice(k * PAGE as usize..(k + 1) * PAGE as usize))
                                }),
                        }
                        .map_err(|e| image.refuse(e))?;
                    }
                    PARENT => inherited.entry(run.space).or_default().push((run.start, run.end())),
                    _ => {}
                }
            }
        }
        let mut inherited: BTreeMap<u32, PageSet> = inherited.into_iter().map(|(space, r)| (space, PageSet::from_ranges(r))).collect();
        if let Some(want) = want {
            for (space, pages) in &mut inherited {
                *pages = want.get(space).map_or_else(PageSet::new, |w| w.intersection(pages));
            }
        }
        if inherited.values().all(PageSet::is_empty) {
            return Ok(());
        }
        let Some(parent) = image.info.parent.clone() else {
            return Err(image.refuse("the image is damaged: pages of a parent it does not name"));
        };
        // A long chain does not stay open.
        drop(image);
        walk(dir, &parent, seen, Some(&inherited), sink)
    }
    walk(dir, name, &mut Vec::new(), None, sink)
}

/// A restored tree, running.
#[derive(Debug)]
pub struct Restored {
    /// What was done.
    pub report: Report,
    /// Root pid in the agent's namespace; a child of this process.
    pub pid: i32,
    /// Keeps the tracer thread, whose child the root is.
    pub tracer: Tracer,
}

/// Brings a checkpoint back to life.
pub fn restore(options: &RestoreOptions, events: &Events, cancel: &CancellationToken) -> Result<Restored, Failure> {
    let start = Instant::now();
    let name = match &options.name {
        Some(n) => n.clone(),
        None => {
            let newest = list(&options.dir)?.into_iter().max_by_key(|i| i.created);
            newest
                .ok_or_else(|| {
                    Failure::refused(
                        "image",
                        0,
                        format!("there is no checkpoint in {}", options.dir.display()),
                        Vec::new(),
                    )
                })?
                .name
        }
    };
    events(Event::Phase { phase: "verify" });
    let mut image = Image::open(&options.dir, &name)?;
    image.verify()?;
    let Saved {
        tree,
        names,
        guards,
        bytes,
        ..
    } = image.state()?;
    drop(image);
    events(Event::Phase { phase: "preflight" });
    let (blockers, fresh) = crate::preflight::tree(&tree);
    if !blockers.is_empty() {
        return Err(Failure::refused(
            "preflight",
            0,
            format!("checkpoint {name} cannot run here"),
            blockers,
        ));
    }
    if fresh {
        events(Event::Note {
            text: "some of the tree's pids are taken here: it gets a pid namespace of its own".into(),
        });
    }
    let (processes, thread_count) = (tree.processes.len() as u32, threads(&tree));
    let original = tree.processes[0].pid;
    let failed = |m: String| Failure::failed("restore", original, format!("{m}; nothing was started"));
    let stdio = StdioFds::open(&options.stdio).map_err(|e| failed(format!("cannot open the standard streams: {e}")))?;
    let tracer = Tracer::start().map_err(|e| failed(e.to_string()))?;
    events(Event::Phase { phase: "restore" });
    let word = memory_word().map_err(|e| failed(e.to_string()))?;
    let setting = Setting {
        pids: if fresh { Pids::Fresh } else { Pids::Here },
        fresh_files: false,
        descriptors: 0,
    };
    let skeleton = tracer
        .call_blocking(move || {
            let mut copy = Rebuild::skeleton(tree, names, &word, setting).map_err(|e| e.to_string())?;
            let sink = copy.sink().map_err(|e| e.to_string())?;
            Ok::<_, String>((copy, sink))
        })
        .map_err(|e| failed(e.to_string()))?;
    let (copy, sink) = skeleton.map_err(failed)?;
    let mut round = Round::default();
    let t = Instant::now();
    let mut last = Instant::now();
    pages_of(&options.dir, &name, &mut |run, data| {
        if cancel.is_cancelled() {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "interrupted"));
        }
        round.pages += u64::from(run.pages);
        if last.elapsed() > Duration::from_millis(100) {
            last = Instant::now();
            let done = round.pages * PAGE;
            events(Event::Progress {
                round: 1,
                bytes: done,
                total: bytes,
                rate: (done as f64 / t.elapsed().as_secs_f64()) as u64,
            });
        }
        sink.write(&PageFrame {
            runs: vec![*run],
            data: vec![data],
        })
        .map(drop)
    })?;
    round.bytes = round.pages * PAGE;
    round.ms = t.elapsed().as_secs_f64() * 1e3;
    let released = tracer
        .call_blocking(move || {
            let mut copy = copy;
            copy.complete(&stdio, &guards).map_err(|e| e.to_string())?;
            copy.finish().map_err(|e| e.to_string())?;
            if !copy.release() {
                return Err("the copy ended before it was released".to_owned());
            }
            Ok(copy)
        })
        .map_err(|e| failed(e.to_string()))?;
    let mut copy = released.map_err(failed)?;
    let pid = copy.root_pid();
    events(Event::Running { pid });
    let _ = tracer.call_blocking(move || copy.clean_up());
    Ok(Restored {
        report: Report {
            outcome: "restored".into(),
            id: name,
            pid: original,
            restored_pid: pid,
            processes,
            threads: thread_count,
            rounds: vec![round],
            total_ms: start.elapsed().as_secs_f64() * 1e3,
            pages_sent: round.pages,
            agent_peak_rss: misc::peak_rss(),
            ..Default::default()
        },
        pid,
        tracer,
    })
}

/// A decision page that no journal needs: nobody else waits for the outcome.
fn memory_word() -> io::Result<File> {
    let fd = nix::sys::memfd::memfd_create(c"migrate-pilot-word", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let f = File::from(fd);
    f.set_len(PAGE)?;
    Ok(f)
}

/// All checkpoints of a directory, oldest first. Files that are none are passed over.
pub fn list(dir: &Path) -> Result<Vec<ImageInfo>, Failure> {
    let mut out = Vec::new();
    let entries = fs::read_dir(dir).map_err(|e| fail("list", 0, format!("cannot read {}: {e}", dir.display())))?;
    for e in entries.flatten() {
        let file = e.file_name();
        if let Some(name) = file.to_str().and_then(|n| n.strip_suffix(&format!(".{SUFFIX}")))
            && let Ok(image) = Image::open(dir, name)
        {
            // The file's name counts, also after somebody renamed it.
            out.push(ImageInfo {
                name: name.to_owned(),
                ..image.info
            });
        }
    }
    out.sort_by(|a, b| a.created.cmp(&b.created).then(a.name.cmp(&b.name)));
    Ok(out)
}

/// Header and tree of one checkpoint, checksum compared.
pub fn show(dir: &Path, name: &str) -> Result<(ImageInfo, Tree), Failure> {
    let mut image = Image::open(dir, name)?;
    image.verify()?;
    let state = image.state()?;
    Ok((image.info, state.tree))
}

/// Removes a checkpoint that no other is based on.
pub fn remove(dir: &Path, name: &str) -> Result<(), Failure> {
    let p = path(dir, name)?;
    if let Some(child) = list(dir)?.into_iter().find(|i| i.parent.as_deref() == Some(name)) {
        return Err(
            Failure::refused("rm", 0, format!("checkpoint {} is based on {name}", child.name), Vec::new())
                .with_fix(format!("remove {} first", child.name)),
        );
    }
    fs::remove_file(&p).map_err(|e| {
        let m = if e.kind() == io::ErrorKind::NotFound {
            format!("there is no checkpoint {name} in {}", dir.display())
        } else {
            e.to_string()
        };
        Failure::refused("rm", 0, m, Vec::new())
    })
}

//! Pre-copy rounds at the source: what the destination holds, what it is owed, and what each look at the tree adds to that.
//!
//! For every address space there are two sets of pages. *held*: the destination may have some version of this page. *owed*: the page was seen
//! dirty, is armed by now, and has not been delivered. Whatever the tracker finds dirty goes to owed; what a round has delivered
//! moves from owed to held. Beside that a page leaves the two sets only when its mapping is new or it has vanished, and then the destination is
//! told to drop it. So a page that was armed is never forgotten: not one that a round held back because it is hot, not one that could not be read or
//! written, not one whose mapping was missing from one list of mappings. Both sets may hold more than what is mapped; that costs nothing.
//!
//! At the freeze everything owed is sent, everything found dirty then, and what is held but has vanished is dropped. A process that could not be
//! tracked is sent whole at the freeze.

use super::{
    attach,
    freeze::{Last, Unseen},
    objects::{Extent, Hash},
    shared::{self, Shared},
};
use crate::{
    dump::{
        self,
        mm::Cache,
        pages::{self, OBJECT_SPACE, Reader, SpacePlan},
        tree::Dumped,
    },
    image::{Host, ObjectKind, PAGE, Tree},
    laps::Laps,
    lazy,
    pages::PageSet,
    procfs::maps,
    restore::{rebuild::Names, shape},
    sys::mem::Mem,
    tracer::Frozen,
    track::{
        self, TrackError, Tracker,
        ahead::{self, Ahead, Seen},
        shared::SharedMemory,
        soft_dirty::SoftDirty,
    },
    wire::Ranges,
};
use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fs::File,
    io,
    os::fd::AsFd,
    time::{Duration, Instant},
};

/// Rounds in a row in which a page was dirty that make it hot: it waits for the freeze.
const HOT: usize = 3;
/// What a scan of a GiB that arms nothing takes (measured: 0.6 to 0.9 ms).
const CLEAN_SCAN: Duration = Duration::from_micros(800);
/// How often a look at a running tree is tried, since processes end under it.
const TRIES: u32 = 20;

/// One address space of the running tree.
#[derive(Debug)]
struct Space {
    name: u32,
    tracker: Option<Box<dyn Tracker>>,
    /// Of its shared memory.
    shared: Option<SharedMemory>,
    held: PageSet,
    owed: PageSet,
    /// What was dirty in the rounds before, newest first.
    recent: Vec<PageSet>,
    /// Mappings that the last look found untracked: those that are still there at the next are adopted.
    young: HashSet<(u64, u64)>,
}

impl Space {
    fn new(name: u32) -> Space {
        Space {
            name,
            tracker: None,
            shared: None,
            held: PageSet::new(),
            owed: PageSet::new(),
            recent: Vec::new(),
            young: HashSet::new(),
        }
    }

    /// The destination loses what it had of a range; what the tree still has there has to be sent again.
    fn lose(&mut self, start: u64, end: u64) {
        // It stays in held too: the round that tells of the change may never be sent.
        self.owed.extend(&self.held.clip(start, end));
    }

    /// Tracks more mappings of a stopped process: those seen untracked twice, by their present borders.
    fn adopt(&mut self, pid: i32, tracker: &mut dyn Tracker) -> io::Result<()> {
        let old = PageSet::from_ranges(std::mem::take(&mut self.young));
        let now = maps::maps(pid)?;
        let seen = |m: &(u64, u64)| old.overlaps(m.0, m.1);
        tracker.adopt(&attach::private(&now).filter(seen).collect::<Vec<_>>());
        if let Some(shared) = &mut self.shared {
            shared.adopt(&attach::shared(&now).filter(seen).collect::<Vec<_>>());
        }
        Ok(())
    }

    /// A range is new or gone: nothing that is known of it counts.
    fn void(&mut self, start: u64, end: u64, drops: &mut Vec<(u32, u64, u64)>) {
        drops.extend(self.held.clip(start, end).ranges().iter().map(|r| (self.name, r.0, r.1)));
        self.held.remove(start, end);
        self.owed.remove(start, end);
    }
}

/// Pages of a mapping that have to be missed when they vanish: those held, and those owed that were never delivered. Over a file such a page would else
/// be read for the file's. `owed`: those in the mapping.
fn known<'a>(held: &'a PageSet, owed: &PageSet, v: &crate::image::Vma) -> Cow<'a, PageSet> {
    if owed.is_empty() {
        Cow::Borrowed(held)
    } else {
        Cow::Owned(held.clip(v.start, v.end).union(owed))
    }
}

/// What a round sends, and how much is left.
#[derive(Debug)]
pub struct Prepared {
    /// The tree, when its shape differs from what the destination knows.
    pub tree: Option<Tree>,
    /// Names of its address spaces and objects.
    pub names: Names,
    /// Memory that the destination holds and that is untouched now.
    pub drops: Vec<(u32, u64, u64)>,
    /// Pages to send, and what reads them.
    pub plans: Vec<(SpacePlan, Reader)>,
    /// Pages of objects that are going to follow, of which the destination was not told.
    pub expect: Vec<Ranges>,
    /// Of these, what the destination did not hold before, by names of address spaces.
    new: Vec<(u32, PageSet)>,
    /// Bytes of memory that are dirty now: W.
    pub dirty: u64,
    /// Of these, in memory that cannot follow the resume, or may not.
    pub stays: u64,
    /// Of these, held back.
    pub hot: u64,
    /// Bytes that became dirty since the last look.
    pub dirtied: u64,
    /// How long the tree was stopped for the look.
    pub stopped: Duration,
    /// How long reading the tree took.
    pub read: Duration,
    /// How long the scan inside the freeze is going to take.
    pub last_scan: Duration,
    /// Bytes of shared memory that were compared by content.
    pub compared: u64,
    /// Processes that cannot be tracked, with the reason.
    pub untracked: Vec<String>,
}

impl Prepared {
    fn nothing() -> Prepared {
        Prepared {
            tree: None,
            names: Names::default(),
            drops: Vec::new(),
            plans: Vec::new(),
            expect: Vec::new(),
            new: Vec::new(),
            dirty: 0,
            stays: 0,
            hot: 0,
            dirtied: 0,
            stopped: Duration::ZERO,
            read: Duration::ZERO,
            last_scan: Duration::ZERO,
            compared: 0,
            untracked: Vec::new(),
        }
    }

    /// Bytes of memory to send.
    pub fn bytes(&self) -> u64 {
        self.plans.iter().map(|(plan, _)| plan.bytes()).sum()
    }
}

/// Everything known of the tree between looks.
#[derive(Debug)]
pub struct Rounds {
    root: i32,
    host: Host,
    /// None: nothing is tracked, and only the shape of the tree is looked at; its pages are looked for after the freeze and follow.
    kind: Option<track::Kind>,
    cache: Cache,
    tracks: Tracks,
}

/// See the module.
#[derive(Debug)]
pub struct Tracks {
    /// By pid and start time.
    spaces: HashMap<(i32, u64), Space>,
    /// Names of objects, by device, inode and kind: of a running tree both may be read of different mappings at one address.
    objects: HashMap<(u64, u64, ObjectKind), u32>,
    /// What was sent of each object, and what is known of who writes it.
    shared: Shared,
    next_space: u32,
    next_object: u32,
    /// What the destination was told last.
    told: Option<(Tree, Names)>,
    /// What it had been told before the last look, when that told it something else.
    before: Option<Option<(Tree, Names)>>,
    /// Memory that the destination has to drop and was not told of yet.
    drops: Vec<(u32, u64, u64)>,
    /// Pages that can follow are not sent in rounds; and in the freeze they are not looked for where they are not tracked.
    lazy: bool,
    /// The destination can let shared memory follow.
    shared_follows: bool,
    /// Then: objects of which nothing is sent in rounds, by name: where they have content, and what the destination was told to expect of them.
    follows: HashMap<u32, (Extent, PageSet)>,
    /// Objects of the inventory that nothing maps: only descriptors lead to them.
    unmapped: Vec<((u64, u64), crate::image::Object, File)>,
}

impl Rounds {
    /// Starts from the inventory. `lazy`: pages that can follow are going to; those of shared memory too? `cache`: what the inventory has learnt.
    pub fn new(root: i32, kind: Option<track::Kind>, lazy: Option<bool>, inventory: &Dumped, mut cache: Cache) -> io::Result<Rounds> {
        cache.tracked = kind.is_some();
        let mapped = mapped_objects(&inventory.tree);
        let mut unmapped = Vec::new();
        for (i, ((o, key), fd)) in inventory
            .tree
            .objects
            .iter()
            .zip(&inventory.object_keys)
            .zip(&inventory.object_fds)
            .enumerate()
        {
            if !mapped.contains(&(i as u32)) {
                unmapped.push((*key, o.clone(), File::from(fd.try_clone()?)));
            }
        }
        Ok(Rounds {
            root,
            host: inventory.tree.host.clone(),
            kind,
            cache,
            tracks: Tracks {
                spaces: HashMap::new(),
                objects: HashMap::new(),
                shared: Shared::default(),
                next_space: 0,
                next_object: OBJECT_SPACE,
                told: None,
                before: None,
                drops: Vec::new(),
                lazy: lazy.is_some(),
                shared_follows: lazy == Some(true),
                follows: HashMap::new(),
                unmapped,
            },
        })
    }

    /// The cache for reading the tree, and the rest.
    pub fn split(&mut self) -> (&mut Cache, &mut Tracks) {
        (&mut self.cache, &mut self.tracks)
    }

    /// See [`Tracks::ahead`].
    pub fn ahead(&self) -> Option<Ahead> {
        self.tracks.ahead()
    }

    /// The round that the last look prepared was sent, with these pages of objects.
    pub fn sent(&mut self, objects: &[(u32, u64, Hash)]) {
        self.tracks.drops.clear();
        self.tracks.shared.contents().sent(objects);
    }

    /// For a prediction: takes a round for sent without sending it.
    pub fn pretend_sent(&mut self, p: &Prepared) -> io::Result<()> {
        let mut hashes = Vec::new();
        for (plan, reader) in p.plans.iter().filter(|(plan, _)| plan.space >= OBJECT_SPACE) {
            let mut missed = Vec::new();
            crate::dump::pages::read_running(plan, reader, &mut missed, &mut |b| {
                super::transfer::note(&b, &mut hashes);
                true
            })?;
        }
        self.sent(&hashes);
        Ok(())
    }

    /// The round that the last look prepared is not going to be sent.
    pub fn unsent(&mut self, p: &Prepared) {
        let t = &mut self.tracks;
        if let Some(before) = t.before.take() {
            t.told = before;
        }
        let pages: Vec<(u32, u64, u64)> = p
            .plans
            .iter()
            .flat_map(|(plan, _)| plan.ranges.iter().map(|r| (plan.space, r.0, r.1)))
            .collect();
        self.missed(&pages);
        for (name, new) in &p.new {
            if let Some(s) = self.tracks.spaces.values_mut().find(|s| s.name == *name) {
                s.held.subtract(new);
            }
        }
    }

    /// Everything owed that the destination has an older version of is going to be missing there when the copy runs: it can drop that already while
    /// the program runs on. A round without pages that says so; None: it is not worth one.
    pub fn let_go(&mut self) -> Option<Prepared> {
        let (tree, names) = self.tracks.told.as_ref()?;
        let mut drops = std::mem::take(&mut self.tracks.drops);
        for s in self.tracks.spaces.values_mut() {
            let Some(mm) = names.spaces.iter().position(|n| *n == s.name).and_then(|m| tree.mms.get(m)) else {
                continue;
            };
            let stale = s.owed.intersection(&s.held).intersection(&lazy::waiting(&mm.vmas));
            drops.extend(stale.ranges().iter().map(|r| (s.name, r.0, r.1)));
            s.held.subtract(&stale);
        }
        if drops.is_empty() {
            return None;
        }
        // Until the round was sent.
        self.tracks.drops.clone_from(&drops);
        Some(Prepared {
            names: names.clone(),
            drops,
            ..Prepared::nothing()
        })
    }

    /// Pages that a round planned and could not read: still owed.
    pub fn missed(&mut self, pages: &[(u32, u64, u64)]) {
        for (name, start, end) in pages {
            if *name >= OBJECT_SPACE {
                let unknown: Vec<_> = (*start..*end).step_by(PAGE as usize).map(|at| (*name, at, [0; 16])).collect();
                self.tracks.shared.contents().sent(&unknown);
                continue;
            }
            if let Some(s) = self.tracks.spaces.values_mut().find(|s| s.name == *name) {
                // Still held as well: the destination may have an older version, which has to go if the page vanishes.
                s.owed.insert(*start, *end);
            }
        }
    }

    /// Looks at the tree: what has changed since the last look becomes the next round. Runs on the tracer thread.
    pub fn look(&mut self) -> io::Result<Prepared> {
        let mut laps = Laps::start();
        let stops = self.kind == Some(track::Kind::SoftDirty);
        let mut frozen = None;
        if stops {
            self.cache.freshen();
            frozen = Some(Frozen::freeze(self.root, Duration::from_secs(5)).map_err(io::Error::other)?);
        }
        self.cache.stopped = stops;
        self.tracks.shared.begin();
        let began = Instant::now();
        let d = self.outline();
        self.cache.stopped = false;
        let d = d?;
        let read = began.elapsed();
        laps.lap("outline");
        let mut untracked = Vec::new();
        if !stops && self.kind.is_some() {
            untracked = self.attach(&d);
        }
        laps.lap("attach");
        let scanning = Instant::now();
        let mut p = self.scan(&d)?;
        p.read = read;
        p.last_scan = match self.kind {
            Some(track::Kind::SoftDirty) => scanning.elapsed(),
            // Arming is most of a look's scan, and the last one does not arm.
            _ => CLEAN_SCAN.mul_f64(self.tracks.spaces.values().map(|s| s.held.bytes()).sum::<u64>() as f64 / f64::from(1 << 30)),
        };
        laps.lap("scan");
        p.stopped += frozen.as_ref().map_or(Duration::ZERO, |f| f.since.elapsed());
        drop(frozen);
        laps.lap("thaw");
        let follows = self.tracks.expect(&d, &mut p)?;
        if self.kind.is_some() {
            self.tracks.objects(&d, &mut p, &follows)?;
        }
        laps.lap("objects");
        laps.log("look");
        p.untracked = untracked;
        Ok(p)
    }

    fn outline(&mut self) -> io::Result<Dumped> {
        let mut tries = 0;
        let mut d = loop {
            match dump::tree::outline(self.root, self.host.clone(), &mut self.cache) {
                Ok(d) => match d.tree.validate() {
                    Ok(()) => break d,
                    Err(e) if tries >= TRIES => return Err(io::Error::other(e)),
                    Err(_) => {}
                },
                Err(e) if tries >= TRIES => return Err(io::Error::other(e)),
                Err(_) => {}
            }
            tries += 1;
            std::thread::sleep(Duration::from_micros(u64::from(tries) * 200));
        };
        self.cache.keep(&d.pids);
        for (key, o, f) in &self.tracks.unmapped {
            if !d.object_keys.contains(key) {
                d.object_keys.push(*key);
                d.tree.objects.push(o.clone());
                d.object_fds.push(f.try_clone()?.into());
            }
        }
        Ok(d)
    }

    /// Gives every process that has none a tracker; returns those that cannot have one.
    fn attach(&mut self, d: &Dumped) -> Vec<String> {
        let mut untracked = Vec::new();
        let mut wanted: Vec<i32> = Vec::new();
        let mut inherited = HashSet::new();
        let mut new = Vec::new();
        for ((p, pid), started) in d.tree.processes.iter().zip(&d.pids).zip(&d.started) {
            let known = self.tracks.spaces.get(&(*pid, *started)).and_then(|s| s.tracker.as_ref());
            if p.zombie.is_none() && known.is_none_or(|t| !t.alive()) {
                wanted.push(*pid);
                if d.tree.mms[p.mm as usize].vmas.iter().any(|v| shared::tracked(&d.tree, v)) {
                    inherited.insert(*pid);
                }
            }
        }
        if !self.tracks.shared.adopt_children(inherited.len()) {
            wanted.retain(|pid| !inherited.contains(pid));
        }
        if wanted.is_empty() {
            return untracked;
        }
        // All of the tree at once in the first round, later each newcomer by itself.
        let together = wanted.len() == d.pids.len();
        let groups: Vec<Vec<i32>> = if together {
            vec![wanted]
        } else {
            wanted.into_iter().map(|p| vec![p]).collect()
        };
        for group in groups.into_iter().filter(|g| !g.is_empty()) {
            match Frozen::freeze(group[0], Duration::from_secs(5)) {
                Ok(mut f) => {
                    for pid in group {
                        match attach::track(&mut f, pid) {
                            Ok(t) => {
                                if let Some(i) = d.pids.iter().position(|p| *p == pid) {
                                    let s = self.tracks.renew(pid, d.started[i]);
                                    s.tracker = Some(Box::new(t));
                                    new.push((pid, d.started[i]));
                                }
                            }
                            Err(e) => untracked.push(format!("process {pid} cannot be tracked: {e}")),
                        }
                    }
                }
                // Ended meanwhile, most likely.
                Err(e) => tracing::debug!(pid = group[0], error = %e, "not tracked"),
            }
        }
        if self.tracks.lazy {
            // Shared memory is not sent in rounds but for a little.
            return untracked;
        }
        let Some(listener) = self.tracks.shared.listen(&d.tree) else {
            return untracked;
        };
        for key in &new {
            match attach::track_shared(key.0, &listener) {
                Ok(t) => drop(self.tracks.spaces.get_mut(key).map(|s| s.shared = t)),
                // Without root, for example: it is compared by content then.
                Err(e) => tracing::debug!(pid = key.0, error = %e, "its shared memory is not tracked"),
            }
        }
        untracked
    }

    fn scan(&mut self, d: &Dumped) -> io::Result<Prepared> {
        let soft = self.kind == Some(track::Kind::SoftDirty);
        let t = &mut self.tracks;
        if soft {
            for ((p, pid), started) in d.tree.processes.iter().zip(&d.pids).zip(&d.started) {
                let known = t.spaces.get(&(*pid, *started)).and_then(|s| s.tracker.as_ref());
                if p.zombie.is_none() && known.is_none_or(|t| !t.alive()) {
                    let s = t.renew(*pid, *started);
                    s.tracker = Some(Box::new(SoftDirty::new(*pid)?));
                }
            }
        }
        let names = t.name(d);
        t.forget(d);
        t.account(&d.tree, &names);
        let mut out = Prepared {
            names: names.clone(),
            ..Prepared::nothing()
        };
        for ((p, pid), started) in d.tree.processes.iter().zip(&d.pids).zip(&d.started) {
            let Some(s) = t.spaces.get_mut(&(*pid, *started)).filter(|_| p.zombie.is_none()) else {
                continue;
            };
            let Some(mut tracker) = s.tracker.take() else { continue };
            let mut dirty = PageSet::new();
            let mut private = PageSet::new();
            let mut gone = false;
            let mut adopt = false;
            let mut young = HashSet::new();
            for v in d.tree.mms[p.mm as usize].vmas.iter().filter(|v| track::has_private_pages(v)) {
                private.insert(v.start, v.end);
                match tracker.scan(v, &known(&s.held, &s.owed.clip(v.start, v.end), v), false) {
                    Ok(scan) => {
                        if scan.fresh {
                            s.void(v.start, v.end, &mut t.drops);
                        }
                        for &(a, b) in scan.gone.ranges() {
                            s.void(a, b, &mut t.drops);
                        }
                        dirty.extend(&scan.dirty);
                    }
                    Err(TrackError::Gone) => {
                        gone = true;
                        break;
                    }
                    Err(TrackError::Changed) => s.void(v.start, v.end, &mut t.drops),
                    Err(TrackError::Untracked) => {
                        s.void(v.start, v.end, &mut t.drops);
                        adopt |= s.young.contains(&(v.start, v.end));
                        young.insert((v.start, v.end));
                    }
                    Err(TrackError::Io(e)) => return Err(e),
                }
            }
            if t.shared.given_up() {
                s.shared = None;
            }
            let shared = d.tree.mms[p.mm as usize].vmas.iter().filter(|v| shared::tracked(&d.tree, v));
            if let Some(tracker) = s.shared.as_mut().filter(|_| !gone) {
                for v in shared {
                    match tracker.scan(v, false) {
                        Ok(written) => t.shared.saw(s.name, v.start, written),
                        // Its object is compared by content then.
                        Err(e) => {
                            tracing::debug!(pid, error = %e, "shared memory at {:x} is not tracked", v.start);
                            adopt |= s.young.contains(&(v.start, v.end));
                            young.insert((v.start, v.end));
                        }
                    }
                }
            }
            if gone {
                // It has ended or runs another program. The dead tracker stays, by which the next look, or the last, gives the address space
                // another name.
                s.tracker = Some(tracker);
                continue;
            }
            tracker.arm()?;
            s.young = young;
            if adopt {
                match Frozen::freeze(*pid, Duration::from_secs(5)) {
                    Ok(f) => {
                        s.adopt(*pid, tracker.as_mut())?;
                        out.stopped += f.since.elapsed();
                    }
                    // Ended meanwhile, most likely.
                    Err(e) => tracing::debug!(pid, error = %e, "new mappings are not tracked"),
                }
            }
            s.tracker = Some(tracker);
            out.dirtied += dirty.bytes();
            s.owed.extend(&dirty);
            let mut hot = PageSet::new();
            if s.recent.len() >= HOT - 1 {
                hot = s.recent.iter().fold(dirty.clone(), |hot, r| hot.intersection(r));
            }
            s.recent.insert(0, dirty);
            s.recent.truncate(HOT - 1);
            // A mapping may be missing from this list only because it changed while the list was made: what is owed of it stays owed.
            let owed = s.owed.intersection(&private);
            let mut send = owed.difference(&hot);
            let waiting = lazy::waiting(&d.tree.mms[p.mm as usize].vmas);
            if t.lazy {
                send.subtract(&waiting);
            }
            out.dirty += owed.bytes();
            out.stays += owed.difference(&waiting).bytes();
            out.hot += hot.bytes();
            if send.is_empty() {
                continue;
            }
            let plan = plan(s.name, &send, &d.tree.mms[p.mm as usize].vmas);
            match Mem::open(*pid) {
                Ok(m) => out.plans.push((plan, Reader::Process(m))),
                Err(_) => continue,
            }
            out.new.push((s.name, send.difference(&s.held)));
            s.owed.subtract(&send);
            s.held.extend(&send);
        }
        let changed = t.told.as_ref().is_none_or(|(tree, n)| *n != names || !same_shape(tree, &d.tree));
        t.before = None;
        if changed {
            out.tree = Some(d.tree.clone());
            t.before = Some(t.told.replace((d.tree.clone(), names)));
        }
        Ok(out)
    }
}

/// Whether a skeleton of one tree is one of the other.
fn same_shape(a: &Tree, b: &Tree) -> bool {
    let process = |p: &crate::image::Process| (p.pid, p.parent, p.pgid, p.sid, p.zombie, p.mm);
    a.objects == b.objects
        && a.mms.len() == b.mms.len()
        && a.mms.iter().zip(&b.mms).all(|(x, y)| x.vmas == y.vmas && x.exe == y.exe)
        && a.processes.len() == b.processes.len()
        && a.processes.iter().zip(&b.processes).all(|(x, y)| {
            process(x) == process(y) && x.threads.len() == y.threads.len() && x.threads.iter().zip(&y.threads).all(|(s, t)| s.tid == t.tid)
        })
}

fn mapped_objects(tree: &Tree) -> HashSet<u32> {
    let all = tree.mms.iter().flat_map(|m| &m.vmas);
    all.filter_map(|v| match v.backing {
        crate::image::Backing::Object { object, .. } => Some(object),
        _ => None,
    })
    .collect()
}

/// What reads each object.
fn files(d: &Dumped) -> io::Result<Vec<File>> {
    d.object_fds.iter().map(|fd| Ok(File::from(fd.try_clone()?))).collect()
}

/// The ranges of a set, cut at mapping borders: the other side writes mapping by mapping.
fn plan(space: u32, set: &PageSet, vmas: &[crate::image::Vma]) -> SpacePlan {
    let mut ranges = Vec::new();
    let mut k = 0;
    for &(a, b) in set.ranges() {
        let mut at = a;
        while at < b {
            while vmas.get(k).is_some_and(|v| v.end <= at) {
                k += 1;
            }
            let Some(v) = vmas.get(k).filter(|v| v.start < b) else { break };
            at = at.max(v.start);
            let end = b.min(v.end);
            ranges.push((at, end));
            at = end;
        }
    }
    SpacePlan { space, ranges }
}

impl Tracks {
    /// A process with an address space that nothing is known of.
    fn renew(&mut self, pid: i32, started: u64) -> &mut Space {
        let name = self.next_space;
        self.next_space += 1;
        let entry = self.spaces.entry((pid, started));
        let s = entry.insert_entry(Space::new(name));
        s.into_mut()
    }

    /// Names for all address spaces and objects of a tree.
    fn name(&mut self, d: &Dumped) -> Names {
        let mut names = Names {
            spaces: vec![0; d.tree.mms.len()],
            objects: Vec::new(),
        };
        for ((p, pid), started) in d.tree.processes.iter().zip(&d.pids).zip(&d.started) {
            if p.zombie.is_some() {
                continue;
            }
            let name = match self.spaces.get(&(*pid, *started)) {
                // The program was exchanged: it has another address space.
                Some(s) if s.tracker.as_ref().is_some_and(|t| !t.alive()) => self.renew(*pid, *started).name,
                Some(s) => s.name,
                None => self.renew(*pid, *started).name,
            };
            names.spaces[p.mm as usize] = name;
        }
        for ((dev, ino), o) in d.object_keys.iter().zip(&d.tree.objects) {
            let next = &mut self.next_object;
            let name = *self.objects.entry((*dev, *ino, o.kind.clone())).or_insert_with(|| {
                *next += 1;
                *next - 1
            });
            names.objects.push(name);
        }
        names
    }

    /// Forgets what is no more.
    fn forget(&mut self, d: &Dumped) {
        let live: HashSet<(i32, u64)> = d.pids.iter().copied().zip(d.started.iter().copied()).collect();
        let shared = &mut self.shared;
        // One that is there and was not found may write to shared memory.
        self.spaces.retain(|k, s| {
            let hidden = !live.contains(k) && s.tracker.as_ref().is_some_and(|t| t.alive());
            if hidden {
                shared.incomplete();
            }
            hidden || live.contains(k)
        });
        let keys = d.object_keys.iter().zip(&d.tree.objects);
        let objects: HashSet<(u64, u64, ObjectKind)> = keys.map(|(k, o)| (k.0, k.1, o.kind.clone())).collect();
        let contents = self.shared.contents();
        self.objects.retain(|k, name| {
            let keep = objects.contains(k);
            if !keep {
                contents.forget(*name);
            }
            keep
        });
    }

    /// Takes into account what the destination loses by becoming this tree.
    fn account(&mut self, tree: &Tree, names: &Names) {
        let Some((old, old_names)) = &self.told else { return };
        let losses = shape::losses(old_names.of(old), names.of(tree));
        for s in self.spaces.values_mut() {
            if losses.all {
                s.lose(0, !(PAGE - 1));
            }
            let name = s.name;
            for (_, a, b) in losses.ranges.iter().filter(|r| r.0 == name) {
                s.lose(*a, *b);
            }
        }
        if losses.all {
            self.shared.contents().resend_all();
        }
    }

    /// The objects of which nothing is sent before the resume, by name: those that can follow, and of which nothing was sent before that was known.
    fn following(&mut self, tree: &Tree, names: &Names) -> HashSet<u32> {
        if !self.shared_follows {
            return HashSet::new();
        }
        let contents = self.shared.contents();
        let mut all = lazy::objects(tree, names);
        all.retain(|name| !contents.knows(*name));
        for name in &all {
            self.follows.entry(*name).or_default();
        }
        all
    }

    /// Tells the destination what is going to follow of objects: making so many pages takes longer than a freeze.
    fn expect(&mut self, d: &Dumped, out: &mut Prepared) -> io::Result<HashSet<u32>> {
        let all = self.following(&d.tree, &out.names);
        for ((o, fd), name) in d.tree.objects.iter().zip(&d.object_fds).zip(&out.names.objects) {
            let Some((extent, told)) = self.follows.get_mut(name).filter(|_| all.contains(name)) else {
                continue;
            };
            let new = extent.look(fd.as_fd(), o.size)?.difference(told);
            if !new.is_empty() {
                out.expect.push(Ranges::pack(*name, new.ranges()));
                told.extend(&new);
            }
        }
        Ok(all)
    }

    /// Shared memory of a running tree, without what follows.
    fn objects(&mut self, d: &Dumped, out: &mut Prepared, follows: &HashSet<u32>) -> io::Result<()> {
        let began = Instant::now();
        let files = files(d)?;
        let (changes, compared) = self.shared.changed(&d.tree, &out.names, &files, follows)?;
        out.compared = compared;
        if compared > 0 {
            // So it will be in the freeze, unless something changes.
            out.last_scan += began.elapsed();
        }
        for ((name, changed), file) in changes.into_iter().zip(files) {
            self.drops.extend(changed.gone.ranges().iter().map(|r| (name, r.0, r.1)));
            if changed.dirty.is_empty() {
                continue;
            }
            out.dirty += changed.dirty.bytes();
            out.stays += changed.dirty.bytes();
            out.dirtied += changed.dirty.bytes();
            let plan = SpacePlan {
                space: name,
                ranges: changed.dirty.ranges().to_vec(),
            };
            out.plans.push((plan, Reader::Object(file)));
        }
        out.drops.clone_from(&self.drops);
        Ok(())
    }

    /// What the address spaces and objects of the frozen tree are called.
    pub fn names(&mut self, d: &Dumped) -> Names {
        self.shared.begin();
        let names = self.name(d);
        self.forget(d);
        self.account(&d.tree, &names);
        names
    }

    /// Gets ready to begin the last look as soon as the tree stands still. None: not worth it.
    pub fn ahead(&self) -> Option<Ahead> {
        let (tree, names) = self.told.as_ref()?;
        let mut tasks = Vec::new();
        for s in self.spaces.values() {
            let mm = names.spaces.iter().position(|n| *n == s.name).and_then(|m| tree.mms.get(m));
            let (Some(tracker), Some(mm)) = (&s.tracker, mm) else { continue };
            for v in mm.vmas.iter().filter(|v| track::has_private_pages(v)) {
                let owed = s.owed.clip(v.start, v.end);
                let blocks = tracker.ahead(v, &known(&s.held, &owed, v));
                tasks.extend(blocks.map(|(blocks, pagemap)| ahead::Task {
                    space: s.name,
                    start: v.start,
                    end: v.end,
                    blocks,
                    owed,
                    pagemap,
                }));
            }
        }
        Ahead::ready(tasks)
    }

    /// The last look, at the frozen tree. `seen`: what was seen of it since it stands still.
    pub fn last(&mut self, d: &Dumped, names: Names, seen: Vec<(u32, u64, u64, Seen)>) -> io::Result<Last> {
        let mut seen: HashMap<(u32, u64, u64), Seen> = seen.into_iter().map(|(space, a, b, s)| ((space, a, b), s)).collect();
        let mut out = Last {
            names: names.clone(),
            guards: vec![Vec::new(); d.tree.mms.len()],
            drops: self.drops.clone(),
            ..Default::default()
        };
        for ((p, pid), started) in d.tree.processes.iter().zip(&d.pids).zip(&d.started) {
            if p.zombie.is_some() {
                continue;
            }
            let mm = &d.tree.mms[p.mm as usize];
            let (whole, all_guards) = match self.spaces.get_mut(&(*pid, *started)) {
                Some(s) if s.tracker.is_some() => {
                    let rseqs = p.threads.iter().filter_map(|t| t.rseq.as_ref());
                    let touched = PageSet::from_ranges(rseqs.map(|r| (r.address, r.address + u64::from(r.len))));
                    let name = s.name;
                    let mut before = |v: &crate::image::Vma| {
                        let seen = seen.remove(&(name, v.start, v.end))?;
                        Some(Seen {
                            touched: touched.clone(),
                            ..seen
                        })
                    };
                    let (whole, guards) = s.last(&mm.vmas, &mut out.drops, &mut before)?;
                    if let Some(tracker) = s.shared.as_mut() {
                        for v in mm.vmas.iter().filter(|v| shared::tracked(&d.tree, v)) {
                            if let Ok(written) = tracker.scan(v, true) {
                                self.shared.saw(s.name, v.start, written);
                            }
                        }
                    }
                    out.held.push((s.name, s.held.intersection(&whole)));
                    (whole, guards)
                }
                // All that can follow does; where it is is found out meanwhile.
                _ if self.lazy => {
                    let space = names.spaces[p.mm as usize];
                    let (plan, guards) = pages::plan_some(*pid, space, mm, &|v| !lazy::can_wait(v))?;
                    out.plans.push(plan);
                    out.guards[p.mm as usize] = guards;
                    out.unseen.push(Unseen {
                        space,
                        mm: p.mm as usize,
                        pid: *pid,
                    });
                    continue;
                }
                // Never looked at: everything.
                other => {
                    let name = other.map_or(names.spaces[p.mm as usize], |s| s.name);
                    let (mut plan, guards) = pages::plan_mm(*pid, name, mm)?;
                    plan.space = name;
                    out.plans.push(plan);
                    out.guards[p.mm as usize] = guards;
                    continue;
                }
            };
            out.guards[p.mm as usize] = Last::ranges(&all_guards);
            out.plans.push(plan(names.spaces[p.mm as usize], &whole, &mm.vmas));
        }
        let follows = self.following(&d.tree, &names);
        for ((o, fd), name) in d.tree.objects.iter().zip(&d.object_fds).zip(&names.objects) {
            let Some((extent, _)) = self.follows.get_mut(name).filter(|_| follows.contains(name)) else {
                continue;
            };
            out.plans.push(SpacePlan {
                space: *name,
                ranges: extent.look(fd.as_fd(), o.size)?.ranges().to_vec(),
            });
        }
        let (changes, compared) = self.shared.changed(&d.tree, &names, &files(d)?, &follows)?;
        out.compared = compared;
        for (name, changed) in changes {
            out.drops.extend(changed.gone.ranges().iter().map(|r| (name, r.0, r.1)));
            out.plans.push(SpacePlan {
                space: name,
                ranges: changed.dirty.ranges().to_vec(),
            });
        }
        Ok(out)
    }
}

impl Space {
    /// (pages to send, guard regions). `seen`: what was seen of a mapping before.
    fn last(
        &mut self,
        vmas: &[crate::image::Vma],
        drops: &mut Vec<(u32, u64, u64)>,
        seen: &mut dyn FnMut(&crate::image::Vma) -> Option<Seen>,
    ) -> io::Result<(PageSet, PageSet)> {
        let Some(tracker) = self.tracker.as_mut() else {
            return Ok(Default::default());
        };
        // Mappings do not overlap, so what is found of one is no matter to the next: the sets of the whole space, which may be long, change once.
        let (mut dirty, mut gone, mut guards, mut private) = (PageSet::new(), PageSet::new(), PageSet::new(), PageSet::new());
        let mut failed = None;
        for v in vmas.iter().filter(|v| track::has_private_pages(v)) {
            private.insert(v.start, v.end);
            let owed = self.owed.clip(v.start, v.end);
            let known = known(&self.held, &owed, v);
            let scan = match tracker.last(v, &known, &owed, seen(v)) {
                Ok(scan) => scan,
                Err(e) => {
                    failed = Some(io::Error::other(e));
                    break;
                }
            };
            if scan.fresh {
                self.owed.remove(v.start, v.end);
                gone.extend(&self.held.clip(v.start, v.end).difference(&scan.dirty));
            } else {
                gone.extend(&scan.gone);
            }
            dirty.extend(&scan.dirty);
            guards.extend(&scan.guards);
        }
        self.owed.subtract(&gone);
        // Armed by now, perhaps: if the tree is let go once more, it has to be sent later.
        self.owed.extend(&dirty);
        if let Some(e) = failed {
            return Err(e);
        }
        drops.extend(gone.ranges().iter().map(|r| (self.name, r.0, r.1)));
        let mut send = self.owed.intersection(&private);
        send.subtract(&guards);
        Ok((send, guards))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        image::{Backing, FileId, Vma},
        track::Scan,
    };

    /// Finds no private page at all: what it is told of is gone.
    #[derive(Debug)]
    struct Nothing;

    impl Tracker for Nothing {
        fn scan(&mut self, vma: &Vma, held: &PageSet, _last: bool) -> Result<Scan, TrackError> {
            let gone = held.clip(vma.start, vma.end);
            Ok(Scan { gone, ..Scan::default() })
        }
        fn arm(&mut self) -> io::Result<()> {
            Ok(())
        }
        fn stops(&self) -> bool {
            false
        }
        fn alive(&self) -> bool {
            true
        }
    }

    /// A round that planned a page is not sent, and the program gives the page back to the file: read then, it would be the file's.
    #[test]
    fn a_page_that_no_round_delivered_and_that_has_vanished_is_not_sent() {
        let file = FileId {
            path: b"/lib".to_vec(),
            ..FileId::default()
        };
        let backing = Backing::File {
            file,
            offset: 0,
            writable: true,
        };
        let vma = Vma {
            start: 0x10000,
            end: 0x20000,
            backing,
            prot: 3,
            shared: false,
            flags: crate::image::VmaFlags::default(),
            name: None,
            pkey: 0,
        };
        let mut s = Space::new(0);
        s.tracker = Some(Box::new(Nothing));
        s.owed.insert(0x12000, 0x13000);
        let mut drops = Vec::new();
        let (send, _) = s.last(&[vma], &mut drops, &mut |_| None).unwrap();
        assert!(send.is_empty(), "{send:?}");
        assert!(s.owed.is_empty());
    }
}

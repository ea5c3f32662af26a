//! The freeze: stopping the tree, reading it, and the ways out of it.

use super::{interrupted, inventory, rounds::Rounds};
use crate::{
    blocker::Blocker,
    door::Door,
    dump::{self, mm::Cache, pages, tree::DumpError},
    image::{Backing, Host, Tree, Vma},
    inject::{InjectError, Injector},
    lazy::{self, serve::Originals},
    pages::PageSet,
    report::Failure,
    restore::rebuild::Names,
    sys::{mem::Mem, pagemap::Pagemap},
    tracer::{Frozen, Holder, Proc, Tracer},
    track::ahead::Ahead,
    wire::{Encoded, Message, Ranges, State, WireError},
};
use std::{
    cell::RefCell,
    collections::HashMap,
    fs::File,
    io,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// A frozen tree with what was read of it; lives on the tracer thread.
pub struct Held {
    frozen: Frozen,
    injectors: Vec<Option<Injector>>,
}

impl Held {
    /// Lets the tree go on as if nothing had been.
    fn release(&mut self) {
        self.frozen.unhold();
        for inj in self.injectors.drain(..).flatten() {
            if let Err(e) = inj.leave(&mut self.frozen) {
                tracing::warn!(error = %e, "the stub's table stays mapped");
            }
        }
        self.frozen.thaw();
    }

    /// Forgets the tree without letting it go: it stays stopped by SIGSTOP once ptrace lets go.
    fn abandon(mut self) {
        for (p, inj) in self.frozen.procs.iter_mut().zip(self.injectors.drain(..)) {
            if let (Some(inj), Some(leader)) = (inj, p.tasks.first_mut())
                && let Err(e) = inj.leave_behind(leader)
            {
                tracing::warn!(pid = p.pid, error = %e, "the stub's table stays mapped");
            }
        }
        std::mem::replace(&mut self.frozen, Frozen::nothing()).let_go_stopped();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.release();
    }
}

thread_local! {
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

/// What a freeze gave.
pub struct Snapshot {
    /// The tree.
    pub tree: Tree,
    /// What its address spaces and objects are called in page runs.
    pub names: Names,
    /// Agent-side pids.
    pub pids: Vec<i32>,
    /// Readers of the objects.
    pub object_fds: Vec<std::os::fd::OwnedFd>,
    /// Pages to send.
    pub plans: Vec<pages::SpacePlan>,
    /// Pages to send after the resume.
    pub later: Vec<pages::SpacePlan>,
    /// What of `later` has content, while that is still being found out; until then it is every page of what can follow.
    pub finding: Option<JoinHandle<io::Result<Vec<Found>>>>,
    /// Address spaces that were not looked at.
    unseen: Vec<Unseen>,
    /// Of the pages to send, those of which the destination may hold an older version, by space.
    pub held: Vec<(u32, PageSet)>,
    /// Memory that the destination holds and that is untouched now.
    pub drops: Vec<(u32, u64, u64)>,
    /// Bytes of shared memory that were compared by content.
    pub compared: u64,
    /// Guard regions.
    pub guards: Vec<Vec<(u64, u64)>>,
    /// Keeps the tree stopped beyond the death of this agent.
    pub holder: Holder,
    /// When the first task stopped.
    pub since: Instant,
    /// Time to stop all, and to read all.
    pub interrupt: Duration,
    /// Time to read everything but pages.
    pub collect: Duration,
    /// Time to look for pages that were written; some of it passes beside the collecting.
    pub scan: Duration,
}

/// What looks at the tree, in rounds and at the freeze, shared with the tracer thread.
pub type Shared = Arc<Mutex<Rounds>>;

/// How long a freeze that meets transient blockers is tried again.
const FREEZE_PATIENCE: Duration = Duration::from_secs(20);

/// What a try at a freeze came to: the way may be blocked by something that passes.
pub type Try = Result<Snapshot, Vec<Blocker>>;

/// What the destination is told of a frozen tree before its memory has been looked at, which takes as long again.
pub struct Tell {
    /// Where it is given to.
    pub to: oneshot::Sender<Result<Encoded, WireError>>,
    /// See [`State::expected`].
    pub expected: u64,
    /// See [`State::verify`].
    pub verify: bool,
}

impl Tell {
    /// The tree is lent to the message rather than copied.
    fn tell(self, tree: &mut Tree, names: &mut Names) {
        let nothing = Tree::empty(tree.host.clone());
        let message = Message::State(Box::new(State {
            tree: std::mem::replace(tree, nothing),
            names: std::mem::take(names),
            expected: self.expected,
            verify: self.verify,
        }));
        let encoded = Encoded::of(&message);
        if let Message::State(s) = message {
            (*tree, *names) = (s.tree, s.names);
        }
        // Nobody waits for it any more when the migration was given up.
        let _ = self.to.send(encoded);
    }
}

/// Freezes the tree and reads it. On `Ok` it stays frozen on the tracer thread, until [`thaw`], [`kill`] or the end of that thread.
pub async fn freeze(tracer: &Tracer, pid: i32, host: &Host, cancel: &CancellationToken) -> Result<Snapshot, Failure> {
    let mut retry = Retry::new(pid);
    loop {
        match freeze_now(tracer, pid, host, None, None).await? {
            Ok(s) => return Ok(s),
            Err(blockers) => retry.pause(blockers, cancel).await?,
        }
    }
}

/// One try. With `rounds` only what the destination does not hold yet is planned to be sent. `tell`: from then on there is no other try.
pub async fn freeze_now(tracer: &Tracer, pid: i32, host: &Host, rounds: Option<Shared>, tell: Option<Tell>) -> Result<Try, Failure> {
    let host = host.clone();
    tracer
        .call(move || match rounds {
            Some(r) => match r.lock() {
                Ok(mut r) => freeze_once(pid, host, Some(&mut r), tell),
                Err(_) => Err(Failure::failed("freeze", pid, "the look at the tree failed before")),
            },
            None => freeze_once(pid, host, None, tell),
        })
        .await
        .map_err(|e| Failure::failed("freeze", pid, e))?
}

/// Waiting for a better moment.
pub struct Retry {
    pid: i32,
    tries: u32,
    end: Instant,
}

impl Retry {
    /// From now on.
    pub fn new(pid: i32) -> Retry {
        Retry {
            pid,
            tries: 0,
            end: Instant::now() + FREEZE_PATIENCE,
        }
    }

    /// Waits a little, unless these blockers will not pass or time is up.
    pub async fn pause(&mut self, blockers: Vec<Blocker>, cancel: &CancellationToken) -> Result<(), Failure> {
        self.tries += 1;
        let lasting = blockers.iter().any(|b| !b.transient);
        if lasting || Instant::now() > self.end {
            let m = if lasting {
                "the tree cannot move"
            } else {
                "the tree did not come to a point where it can move"
            };
            return Err(Failure::refused("freeze", self.pid, m, blockers));
        }
        // Another moment each time, so that a periodic client is not met at the same point again.
        let wait = Duration::from_millis(3 + u64::from(self.tries) * 7 % 41);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = cancel.cancelled() => return Err(interrupted(self.pid)),
        }
        // Looking costs the program nothing: it is stopped again only when the way seems clear.
        if self.tries > 3 {
            let pid = self.pid;
            let _ = tokio::task::spawn_blocking(move || inventory(pid)).await;
        }
        Ok(())
    }
}

fn freeze_once(pid: i32, host: Host, rounds: Option<&mut Rounds>, tell: Option<Tell>) -> Result<Try, Failure> {
    let fail = |m: String| Failure::failed("freeze", pid, m);
    let ahead = rounds.as_ref().and_then(|r| r.ahead());
    let frozen = Frozen::freeze(pid, Duration::from_secs(5)).map_err(|e| fail(e.to_string()))?;
    if let Some(a) = &ahead {
        a.go();
    }
    let has_run = frozen.has_run.clone();
    let since = frozen.since;
    let interrupt = since.elapsed();
    if frozen.procs.first().is_none_or(Proc::is_zombie) {
        return Err(super::ended("freeze", pid));
    }
    let mut held = Held {
        frozen,
        injectors: Vec::new(),
    };
    let mut own = Cache::default();
    let (cache, rounds) = match rounds {
        Some(r) => {
            let (cache, rest) = r.split();
            (cache, Some(rest))
        }
        None => (&mut own, None),
    };
    let mut scan = Duration::ZERO;
    let mut rounds = rounds;
    let found = dump::tree::frozen(&mut held.frozen, &mut held.injectors, host, cache, |d| {
        let mut names = match &mut rounds {
            Some(r) => r.names(d),
            None => Names::plain(&d.tree),
        };
        if let Some(tell) = tell {
            tell.tell(&mut d.tree, &mut names);
        }
        let began = Instant::now();
        let last = match &mut rounds {
            Some(r) => {
                let seen = ahead.filter(|_| !has_run.get()).map_or(Vec::new(), Ahead::seen);
                r.last(d, names, seen)
            }
            None => pages::plan_tree(&d.tree, &d.pids, &d.object_fds).map(|(plans, guards)| Last {
                names,
                plans,
                guards,
                ..Default::default()
            }),
        };
        scan = began.elapsed();
        last
    });
    let found = match found {
        Ok(found) => found,
        Err(DumpError::Inside(blockers)) => return Ok(Err(blockers)),
        Err(DumpError::Inject(e @ InjectError::Unfit { .. })) => return Err(Failure::refused("freeze", pid, e, Vec::new())),
        Err(e) => return Err(fail(format!("cannot read the frozen tree: {e}"))),
    };
    let d = found.dumped;
    let last = match found.also {
        Some(last) if d.blockers.is_empty() => last,
        _ => return Ok(Err(d.blockers)),
    };
    let last = last.map_err(|e| fail(format!("cannot read the page tables: {e}")))?;
    let collect = since.elapsed() - interrupt;
    let holder = held.frozen.holder();
    HELD.with(|h| *h.borrow_mut() = Some(held));
    Ok(Ok(Snapshot {
        holder,
        tree: d.tree,
        names: last.names,
        pids: d.pids,
        object_fds: d.object_fds,
        plans: last.plans,
        later: Vec::new(),
        finding: None,
        unseen: last.unseen,
        held: last.held,
        drops: last.drops,
        compared: last.compared,
        guards: last.guards,
        since,
        interrupt,
        collect: collect.saturating_sub(scan),
        scan,
    }))
}

/// What the last look found.
#[derive(Debug, Default)]
pub struct Last {
    /// See [`Snapshot`].
    pub names: Names,
    /// Pages to send.
    pub plans: Vec<pages::SpacePlan>,
    /// Of these, those of which the destination may hold an older version, by space.
    pub held: Vec<(u32, PageSet)>,
    /// Address spaces of which only what cannot follow was looked at.
    pub unseen: Vec<Unseen>,
    /// Guard regions, by address space.
    pub guards: Vec<pages::Guards>,
    /// Memory that is untouched now.
    pub drops: Vec<(u32, u64, u64)>,
    /// Bytes of shared memory that were compared by content.
    pub compared: u64,
}

impl Last {
    /// The ranges of a set as guard regions.
    pub fn ranges(set: &PageSet) -> pages::Guards {
        set.ranges().to_vec()
    }
}

/// An address space whose pages are looked for beside the freeze.
#[derive(Debug, Clone, Copy)]
pub struct Unseen {
    /// Its name.
    pub space: u32,
    /// Its index in the tree.
    pub mm: usize,
    /// A process that has it.
    pub pid: i32,
}

/// What was found in one.
#[derive(Debug)]
pub struct Found {
    /// Its name.
    pub space: u32,
    /// Its index in the tree.
    pub mm: usize,
    /// Pages with content.
    pub ranges: Vec<(u64, u64)>,
    /// Guard regions.
    pub guards: pages::Guards,
}

impl Snapshot {
    /// Has all memory that can follow looked at by another thread: reading the page tables takes milliseconds a GiB, which the freeze does not have.
    /// Until it is through, `later` is every page of that memory; [`Snapshot::found`] narrows it down.
    fn look_beside(&mut self) -> io::Result<()> {
        let mut jobs = Vec::new();
        for u in &self.unseen {
            let Some(mm) = self.tree.mms.get(u.mm) else { continue };
            let waits: Vec<Vma> = mm.vmas.iter().filter(|v| lazy::can_wait(v)).cloned().collect();
            let mut all = lazy::waiting(&mm.vmas);
            // What the first steps need goes now: a few pages, which are looked at here.
            let pagemap = Pagemap::open(u.pid)?;
            let mut now = Vec::new();
            for &(a, b) in lazy::first(&self.tree, u.mm).intersection(&all).ranges() {
                let mut found = Vec::new();
                pagemap.populated(a, b, &mut found)?;
                let content: Vec<(u64, u64)> = found.iter().filter(|r| !r.guard).map(|r| (r.start, r.end)).collect();
                content.iter().for_each(|r| all.remove(r.0, r.1));
                now.extend(content);
            }
            let plan = |set: &PageSet| pages::SpacePlan {
                space: u.space,
                ranges: lazy::at_borders(set, &mm.vmas),
            };
            self.plans.push(plan(&PageSet::from_ranges(now)));
            self.later.push(plan(&all));
            jobs.push((*u, waits));
        }
        let look = move || {
            let mut out = Vec::new();
            for (u, waits) in jobs {
                let (plan, guards) = pages::plan_anonymous(u.pid, u.space, &waits)?;
                out.push(Found {
                    space: u.space,
                    mm: u.mm,
                    ranges: plan.ranges,
                    guards,
                });
            }
            Ok(out)
        };
        self.finding = Some(std::thread::Builder::new().name("page tables".into()).spawn(look)?);
        Ok(())
    }

    /// Waits for the look at the page tables that goes on beside the freeze, if there is one: what of `later` has content, and guard regions by address space.
    pub fn found(&mut self) -> io::Result<Option<(Vec<Ranges>, Vec<pages::Guards>)>> {
        let Some(finding) = self.finding.take() else { return Ok(None) };
        let found = finding
            .join()
            .map_err(|_| io::Error::other("looking at the page tables failed"))??;
        let mut guards = vec![Vec::new(); self.tree.mms.len()];
        for f in found {
            let ranges = PageSet::from_ranges(f.ranges);
            if let Some(plan) = self.later.iter_mut().find(|p| p.space == f.space) {
                let all = PageSet::from_ranges(plan.ranges.iter().copied());
                plan.ranges = lazy::at_borders(&all.intersection(&ranges), &self.tree.mms[f.mm].vmas);
            }
            guards[f.mm] = f.guards;
        }
        let ranges = self.later.iter().map(|p| Ranges::pack(p.space, &p.ranges)).collect();
        Ok(Some((ranges, guards)))
    }

    /// The processes whose pages follow: (name of the address space, pid).
    pub fn spaces_later(&self) -> Vec<(u32, i32)> {
        let pid = |space: u32| {
            let mm = self.names.spaces.iter().position(|n| *n == space)?;
            let mut live = self.tree.processes.iter().zip(&self.pids).filter(|(p, _)| p.zombie.is_none());
            live.find(|(p, _)| p.mm as usize == mm).map(|(_, pid)| (space, *pid))
        };
        self.later.iter().filter_map(|p| pid(p.space)).collect()
    }

    /// The shared memory whose pages follow: (its name, a process that maps it, where).
    pub fn objects_later(&self) -> Vec<(u32, i32, u64, u64)> {
        let mapped = |name: u32| {
            let o = self.names.objects.iter().position(|n| *n == name)? as u32;
            let live = self.tree.processes.iter().zip(&self.pids).filter(|(p, _)| p.zombie.is_none());
            live.flat_map(|(p, pid)| {
                self.tree
                    .mms
                    .get(p.mm as usize)
                    .into_iter()
                    .flat_map(|m| &m.vmas)
                    .map(move |v| (v, *pid))
            })
            .find(|(v, _)| matches!(v.backing, Backing::Object { object, .. } if object == o))
            .map(|(v, pid)| (name, pid, v.start, v.end))
        };
        self.later.iter().filter_map(|p| mapped(p.space)).collect()
    }

    /// Where clients come to it.
    pub fn door(&self) -> Door {
        Door::of(&self.tree, &self.pids)
    }

    /// What reads the pages that follow.
    pub fn originals(&self) -> io::Result<Originals> {
        let readers = self.later.iter().map(|p| Ok((p.space, open_reader(p.space, self)?)));
        let mut ranges: HashMap<u32, Vec<(u64, u64)>> = HashMap::new();
        for plan in &self.later {
            ranges.entry(plan.space).or_default().extend(&plan.ranges);
        }
        Ok(Originals {
            door: self.door(),
            readers: readers.collect::<io::Result<_>>()?,
            may_follow: ranges.into_iter().map(|(space, r)| (space, PageSet::from_ranges(r))).collect(),
        })
    }

    /// Takes the pages that follow out of a list of hashes, which goes by the indices of address spaces, and returns them by their names.
    pub fn without_later(&self, hashes: &mut Vec<(u32, u64, u64)>) -> Vec<(u32, u64, u64)> {
        let mut out = Vec::new();
        for plan in &self.later {
            let at = |names: &[u32]| names.iter().position(|n| *n == plan.space).map(|i| i as u32);
            let object = at(&self.names.objects).map(|o| pages::OBJECT_SPACE + o);
            let Some(index) = at(&self.names.spaces).or(object) else {
                continue;
            };
            let set = PageSet::from_ranges(plan.ranges.iter().copied());
            let follow = hashes.extract_if(.., |h| h.0 == index && set.contains(h.1));
            out.extend(follow.map(|h| (plan.space, h.1, h.2)));
        }
        out
    }

    /// Takes out of the pages to send those that can follow after the resume, beyond `budget` bytes; what the destination holds of them goes. `shared`: the
    /// destination can let shared memory follow.
    pub fn put_off(&mut self, budget: u64, shared: bool) -> io::Result<()> {
        let split = lazy::split(&self.tree, &self.names, std::mem::take(&mut self.plans), budget, shared);
        for plan in &split.later {
            let held = self.held.iter().filter(|(space, _)| *space == plan.space);
            let later = PageSet::from_ranges(plan.ranges.iter().copied());
            for (space, held) in held {
                self.drops
                    .extend(held.intersection(&later).ranges().iter().map(|r| (*space, r.0, r.1)));
            }
        }
        (self.plans, self.later) = (split.now, split.later);
        if self.unseen.is_empty() { Ok(()) } else { self.look_beside() }
    }
}

/// Lets the frozen tree go on.
pub async fn thaw(tracer: &Tracer) {
    let _ = tracer.call(|| HELD.with(|h| drop(h.borrow_mut().take()))).await;
}

/// Kills the frozen originals.
pub async fn kill(tracer: &Tracer) {
    let _ = tracer
        .call(|| {
            HELD.with(|h| {
                if let Some(mut held) = h.borrow_mut().take() {
                    held.injectors.clear();
                    std::mem::replace(&mut held.frozen, Frozen::nothing()).kill();
                }
            });
        })
        .await;
}

/// Ends the tracing of a held tree, which stays stopped.
pub(super) async fn abandon(tracer: &Tracer) {
    let _ = tracer.call(|| HELD.with(|h| h.borrow_mut().take().map(Held::abandon))).await;
}

/// What reads a space of the snapshot.
pub fn open_reader(space: u32, snap: &Snapshot) -> io::Result<pages::Reader> {
    if let Some(o) = snap.names.objects.iter().position(|n| *n == space) {
        return Ok(pages::Reader::Object(File::from(snap.object_fds[o].try_clone()?)));
    }
    let mm = snap.names.spaces.iter().position(|n| *n == space);
    let at = snap
        .tree
        .processes
        .iter()
        .position(|p| Some(p.mm as usize) == mm && p.zombie.is_none())
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no process has this address space"))?;
    Ok(pages::Reader::Process(Mem::open(snap.pids[at])?))
}

//! The destination's side of a migration, the mirror of [`crate::source`].
//!
//! Until the decision word is set to 1 the copy is nothing but pilots, which end when this agent does. The word lies in the journal's page, so
//! a later agent knows from the journal alone whether the tasks were let go: see [`answer`].

use crate::{
    blocker::Blocker,
    dump,
    image::Tree,
    journal::{self, Entry, Journal, Side, Stage},
    laps::Laps,
    lazy::{
        fetch::{Drain, Hub, Question},
        keeper::{Armed, Keeper, Pending},
        lane::Lane,
        object,
    },
    oracle,
    pages::PageSet,
    patient::Patient,
    preflight,
    report::{Downtime, Event, Events, Failure, Report, Round, Stdio},
    restore::{
        fds::StdioFds,
        follow::FollowError,
        rebuild::{Names, Pids, Rebuild, Setting},
        sink::Sink,
    },
    steps,
    sys::{awake::Awake, misc, priority::Background},
    tracer::Tracer,
    track,
    wire::{self, Accept, Applied, Attach, Attached, Channel, Goodbye, Memory, Message, Ranges, RoundStart, Running, State, WireError},
};
use migrate_transport::{Link, PageFrame, PageReceiver};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

/// How a served connection ended.
#[derive(Debug)]
pub enum Served {
    /// A tree runs here now. The guard keeps what has to live on with it.
    Running(Box<Report>),
    /// A preflight, or a question about an older migration: nothing was started.
    Answered,
}

/// Pages that arrive while the rest is built, at most: more would take so long that timers of the copy went off before it runs.
const MEANWHILE: u64 = 16 << 20;

/// What bounds a receiver's migrations.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// How long a source may be there without going on, up to the resume.
    patience: Duration,
    /// One for each migration that may be under way, from the preflight to the end of the drain.
    slots: Arc<Semaphore>,
    at_once: u32,
}

impl Bounds {
    /// `at_once`: how many migrations may be under way.
    pub fn new(patience: Duration, at_once: u32) -> Bounds {
        Bounds {
            patience,
            slots: Arc::new(Semaphore::new(at_once as usize)),
            at_once,
        }
    }
}

/// Serves one authenticated connection to its end.
pub async fn serve<L: Link>(
    mut link: L,
    stdio: Stdio,
    state_dir: PathBuf,
    events: Events,
    cancel: CancellationToken,
    hub: Arc<Hub<L>>,
    bounds: Bounds,
) -> Result<Served, Failure> {
    let patience = bounds.patience;
    let start = Instant::now();
    let lost = |phase: &'static str| move |e: WireError| Failure::failed(phase, 0, format!("{e}; nothing was started here"));
    let first = tokio::select! {
        m = tokio::time::timeout(patience, wire::recv(&mut link)) => match m {
            Ok(m) => m.map_err(lost("inventory"))?,
            Err(_) => return Err(Failure::failed("inventory", 0, "the source says nothing")),
        },
        () = cancel.cancelled() => return Err(interrupted()),
    };
    let inv = match first {
        Message::Query(id) => {
            let m = answer(&state_dir, &id);
            let sent = wire::send(&mut link, &m).await;
            // The source closes once it has read the answer.
            let _ = tokio::time::timeout(Duration::from_secs(5), wire::recv(&mut link)).await;
            if sent.is_ok() && !matches!(m, Message::Pending) {
                hub.note_answered(&id);
            }
            return Ok(Served::Answered);
        }
        Message::Attach(a) => return attach(link, a, &state_dir, &events, &cancel, &hub).await,
        Message::Inventory(i) => i,
        other => {
            return Err(lost("inventory")(WireError::Protocol(format!(
                "{} as its first message",
                other.name()
            ))));
        }
    };
    let mut link = Patient::new(link, patience);
    events(Event::Phase { phase: "preflight" });
    if !journal::valid_id(&inv.id) {
        return Err(lost("inventory")(WireError::Protocol("an id that is none".into())));
    }
    let id = inv.id.clone();
    let question = hub.question(&id);
    let (check_only, lazy, memory) = (inv.check_only, inv.lazy, inv.memory);
    inv.tree
        .validate()
        .map_err(|e| lost("inventory")(WireError::Protocol(format!("a tree that is none: {e}"))))?;
    let numbers = inv.tree.processes.iter().flat_map(|p| p.fds.iter().map(|f| f.fd));
    let descriptors = numbers.max().map_or(0, |n| n as u64 + 1);
    let (blockers, host) = {
        tokio::task::spawn_blocking(move || (preflight::tree(&inv.tree), dump::host::host()))
            .await
            .map_err(|e| Failure::failed("preflight", 0, e))?
    };
    let (mut blockers, fresh) = blockers;
    if lazy && let Err(e) = crate::sys::uffd::missing_works() {
        let fix = "use --mode pre-copy or --mode stop; `migrate check` says what this host lacks";
        blockers.push(Blocker::new(
            "the receiving host",
            format!("pages cannot follow after the resume: {e}"),
            fix,
        ));
    }
    blockers.extend(preflight::memory(memory, preflight::memory_left()));
    let slot = bounds.slots.try_acquire();
    if slot.is_err() && !check_only {
        blockers.push(Blocker::new(
            "the receiving host",
            format!("it receives {} programs at this moment, which is as many as it may", bounds.at_once),
            "try again when one of them is there; or start the receiver with a higher --at-once",
        ));
    }
    let host = host.map_err(|e| Failure::failed("preflight", 0, format!("cannot examine this host: {e}")))?;
    if !blockers.is_empty() {
        let text = blockers.iter().map(|b| format!("\n  - {b}")).collect::<String>();
        refuse(&mut link, blockers.clone()).await;
        if check_only {
            return Ok(Served::Answered);
        }
        tracing::info!("refused a tree:{text}");
        return Err(Failure::refused(
            "preflight",
            0,
            "a tree was refused; nothing was started",
            blockers,
        ));
    }
    let mut keeper = None;
    let mut links = None;
    if lazy && !check_only {
        links = hub.register(&id);
        let (dir, id) = (state_dir.clone(), id.clone());
        let started = tokio::task::spawn_blocking(move || Keeper::spawn(&dir, &id))
            .await
            .map_err(io::Error::other)
            .and_then(|k| k);
        match started {
            Ok(k) => keeper = Some(k),
            Err(e) => {
                let what = format!("the keeper of the copy's memory cannot be started: {e}");
                let fix = "see what it lacks there; or use --mode pre-copy, which needs none";
                refuse(&mut link, vec![Blocker::new("the receiving host", what.clone(), fix)]).await;
                return Err(Failure::failed("preflight", 0, format!("{what}; nothing was started")));
            }
        }
    }
    let accept = Accept {
        host,
        fresh_pids: fresh,
        shared_follows: lazy && object::possible(),
    };
    wire::send(&mut link, &Message::Accept(accept)).await.map_err(lost("preflight"))?;
    if check_only {
        while let Ok(Ok(Message::Probe(_))) = tokio::time::timeout(Duration::from_secs(10), wire::recv(&mut link)).await {
            if wire::send(&mut link, &Message::Pending).await.is_err() {
                break;
            }
        }
        return Ok(Served::Answered);
    }

    // A while may pass before the freeze: rounds, transient blockers.
    let tracer = Tracer::start().map_err(|e| Failure::failed("restore", 0, e))?;
    let stdio_fds = StdioFds::open(&stdio).map_err(|e| Failure::failed("restore", 0, format!("cannot open the standard streams: {e}")))?;
    let mut site = Site {
        tracer: &tracer,
        id: &id,
        state_dir: &state_dir,
        peer: link.peer().fingerprint.to_string(),
        copy: None,
        begun: false,
        lazy,
        keeper,
        awake: None,
        descriptors,
    };
    let mut rounds = Vec::new();
    let built = tokio::select! {
        b = rounds_and_state(&mut link, &mut site, &mut rounds, stdio_fds, &events) => b,
        () = cancel.cancelled() => Err("the receiver was interrupted".to_owned()),
    };
    let (
        (arrived, draining),
        Copy {
            rebuild,
            mut journal,
            mut entry,
        },
    ) = match built.and_then(|a| Ok((a, site.copy.take().ok_or("nothing arrived")?))) {
        Ok(b) => b,
        Err(reason) => {
            // Everything built so far dies with its guard, at the latest when what the thread was busy with has ended. Whoever asks later hears the same: nothing
            // is known of it.
            let began = site.begun;
            let _ = tracer.call(|| ()).await;
            drop((site.copy.take(), site.keeper.take(), site.awake.take(), slot));
            if let Ok((journal, _)) = Journal::open(&state_dir, &id, Side::Destination) {
                let _ = journal.remove();
            }
            let _ = wire::send(&mut link, &Message::Aborted(reason.clone())).await;
            let silent = read_out(&mut link, &cancel).await;
            let told = !silent || !began || asked(&question, &events, &cancel).await;
            let m = match (began, told) {
                (false, _) => "nothing was started here",
                (true, true) => "nothing runs here, the source was told",
                (true, false) => {
                    "nothing runs here; the source was not told, and has not asked. If it waits for that, `migrate recover` there asks again"
                }
            };
            return Err(Failure::failed("restore", 0, format!("{reason}; {m}")));
        }
    };
    let processes = rebuild.tree().processes.len() as u32;
    let threads = rebuild.tree().processes.iter().map(|p| p.threads.len() as u32).sum();
    let mut copy = Some(rebuild);

    // The decision: one store that is the journal entry and the release.
    let released = copy.as_mut().is_some_and(|c| c.release());
    steps::reached("decided");
    let restore_ms = arrived.elapsed().as_secs_f64() * 1000.0;
    let pid = copy.as_ref().map_or(0, Rebuild::root_pid);
    if !released {
        entry.stage = Stage::Aborted;
        let _ = journal.update(&entry);
        drop(copy);
        let reason = "the copy ended before it was released".to_owned();
        let _ = wire::send(&mut link, &Message::Aborted(reason.clone())).await;
        read_out(&mut link, &cancel).await;
        return Err(Failure::failed("restore", 0, format!("{reason}; nothing runs here")));
    }
    let running = Running {
        pid,
        restore_ms,
        draining: draining.is_some(),
    };
    let told = wire::send(&mut link, &Message::Running(running)).await;
    (site.awake, site.keeper) = (None, None);
    entry.stage = Stage::Running;
    let _ = journal.update(&entry);
    steps::reached("noted that it runs");
    events(Event::Running { pid });
    // A task inside a fault stops only when its page is there: the drain goes on beside this.
    let cleaning = tracer.call(move || copy.as_mut().map_or(0, Rebuild::clean_up));
    if let Err(e) = &told {
        events(Event::Note {
            text: format!("the source did not hear that the tree runs here ({e}); it will ask"),
        });
    }
    let mut stats = None;
    let mut bytes_sent = link.bytes_sent();
    let after = Instant::now();
    let left = if let (Some(keeper), Some(links)) = (draining, links) {
        events(Event::Phase { phase: "drain" });
        let lost = |e: String| Failure::failed("drain", pid, e);
        let drain = Drain::new(keeper, links, cancel.clone()).map_err(|e| lost(e.to_string()))?;
        let (drained, left) = tokio::join!(drain.run(Some(link.into_inner()), &events), cleaning);
        let drained = drained.map_err(lost)?;
        match drained.goodbye {
            Goodbye::Said => _ = journal.remove(),
            Goodbye::Silence => _ = asked(&question, &events, &cancel).await,
            Goodbye::Not => {}
        }
        // The link is gone with what it counted.
        bytes_sent = 0;
        stats = Some(drained.stats);
        left
    } else {
        let left = cleaning.await;
        // One that is merely gone keeps its originals stopped, and asks.
        match wire::goodbye(&mut link, &cancel).await {
            Goodbye::Said if told.is_ok() => _ = journal.remove(),
            Goodbye::Silence => _ = asked(&question, &events, &cancel).await,
            _ => {}
        }
        left
    };
    steps::reached("cleaned up");
    let left = left.unwrap_or(1);
    if left > 0 {
        events(Event::Note {
            text: format!("{left} processes keep an unused mapping of the restore"),
        });
    }
    // The root is a child of this process: without a wait its pid would stay taken after its end.
    let _ = std::thread::Builder::new().name("reaper".into()).spawn(move || misc::wait(pid));
    Ok(Served::Running(Box::new(Report {
        outcome: "migrated".into(),
        id,
        pid: 0,
        restored_pid: pid,
        processes,
        threads,
        pages_sent: rounds.iter().map(|r| r.pages).sum(),
        pages_zero: rounds.iter().map(|r| r.zero_pages).sum(),
        rounds,
        downtime_ms: 0.0,
        downtime: Downtime {
            restore_ms,
            ..Default::default()
        },
        total_ms: start.elapsed().as_secs_f64() * 1000.0,
        bytes_sent,
        agent_peak_rss: misc::peak_rss(),
        range: None,
        pages_lazy: stats.as_ref().map_or(0, |s| s.pulled + s.pushed),
        fault_latency_us: stats.as_ref().map(|s| s.latency.clone()).unwrap_or_default(),
        drain: stats.map(|s| crate::report::Drain::of(&s, after.elapsed())),
    })))
}

/// Says what is in the way, and waits until the source has read it.
async fn refuse<L: Link>(link: &mut L, blockers: Vec<Blocker>) {
    let _ = wire::send(link, &Message::Refuse(blockers)).await;
    let _ = tokio::time::timeout(Duration::from_secs(5), wire::recv(link)).await;
}

/// Waits until the source closes, which it does once it has read what it was told last: ended before that, it would have to ask, and could not say what became
/// of the tree. What it had sent before it read that, the handover above all, may come first. True: it has not closed but fallen silent.
async fn read_out<L: Link>(link: &mut L, cancel: &CancellationToken) -> bool {
    wire::goodbye(link, cancel).await == Goodbye::Silence
}

/// How long a source that has fallen silent is waited for. It notices the silence when this side does, more or less, and asks for [`crate::source::ASK_PATIENCE`].
const ASKED_WITHIN: Duration = Duration::from_secs(60);

/// Waits until a source that has fallen silent asks what became of its tree, on another connection: a receiver that ends before that, as one with `--once` does,
/// leaves it with originals that it may neither resume nor end. False: it has not asked.
async fn asked<L>(question: &Question<'_, L>, events: &Events, cancel: &CancellationToken) -> bool {
    events(Event::Note {
        text: format!(
            "the source has fallen silent; it may ask what became of the program, for which it gets {} s",
            ASKED_WITHIN.as_secs()
        ),
    });
    tokio::select! {
        () = question.answered() => true,
        () = tokio::time::sleep(ASKED_WITHIN) => false,
        () = cancel.cancelled() => false,
    }
}

/// How long a source may take to come once more.
const AGAIN: Duration = Duration::from_secs(10);

fn attached(again: bool) -> Message {
    Message::Attached(Attached {
        missing: Vec::new(),
        again,
    })
}

/// Has the source come once more, to a socket that hears it alone and is read by the thread for faults: that connection; this one where there cannot be such a
/// socket; none if it does not come there.
async fn apart<L: Link>(mut link: L, a: &Attach, lane: &Lane, cancel: &CancellationToken) -> Option<L> {
    let socket = {
        let _there = lane.enter();
        link.apart()
    };
    let next = match socket {
        Ok(next) => next,
        Err(e) => {
            tracing::debug!(error = %e, "faults share a socket with the push");
            return Some(link);
        }
    };
    wire::send(&mut link, &attached(true)).await.ok()?;
    let come = async {
        let mut link = next.await.ok()?;
        match wire::recv(&mut link).await {
            Ok(Message::Attach(b)) if (&b.id, b.channel) == (&a.id, a.channel) => Some(link),
            _ => None,
        }
    };
    tokio::select! {
        c = tokio::time::timeout(AGAIN, lane.around(come)) => c.ok()?,
        () = cancel.cancelled() => None,
    }
}

/// A further connection of a migration that is under way; or the first one to a receiver that was started again while pages were missing.
async fn attach<L: Link>(
    mut link: L,
    a: Attach,
    state_dir: &Path,
    events: &Events,
    cancel: &CancellationToken,
    hub: &Hub<L>,
) -> Result<Served, Failure> {
    let answered = |_| Ok(Served::Answered);
    // The second connection is answered at once, long before there is a drain; one for the push by the drain, which asks what is missing.
    if a.channel == Channel::Faults && hub.knows(&a.id) {
        let there = match hub.lane(&a.id).filter(|_| a.first) {
            Some(lane) => apart(link, &a, &lane, cancel).await,
            None => Some(link),
        };
        let Some(there) = there else { return Ok(Served::Answered) };
        link = there;
        if wire::send(&mut link, &attached(false)).await.is_err() {
            return Ok(Served::Answered);
        }
    }
    link = match hub.pass(&a.id, a.channel, link) {
        Ok(()) => return Ok(Served::Answered),
        Err(link) => link,
    };
    let adopted = (a.channel == Channel::Bulk).then(|| Keeper::adopt(state_dir, &a.id));
    let (keeper, links) = match (adopted, hub.register(&a.id)) {
        (Some(Ok(keeper)), Some(links)) => (keeper, links),
        _ => {
            let m = match answer(state_dir, &a.id) {
                Message::Running(Running { draining: false, .. }) if a.channel == Channel::Bulk => Message::Drained(Box::default()),
                _ => Message::Aborted("this receiver knows no copy that misses pages".into()),
            };
            let sent = wire::send(&mut link, &m).await;
            let end = tokio::time::timeout(Duration::from_secs(5), wire::recv(&mut link)).await;
            if sent.is_ok() {
                hub.note_answered(&a.id);
            }
            return answered(end);
        }
    };
    events(Event::Phase { phase: "drain" });
    events(Event::Note {
        text: "the program that came before this receiver was started has pages to get: they go on arriving".into(),
    });
    let failed = |e: String| Failure::failed("drain", 0, e);
    let drain = Drain::new(keeper, links, cancel.clone()).map_err(|e| failed(e.to_string()))?;
    // As any later connection: it is told what is missing first.
    hub.pass(&a.id, a.channel, link)
        .map_err(|_| failed("the connection was lost".into()))?;
    let drained = drain.run(None, events).await.map_err(failed)?;
    if drained.goodbye == Goodbye::Said
        && let Ok((journal, _)) = Journal::open(state_dir, &a.id, Side::Destination)
    {
        let _ = journal.remove();
    }
    events(Event::Note {
        text: "all pages have arrived".into(),
    });
    Ok(Served::Answered)
}

fn interrupted() -> Failure {
    Failure::failed("cancel", 0, "interrupted; nothing was started here")
}

/// A copy being built, and its journal.
struct Copy {
    rebuild: Rebuild,
    journal: Journal,
    entry: Entry,
}

impl Copy {
    /// Notes the processes in the journal, and opens the way for pages.
    fn settle(&mut self) -> Result<Sink, String> {
        let now = journal::identify(self.rebuild.pids());
        let sink = self.rebuild.sink().map_err(|e| format!("cannot reach the copy's memory: {e}"));
        if now != self.entry.processes {
            self.entry.processes = now;
            let noted = self.journal.update(&self.entry);
            noted.map_err(|e| format!("cannot write the journal: {e}"))?;
        }
        sink
    }
}

/// What following came to.
enum Followed<F> {
    /// It has the new shape, and what came next was done; or something failed.
    There(Copy, Result<(), String>),
    /// It has to be built anew, and this is still to be done then.
    Anew(Copy, String, F),
}

/// Where it is built.
struct Site<'a> {
    tracer: &'a Tracer,
    id: &'a str,
    state_dir: &'a Path,
    peer: String,
    copy: Option<Copy>,
    /// There was one: the thread that owns it may be busy with it just now.
    begun: bool,
    /// Pages may follow.
    lazy: bool,
    keeper: Option<Keeper>,
    /// From the arrival of the state on.
    awake: Option<Awake>,
    /// For the skeleton's setting.
    descriptors: u64,
}

impl Site<'_> {
    /// Gives the copy this shape: the first time from nothing, later by following; anew when that is not possible, which the source knows too.
    async fn shape(&mut self, tree: Tree, names: Names, drops: Vec<(u32, u64, u64)>) -> Result<Sink, String> {
        let (open, way) = oneshot::channel();
        self.shape_and(tree, names, drops, open, |_| Ok(())).await?;
        way.await.map_err(|_| "internal error: no way for pages".into())
    }

    /// The same, and what comes next, in one go on the thread that owns the copy: each time that it is waited for costs two wakes of a thread, a tenth of a
    /// millisecond. `open` gets the way for pages as soon as there is one.
    async fn shape_and(
        &mut self,
        tree: Tree,
        names: Names,
        drops: Vec<(u32, u64, u64)>,
        open: oneshot::Sender<Sink>,
        next: impl FnOnce(&mut Rebuild) -> Result<(), String> + Send + 'static,
    ) -> Result<(), String> {
        tree.validate().map_err(|e| format!("the source sent a tree that is none: {e}"))?;
        if tree.processes.is_empty() || !names.fit(&tree) {
            return Err("the source sent a tree that is none: it is empty, or its names do not fit".into());
        }
        let lazy = self.lazy;
        let on = move |c: &mut Copy| {
            let sink = c.settle()?;
            // Nobody waits for it when the migration was given up.
            let _ = open.send(sink);
            next(&mut c.rebuild)
        };
        if let Some(mut c) = self.copy.take() {
            let (t, n) = (tree.clone(), names.clone());
            let follow = move || {
                let mut laps = Laps::start();
                let followed = c.rebuild.follow(t, n, &drops);
                let followed = followed.and_then(|()| if lazy { Ok(c.rebuild.userfaults()?) } else { Ok(()) });
                laps.lap("follow");
                match followed {
                    Ok(()) => {
                        let r = on(&mut c);
                        laps.lap("settle, and what comes next");
                        laps.log("shape");
                        Followed::There(c, r)
                    }
                    Err(FollowError::Anew(why)) => Followed::Anew(c, why, on),
                    Err(FollowError::Failed(e)) => Followed::There(c, Err(e.to_string())),
                }
            };
            match self.tracer.call(follow).await.map_err(|e| e.to_string())? {
                Followed::There(c, r) => {
                    self.copy = Some(c);
                    r
                }
                Followed::Anew(c, why, on) => {
                    tracing::debug!(why, "the skeleton is built anew");
                    let Copy { rebuild, journal, .. } = c;
                    self.tracer.call(move || drop(rebuild)).await.map_err(|e| e.to_string())?;
                    journal.remove().map_err(|e| e.to_string())?;
                    self.build(tree, names, on).await
                }
            }
        } else {
            self.build(tree, names, on).await
        }
    }

    /// Builds it from nothing.
    async fn build(
        &mut self,
        tree: Tree,
        names: Names,
        on: impl FnOnce(&mut Copy) -> Result<(), String> + Send + 'static,
    ) -> Result<(), String> {
        let lazy = self.lazy;
        let entry = Entry {
            id: self.id.to_owned(),
            side: Side::Destination,
            stage: Stage::Committed,
            processes: Vec::new(),
            peer: self.peer.clone(),
            since: misc::clock_ns(libc::CLOCK_REALTIME) / 1_000_000_000,
            boot_id: journal::boot_id(),
            spaces: Vec::new(),
            objects: Vec::new(),
        };
        let journal = Journal::create(self.state_dir, &entry)
            .map_err(|e| format!("cannot write the journal in {}: {e}", self.state_dir.display()))?;
        self.begun = true;
        let word = journal.file().try_clone().map_err(|e| e.to_string())?;
        let descriptors = self.descriptors;
        let built = self
            .tracer
            .call(move || {
                let pids = if crate::restore::rebuild::pids_free(&tree) {
                    Pids::Here
                } else {
                    Pids::Fresh
                };
                let mut r = Rebuild::skeleton(
                    tree,
                    names,
                    &word,
                    Setting {
                        pids,
                        fresh_files: true,
                        descriptors,
                    },
                )
                .map_err(|e| e.to_string())?;
                if lazy {
                    r.userfaults().map_err(|e| e.to_string())?;
                }
                Ok::<_, String>(r)
            })
            .await
            .map_err(|e| e.to_string())?;
        match built {
            Ok(rebuild) => {
                self.copy = Some(Copy { rebuild, journal, entry });
                self.with_copy(on).await?
            }
            Err(e) => {
                let _ = journal.remove();
                Err(e)
            }
        }
    }

    /// Runs a closure with the copy on the thread that owns it.
    async fn with<R: Send + 'static>(&mut self, f: impl FnOnce(&mut Rebuild) -> R + Send + 'static) -> Result<R, String> {
        self.with_copy(move |c| f(&mut c.rebuild)).await
    }

    async fn with_copy<R: Send + 'static>(&mut self, f: impl FnOnce(&mut Copy) -> R + Send + 'static) -> Result<R, String> {
        let mut c = self.copy.take().ok_or("nothing was built yet")?;
        let (r, c) = self.tracer.call(move || (f(&mut c), c)).await.map_err(|e| e.to_string())?;
        self.copy = Some(c);
        Ok(r)
    }
}

/// Receives rounds, then the state, and builds the copy up to the last step before the release. Returns when the state arrived. Err: why not, in
/// words for both sides.
async fn rounds_and_state<L: Link>(
    link: &mut L,
    site: &mut Site<'_>,
    rounds: &mut Vec<Round>,
    stdio: StdioFds,
    events: &Events,
) -> Result<(Instant, Option<Keeper>), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let mut shown = None;
    let mut background = Background::new();
    loop {
        let message = wire::recv(link).await.map_err(|e| text(&e))?;
        let start = match message {
            Message::Round(r) => *r,
            Message::State(state) => {
                site.awake = Some(Awake::hold());
                background.raise();
                return last(link, site, rounds, *state, stdio, events).await;
            }
            other => return Err(format!("the source sent {} instead of a round or the state", other.name())),
        };
        if shown.is_none() {
            events(Event::Phase { phase: "pre-copy" });
        }
        let began = Instant::now();
        let RoundStart {
            number,
            tree,
            names,
            drops,
            expect,
            bytes,
        } = start;
        background.round(bytes);
        let tree = match (tree, &mut shown) {
            (Some(t), _) => {
                shown = Some(t.clone());
                t
            }
            (None, Some(t)) => t.clone(),
            (None, None) => return Err("the source's first round has no tree".into()),
        };
        let sink = site.shape(tree, names, drops).await?;
        if !expect.is_empty() {
            site.with(move |c| c.expect(&expect).map_err(|e| e.to_string())).await??;
        }
        let shape_ms = began.elapsed().as_secs_f64() * 1000.0;
        let (round, missed) = pages(link, sink.tolerant(), number, bytes, events).await?;
        events(Event::Round(round));
        rounds.push(round);
        let applied = Applied {
            number,
            pages: round.pages,
            zero: round.zero_pages,
            missed,
            shape_ms,
        };
        wire::send(link, &Message::Applied(applied)).await.map_err(|e| text(&e))?;
    }
}

/// The frozen tree: the last pages, and everything else.
async fn last<L: Link>(
    link: &mut L,
    site: &mut Site<'_>,
    rounds: &mut Vec<Round>,
    state: State,
    stdio: StdioFds,
    events: &Events,
) -> Result<(Instant, Option<Keeper>), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let arrived = Instant::now();
    events(Event::Phase { phase: "restore" });
    let State {
        tree,
        names,
        expected,
        verify,
    } = state;
    // Memory that is locked can no longer be dropped, and is full: what it has comes first.
    let locked = tree.mms.iter().flat_map(|m| &m.vmas).any(|v| v.flags.is_locked());
    let mut laps = Laps::start();
    let number = rounds.len() as u32 + 1;
    let mut stdio = Some(stdio);
    let (memory, sink, mut round) = if let Some(stdio) = stdio.take_if(|_| expected <= MEANWHILE && !locked) {
        let (open, way) = oneshot::channel();
        // The last step, with the guard regions, is taken without waiting for the pages; not taken if nothing comes here.
        let (all, rest) = std::sync::mpsc::channel::<Vec<Vec<(u64, u64)>>>();
        let coming = async {
            let mut m = memory(link).await?;
            let little = m.drops.is_empty() && m.later.is_empty() && !m.narrowed && m.bytes <= MEANWHILE;
            if little {
                // Nobody waits for it when something failed, which is what is told.
                let _ = all.send(std::mem::take(&mut m.guards));
            }
            drop(all);
            let sink = way.await.map_err(|_| String::new())?;
            if little {
                let round = pages(link, sink, number, m.bytes, events).await?.0;
                return Ok((m, None, Some(round)));
            }
            Ok::<_, String>((m, Some(sink), None))
        };
        let prepare = move |c: &mut Rebuild| {
            c.prepare(&stdio, &[])
                .and_then(|()| rest.recv().map_or(Ok(()), |guards| c.contexts(&guards)))
                .map_err(|e| e.to_string())
        };
        let (came, prepared) = tokio::join!(coming, site.shape_and(tree, names, Vec::new(), open, prepare));
        prepared?;
        came?
    } else {
        let sink = site.shape(tree, names, Vec::new()).await?;
        (memory(link).await?, Some(sink), None)
    };
    laps.lap("state");
    let Memory {
        drops,
        guards,
        bytes,
        later,
        narrowed,
    } = memory;
    let lazy = !later.is_empty();
    if lazy && site.keeper.is_none() {
        return Err("the source wants pages to follow that it had not announced".into());
    }
    if lazy || !drops.is_empty() {
        site.with(move |c| c.make_way(&drops, lazy).map_err(|e| e.to_string())).await??;
        laps.lap("make way");
    }
    let complete = move |c: &mut Rebuild| {
        let prepared = match stdio {
            Some(stdio) => c.prepare(&stdio, &guards),
            None => c.guard(&guards),
        };
        prepared
            .and_then(|()| if narrowed { Ok(()) } else { c.contexts(&[]) })
            .map_err(|e| e.to_string())
    };
    match sink {
        Some(sink) if bytes <= MEANWHILE => {
            let (arrived, built) = tokio::join!(pages(link, sink, number, bytes, events), site.with(complete));
            built??;
            round = Some(arrived?.0);
        }
        Some(sink) => {
            round = Some(pages(link, sink, number, bytes, events).await?.0);
            site.with(complete).await??;
        }
        // It is complete.
        None => {}
    }
    let round = round.unwrap_or_default();
    rounds.push(round);
    let own_hashes = if verify {
        let later = later.clone();
        let found = site
            .with(move |c| {
                let mut hashes = oracle::hashes(c.tree(), c.pids(), c.objects())?;
                c.without_expected(&later, &mut hashes);
                Ok::<_, io::Error>(((hashes, c.tree().mms.clone()), c.check_mappings()?))
            })
            .await?;
        let (hashes, wrong) = found.map_err(|e| format!("cannot hash the copy's pages: {e}"))?;
        if !wrong.is_empty() {
            return Err(format!("the copy's mappings differ from the original's: {}", wrong.join("; ")));
        }
        Some(hashes)
    } else {
        None
    };
    laps.lap("pages and state");
    let watch = verify && track::wp_async::available();
    let (mut armed, mut objects) = Default::default();
    if !later.is_empty() && !narrowed {
        let later = later.clone();
        (armed, objects) = site.with(move |c| c.arm(&later, watch).map_err(|e| e.to_string())).await??;
    }
    laps.lap("register");
    site.with(|c| c.finish().map_err(|e| e.to_string())).await??;
    laps.lap("finish");
    let h = match wire::recv(link).await.map_err(|e| text(&e))? {
        Message::Handover(h) => h,
        other => return Err(format!("the source sent {} instead of the handover", other.name())),
    };
    if (h.pages, h.zero) != (round.pages, round.zero_pages) {
        return Err(format!(
            "{} pages and {} zero pages were sent, {} and {} arrived",
            h.pages, h.zero, round.pages, round.zero_pages
        ));
    }
    if let (Some(theirs), Some((ours, mms))) = (h.hashes, own_hashes) {
        let d = oracle::differences(&theirs, &ours, &mms);
        if !d.is_empty() {
            return Err(format!("the copy's memory differs from the original's: {}", d.join("; ")));
        }
    }
    laps.lap("handover");
    if narrowed {
        let exact = narrow(&later, &h.later.unwrap_or_default())?;
        let guards = h.guards;
        (armed, objects) = site
            .with(move |c| c.contexts(&guards).and_then(|()| c.arm(&exact, watch)).map_err(|e| e.to_string()))
            .await??;
    }
    laps.lap("narrow");
    let private = armed
        .iter_mut()
        .filter_map(|a: &mut Armed| Some((a.name, &mut a.watched.as_mut()?.1)));
    let shared = objects
        .iter_mut()
        .filter_map(|o: &mut Pending| Some((o.name, o.expected.as_mut()?)));
    for (name, hashes) in private.chain(shared) {
        let of = h.later_hashes.iter().filter(|l| l.0 == name);
        hashes.extend(of.map(|l| (l.1, l.2)));
    }
    // One that is not needed has time to end when the copy runs.
    let keeper = match site.keeper.take_if(|_| !armed.is_empty()) {
        Some(keeper) => Some(start_keeper(keeper, armed, objects)?),
        None => None,
    };
    laps.lap("keeper");
    laps.log("restore");
    Ok((arrived, keeper))
}

/// What is to come of the frozen tree's memory.
async fn memory<L: Link>(link: &mut L) -> Result<Memory, String> {
    match wire::recv(link).await.map_err(|e| e.to_string())? {
        Message::Memory(m) => Ok(*m),
        other => Err(format!("the source sent {} instead of what is to come of its memory", other.name())),
    }
}

/// Of the pages announced, those that have content.
fn narrow(announced: &[Ranges], content: &[Ranges]) -> Result<Vec<Ranges>, String> {
    let bad = || "the source lists pages that are none".to_owned();
    let set = |r: &Ranges| r.unpack().map(PageSet::from_ranges).ok_or_else(bad);
    let mut out = Vec::new();
    for r in content {
        let all = announced.iter().find(|a| a.space == r.space).ok_or_else(bad)?;
        let both = set(all)?.intersection(&set(r)?);
        if !both.is_empty() {
            out.push(Ranges::pack(r.space, both.ranges()));
        }
    }
    Ok(out)
}

/// Hands the copy's memory over to the keeper: a few kilobytes to a process that reads.
fn start_keeper(mut keeper: Keeper, armed: Vec<Armed>, objects: Vec<Pending>) -> Result<Keeper, String> {
    let start = move || {
        for o in objects {
            keeper.take_object(o)?;
        }
        for a in armed {
            keeper.take(a)?;
        }
        keeper.start()?;
        Ok(keeper)
    };
    let started = start();
    started.map_err(|e: io::Error| format!("the keeper of the copy's memory is gone: {e}"))
}

/// Pages that could not be written: (space or object, start, end).
type Missed = Vec<(u32, u64, u64)>;

/// Receives pages until the stream ends, and writes them from a thread of their own.
async fn pages<L: Link>(link: &mut L, sink: Sink, number: u32, total: u64, events: &Events) -> Result<(Round, Missed), String> {
    if total == 0 {
        return Ok(Default::default());
    }
    let start = Instant::now();
    let mut stream = link.accept_pages().await.map_err(|e| e.to_string())?;
    let (tx, rx) = std::sync::mpsc::sync_channel::<PageFrame>(4);
    let writer = tokio::task::spawn_blocking(move || -> io::Result<(u64, u64, Missed)> {
        let (mut pages, mut zero) = (0, 0);
        for frame in rx {
            let (p, z) = sink.write(&frame)?;
            pages += p;
            zero += z;
        }
        Ok((pages, zero, sink.missed()))
    });
    let tx = Arc::new(tx);
    let mut received = 0u64;
    let mut last = Instant::now();
    let mut failed = None;
    loop {
        match stream.recv().await {
            Ok(Some(frame)) => {
                received += frame.runs.iter().map(|r| u64::from(r.pages) * crate::image::PAGE).sum::<u64>();
                // try_send first: the channel is rarely full, and a blocked runtime thread would hold up the network.
                if let Err(std::sync::mpsc::TrySendError::Full(frame)) = tx.try_send(frame) {
                    let tx = tx.clone();
                    if tokio::task::spawn_blocking(move || tx.send(frame).is_ok()).await.ok() != Some(true) {
                        break;
                    }
                }
                if writer.is_finished() {
                    break;
                }
                if last.elapsed() > Duration::from_millis(100) {
                    last = Instant::now();
                    let rate = (received as f64 / start.elapsed().as_secs_f64()) as u64;
                    events(Event::Progress {
                        round: number,
                        bytes: received,
                        total,
                        rate,
                    });
                }
            }
            Ok(None) => break,
            Err(e) => {
                failed = Some(e.to_string());
                break;
            }
        }
    }
    drop(tx);
    let (pages, zero_pages, missed) = writer
        .await
        .map_err(|e| e.to_string())?
        .map_err(|e| format!("writing the copy's memory failed: {e}"))?;
    if let Some(f) = failed {
        return Err(f);
    }
    let round = Round {
        pages,
        zero_pages,
        bytes: received,
        ms: start.elapsed().as_secs_f64() * 1000.0,
        stopped_ms: 0.0,
        compared: 0,
    };
    Ok((round, missed))
}

/// What became of a migration, from the journal alone: presumed abort.
pub fn answer(state_dir: &Path, id: &str) -> Message {
    match Journal::open(state_dir, id, Side::Destination) {
        Err(_) => match Journal::refuse(state_dir, id) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Message::Pending,
            _ => Message::Aborted("this receiver knows nothing of it".into()),
        },
        Ok((journal, entry)) => {
            if entry.boot_id != journal::boot_id() {
                return Message::Aborted("the receiving host has restarted since".into());
            }
            match journal.decision() {
                Ok(1) => Message::Running(Running {
                    pid: entry.processes.first().map_or(0, |p| p.0),
                    restore_ms: 0.0,
                    draining: Keeper::exists(state_dir, id),
                }),
                Ok(0) => {
                    // Undecided: while its tasks wait they may still be let go, unless this question decides against them.
                    if decide_against(&journal) {
                        Message::Aborted("the receiver had not resumed it".into())
                    } else {
                        Message::Pending
                    }
                }
                _ => Message::Aborted("the copy had ended before it was resumed".into()),
            }
        }
    }
}

/// Turns an undecided word into 2. False: it was decided in between.
fn decide_against(journal: &Journal) -> bool {
    use crate::{restore::pilots::WORD, sys::region::Region};
    use std::sync::atomic::Ordering;
    let Ok(region) = Region::map(journal.file(), 4096, 0) else {
        return false;
    };
    region
        .word(WORD)
        .compare_exchange(0, 2, Ordering::AcqRel, Ordering::Acquire)
        .is_ok()
}

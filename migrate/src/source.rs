//! The source's side of a migration, one phase after the other.
//!
//! Until the handover message is sent, every way out thaws the tree: errors, a dead link, Ctrl-C (the guard is [`Held`]'s drop) and the agent's
//! own death (ptrace lets go, the injected stub returns by itself). After it only the destination's answer counts; without one the tree
//! stays stopped by SIGSTOP and the journal says so.

use crate::{
    blocker::Blocker,
    dump::{self, pages, tree::Dumped},
    image::{Host, Tree},
    inject::Injector,
    journal::{self, Entry, Journal, Side, Stage},
    oracle,
    procfs::{stat, status},
    report::{Class, Downtime, Event, Events, Failure, Mode, Report, Round, SendOptions},
    sys::{mem::Mem, misc},
    tracer::{Frozen, Tracer},
    wire::{self, Handover, Inventory, Message, State, WireError},
};
use migrate_transport::{Link, PageSender};
use std::{
    cell::RefCell,
    fs::File,
    future::Future,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// Makes connections to one destination: the first, and others when it breaks after the handover.
pub trait Connector: Send {
    /// What it makes.
    type Link: Link;
    /// Connects.
    fn connect(&self) -> impl Future<Output = Result<Self::Link, Failure>> + Send;
    /// HOST:PORT, for messages and the journal.
    fn name(&self) -> String;
}

/// A frozen tree with what was read of it; lives on the tracer thread.
pub struct Held {
    frozen: Frozen,
    injectors: Vec<Option<Injector>>,
}

impl Held {
    /// Lets the tree go on as if nothing had been.
    fn release(&mut self) {
        for (p, inj) in self.frozen.procs.iter_mut().zip(self.injectors.drain(..)) {
            if let (Some(inj), Some(leader)) = (inj, p.tasks.first_mut())
                && let Err(e) = inj.leave(leader)
            {
                tracing::warn!(pid = p.pid, error = %e, "the stub's table stays mapped");
            }
        }
        self.frozen.thaw();
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

/// Refuses pids that cannot or must not be moved, in words.
pub fn check_pid(pid: i32) -> Result<(), Failure> {
    let refuse = |m: String, fix: &str| Err(Failure::refused("preflight", pid, m, Vec::new()).with_fix(fix));
    if pid <= 0 || !Path::new(&format!("/proc/{pid}")).exists() {
        return refuse(format!("there is no process {pid}"), "see `ps -e` for the pid");
    }
    match status::read(pid) {
        Ok(s) if s.tgid != pid => return refuse(format!("{pid} is a thread of process {}", s.tgid), "name the process"),
        Ok(s) if s.state == b'Z' => return refuse(format!("process {pid} has ended already (zombie)"), "nothing is left to move"),
        _ => {}
    }
    if dump::tree::own_ancestor(pid).unwrap_or(false) {
        return refuse(
            format!("process {pid} is this agent or one of its ancestors, which would stop itself"),
            "run migrate from another session",
        );
    }
    const PF_KTHREAD: u32 = 0x0020_0000;
    if stat::read(pid).is_ok_and(|s| s.flags & PF_KTHREAD != 0) {
        return refuse(format!("process {pid} is a kernel thread"), "name a user process");
    }
    if pid == 1 {
        return refuse("process 1 is the init of this pid namespace".into(), "name a process below it");
    }
    let me = rustix::process::geteuid().as_raw();
    if me != 0
        && let Ok(s) = status::read(pid)
        && (s.uids.iter().any(|u| *u != me))
    {
        return refuse(
            format!("process {pid} belongs to uid {}, this agent runs as uid {me}", s.uids[0]),
            "run migrate as root",
        );
    }
    Ok(())
}

const INVENTORY_TRIES: u64 = 8;
/// How long a tree may take until nothing transient is in the way.
const SETTLE: Duration = Duration::from_secs(5);

/// Reads the running tree for preflight and refuses what cannot move.
pub fn inventory(pid: i32) -> Result<Dumped, Failure> {
    check_pid(pid)?;
    let host = dump::host::host().map_err(|e| Failure::failed("inventory", pid, format!("cannot examine this host: {e}")))?;
    // The tree runs meanwhile: processes vanish between two looks, and a pipe whose ends were seen at different moments looks as if it led
    // outside. What is really in the way is there every time; what passes by itself is given some seconds.
    let mut tries = 0;
    let end = Instant::now() + SETTLE;
    loop {
        tries += 1;
        let last = tries >= INVENTORY_TRIES;
        match dump::tree::inventory(pid, host.clone()) {
            Ok(mut d) if d.blockers.is_empty() => {
                d.blockers = dump::outsiders::blockers(&d);
                return Ok(d);
            }
            Ok(d) => {
                let passing = d.blockers.iter().all(|b| b.transient);
                if (last && !passing) || Instant::now() > end {
                    return Ok(d);
                }
            }
            Err(_) if !last && Path::new(&format!("/proc/{pid}")).exists() => {}
            Err(e) => {
                let f = Failure::refused("inventory", pid, format!("cannot examine the tree: {e}"), Vec::new());
                return Err(f.with_fix("run migrate as root, and see whether the process still runs"));
            }
        }
        std::thread::sleep(Duration::from_millis((2 + tries * 3).min(40)));
    }
}

/// A new migration's id.
pub fn new_id() -> String {
    let mut b = [0u8; 16];
    let _ = File::open("/dev/urandom").and_then(|mut f| io::Read::read_exact(&mut f, &mut b));
    b.iter().map(|b| format!("{b:02x}")).collect()
}

/// What a freeze gave.
pub struct Snapshot {
    /// The tree.
    pub tree: Tree,
    /// Agent-side pids.
    pub pids: Vec<i32>,
    /// Readers of the objects.
    pub object_fds: Vec<std::os::fd::OwnedFd>,
    /// Pages to send.
    pub plans: Vec<pages::SpacePlan>,
    /// Guard regions.
    pub guards: Vec<Vec<(u64, u64)>>,
    /// When the first task stopped.
    pub since: Instant,
    /// Time to stop all, and to read all.
    pub interrupt: Duration,
    /// Time to read everything but pages.
    pub collect: Duration,
}

/// How long a freeze that meets transient blockers is tried again.
const FREEZE_PATIENCE: Duration = Duration::from_secs(20);

/// Freezes the tree and reads it. On `Ok` it stays frozen on the tracer thread, until [`thaw`], [`kill`] or the end of that thread.
pub async fn freeze(tracer: &Tracer, pid: i32, host: &Host, cancel: &CancellationToken) -> Result<Snapshot, Failure> {
    let mut tries = 0u32;
    let end = Instant::now() + FREEZE_PATIENCE;
    loop {
        let host = host.clone();
        let r = tracer
            .call(move || freeze_once(pid, host))
            .await
            .map_err(|e| Failure::failed("freeze", pid, e))??;
        match r {
            Ok(s) => return Ok(s),
            Err(blockers) => {
                tries += 1;
                let lasting = blockers.iter().any(|b| !b.transient);
                if lasting || Instant::now() > end {
                    let m = if lasting {
                        "the tree cannot move"
                    } else {
                        "the tree did not come to a point where it can move"
                    };
                    return Err(Failure::refused("freeze", pid, m, blockers));
                }
                // Another moment each time, so that a periodic client is not met at the same point again.
                let wait = Duration::from_millis(3 + u64::from(tries) * 7 % 41);
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = cancel.cancelled() => return Err(interrupted(pid)),
                }
                // Looking costs the program nothing: it is stopped again only when the way seems clear.
                if tries > 3 {
                    let _ = tokio::task::spawn_blocking(move || inventory(pid)).await;
                }
            }
        }
    }
}

fn interrupted(pid: i32) -> Failure {
    Failure::failed("cancel", pid, "interrupted; the program runs on here")
}

fn freeze_once(pid: i32, host: Host) -> Result<Result<Snapshot, Vec<Blocker>>, Failure> {
    let fail = |m: String| Failure::failed("freeze", pid, m);
    let frozen = Frozen::freeze(pid, Duration::from_secs(5)).map_err(|e| fail(e.to_string()))?;
    let since = frozen.since;
    let interrupt = since.elapsed();
    let mut held = Held {
        frozen,
        injectors: Vec::new(),
    };
    let (d, injectors) = dump::tree::frozen(&mut held.frozen, host).map_err(|e| match e {
        dump::tree::DumpError::Inject(e @ crate::inject::InjectError::Unfit { .. }) => Failure::refused("freeze", pid, e, Vec::new()),
        e => fail(format!("cannot read the frozen tree: {e}")),
    })?;
    held.injectors = injectors;
    if !d.blockers.is_empty() {
        return Ok(Err(d.blockers));
    }
    let (plans, guards) =
        pages::plan_tree(&d.tree, &d.pids, &d.object_fds).map_err(|e| fail(format!("cannot read the page tables: {e}")))?;
    let collect = since.elapsed() - interrupt;
    HELD.with(|h| *h.borrow_mut() = Some(held));
    Ok(Ok(Snapshot {
        tree: d.tree,
        pids: d.pids,
        object_fds: d.object_fds,
        plans,
        guards,
        since,
        interrupt,
        collect,
    }))
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

async fn hold(tracer: &Tracer) {
    let _ = tracer
        .call(|| {
            HELD.with(|h| {
                if let Some(h) = h.borrow_mut().as_mut() {
                    h.frozen.hold()
                }
            })
        })
        .await;
}

/// How long an answer to the handover is looked for before the operator has to decide when to go on (`migrate recover`).
const ASK_PATIENCE: Duration = Duration::from_secs(20);

/// The whole of `migrate send`.
pub async fn send<C: Connector>(
    connector: C,
    options: SendOptions,
    verify: bool,
    state_dir: PathBuf,
    events: Events,
    cancel: CancellationToken,
) -> Result<Report, Failure> {
    let start = Instant::now();
    let pid = options.pid;
    let phase = |phase| events(Event::Phase { phase });

    phase("inventory");
    let inv = tokio::task::spawn_blocking(move || inventory(pid))
        .await
        .map_err(|e| Failure::failed("inventory", pid, e))??;
    if !inv.blockers.is_empty() {
        return Err(Failure::refused("preflight", pid, "the tree cannot move", inv.blockers));
    }
    if options.mode != Mode::Stop {
        return Err(
            Failure::refused("preflight", pid, format!("mode {:?} is not built yet", options.mode), Vec::new()).with_fix("use --mode stop"),
        );
    }

    phase("connect");
    let mut link = tokio::select! {
        l = connector.connect() => l?,
        () = cancel.cancelled() => return Err(interrupted(pid)),
    };

    phase("preflight");
    let id = new_id();
    let host = inv.tree.host.clone();
    let lost = |phase: &'static str| move |e: WireError| Failure::failed(phase, pid, format!("{e}; the program runs on here"));
    let counts = Counts::of(&inv.tree, &inv.pids);
    let message = Message::Inventory(Inventory {
        id: id.clone(),
        tree: inv.tree,
        check_only: options.dry_run,
        leave_running: options.leave_running,
    });
    let answer = async {
        wire::send(&mut link, &message).await?;
        wire::recv(&mut link).await
    };
    let answer = tokio::select! {
        a = tokio::time::timeout(Duration::from_secs(60), answer) => match a {
            Ok(a) => a.map_err(lost("preflight"))?,
            Err(_) => return Err(Failure::failed("preflight", pid, format!("{} did not answer within 60 s", connector.name()))),
        },
        () = cancel.cancelled() => return Err(interrupted(pid)),
    };
    match answer {
        Message::Accept(a) => {
            if a.fresh_pids {
                events(Event::Note {
                    text: "some of the tree's pids are taken there: it gets a pid namespace of its own".into(),
                });
            }
        }
        Message::Refuse(blockers) => {
            return Err(Failure::refused(
                "preflight",
                pid,
                format!("{} cannot take the tree", connector.name()),
                blockers,
            ));
        }
        other => {
            return Err(lost("preflight")(WireError::Protocol(format!(
                "{} instead of an answer to the inventory",
                other.name()
            ))));
        }
    }
    if options.dry_run {
        phase("predict");
        let p = predict(&mut link, &counts).await.map_err(lost("predict"))?;
        link.close("rehearsed").await;
        return Ok(Report {
            outcome: "predicted".into(),
            id,
            pid,
            agent_peak_rss: misc::peak_rss(),
            ..p
        });
    }

    let tracer = Tracer::start().map_err(|e| Failure::failed("freeze", pid, e))?;
    phase("freeze");
    let snap = freeze(&tracer, pid, &host, &cancel).await?;
    let t_transfer = Instant::now();
    let result = tokio::select! {
        r = transfer(&mut link, &snap, verify, options.bandwidth, &events) => r.map_err(lost("transfer")),
        () = cancel.cancelled() => Err(interrupted(pid)),
    };
    let round = match result {
        Ok(r) => r,
        Err(mut e) => {
            thaw(&tracer).await;
            // A receiver that gave up says why on the control stream.
            if let Ok(Ok(Message::Aborted(reason))) = tokio::time::timeout(Duration::from_millis(300), wire::recv(&mut link)).await {
                e.message = format!("the destination gave up: {reason}; the program runs on here");
            }
            link.close("the source gave up").await;
            return Err(e);
        }
    };
    if cancel.is_cancelled() {
        thaw(&tracer).await;
        link.close("the source gave up").await;
        return Err(interrupted(pid));
    }

    phase("handover");
    let entry = Entry {
        id: id.clone(),
        side: Side::Source,
        stage: Stage::Committed,
        processes: journal::identify(&snap.pids),
        peer: connector.name(),
        since: misc::clock_ns(libc::CLOCK_REALTIME) / 1_000_000_000,
        boot_id: journal::boot_id(),
    };
    let journal = match Journal::create(&state_dir, &entry) {
        Ok(j) => j,
        Err(e) => {
            thaw(&tracer).await;
            return Err(Failure::failed(
                "handover",
                pid,
                format!("cannot write the journal in {}: {e}", state_dir.display()),
            ));
        }
    };
    hold(&tracer).await;
    let t_handover = Instant::now();
    let hashes = if verify {
        match oracle::hashes(&snap.tree, &snap.pids, &snap.object_fds) {
            Ok(h) => Some(h),
            Err(e) => {
                thaw(&tracer).await;
                let _ = journal.remove();
                return Err(Failure::failed("handover", pid, format!("cannot hash the frozen pages: {e}")));
            }
        }
    } else {
        None
    };
    let handover = Message::Handover(Handover {
        pages: round.pages,
        zero: round.zero_pages,
        hashes,
    });
    let sent = wire::send(&mut link, &handover).await;
    let answer = match sent {
        Ok(()) => wire::recv(&mut link).await,
        Err(e) => Err(e),
    };
    let answer = match answer {
        Ok(m @ (Message::Running(_) | Message::Aborted(_))) => m,
        other => {
            let why = match other {
                Ok(m) => format!("{} instead of an answer to the handover", m.name()),
                Err(e) => e.to_string(),
            };
            events(Event::Note {
                text: format!("no answer to the handover ({why}); asking {} again", connector.name()),
            });
            match ask_again(&connector, &id, ASK_PATIENCE).await {
                Some(m) => m,
                None => {
                    // The tree stays stopped by SIGSTOP when this agent ends.
                    let _ = tracer.call(|| HELD.with(|h| h.borrow_mut().take().map(Held::abandon))).await;
                    return Err(Failure {
                        class: Class::Unknown,
                        phase: "handover",
                        pid,
                        message: format!(
                            "the link broke after the handover and {} does not answer ({why}); the originals stay stopped",
                            connector.name()
                        ),
                        fix: Some(format!("when it is reachable again: migrate recover {id}")),
                        blockers: Vec::new(),
                    });
                }
            }
        }
    };
    let running = match answer {
        Message::Running(r) => r,
        Message::Aborted(reason) => {
            thaw(&tracer).await;
            let _ = journal.remove();
            return Err(Failure::failed(
                "restore",
                pid,
                format!("the destination could not resume it: {reason}; the program runs on here"),
            ));
        }
        _ => unreachable!("only these two leave the match above"),
    };
    let downtime = snap.since.elapsed();
    let handover_ms = ms(t_handover.elapsed());
    let transfer_ms = ms(t_handover - t_transfer);
    phase("end");
    if options.leave_running {
        thaw(&tracer).await;
    } else {
        kill(&tracer).await;
    }
    let _ = journal.remove();
    let bytes_sent = link.bytes_sent();
    link.close(wire::DONE).await;
    Ok(Report {
        outcome: "migrated".into(),
        id,
        pid,
        restored_pid: running.pid,
        processes: snap.tree.processes.len() as u32,
        threads: snap.tree.processes.iter().map(|p| p.threads.len() as u32).sum(),
        rounds: vec![round],
        downtime_ms: ms(downtime),
        downtime: Downtime {
            interrupt_ms: ms(snap.interrupt),
            collect_ms: ms(snap.collect),
            transfer_ms,
            restore_ms: running.restore_ms,
            handover_ms,
        },
        total_ms: ms(start.elapsed()),
        bytes_sent,
        pages_sent: round.pages,
        pages_zero: round.zero_pages,
        agent_peak_rss: misc::peak_rss(),
        ..Default::default()
    })
}

impl Held {
    /// Forgets the tree without letting it go: it stays stopped by SIGSTOP once ptrace lets go.
    fn abandon(mut self) {
        for (p, inj) in self.frozen.procs.iter_mut().zip(self.injectors.drain(..)) {
            if let (Some(inj), Some(leader)) = (inj, p.tasks.first_mut()) {
                let _ = inj.leave(leader);
            }
        }
        std::mem::replace(&mut self.frozen, Frozen::nothing()).let_go_stopped();
    }
}

/// Asks on new connections what became of a migration, with growing pauses.
pub async fn ask_again<C: Connector>(connector: &C, id: &str, limit: Duration) -> Option<Message> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(50);
    while Instant::now() < end {
        if let Ok(mut link) = connector.connect().await {
            let ask = async {
                wire::send(&mut link, &Message::Query(id.to_owned())).await?;
                wire::recv(&mut link).await
            };
            match tokio::time::timeout(Duration::from_secs(5), ask).await {
                Ok(Ok(m @ (Message::Running(_) | Message::Aborted(_)))) => return Some(m),
                _ => link.close("asked").await,
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
    None
}

/// What a prediction goes by.
struct Counts {
    processes: u32,
    threads: u32,
    bytes: u64,
}

impl Counts {
    fn of(tree: &Tree, pids: &[i32]) -> Counts {
        // Shared objects are counted by their size, which is at most too much.
        let private = tree
            .processes
            .iter()
            .zip(pids)
            .filter(|(p, _)| p.zombie.is_none())
            .filter_map(|(p, pid)| {
                let mm = tree.mms.get(p.mm as usize)?;
                pages::plan_mm(*pid, p.mm, mm).ok().map(|(plan, _)| plan.bytes())
            });
        Counts {
            processes: tree.processes.len() as u32,
            threads: tree.processes.iter().map(|p| p.threads.len() as u32).sum(),
            bytes: private.sum::<u64>() + tree.objects.iter().map(|o| o.size).sum::<u64>(),
        }
    }
}

/// Predicts a stop-and-copy migration: the link is measured with some random bytes, nothing is stopped.
async fn predict<L: Link>(link: &mut L, c: &Counts) -> Result<Report, WireError> {
    let start = Instant::now();
    let mut probe = vec![0u8; 8 << 20];
    let _ = File::open("/dev/urandom").and_then(|mut f| io::Read::read_exact(&mut f, &mut probe));
    let mut best = f64::INFINITY;
    let mut rtt = Duration::MAX;
    for k in 0..4 {
        let t = Instant::now();
        // A small one for the round trip, then large ones for the rate.
        let bytes = if k == 0 { vec![0] } else { probe.clone() };
        wire::send(link, &Message::Probe(bytes)).await?;
        match wire::recv(link).await? {
            Message::Pending => {}
            other => return Err(WireError::Protocol(format!("{} instead of an answer to a probe", other.name()))),
        }
        if k == 0 {
            rtt = t.elapsed();
        } else {
            best = best.min(t.elapsed().saturating_sub(rtt).as_secs_f64() / probe.len() as f64);
        }
    }
    // Stop, collect and rebuild: milliseconds for the first process, then by the piece (measured, docs/benchmarks.md).
    let fixed = 4.0 + 0.4 * f64::from(c.processes.saturating_sub(1)) + 0.06 * f64::from(c.threads) + ms(rtt);
    let wire_ms = best * c.bytes as f64 * 1000.0;
    let round = Round {
        pages: c.bytes / crate::image::PAGE,
        zero_pages: 0,
        bytes: c.bytes,
        ms: wire_ms,
    };
    Ok(Report {
        processes: c.processes,
        threads: c.threads,
        rounds: vec![round],
        downtime_ms: fixed + wire_ms,
        downtime: Downtime {
            transfer_ms: wire_ms,
            restore_ms: fixed,
            ..Default::default()
        },
        total_ms: ms(start.elapsed()),
        bytes_sent: link.bytes_sent(),
        ..Default::default()
    })
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1000.0
}

/// Sends the state and every page of the frozen tree.
async fn transfer<L: Link>(
    link: &mut L,
    snap: &Snapshot,
    verify: bool,
    bandwidth: Option<u64>,
    events: &Events,
) -> Result<Round, WireError> {
    let start = Instant::now();
    let total: u64 = snap.plans.iter().map(pages::SpacePlan::bytes).sum();
    let before = link.bytes_sent();
    let state = State {
        tree: snap.tree.clone(),
        guards: snap.guards.clone(),
        bytes: total,
        verify,
    };
    wire::send(link, &Message::State(Box::new(state))).await?;
    let mut round = Round::default();
    let mut stream = link.open_pages().await?;
    let (tx, mut rx) = tokio::sync::mpsc::channel::<io::Result<pages::Batch>>(16);
    let mut readers = Vec::new();
    for plan in &snap.plans {
        let reader =
            open_reader(plan.space, snap).map_err(|e| WireError::Protocol(format!("nothing: cannot read the tree's memory: {e}")))?;
        readers.push((plan.clone(), reader));
    }
    let worker = tokio::task::spawn_blocking(move || {
        for (plan, reader) in readers {
            let r = pages::read_plan(&plan, &reader, &mut |b| tx.blocking_send(Ok(b)).is_ok());
            if let Err(e) = r {
                let _ = tx.blocking_send(Err(e));
                return;
            }
        }
    });
    let mut done = 0u64;
    let mut last = Instant::now();
    while let Some(batch) = rx.recv().await {
        let batch = batch.map_err(|e| WireError::Protocol(format!("nothing: reading the tree's memory failed: {e}")))?;
        stream.send(&batch.runs, batch.data).await?;
        round.pages += batch.pages;
        round.zero_pages += batch.zero;
        done += (batch.pages + batch.zero) * crate::image::PAGE;
        if last.elapsed() > Duration::from_millis(100) {
            last = Instant::now();
            let rate = (done as f64 / start.elapsed().as_secs_f64()) as u64;
            events(Event::Progress {
                round: 1,
                bytes: done,
                total,
                rate,
            });
        }
        if let Some(limit) = bandwidth {
            let due = Duration::from_secs_f64((link.bytes_sent() - before) as f64 / limit as f64);
            if let Some(early) = due.checked_sub(start.elapsed()) {
                tokio::time::sleep(early).await;
            }
        }
    }
    let _ = worker.await;
    stream.finish().await?;
    round.bytes = link.bytes_sent() - before;
    round.ms = ms(start.elapsed());
    events(Event::Round(round));
    Ok(round)
}

/// What reads a space of the snapshot.
pub fn open_reader(space: u32, snap: &Snapshot) -> io::Result<pages::Reader> {
    if space >= pages::OBJECT_SPACE {
        return Ok(pages::Reader::Object(File::from(
            snap.object_fds[(space - pages::OBJECT_SPACE) as usize].try_clone()?,
        )));
    }
    let at = snap
        .tree
        .processes
        .iter()
        .position(|p| p.mm == space && p.zombie.is_none())
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no process has this address space"))?;
    Ok(pages::Reader::Process(Mem::open(snap.pids[at])?))
}

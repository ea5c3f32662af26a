//! The source's side of a migration, one phase after the other.
//!
//! Until the handover message is sent, every way out thaws the tree: errors, a dead link, Ctrl-C (the guard is [`freeze::Held`]'s drop) and the agent's
//! own death (ptrace lets go, the injected stub returns by itself). After it only the destination's answer counts; without one the tree
//! stays stopped by SIGSTOP and the journal says so.

pub mod attach;
mod fixed;
pub mod freeze;
pub mod objects;
mod precopy;
mod predict;
pub mod rounds;
pub mod shared;
mod transfer;

use crate::{
    dump::{self, mm::Cache, tree::Dumped},
    journal::{self, Entry, Journal, Side, Stage},
    lazy::serve::{self, Refusal, ServeError},
    oracle,
    patient::Patient,
    procfs::{stat, status, vanished},
    report::{Class, Downtime, Drain, Event, Events, Failure, Mode, Report, SendOptions},
    steps,
    sys::{misc, priority::Background},
    tracer::Tracer,
    track,
    wire::{self, Handover, Inventory, Message, WireError},
};
use fixed::Fixed;
use freeze::{Snapshot, kill, thaw};
use migrate_transport::Link;
use precopy::Job;
use predict::{Basis, Counts, predict};
use rounds::Rounds;
use std::{
    fs::File,
    future::Future,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
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
    inventory_with(pid, &mut Cache::default())
}

/// The same; what it learns of files and mappings stays in the cache for the next look.
pub fn inventory_with(pid: i32, cache: &mut Cache) -> Result<Dumped, Failure> {
    check_pid(pid)?;
    let host = dump::host::host().map_err(|e| Failure::failed("inventory", pid, format!("cannot examine this host: {e}")))?;
    // The tree runs meanwhile: processes vanish between two looks, and a pipe whose ends were seen at different moments looks as if it led
    // outside. What is really in the way is there every time; what passes by itself is given some seconds.
    let mut tries = 0;
    let end = Instant::now() + SETTLE;
    loop {
        tries += 1;
        let last = tries >= INVENTORY_TRIES;
        match dump::tree::inventory(pid, host.clone(), cache) {
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
            // A tree whose processes come and go on a host without a core to spare: a process that ends under the look says nothing of the rest.
            Err(e) if (!last || e.vanished() && Instant::now() < end) && Path::new(&format!("/proc/{pid}")).exists() => {}
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

/// How long an answer to the handover is looked for before the operator has to decide when to go on (`migrate recover`).
pub const ASK_PATIENCE: Duration = Duration::from_secs(20);

/// Bytes of memory with content of a tree.
pub fn memory(d: &dump::tree::Dumped) -> u64 {
    Counts::of(d).bytes
}

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
    let (inv, cache) = tokio::task::spawn_blocking(move || {
        let mut cache = Cache::default();
        inventory_with(pid, &mut cache).map(|inv| (inv, cache))
    })
    .await
    .map_err(|e| Failure::failed("inventory", pid, e))??;
    if !inv.blockers.is_empty() {
        return Err(Failure::refused("preflight", pid, "the tree cannot move", inv.blockers));
    }
    let mut options = options;
    if options.leave_running && matches!(options.mode, Mode::Hybrid | Mode::PostCopy) {
        // The original could not go on before the last page has left it.
        events(Event::Note {
            text: "--leave-running: no pages follow after the resume, all of them are sent before it (as with --mode pre-copy)".into(),
        });
        options.mode = Mode::PreCopy;
    }
    let options = options;
    let lazy = matches!(options.mode, Mode::Hybrid | Mode::PostCopy);
    let kind = match options.mode {
        Mode::Stop => None,
        // Only where it stops nothing: else the look beside the freeze is better.
        Mode::PostCopy => track::choose(options.tracker).ok().filter(|k| *k == track::Kind::WpAsync),
        _ => Some(track::choose(options.tracker).map_err(|e| {
            Failure::refused("preflight", pid, e, Vec::new()).with_fix("use --mode stop; `migrate check` says what this kernel offers")
        })?),
    };

    phase("connect");
    let link = tokio::select! {
        l = connector.connect() => l?,
        () = cancel.cancelled() => return Err(interrupted(pid)),
    };
    let mut link = Patient::new(link, options.peer_timeout);

    phase("preflight");
    let id = new_id();
    let host = inv.tree.host.clone();
    let lost = |phase: &'static str| move |e: WireError| Failure::failed(phase, pid, format!("{e}; the program runs on here"));
    let counts = Counts::of(&inv);
    let message = Message::Inventory(Inventory {
        id: id.clone(),
        tree: inv.tree.clone(),
        check_only: options.dry_run,
        leave_running: options.leave_running,
        lazy,
        memory: counts.bytes,
    });
    let answer = async {
        wire::send(&mut link, &message).await?;
        wire::recv(&mut link).await
    };
    let answer = tokio::select! {
        a = answer => a.map_err(lost("preflight"))?,
        () = cancel.cancelled() => return Err(interrupted(pid)),
    };
    let shared_follows = match answer {
        Message::Accept(a) => {
            if a.fresh_pids {
                events(Event::Note {
                    text: "some of the tree's pids are taken there: it gets a pid namespace of its own".into(),
                });
            }
            a.shared_follows
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
    };
    let mut faults = None;
    if lazy && !options.dry_run {
        // Now, so that no handshake is waited for when a task waits for a page.
        match serve::Faults::connect(&connector, &id).await {
            Ok(link) => faults = Some(link),
            Err(Refusal::Refused(why) | Refusal::Unreachable(why)) => {
                let m = format!(
                    "no second connection to {} for pages on demand: {why}; the program runs on here",
                    connector.name()
                );
                return Err(Failure::failed("connect", pid, m));
            }
        }
    }
    let tracer = Tracer::start().map_err(|e| Failure::failed("freeze", pid, e))?;
    if options.dry_run {
        phase("predict");
        // What comes before the first round is done already.
        let before = start.elapsed();
        // For post-copy the sample is only to say how much will follow.
        let sampled = kind.or_else(|| lazy.then(|| track::choose(options.tracker).ok()).flatten());
        let rounds = sampled.map(|kind| Rounds::new(pid, Some(kind), None, &inv, cache)).transpose();
        let basis = Basis {
            counts: &counts,
            options: &options,
            rounds: rounds.map_err(|e| Failure::failed("predict", pid, e))?,
            tracer: &tracer,
            before,
        };
        let p = tokio::select! {
            p = predict(&mut link, basis) => p.map_err(lost("predict"))?,
            () = cancel.cancelled() => return Err(interrupted(pid)),
        };
        link.close("rehearsed").await;
        return Ok(Report {
            outcome: "predicted".into(),
            id,
            pid,
            agent_peak_rss: misc::peak_rss(),
            ..p
        });
    }

    let mut job = Job {
        pid,
        host,
        tracer: &tracer,
        options: &options,
        events: &events,
        cancel: &cancel,
        rounds: Vec::new(),
        rate: 0.0,
        background: Background::new(),
        awake: None,
        fixed: Fixed::new(&counts, link.rtt()),
        shared_follows,
        verify,
        left: (0, 0),
    };
    let tracked = match options.mode {
        Mode::PreCopy | Mode::Hybrid | Mode::PostCopy => {
            let following = (options.mode == Mode::PostCopy).then_some(shared_follows);
            let rounds = Rounds::new(pid, kind, following, &inv, cache).map_err(|e| Failure::failed("pre-copy", pid, e))?;
            Some(Arc::new(Mutex::new(rounds)))
        }
        Mode::Stop => None,
    };
    drop(inv);
    let mut journal = None;
    let result = match job.until_frozen(&mut link, tracked.as_ref()).await {
        Ok(mut snap) => {
            let t_transfer = Instant::now();
            // Written while the pages are on their way. It says nothing untrue yet: whoever asks because of it hears that the copy was never resumed.
            let (dir, id, pids, peer) = (state_dir.clone(), id.clone(), snap.pids.clone(), connector.name());
            let (spaces, objects) = (snap.spaces_later(), snap.objects_later());
            journal = Some(tokio::task::spawn_blocking(move || {
                let entry = Entry {
                    id,
                    side: Side::Source,
                    stage: Stage::Committed,
                    processes: journal::identify(&pids),
                    peer,
                    since: misc::clock_ns(libc::CLOCK_REALTIME) / 1_000_000_000,
                    boot_id: journal::boot_id(),
                    spaces,
                    objects,
                };
                Journal::create(&dir, &entry).map(|j| (j, entry))
            }));
            let terms = job.terms();
            let number = job.rounds.len() as u32 + 1;
            tokio::select! {
                r = transfer::last(&mut link, &mut snap, number, terms, &events) => r.map_err(lost("transfer")),
                () = cancel.cancelled() => Err(interrupted(pid)),
            }
            .map(|round| (snap, round, t_transfer))
        }
        Err(e) => Err(e),
    };
    let mut rounds = std::mem::take(&mut job.rounds);
    let journal = match journal {
        Some(j) => Some(j.await.map_err(io::Error::other).and_then(|j| j)),
        None => None,
    };
    let interrupted_now = || if cancel.is_cancelled() { Err(interrupted(pid)) } else { Ok(()) };
    let result = result.and_then(|r| interrupted_now().map(|()| r));
    let result = result.and_then(|(mut snap, round, t)| match snap.found() {
        Ok(found) => Ok((snap, round, t, found)),
        Err(e) => Err(Failure::failed(
            "transfer",
            pid,
            format!("cannot read the page tables: {e}; the program runs on here"),
        )),
    });
    let (snap, round, t_transfer, found) = match result {
        Ok(r) => r,
        Err(mut e) => {
            thaw(&tracer).await;
            if let Some(Ok((j, _))) = journal {
                let _ = j.remove();
            }
            // A receiver that gave up says why on the control stream.
            if let Ok(Ok(Message::Aborted(reason))) = tokio::time::timeout(Duration::from_millis(300), wire::recv(&mut link)).await {
                e.message = format!("the destination gave up: {reason}; the program runs on here");
            }
            link.close("the source gave up").await;
            return Err(e);
        }
    };
    rounds.push(crate::report::Round {
        compared: snap.compared,
        ..round
    });

    phase("handover");
    let (mut journal, mut entry) = match journal.unwrap_or_else(|| Err(io::ErrorKind::NotFound.into())) {
        Ok(j) => j,
        Err(e) => {
            give_up(&tracer, None, &mut link).await;
            return Err(Failure::failed(
                "handover",
                pid,
                format!("cannot write the journal in {}: {e}; the program runs on here", state_dir.display()),
            ));
        }
    };
    steps::reached("wrote the journal");
    snap.holder.hold();
    steps::reached("holds the originals");
    let t_handover = Instant::now();
    let (hashes, later_hashes) = if verify {
        match oracle::hashes(&snap.tree, &snap.pids, &snap.object_fds) {
            Ok(mut h) => {
                let later = snap.without_later(&mut h);
                (Some(h), later)
            }
            Err(e) => {
                give_up(&tracer, Some(journal), &mut link).await;
                return Err(Failure::failed(
                    "handover",
                    pid,
                    format!("cannot hash the frozen pages: {e}; the program runs on here"),
                ));
            }
        }
    } else {
        Default::default()
    };
    let (later, guards) = found.map_or_else(Default::default, |(later, guards)| (Some(later), guards));
    let handover = Message::Handover(Handover {
        pages: round.pages,
        zero: round.zero_pages,
        later,
        guards,
        hashes,
        later_hashes,
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
                    freeze::abandon(&tracer).await;
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
            give_up(&tracer, Some(journal), &mut link).await;
            return Err(Failure::failed(
                "restore",
                pid,
                format!("the destination could not resume it: {reason}; the program runs on here"),
            ));
        }
        _ => unreachable!("only these two leave the match above"),
    };
    let downtime = snap.since.elapsed();
    let mut link = link.into_inner();
    job.awake = None;
    let handover_ms = ms(t_handover.elapsed());
    let transfer_ms = ms(t_handover - t_transfer);
    let mut late = None;
    if !snap.later.is_empty() {
        phase("drain");
        entry.stage = Stage::Running;
        let _ = journal.update(&entry);
        let after = Instant::now();
        let job = serve::Drain {
            connector: &connector,
            id: &id,
            bandwidth: options.bandwidth,
            events: &events,
            cancel: &cancel,
        };
        let before = link.bytes_sent();
        match serve_later(&job, &snap, faults.take().map(|f| (link, f))).await {
            Ok(served) => {
                link = served.link;
                let mut d = Drain::of(&served.stats, after.elapsed());
                d.reconnects = served.totals.reconnects;
                d.longest_cut_ms = ms(served.totals.longest_cut);
                late = Some(Late {
                    drain: Some(d),
                    latency: served.stats.latency,
                    pages: served.totals.pages,
                    zero: served.totals.zero,
                    bytes: before + served.totals.bytes,
                });
            }
            Err(e) => {
                // The originals are all there is of what has not arrived: they stay.
                freeze::abandon(&tracer).await;
                return Err(lost_later(&connector, &id, pid, &e));
            }
        }
    }
    phase("end");
    steps::reached("the copy runs");
    if options.leave_running {
        thaw(&tracer).await;
    } else {
        if late.is_none() {
            let door = snap.door();
            let _ = tokio::task::spawn_blocking(move || door.shut()).await;
            steps::reached("shut the listeners");
        }
        kill(&tracer).await;
    }
    steps::reached("ended the originals");
    drop(tracked);
    let _ = journal.remove();
    steps::reached("removed the journal");
    let bytes_sent = late.as_ref().map_or_else(|| link.bytes_sent(), |l| l.bytes);
    link.close(wire::DONE).await;
    let late = late.unwrap_or_default();
    Ok(Report {
        outcome: "migrated".into(),
        id,
        pid,
        restored_pid: running.pid,
        processes: snap.tree.processes.len() as u32,
        threads: snap.tree.processes.iter().map(|p| p.threads.len() as u32).sum(),
        pages_sent: rounds.iter().map(|r| r.pages).sum::<u64>() + late.pages,
        pages_zero: rounds.iter().map(|r| r.zero_pages).sum::<u64>() + late.zero,
        pages_lazy: late.pages + late.zero,
        fault_latency_us: late.latency,
        drain: late.drain,
        rounds,
        downtime_ms: ms(downtime),
        downtime: Downtime {
            interrupt_ms: ms(snap.interrupt),
            collect_ms: ms(snap.collect),
            scan_ms: ms(snap.scan),
            transfer_ms,
            restore_ms: running.restore_ms,
            handover_ms,
        },
        total_ms: ms(start.elapsed()),
        bytes_sent,
        agent_peak_rss: misc::peak_rss(),
        range: None,
    })
}

/// What followed the handover.
#[derive(Default)]
struct Late {
    drain: Option<Drain>,
    latency: crate::report::FaultLatency,
    pages: u64,
    zero: u64,
    bytes: u64,
}

/// Serves the pages that the copy still misses.
async fn serve_later<C: Connector>(
    job: &serve::Drain<'_, C>,
    snap: &Snapshot,
    links: Option<(C::Link, serve::Faults<C::Link>)>,
) -> Result<serve::Served<C::Link>, ServeError> {
    let originals = snap.originals().map_err(ServeError::Read)?;
    job.run(originals, links).await
}

/// The copy runs, and something keeps its last pages here.
fn lost_later<C: Connector>(connector: &C, id: &str, pid: i32, why: &ServeError) -> Failure {
    Failure {
        class: Class::Unknown,
        phase: "drain",
        pid,
        message: format!(
            "the program runs at {} and waits for pages that are still here, in the stopped original ({why})",
            connector.name()
        ),
        fix: Some(format!("to go on sending them: migrate recover {id}")),
        blockers: Vec::new(),
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

/// Whether a process has ended, waited for or not.
fn has_ended(pid: i32) -> bool {
    stat::read(pid).map_or_else(|e| vanished(&e), |s| matches!(s.state, b'Z' | b'X'))
}

/// The program came to its end while it was being moved.
fn ended(phase: &'static str, pid: i32) -> Failure {
    Failure::failed(phase, pid, "the program has ended meanwhile: there is nothing to move any more")
}

/// Lets the frozen tree go on, and tells the destination, which may be waiting for that.
async fn give_up<L: Link>(tracer: &Tracer, journal: Option<Journal>, link: &mut L) {
    thaw(tracer).await;
    if let Some(j) = journal {
        let _ = j.remove();
    }
    link.close("the source gave up").await;
}

fn interrupted(pid: i32) -> Failure {
    Failure::failed("cancel", pid, "interrupted; the program runs on here")
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1000.0
}

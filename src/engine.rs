//! What the command line asks of the engine: the only file that calls it, apart from the types of its reports.

use migrate_engine::{
    check, checkpoint as images, destination,
    door::Door,
    dump,
    journal::{Entry, Journal, Side, Stage},
    lazy,
    report::{Event, Events, Failure, Report, SendOptions, Stdio},
    source::{self, Connector},
    sys::misc,
    tracer::Tracer,
    wire::{self, Inventory, Message},
};
pub use migrate_engine::{
    check::{CheckItem, CheckOk, HostReport, PairReport, ProcessReport},
    checkpoint::{CheckpointOptions, ImageInfo},
};
use migrate_transport::{
    AcceptError, BindError, ConnectError, Link,
    quic::{self, Listener, QuicLink},
    trust::{Fingerprint, Identity, PeerName, Ticket, Tickets, TrustStore},
};
use serde::Serialize;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Connects to one receiver; the ticket counts for the first time only.
struct Dial {
    to: String,
    id: Identity,
    store: TrustStore,
    ticket: Mutex<Option<Ticket>>,
    pid: i32,
}

impl Dial {
    fn new(to: &str, ticket: Option<String>, state_dir: &Path, pid: i32) -> Result<Dial, Failure> {
        let fail = |e: &dyn std::fmt::Display| Failure::failed("connect", pid, e);
        let ticket = ticket.map(|t| Ticket::from_str(t.trim())).transpose().map_err(|e| fail(&e))?;
        Ok(Dial {
            to: to.to_owned(),
            id: Identity::load_or_create(state_dir).map_err(|e| fail(&e))?,
            store: TrustStore::open(state_dir).map_err(|e| fail(&e))?,
            ticket: Mutex::new(ticket),
            pid,
        })
    }
}

impl Connector for Dial {
    type Link = QuicLink;
    async fn connect(&self) -> Result<QuicLink, Failure> {
        let ticket = self.ticket.lock().map(|t| t.clone()).unwrap_or_default();
        let link = quic::connect(&self.to, &self.id, &self.store, ticket.as_ref())
            .await
            .map_err(|e: ConnectError| Failure::failed("connect", self.pid, e))?;
        if let Ok(mut t) = self.ticket.lock() {
            t.take();
        }
        Ok(link)
    }
    fn name(&self) -> String {
        self.to.clone()
    }
}

/// Moves a tree to the receiver at `to`. After `cancel` it thaws the tree before it returns.
pub async fn send(
    options: SendOptions,
    to: &str,
    ticket: Option<String>,
    state_dir: &Path,
    events: Events,
    cancel: CancellationToken,
) -> Result<Report, Failure> {
    source::check_pid(options.pid)?;
    let dial = Dial::new(to, ticket, state_dir, options.pid)?;
    Journal::prune(state_dir);
    let verify = std::env::var_os("MIGRATE_VERIFY").is_some_and(|v| v == "1");
    source::send(dial, options, verify, state_dir.to_owned(), events, cancel).await
}

/// A bound address and this host's identity.
pub struct Receiver {
    listener: Listener,
    id: Identity,
    tickets: Tickets,
    ticket: Mutex<String>,
    state_dir: PathBuf,
    serving: tokio::sync::Mutex<JoinSet<Result<destination::Served, Failure>>>,
    hub: Arc<lazy::fetch::Hub<QuicLink>>,
}

impl Receiver {
    /// Binds; called inside a tokio runtime.
    pub async fn bind(listen: SocketAddr, state_dir: &Path, ticket_lifetime: Duration) -> Result<Receiver, Failure> {
        let fail = |e: &dyn std::fmt::Display| Failure::failed("listen", 0, e);
        let id = Identity::load_or_create(state_dir).map_err(|e| fail(&e))?;
        let store = TrustStore::open(state_dir).map_err(|e| fail(&e))?;
        Journal::prune(state_dir);
        let tickets = Tickets::new(&id).lasting(ticket_lifetime);
        // One that was killed a moment ago may still be held by what it was building, which is about to end.
        let end = Instant::now() + Duration::from_secs(1);
        let listener = loop {
            match Listener::bind(listen, &id, store.clone(), tickets.clone()).await {
                Err(BindError::Socket { source, .. }) if source.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < end => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                r => break r.map_err(|e| fail(&e))?,
            }
        };
        let r = Receiver {
            listener,
            id,
            tickets,
            ticket: Mutex::default(),
            state_dir: state_dir.to_owned(),
            serving: tokio::sync::Mutex::default(),
            hub: Arc::default(),
        };
        Ok(r)
    }
    /// The address bound, with its real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.listener.local_addr()
    }
    /// The ticket that is good now: a new one when the last was used or is too old.
    pub fn ticket(&self) -> String {
        let Ok(mut t) = self.ticket.lock() else { return String::new() };
        if t.is_empty() || self.tickets.open() == 0 {
            *t = self.tickets.issue().map(|t| t.to_string()).unwrap_or_default();
        }
        t.clone()
    }
    /// How long each is good.
    pub fn ticket_lifetime(&self) -> Duration {
        self.tickets.lifetime()
    }
    /// This host's fingerprint.
    pub fn fingerprint(&self) -> String {
        self.id.fingerprint().to_string()
    }
    /// Serves one migration (or rehearsal, outcome "predicted") to the end. Strangers, checks and broken handshakes are turned away
    /// inside and do not end it. Sends no event before a trusted peer has asked for a migration.
    pub async fn next(
        &self,
        stdio: Stdio,
        events: Events,
        cancel: CancellationToken,
        bounds: destination::Bounds,
    ) -> Result<Report, Failure> {
        // Connections are served side by side: a question about one migration may come while it is still being built.
        let mut serving = self.serving.lock().await;
        loop {
            tokio::select! {
                link = self.listener.accept() => match link {
                    Ok(link) => {
                        serving.spawn(destination::serve(link, stdio.clone(), self.state_dir.clone(), events.clone(), cancel.clone(), self.hub.clone(), bounds.clone()));
                    }
                    Err(AcceptError::ListenerClosed) => return Err(Failure::failed("listen", 0, "the listener was closed")),
                    Err(e) => tracing::warn!("{e}"),
                },
                Some(done) = serving.join_next() => match done {
                    Ok(Ok(destination::Served::Running(report))) => return Ok(*report),
                    Ok(Ok(destination::Served::Answered)) => {}
                    // A peer that comes and goes without a word is no migration.
                    Ok(Err(e)) if e.phase == "inventory" => tracing::warn!("{e}"),
                    Ok(Err(e)) => return Err(e),
                    Err(e) => return Err(Failure::failed("restore", 0, format!("internal error: {e}"))),
                },
                () = cancel.cancelled() => {
                    // What is being built ends by the same token; wait for it.
                    let mut last = Failure::failed("listen", 0, "interrupted");
                    while let Some(done) = serving.join_next().await {
                        match done {
                            Ok(Ok(destination::Served::Running(report))) => return Ok(*report),
                            Ok(Err(e)) => last = e,
                            _ => {}
                        }
                    }
                    return Err(last);
                }
            }
        }
    }
}

/// The process that holds the memory of copies whose pages follow.
pub fn keeper() -> std::io::Result<()> {
    lazy::pager::main()
}

/// Saves a tree; blocks.
pub fn checkpoint(options: CheckpointOptions, events: Events, cancel: CancellationToken) -> Result<Report, Failure> {
    images::checkpoint(&options, &events, &cancel)
}

/// What `restore` was asked to do.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Directory of the checkpoints.
    pub dir: PathBuf,
    /// Name; the newest when there is none.
    pub name: Option<String>,
    /// File for the root's pid.
    pub pid_file: Option<PathBuf>,
    /// Where its standard streams lead.
    pub stdio: Stdio,
}

/// A tree that runs again.
pub struct Restored {
    /// How it went.
    pub report: Report,
    /// The tree's root.
    pub program: Program,
}

/// The root of a restored tree, our child.
#[derive(Debug, Clone)]
pub struct Program {
    /// Its pid in our pid namespace.
    pub pid: i32,
    // The root is a child of this thread.
    _tracer: Arc<Tracer>,
}

impl Program {
    /// Waits for its end; blocks. Its exit status, or 128 and the signal that ended it.
    pub fn wait(&self) -> Result<u8, Failure> {
        loop {
            match misc::reap(self.pid) {
                Ok(Some(status)) if status & 0x7f == 0 => return Ok((status >> 8) as u8),
                Ok(Some(status)) => return Ok(128 + (status & 0x7f) as u8),
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Err(e) => return Err(Failure::failed("wait", self.pid, e)),
            }
        }
    }
    /// Sends it a signal by its number. One that ended already is no failure.
    pub fn signal(&self, signal: i32) -> Result<(), Failure> {
        match misc::kill(self.pid, signal) {
            Err(e) if e.raw_os_error() != Some(3) => Err(Failure::failed("signal", self.pid, e)),
            _ => Ok(()),
        }
    }
}

/// Starts a saved tree; blocks until it runs.
pub fn restore(options: RestoreOptions, events: Events, cancel: CancellationToken) -> Result<Restored, Failure> {
    let RestoreOptions {
        dir,
        name,
        stdio,
        pid_file,
        ..
    } = options;
    let r = images::restore(&images::RestoreOptions { dir, name, stdio }, &events, &cancel)?;
    if let Some(file) = pid_file
        && let Err(e) = std::fs::write(&file, format!("{}\n", r.pid))
    {
        events(Event::Note {
            text: format!("the program runs as pid {}, but {} cannot be written: {e}", r.pid, file.display()),
        });
    }
    Ok(Restored {
        report: r.report,
        program: Program {
            pid: r.pid,
            _tracer: Arc::new(r.tracer),
        },
    })
}

/// A checkpoint, as `show` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct ImageDetail {
    /// What `list` knows.
    #[serde(flatten)]
    pub info: ImageInfo,
    /// Host it was taken on.
    pub hostname: String,
    /// That host's kernel.
    pub kernel: String,
    /// Every process, parents first.
    pub tree: Vec<ImageProcess>,
}

/// A process in a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct ImageProcess {
    /// Its pid, as the tree saw it.
    pub pid: i32,
    /// Its parent's.
    pub ppid: i32,
    /// Its command line.
    pub command: String,
    /// Threads.
    pub threads: u32,
    /// Mappings.
    pub mappings: u32,
    /// Bytes of memory saved.
    pub memory: u64,
    /// Open descriptors: "3 /var/log/app.log (write, append)".
    pub files: Vec<String>,
}

/// The checkpoints in a directory.
pub fn list(dir: &Path) -> Result<Vec<ImageInfo>, Failure> {
    images::list(dir)
}

/// What a checkpoint holds.
pub fn show(dir: &Path, name: &str) -> Result<ImageDetail, Failure> {
    let (info, tree) = images::show(dir, name)?;
    let processes = tree
        .processes
        .iter()
        .map(|p| {
            let mm = tree.mms.get(p.mm as usize).filter(|_| p.zombie.is_none());
            ImageProcess {
                pid: p.pid,
                ppid: p.parent.and_then(|i| tree.processes.get(i as usize)).map_or(0, |p| p.pid),
                command: p.comm.clone(),
                threads: p.threads.len() as u32,
                mappings: mm.map_or(0, |m| m.vmas.len() as u32),
                memory: mm.map_or(0, |m| m.vmas.iter().map(|v| v.len()).sum()),
                files: p
                    .fds
                    .iter()
                    .map(|f| {
                        let kind = tree
                            .descriptions
                            .get(f.description as usize)
                            .map(|d| check::describe(&tree, &d.kind));
                        format!("{} {}", f.fd, kind.unwrap_or_default())
                    })
                    .collect(),
            }
        })
        .collect();
    Ok(ImageDetail {
        info,
        hostname: tree.host.hostname.clone(),
        kernel: tree.host.kernel.clone(),
        tree: processes,
    })
}

/// Removes a checkpoint.
pub fn remove(dir: &Path, name: &str) -> Result<(), Failure> {
    images::remove(dir, name)
}

/// Looks at this host.
pub fn check_host() -> Result<HostReport, Failure> {
    check::host()
}

/// Looks at a tree, without stopping it.
pub fn check_process(pid: i32) -> Result<ProcessReport, Failure> {
    check::process(pid)
}

/// Asks a receiver, with a pid for the whole preflight. Nothing is created there.
pub async fn check_pair(
    pid: Option<i32>,
    to: &str,
    ticket: Option<String>,
    state_dir: &Path,
    cancel: CancellationToken,
) -> Result<PairReport, Failure> {
    let dial = Dial::new(to, ticket, state_dir, pid.unwrap_or(0))?;
    let fail = |m: String| Failure::failed("check", pid.unwrap_or(0), m);
    let tree = match pid {
        Some(pid) => {
            let d = tokio::task::spawn_blocking(move || source::inventory(pid))
                .await
                .map_err(|e| fail(e.to_string()))??;
            let memory = source::memory(&d);
            Some((d.tree, d.blockers, memory))
        }
        None => None,
    };
    let host = dump::host::host().map_err(|e| fail(format!("cannot examine this host: {e}")))?;
    let work = async {
        let mut link = dial.connect().await?;
        let (tree, mut blockers, memory) = tree.unwrap_or_else(|| (migrate_engine::image::Tree::empty(host.clone()), Vec::new(), 0));
        let inventory = Inventory {
            id: source::new_id(),
            tree,
            check_only: true,
            leave_running: false,
            lazy: false,
            memory,
        };
        let lost = |e: wire::WireError| fail(e.to_string());
        wire::send(&mut link, &Message::Inventory(inventory)).await.map_err(lost)?;
        let answer = wire::recv(&mut link).await.map_err(lost)?;
        let name = link.peer().name.clone();
        link.close("checked").await;
        match answer {
            Message::Accept(a) => {
                let items = check::compare(&host, &a.host);
                Ok(PairReport {
                    peer: format!("{} (Linux {})", a.host.hostname, a.host.kernel),
                    items,
                    blockers,
                })
            }
            Message::Refuse(b) => {
                blockers.extend(b);
                Ok(PairReport {
                    peer: name,
                    items: Vec::new(),
                    blockers,
                })
            }
            other => Err(fail(format!("{to} sent {} instead of an answer", other.name()))),
        }
    };
    tokio::select! {
        r = work => r,
        () = cancel.cancelled() => Err(fail("interrupted".into())),
    }
}

/// A trusted host.
#[derive(Debug, Clone, Serialize)]
pub struct TrustedPeer {
    /// Its fingerprint.
    pub fingerprint: String,
    /// What it is called; may be empty.
    pub name: String,
    /// Seconds since 1970.
    pub added: u64,
}

/// The trusted hosts.
#[derive(Debug, Clone, Serialize)]
pub struct TrustList {
    /// This host's own fingerprint.
    pub own: String,
    /// The others.
    pub peers: Vec<TrustedPeer>,
}

fn trust_failure(e: impl std::fmt::Display) -> Failure {
    Failure::failed("trust", 0, e)
}

fn seconds(t: SystemTime) -> u64 {
    t.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn trusted(p: migrate_transport::trust::TrustedPeer) -> TrustedPeer {
    TrustedPeer {
        fingerprint: p.fingerprint.to_string(),
        name: p.name.to_string(),
        added: seconds(p.first_seen),
    }
}

/// Lists the trusted hosts.
pub fn trust_list(state_dir: &Path) -> Result<TrustList, Failure> {
    let own = Identity::load_or_create(state_dir)
        .map_err(trust_failure)?
        .fingerprint()
        .to_string();
    let peers = TrustStore::open(state_dir).and_then(|s| s.list()).map_err(trust_failure)?;
    Ok(TrustList {
        own,
        peers: peers.into_iter().map(trusted).collect(),
    })
}

/// Trusts a host.
pub fn trust_add(state_dir: &Path, fingerprint: &str, name: Option<&str>) -> Result<TrustedPeer, Failure> {
    let f = Fingerprint::from_str(fingerprint).map_err(trust_failure)?;
    let name = PeerName::new(name.unwrap_or("unnamed")).map_err(trust_failure)?;
    TrustStore::open(state_dir)
        .and_then(|s| s.add(f, &name))
        .map(trusted)
        .map_err(trust_failure)
}

/// Trusts a host, by fingerprint or name, no longer.
pub fn trust_remove(state_dir: &Path, peer: &str) -> Result<TrustedPeer, Failure> {
    TrustStore::open(state_dir)
        .and_then(|s| s.remove(peer))
        .map(trusted)
        .map_err(trust_failure)
}

/// A hand-over that a crash left open.
#[derive(Debug, Clone, Serialize)]
pub struct OpenHandover {
    /// Id of the migration.
    pub id: String,
    /// "source" or "destination": which side this host was.
    pub side: String,
    /// The root's pid on this host.
    pub pid: i32,
    /// The other host.
    pub peer: String,
    /// How far it came, and what follows from that.
    pub state: String,
    /// Seconds since 1970.
    pub since: u64,
}

/// Hand-overs left open.
pub fn recover_list(state_dir: &Path) -> Result<Vec<OpenHandover>, Failure> {
    let entries = Journal::list(state_dir).map_err(|e| Failure::failed("recover", 0, format!("{}: {e}", state_dir.display())))?;
    Ok(entries
        .into_iter()
        .filter(|e| !(e.side == Side::Destination && e.stage != Stage::Committed))
        .map(|e| {
            let alive = e.alive();
            let state = match (e.side, alive.is_empty()) {
                (_, true) => "its processes are gone; nothing is left to decide".to_owned(),
                (Side::Source, false) if !stopped(&alive) => {
                    "its processes run on here: the agent ended before the hand-over; recovering removes the record".to_owned()
                }
                (Side::Source, false) => format!(
                    "{} processes are kept stopped here until {} says what became of the copy",
                    alive.len(),
                    e.peer
                ),
                (Side::Destination, false) => "the copy waits or runs here".to_owned(),
            };
            OpenHandover {
                side: if e.side == Side::Source {
                    "source".into()
                } else {
                    "destination".into()
                },
                pid: e.processes.first().map_or(0, |p| p.0),
                id: e.id,
                peer: e.peer,
                state,
                since: e.since,
            }
        })
        .collect())
}

/// Whether any of these processes is stopped: by the hand-over, which is the last thing an agent does before it asks the destination to go on.
fn stopped(pids: &[i32]) -> bool {
    let state = |pid: &i32| migrate_engine::procfs::stat::read(*pid).map(|s| s.state);
    pids.iter().any(|pid| matches!(state(pid), Ok(b'T' | b't')))
}

/// The one open hand-over whose id begins like this; else the text itself.
fn whole_id(state_dir: &Path, id: &str) -> String {
    let all = Journal::list(state_dir).unwrap_or_default();
    let mut fitting = all
        .iter()
        .filter(|e| e.side == Side::Source && !id.is_empty() && e.id.starts_with(id));
    match (fitting.next(), fitting.next()) {
        (Some(one), None) => one.id.clone(),
        _ => id.to_owned(),
    }
}

/// Serves a copy that waits for pages of the stopped originals, which another agent was sending.
async fn go_on_sending(dial: &Dial, entry: &Entry, events: Events, cancel: CancellationToken) -> Result<(), Failure> {
    let pid = entry.processes.first().map_or(0, |p| p.0);
    let unknown = |message: String| Failure {
        class: migrate_engine::report::Class::Unknown,
        phase: "drain",
        pid,
        message,
        fix: Some(format!("try again: migrate recover {}", entry.id)),
        blockers: Vec::new(),
    };
    events(Event::Phase { phase: "drain" });
    let drain = lazy::serve::Drain {
        connector: dial,
        id: &entry.id,
        bandwidth: None,
        events: &events,
        cancel: &cancel,
    };
    let served = async {
        let originals =
            lazy::serve::Originals::open(entry.alive(), &entry.spaces, &entry.objects).map_err(lazy::serve::ServeError::Read)?;
        drain.run(originals, None).await
    };
    let mut served = served.await.map_err(|e| unknown(e.to_string()))?;
    served.link.close(wire::DONE).await;
    Ok(())
}

/// Finishes or undoes one. Says what became of the program.
pub async fn recover(state_dir: &Path, id: &str, abort: bool, events: Events, cancel: CancellationToken) -> Result<String, Failure> {
    let id = &whole_id(state_dir, id);
    let (journal, entry) = Journal::open(state_dir, id, Side::Source).map_err(|e| {
        Failure::failed("recover", 0, format!("no open hand-over {id} on this host: {e}")).with_fix("`migrate recover` lists them")
    })?;
    let alive = entry.alive();
    let pid = entry.processes.first().map_or(0, |p| p.0);
    let signal = |s: i32| alive.iter().for_each(|p| drop(misc::kill(*p, s)));
    const SIGCONT: i32 = 18;
    const SIGKILL: i32 = 9;
    let done = |journal: Journal, text: String| {
        let _ = journal.remove();
        Ok(text)
    };
    if alive.is_empty() {
        return done(journal, format!("process {pid} is gone; the record is removed"));
    }
    let dial = Dial::new(&entry.peer, None, state_dir, pid)?;
    events(Event::Phase { phase: "ask" });
    let answer = tokio::select! {
        a = source::ask_again(&dial, id, Duration::from_secs(if abort { 5 } else { 15 })) => a,
        () = cancel.cancelled() => None,
    };
    match answer {
        Some(Message::Running(r)) if abort => Err(Failure::refused(
            "recover",
            pid,
            format!(
                "the copy runs at {} as pid {}: going on here would run the program twice",
                entry.peer, r.pid
            ),
            Vec::new(),
        )
        .with_fix(format!(
            "migrate recover {id} ends the stopped original; to go on here, end the copy there first and remove its journal"
        ))),
        Some(Message::Running(r)) if r.draining => {
            go_on_sending(&dial, &entry, events, cancel).await?;
            signal(SIGKILL);
            done(
                journal,
                format!("the copy at {} has all its pages now; the stopped original was ended", entry.peer),
            )
        }
        Some(Message::Running(r)) => {
            let door = Door::unknown(alive.clone());
            let _ = tokio::task::spawn_blocking(move || door.shut()).await;
            signal(SIGKILL);
            done(
                journal,
                format!("the copy runs at {} as pid {}; the stopped original was ended", entry.peer, r.pid),
            )
        }
        Some(Message::Aborted(reason)) => {
            signal(SIGCONT);
            done(
                journal,
                format!("{} did not resume it ({reason}); process {pid} runs on here", entry.peer),
            )
        }
        // Nobody answers: the operator's word counts.
        _ if abort => {
            signal(SIGCONT);
            done(
                journal,
                format!(
                    "{} does not answer; process {pid} runs on here; see to it that no copy runs there",
                    entry.peer
                ),
            )
        }
        _ => Err(Failure {
            class: migrate_engine::report::Class::Unknown,
            phase: "recover",
            pid,
            message: format!(
                "{} does not answer; process {pid} {}",
                entry.peer,
                if stopped(&alive) { "stays stopped" } else { "runs on here" }
            ),
            fix: Some(format!(
                "try again when it is reachable, or, if the copy is surely dead, migrate recover {id} --abort"
            )),
            blockers: Vec::new(),
        }),
    }
}

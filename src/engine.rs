//! What the command line asks of the engine: the only file that calls it, apart from the types of its reports.

#![allow(dead_code, reason = "fields and variants that wait for the engine")]

use migrate_engine::{
    blocker::Blocker,
    report::{Events, Failure, Report, SendOptions, Stdio},
};
use serde::Serialize;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};
use tokio_util::sync::CancellationToken;

const NOT_BUILT: &str = "not built yet";

/// Moves a tree to the receiver at `to`. After `cancel` it thaws the tree before it returns.
pub async fn send(
    options: SendOptions,
    to: &str,
    ticket: Option<String>,
    state_dir: &Path,
    events: Events,
    cancel: CancellationToken,
) -> Result<Report, Failure> {
    let _ = (to, ticket, state_dir, events, cancel);
    Err(Failure::failed("connect", options.pid, NOT_BUILT))
}

/// A bound address and this host's identity.
pub struct Receiver {
    local: SocketAddr,
}

impl Receiver {
    /// Binds; called inside a tokio runtime.
    pub async fn bind(listen: SocketAddr, state_dir: &Path) -> Result<Receiver, Failure> {
        let _ = state_dir;
        Err(Failure::failed("listen", 0, format!("{listen}: {NOT_BUILT}")))
    }
    /// The address bound, with its real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }
    /// The ticket that is good now: a new one when the last was used or is too old.
    pub fn ticket(&self) -> String {
        String::new()
    }
    /// This host's fingerprint.
    pub fn fingerprint(&self) -> String {
        String::new()
    }
    /// Serves one migration (or rehearsal, outcome "predicted") to the end. Strangers, checks and broken handshakes are turned away
    /// inside and do not end it. Sends no event before a trusted peer has asked for a migration.
    pub async fn next(&self, stdio: Stdio, events: Events, cancel: CancellationToken) -> Result<Report, Failure> {
        let _ = (stdio, events, cancel);
        Err(Failure::failed("listen", 0, NOT_BUILT))
    }
}

/// What `checkpoint` was asked to do.
#[derive(Debug, Clone)]
pub struct CheckpointOptions {
    /// Root of the tree.
    pub pid: i32,
    /// Directory of the checkpoints.
    pub dir: PathBuf,
    /// Name; the engine makes one when there is none.
    pub name: Option<String>,
    /// The program goes on.
    pub leave_running: bool,
    /// Only what changed since this one.
    pub parent: Option<String>,
}

/// Saves a tree; blocks.
pub fn checkpoint(options: CheckpointOptions, events: Events, cancel: CancellationToken) -> Result<Report, Failure> {
    let _ = (events, cancel);
    Err(Failure::failed("checkpoint", options.pid, NOT_BUILT))
}

/// What `restore` was asked to do.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Directory of the checkpoints.
    pub dir: PathBuf,
    /// Name; the newest when there is none.
    pub name: Option<String>,
    /// Nobody waits for the program.
    pub detach: bool,
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
}

impl Program {
    /// Waits for its end; blocks. Its exit status, or 128 and the signal that ended it.
    pub fn wait(&self) -> Result<u8, Failure> {
        Err(Failure::failed("wait", self.pid, NOT_BUILT))
    }
    /// Sends it a signal by its number. One that ended already is no failure.
    pub fn signal(&self, signal: i32) -> Result<(), Failure> {
        let _ = signal;
        Err(Failure::failed("signal", self.pid, NOT_BUILT))
    }
}

/// Starts a saved tree; blocks until it runs.
pub fn restore(options: RestoreOptions, events: Events, cancel: CancellationToken) -> Result<Restored, Failure> {
    let _ = (options, events, cancel);
    Err(Failure::failed("restore", 0, NOT_BUILT))
}

/// A checkpoint, as `list` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct ImageInfo {
    /// Its name.
    pub name: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The root's pid, as the tree saw it.
    pub pid: i32,
    /// The root's command line.
    pub command: String,
    /// Processes in it.
    pub processes: u32,
    /// Threads in it.
    pub threads: u32,
    /// Bytes on disk.
    pub bytes: u64,
    /// The checkpoint it builds on.
    pub parent: Option<String>,
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
    Err(Failure::failed("list", 0, format!("{}: {NOT_BUILT}", dir.display())))
}

/// What a checkpoint holds.
pub fn show(dir: &Path, name: &str) -> Result<ImageDetail, Failure> {
    Err(Failure::failed("show", 0, format!("{}: {NOT_BUILT}", dir.join(name).display())))
}

/// Removes a checkpoint.
pub fn remove(dir: &Path, name: &str) -> Result<(), Failure> {
    Err(Failure::failed("rm", 0, format!("{}: {NOT_BUILT}", dir.join(name).display())))
}

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
#[derive(Debug, Clone, Serialize)]
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

/// What this host can do.
#[derive(Debug, Clone, Serialize)]
pub struct HostReport {
    /// Everything looked at.
    pub items: Vec<CheckItem>,
}

/// Looks at this host.
pub fn check_host() -> Result<HostReport, Failure> {
    Err(Failure::failed("check", 0, NOT_BUILT))
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
    /// "pid 42 (redis-server)", "pid 42 tid 45 (bio_close_file)".
    pub task: String,
    /// What it holds.
    pub holdings: Vec<Holding>,
}

/// What a tree holds.
#[derive(Debug, Clone, Serialize)]
pub struct ProcessReport {
    /// Its root.
    pub pid: i32,
    /// Grouped by task, parents first.
    pub items: Vec<TaskHoldings>,
    /// What stands in the way, all of it.
    pub blockers: Vec<Blocker>,
}

/// Looks at a tree, without stopping it.
pub fn check_process(pid: i32) -> Result<ProcessReport, Failure> {
    Err(Failure::failed("check", pid, NOT_BUILT))
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

/// Asks a receiver, with a pid for the whole preflight. Nothing is created there.
pub async fn check_pair(
    pid: Option<i32>,
    to: &str,
    ticket: Option<String>,
    state_dir: &Path,
    cancel: CancellationToken,
) -> Result<PairReport, Failure> {
    let _ = (ticket, state_dir, cancel);
    Err(Failure::failed("check", pid.unwrap_or(0), format!("{to}: {NOT_BUILT}")))
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

/// Lists the trusted hosts.
pub fn trust_list(state_dir: &Path) -> Result<TrustList, Failure> {
    Err(Failure::failed("trust", 0, format!("{}: {NOT_BUILT}", state_dir.display())))
}

/// Trusts a host.
pub fn trust_add(state_dir: &Path, fingerprint: &str, name: Option<&str>) -> Result<TrustedPeer, Failure> {
    let _ = (fingerprint, name);
    Err(Failure::failed("trust", 0, format!("{}: {NOT_BUILT}", state_dir.display())))
}

/// Trusts a host, by fingerprint or name, no longer.
pub fn trust_remove(state_dir: &Path, peer: &str) -> Result<TrustedPeer, Failure> {
    let _ = peer;
    Err(Failure::failed("trust", 0, format!("{}: {NOT_BUILT}", state_dir.display())))
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

/// Hand-overs left open. None as long as no journal is written.
pub fn recover_list(state_dir: &Path) -> Result<Vec<OpenHandover>, Failure> {
    let _ = state_dir;
    Ok(Vec::new())
}

/// Finishes or undoes one. Says what became of the program.
pub async fn recover(state_dir: &Path, id: &str, abort: bool, events: Events, cancel: CancellationToken) -> Result<String, Failure> {
    let _ = (state_dir, abort, events, cancel);
    Err(Failure::failed("recover", 0, format!("no open hand-over {id}")).with_fix("`migrate recover` lists them"))
}

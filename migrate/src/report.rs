//! What the engine tells its caller: options in, events on the way, a report or a failure at the end.

use crate::{blocker::Blocker, plan::Limits};
use serde::{Deserialize, Serialize};
use std::{fmt, sync::Arc, time::Duration};

/// How memory is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Freeze, copy everything, resume there.
    Stop,
    /// Copy in rounds while it runs, freeze for the rest.
    PreCopy,
    /// Freeze at once, pages follow on demand.
    PostCopy,
    /// Pre-copy while it pays, then post-copy.
    Hybrid,
}

/// What `send` was asked to do.
#[derive(Debug, Clone)]
pub struct SendOptions {
    /// Root of the tree, in the agent's pid namespace.
    pub pid: i32,
    /// How memory is moved.
    pub mode: Mode,
    /// Longest acceptable freeze.
    pub downtime_limit: Duration,
    /// Most pre-copy rounds.
    pub max_rounds: u32,
    /// Longest time before the freeze.
    pub max_time: Duration,
    /// Bytes a second at most on the wire.
    pub bandwidth: Option<u64>,
    /// How written pages are found.
    pub tracker: crate::track::Kind,
    /// The original goes on running too.
    pub leave_running: bool,
    /// Preflight and prediction only.
    pub dry_run: bool,
    /// How long the destination may be there without going on, up to the resume.
    pub peer_timeout: Duration,
}

impl SendOptions {
    /// What the planner goes by.
    pub fn limits(&self) -> Limits {
        Limits {
            downtime: self.downtime_limit,
            rounds: self.max_rounds,
            time: self.max_time,
        }
    }
}

/// Where the receiver's standard streams for the tree come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stdio {
    /// The agent's own.
    Inherit,
    /// /dev/null.
    Null,
    /// Output is appended to a file; input is /dev/null.
    File(std::path::PathBuf),
}

/// One thing that happened; `--json` prints each as a line on stderr.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A phase began.
    Phase {
        /// Its name, e.g. "connect", "inventory", "preflight", "freeze", "transfer", "handover", "resume", "drain".
        phase: &'static str,
    },
    /// Bytes moved so far in this round.
    Progress {
        /// Round, from 1; 0 outside rounds.
        round: u32,
        /// Bytes of pages handled so far.
        bytes: u64,
        /// Bytes expected in all.
        total: u64,
        /// Bytes a second, over the last moments.
        rate: u64,
    },
    /// A round ended.
    Round(Round),
    /// What the planner makes of the rounds so far.
    Plan {
        /// Rounds so far.
        round: u32,
        /// Bytes of memory that are dirty now.
        dirty_bytes: u64,
        /// Bytes of memory dirtied a second.
        dirty_rate: u64,
        /// Bytes a second on the wire, as acknowledged.
        rate: u64,
        /// The freeze that would come of freezing now, milliseconds.
        predicted_downtime_ms: f64,
    },
    /// Something the user should know.
    Note {
        /// The text.
        text: String,
    },
    /// The tree runs (on the side that says it).
    Running {
        /// Its root's pid in the agent's pid namespace.
        pid: i32,
    },
}

/// Takes events; must not block.
pub type Events = Arc<dyn Fn(Event) + Send + Sync>;

/// A pre-copy round, or the one copy of `--mode stop`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Pages with content.
    pub pages: u64,
    /// Pages of zeros, sent as runs.
    pub zero_pages: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Milliseconds.
    pub ms: f64,
    /// Of these, milliseconds in which the tree was stopped to look at it (soft-dirty).
    #[serde(default)]
    pub stopped_ms: f64,
    /// Bytes of shared memory and unlinked files that were compared with what had been sent before, since no page table tells all that was written there.
    #[serde(default)]
    pub compared: u64,
}

/// Parts of the freeze, milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// Stopping every task.
    pub interrupt_ms: f64,
    /// Reading registers, signals, timers, descriptors, mappings.
    pub collect_ms: f64,
    /// Looking for pages that were written since the last round.
    pub scan_ms: f64,
    /// Sending the state and the last pages until the destination has them.
    pub transfer_ms: f64,
    /// Rebuilding processes, mappings, descriptors and threads (destination's clock).
    pub restore_ms: f64,
    /// From the handover message to the answer that the copy runs.
    pub handover_ms: f64,
}

/// How a migration, checkpoint or restore ended well.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Report {
    /// "migrated", "checkpointed", "restored", "predicted".
    pub outcome: String,
    /// Id of the migration, hex.
    pub id: String,
    /// Root pid at the source (its agent's namespace).
    pub pid: i32,
    /// Root pid at the destination (its agent's namespace); 0 when nothing was restored.
    pub restored_pid: i32,
    /// Processes moved.
    pub processes: u32,
    /// Threads moved.
    pub threads: u32,
    /// Rounds, the last one being the one inside the freeze.
    pub rounds: Vec<Round>,
    /// Freeze to resume as the source's agent saw it, milliseconds.
    pub downtime_ms: f64,
    /// Its parts.
    pub downtime: Downtime,
    /// Whole run, milliseconds.
    pub total_ms: f64,
    /// Bytes that this agent has put on the wire.
    pub bytes_sent: u64,
    /// Pages with content.
    pub pages_sent: u64,
    /// Zero pages.
    pub pages_zero: u64,
    /// Pages served after the resume.
    pub pages_lazy: u64,
    /// Fault latency after the resume.
    pub fault_latency_us: FaultLatency,
    /// The drain, when pages followed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain: Option<Drain>,
    /// Peak resident memory of this agent, bytes.
    pub agent_peak_rss: u64,
    /// Of a prediction: between what it would lie if pages were carried slower or faster than the test of the link was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<Range>,
}

/// Least and most of a prediction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Range {
    /// The freeze, milliseconds.
    pub downtime_ms: [f64; 2],
    /// The whole run, milliseconds.
    pub total_ms: [f64; 2],
}

/// The time after the resume in which the rest of the pages arrived.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Drain {
    /// From the resume to the last page, milliseconds.
    pub ms: f64,
    /// Pages that tasks waited for, with those sent along.
    pub pulled: u64,
    /// Pages that came by themselves.
    pub pushed: u64,
    /// Pages that nobody wanted any more when they came.
    pub unwanted: u64,
    /// Faults on pages without content.
    pub zero_faults: u64,
    /// Pages that were there although nobody had put them there: each would be a bug.
    pub anomalies: u64,
    /// Pages that the memory oracle, when it watches, compared once all were there: those that the program had not written.
    pub compared: u64,
    /// Those of them that differed: each would be a bug.
    pub different: u64,
    /// How often the connection was made anew.
    pub reconnects: u32,
    /// From a cut to the next page on its way, the longest, milliseconds.
    pub longest_cut_ms: f64,
}

impl Drain {
    /// Of the keeper's figures.
    pub fn of(s: &crate::lazy::ipc::Stats, took: Duration) -> Drain {
        Drain {
            ms: took.as_secs_f64() * 1000.0,
            pulled: s.pulled,
            pushed: s.pushed,
            unwanted: s.unwanted,
            zero_faults: s.zero_faults,
            anomalies: s.anomalies,
            compared: s.compared,
            different: s.different,
            reconnects: 0,
            longest_cut_ms: 0.0,
        }
    }
}

/// Fault latency, microseconds: from the moment the keeper reads of a fault to the page in place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultLatency {
    /// Half of the faults took no longer.
    pub p50: u64,
    /// Of a hundred faults one took longer.
    pub p99: u64,
    /// The longest.
    pub max: u64,
    /// How many.
    #[serde(default)]
    pub count: u64,
    /// How many took less than 1 us, 1, 2 to 3, 4 to 7 us, and so on.
    #[serde(default)]
    pub histogram: Vec<u64>,
}

/// What a failure means for the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// It still runs where it was. Exit code 1.
    Failed,
    /// Preflight refused, nothing was touched. Exit code 3.
    Refused,
    /// Frozen, outcome unknown; `migrate recover`. Exit code 4.
    Unknown,
}

/// Why something ended badly.
#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    /// What it means for the process.
    pub class: Class,
    /// Phase it happened in.
    pub phase: &'static str,
    /// Root pid, 0 when none is concerned.
    pub pid: i32,
    /// What was tried and why it did not work.
    pub message: String,
    /// What to do.
    pub fix: Option<String>,
    /// All blockers when refused.
    pub blockers: Vec<Blocker>,
}

impl Failure {
    /// A failure after which the process runs where it was.
    pub fn failed(phase: &'static str, pid: i32, message: impl fmt::Display) -> Self {
        Failure {
            class: Class::Failed,
            phase,
            pid,
            message: message.to_string(),
            fix: None,
            blockers: Vec::new(),
        }
    }
    /// A refusal before anything was touched.
    pub fn refused(phase: &'static str, pid: i32, message: impl fmt::Display, blockers: Vec<Blocker>) -> Self {
        Failure {
            class: Class::Refused,
            phase,
            pid,
            message: message.to_string(),
            fix: None,
            blockers,
        }
    }
    /// The same with advice.
    pub fn with_fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.phase)?;
        if self.pid != 0 {
            write!(f, " (pid {})", self.pid)?;
        }
        write!(f, ": {}", self.message)?;
        if let Some(fix) = &self.fix {
            write!(f, "; {fix}")?;
        }
        for b in &self.blockers {
            write!(f, "\n  - {b}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

//! What the two agents say on the control stream. Every message is a section of (kind, version) with a bincode payload.
//!
//! ```text
//! source                      destination
//!   Inventory  ------------------>            preflight: nothing is created yet
//!              <------------------ Accept | Refuse
//!   Round      ------------------>            pre-copy, as often as the planner likes: the shape of the running tree
//!   pages      ==================>            on a stream of their own
//!              <------------------ Applied    all of it is in the skeleton's memory
//!   State      ------------------>            frozen: everything but the memory, of which the source finds out meanwhile what was written last
//!   Memory     ------------------>            what of it is still to come
//!   pages      ==================>
//!   Handover   ------------------>            from here the destination decides
//!              <------------------ Running | Aborted
//!   pages      ==================>            the drain: what follows, on streams of this and of a second connection
//!              <------------------ Credit     so much is in place
//!              <------------------ Fault      on the second connection: a task waits for this page
//!              <------------------ Drained    nothing is missing: the originals may go
//!   Query      ------------------>            on a new connection, when the answer was lost
//!              <------------------ Running | Aborted | Pending
//!   Attach     ------------------>            on a new connection: it is the second one, or takes the place of one that broke in the drain
//!              <------------------ Attached | Aborted
//! ```

use crate::{
    blocker::Blocker,
    image::{Host, PAGE, Tree, codec},
    lazy::ipc::Stats,
    restore::rebuild::Names,
    steps,
};
use bytes::Bytes;
use migrate_transport::{Link, LinkError, Section};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The reason a source closes with once it has heard Running and ended its originals.
pub const DONE: &str = "done";
/// How long a source may take to say that it has heard of the end: longer than a link is silent before it is given up.
const GOODBYE: Duration = Duration::from_secs(45);
/// The same when this agent is to end.
const GOODBYE_CANCELLED: Duration = Duration::from_secs(5);

/// Revision of every message here.
pub const VERSION: u16 = 6;

/// A message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// The running tree, for preflight.
    Inventory(Inventory),
    /// It can come.
    Accept(Accept),
    /// It cannot.
    Refuse(Vec<Blocker>),
    /// The frozen tree, without its memory.
    State(Box<State>),
    /// Everything was sent; the destination decides from here on.
    Handover(Handover),
    /// The copy runs.
    Running(Running),
    /// The copy is dead, the source may go on; with the reason.
    Aborted(String),
    /// What became of a migration?
    Query(String),
    /// It is not decided yet; or a probe has arrived.
    Pending,
    /// Bytes to measure the link with, in a rehearsal.
    Probe(#[serde(with = "serde_bytes")] Vec<u8>),
    /// A pre-copy round begins; its pages follow.
    Round(Box<RoundStart>),
    /// A round is in the skeleton's memory.
    Applied(Applied),
    /// This connection belongs to a migration that is under way.
    Attach(Attach),
    /// It does.
    Attached(Attached),
    /// A task waits for a page.
    Fault(Fault),
    /// Bytes of memory that were pushed and are in place.
    Credit(u64),
    /// Nothing is missing any more.
    Drained(Box<Stats>),
    /// What is to come of the frozen tree's memory; its pages follow.
    Memory(Box<Memory>),
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Channel {
    /// The control stream of the drain, and its push.
    Bulk,
    /// Faults and what answers them.
    Faults,
}

/// A connection of a migration that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// Which migration.
    pub id: String,
    /// What it is for.
    pub channel: Channel,
    /// It may be asked to come again: see [`Attached::again`].
    pub first: bool,
}

/// It is taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// On [`Channel::Bulk`]: what the copy misses.
    pub missing: Vec<Ranges>,
    /// On [`Channel::Faults`]: there is a socket of its own for it, on which the source has to come once more ([`migrate_transport::Link::apart`]).
    pub again: bool,
}

/// A page that a task waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Name of its address space.
    pub space: u32,
    /// Its address at the freeze.
    pub at: u64,
}

/// Ranges of a space, packed: pages between the end of the one before and the start, pages in it, and so on. Small numbers are short on the wire, and
/// a page here and there is the usual case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ranges {
    /// The space.
    pub space: u32,
    deltas: Vec<u64>,
}

impl Ranges {
    /// Of ascending ranges.
    pub fn pack(space: u32, ranges: &[(u64, u64)]) -> Ranges {
        let mut last = 0;
        let mut deltas = Vec::with_capacity(ranges.len() * 2);
        for (a, b) in ranges {
            deltas.extend([(a - last) / PAGE, (b - a) / PAGE]);
            last = *b;
        }
        Ranges { space, deltas }
    }

    /// The ranges; None: they are none, or end beyond every address.
    pub fn unpack(&self) -> Option<Vec<(u64, u64)>> {
        let mut at = 0u64;
        let (pairs, rest) = self.deltas.as_chunks::<2>();
        let ranges = pairs.iter().map(|[gap, len]| {
            let start = gap.checked_mul(PAGE)?.checked_add(at)?;
            at = len.checked_mul(PAGE)?.checked_add(start)?;
            (*len > 0 && at < 1 << 56).then_some((start, at))
        });
        ranges.collect::<Option<Vec<_>>>().filter(|_| rest.is_empty())
    }
}

/// A running tree as the source sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// Id of the migration, 32 hex digits.
    pub id: String,
    /// Partial state: no registers, no queues.
    pub tree: Tree,
    /// Preflight only.
    pub check_only: bool,
    /// The original goes on running, so exclusive things cannot be shared with it.
    pub leave_running: bool,
    /// Pages may follow after the resume.
    pub lazy: bool,
    /// Bytes of memory with content.
    pub memory: u64,
}

/// The destination is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// The destination.
    pub host: Host,
    /// A fresh pid namespace will be used, because pids are taken.
    pub fresh_pids: bool,
    /// Pages of shared memory may follow after the resume.
    pub shared_follows: bool,
}

/// The beginning of a pre-copy round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundStart {
    /// From 1.
    pub number: u32,
    /// The running tree without registers and descriptors, when its shape differs from the last one sent.
    pub tree: Option<Tree>,
    /// What its address spaces and objects are called in page runs.
    pub names: Names,
    /// Memory to be made untouched again before the pages are written: (space or object, start, end).
    pub drops: Vec<(u32, u64, u64)>,
    /// Pages of objects that are going to follow after the resume: they can be made, without their content.
    pub expect: Vec<Ranges>,
    /// Bytes of pages that follow.
    pub bytes: u64,
}

/// A round has arrived.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Applied {
    /// Which.
    pub number: u32,
    /// Pages with content that were written.
    pub pages: u64,
    /// Zero pages.
    pub zero: u64,
    /// Pages that could not be written, because something else is mapped there by now: (space or object, start, end).
    pub missed: Vec<(u32, u64, u64)>,
    /// Milliseconds until the skeleton had its new shape.
    pub shape_ms: f64,
}

/// The frozen tree. Sent as soon as it was read, before the last look at its memory: building the copy and that look go on beside each other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Everything but what is in its memory.
    pub tree: Tree,
    /// What its address spaces and objects are called in page runs.
    pub names: Names,
    /// Bytes of pages that are going to be sent within the freeze, as far as the source can tell: when they are many the copy's timers are better not set
    /// before they have come.
    pub expected: u64,
    /// Hashes of all pages come with the handover.
    pub verify: bool,
}

/// What is to come of the frozen tree's memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Memory to be made untouched again before the pages are written: (space or object, start, end).
    pub drops: Vec<(u32, u64, u64)>,
    /// Guard regions by address space.
    pub guards: Vec<Vec<(u64, u64)>>,
    /// Bytes of pages that follow.
    pub bytes: u64,
    /// Pages that follow after the resume.
    pub later: Vec<Ranges>,
    /// Not each of them has content, and there may be guard regions among them: the handover says which.
    pub narrowed: bool,
}

/// The end of what the source sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// Pages with content that were sent.
    pub pages: u64,
    /// Zero pages that were sent.
    pub zero: u64,
    /// What of the pages that follow has content, when the state did not know that yet.
    pub later: Option<Vec<Ranges>>,
    /// Guard regions by address space, which were found with them.
    pub guards: Vec<Vec<(u64, u64)>>,
    /// Hashes of every page at the freeze, when asked for: (space, address, first 8 bytes of blake3).
    pub hashes: Option<Vec<(u32, u64, u64)>>,
    /// The same of the pages that follow, by names of address spaces.
    pub later_hashes: Vec<(u32, u64, u64)>,
}

/// The copy runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// Root pid in the destination agent's namespace.
    pub pid: i32,
    /// Milliseconds spent on building the copy after the state had arrived.
    pub restore_ms: f64,
    /// Pages are missing still.
    pub draining: bool,
}

impl Message {
    fn kind(&self) -> u16 {
        match self {
            Message::Inventory(_) => 1,
            Message::Accept(_) => 2,
            Message::Refuse(_) => 3,
            Message::State(_) => 4,
            Message::Handover(_) => 5,
            Message::Running(_) => 6,
            Message::Aborted(_) => 7,
            Message::Query(_) => 8,
            Message::Pending => 9,
            Message::Probe(_) => 10,
            Message::Round(_) => 11,
            Message::Applied(_) => 12,
            Message::Attach(_) => 13,
            Message::Attached(_) => 14,
            Message::Fault(_) => 15,
            Message::Credit(_) => 16,
            Message::Drained(_) => 17,
            Message::Memory(_) => 18,
        }
    }

    /// For messages: what it is called.
    pub fn name(&self) -> &'static str {
        [
            "?",
            "Inventory",
            "Accept",
            "Refuse",
            "State",
            "Handover",
            "Running",
            "Aborted",
            "Query",
            "Pending",
            "Probe",
            "Round",
            "Applied",
            "Attach",
            "Attached",
            "Fault",
            "Credit",
            "Drained",
            "Memory",
        ][self.kind() as usize]
    }
}

/// Why a message could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The link failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The peer sent something this side does not understand.
    #[error("the other side sent {0}")]
    Protocol(String),
}

impl WireError {
    /// Whether nothing was heard from the peer, which may be there all the same.
    pub fn is_silence(&self) -> bool {
        matches!(self, WireError::Link(e) if e.is_silence())
    }
}

/// A piece of a message that is longer than a section may be; the last piece has the message's own kind.
const PART: u16 = 100;
const PART_LEN: usize = 8 << 20;

/// A message as it is sent.
#[derive(Debug)]
pub struct Encoded {
    kind: u16,
    name: &'static str,
    payload: Bytes,
}

impl Encoded {
    /// Of this message.
    pub fn of(m: &Message) -> Result<Encoded, WireError> {
        let payload = codec::encode(m).map_err(|e| WireError::Protocol(format!("nothing: {} does not encode: {e}", m.name())))?;
        Ok(Encoded {
            kind: m.kind(),
            name: m.name(),
            payload,
        })
    }
}

/// Sends a message.
pub async fn send<L: Link>(link: &mut L, m: &Message) -> Result<(), WireError> {
    send_encoded(link, Encoded::of(m)?).await
}

/// The same.
pub async fn send_encoded<L: Link>(link: &mut L, m: Encoded) -> Result<(), WireError> {
    let Encoded { kind, name, mut payload } = m;
    steps::reached(format_args!("before {name}"));
    while payload.len() > PART_LEN {
        link.send(Section {
            kind: PART,
            version: VERSION,
            payload: payload.split_to(PART_LEN),
        })
        .await?;
    }
    link.send(Section {
        kind,
        version: VERSION,
        payload,
    })
    .await?;
    steps::reached(format_args!("sent {name}"));
    Ok(())
}

/// How a source goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goodbye {
    /// It has ended its originals, and will never ask again.
    Said,
    /// Nothing is heard from it any more.
    Silence,
    /// Otherwise, or not yet.
    Not,
}

impl Goodbye {
    /// When the link to it is lost.
    pub fn lost(silent: bool) -> Goodbye {
        if silent { Goodbye::Silence } else { Goodbye::Not }
    }
}

/// Whether the source says goodbye soon. What it says before that does not matter any more; a link that is closed for it could lose what the source was told last.
/// `cancel`: somebody wants this agent to end.
pub async fn goodbye<L: Link>(link: &mut L, cancel: &CancellationToken) -> Goodbye {
    let end = async {
        loop {
            if let Err(e) = recv(link).await {
                return e;
            }
        }
    };
    let cancelled = async {
        cancel.cancelled().await;
        tokio::time::sleep(GOODBYE_CANCELLED).await;
    };
    tokio::select! {
        e = end => match e {
            WireError::Link(LinkError::Closed { clean: true, ref reason, .. }) if reason == DONE => Goodbye::Said,
            e => Goodbye::lost(e.is_silence()),
        },
        () = tokio::time::sleep(GOODBYE) => Goodbye::Not,
        () = cancelled => Goodbye::Not,
    }
}

/// Receives a message.
pub async fn recv<L: Link>(link: &mut L) -> Result<Message, WireError> {
    let mut parts: Vec<u8> = Vec::new();
    loop {
        let s = link.recv().await?;
        if s.version != VERSION {
            return Err(WireError::Protocol(format!(
                "message {} in version {}, this side knows {VERSION}",
                s.kind, s.version
            )));
        }
        if parts.len() + s.payload.len() > codec::LIMIT {
            return Err(WireError::Protocol(format!("a message longer than {} MiB", codec::LIMIT >> 20)));
        }
        if s.kind == PART {
            parts.extend_from_slice(&s.payload);
            continue;
        }
        let whole = if parts.is_empty() {
            s.payload
        } else {
            parts.extend_from_slice(&s.payload);
            std::mem::take(&mut parts).into()
        };
        let m: Message = codec::decode(&whole).map_err(|e| WireError::Protocol(format!("a message of kind {}: {e}", s.kind)))?;
        if m.kind() != s.kind {
            return Err(WireError::Protocol(format!("a {} labelled as kind {}", m.name(), s.kind)));
        }
        steps::reached(format_args!("got {}", m.name()));
        return Ok(m);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_and_names_agree() {
        assert_eq!(Message::Pending.name(), "Pending");
        assert_eq!(Message::Aborted(String::new()).name(), "Aborted");
        assert_eq!(Message::Drained(Box::default()).name(), "Drained");
        let memory = Memory {
            drops: Vec::new(),
            guards: Vec::new(),
            bytes: 0,
            later: Vec::new(),
            narrowed: false,
        };
        assert_eq!(Message::Memory(Box::new(memory)).name(), "Memory");
    }

    #[test]
    fn packed_ranges_come_back() {
        let ranges = vec![(0x1000, 0x3000), (0x5000, 0x6000), (0x7fff_ffff_0000, 0x7fff_ffff_f000)];
        let packed = Ranges::pack(7, &ranges);
        assert_eq!(packed.unpack(), Some(ranges));
        assert_eq!(Ranges::pack(7, &[]).unpack(), Some(Vec::new()));
        for deltas in [vec![1], vec![1, 0], vec![u64::MAX, 1], vec![1, u64::MAX], vec![1 << 44, 1]] {
            assert_eq!(Ranges { space: 0, deltas }.unpack(), None);
        }
    }
}

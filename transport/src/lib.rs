//! Authenticated transport between two agents: opaque sections, and runs of pages. It knows nothing of processes.
//!
//! # The protocol
//!
//! One QUIC connection (TLS 1.3, ALPN `migrate/1`, both certificates presented, no 0-RTT, no resumption) carries one bidirectional
//! *control* stream, opened by the side that connects, and any number of unidirectional *page* streams, opened by either side.
//!
//! ```text
//!  sender                                                     receiver
//!    |  TLS: both prove an Ed25519 key                           |  sender checks the receiver's pin here:
//!    |<=========================================================>|  from the ticket, or from its trust store
//!    |  control: hello, 112 bytes                                |
//!    |  magic, versions, name, proof of a ticket if it has one   |
//!    |---------------------------------------------------------->|  1. is the key trusted?  else
//!    |                                                           |  2. does the proof fit a ticket, fresh and unused?
//!    |                                                           |  3. do the versions meet?
//!    |                                                           |  4. the ticket is used up, the sender enrolled
//!    |  control: answer, 80 bytes                                |
//!    |<----------------------------------------------------------|  verdict, versions, name
//!    |  the sender enrols the receiver                           |
//!    |                                                           |
//!    |  control: sections, both ways, to the end                 |  8 bytes of header, at most 16 MiB
//!    |<--------------------------------------------------------->|
//!    |  pages: frame, frame, ... end                             |  16 bytes of header, 16 a run, at most 1 MiB of pages
//!    |==========================================================>|
//!    |  close: a code and a reason                               |
//!    |<--------------------------------------------------------->|
//! ```
//!
//! The byte layouts are drawn where they are coded: [`frame::hello`] (which keeps its place in every version to come),
//! [`frame::section`], [`frame::pages`]. What is inside a section is the engine's; [`codec`] is how it gets there.
//!
//! ## Who may fail when, and what the other side is told
//!
//! | when | what | the sender sees | the receiver logs |
//! |---|---|---|---|
//! | before TLS | no such name, closed port, silence | [`Resolve`], [`Refused`], [`NoAnswer`] | nothing |
//! | TLS | another protocol | [`NotMigrate`] | [`Handshake`] |
//! | TLS | not the pinned key | [`WrongHost`], [`Changed`], [`Unknown`] | [`Handshake`] |
//! | hello | unknown, no ticket | [`NotTrusted`] | [`Untrusted`] |
//! | hello | unknown, wrong secret, or too many of those | [`TicketNotAccepted`] | [`WrongTicket`], [`TooManyAttempts`] |
//! | hello | unknown, right secret, too late | [`TicketUsed`], [`TicketExpired`] | the same |
//! | hello | known, another version | [`LinkError::Version`] with both | [`Version`] |
//! | hello | silence | [`LinkError::Closed`] | [`Stalled`] |
//! | later | a rule is broken | [`LinkError::Rule`] here, the rule's name as the reason there | |
//! | later | the peer's agent dies | [`LinkError::Closed`], not `clean` | the same |
//!
//! A dead agent is noticed within seconds if its host says that the port is closed, or if the agent was started again; else after 30 s.
//!
//! [`Resolve`]: ConnectError::Resolve
//! [`Refused`]: ConnectError::Refused
//! [`NoAnswer`]: ConnectError::NoAnswer
//! [`NotMigrate`]: ConnectError::NotMigrate
//! [`WrongHost`]: ConnectError::WrongHost
//! [`Changed`]: ConnectError::Changed
//! [`Unknown`]: ConnectError::Unknown
//! [`NotTrusted`]: ConnectError::NotTrusted
//! [`TicketNotAccepted`]: ConnectError::TicketNotAccepted
//! [`TicketUsed`]: ConnectError::TicketUsed
//! [`TicketExpired`]: ConnectError::TicketExpired
//! [`Handshake`]: AcceptError::Handshake
//! [`Untrusted`]: AcceptError::Untrusted
//! [`WrongTicket`]: AcceptError::WrongTicket
//! [`TooManyAttempts`]: AcceptError::TooManyAttempts
//! [`Version`]: AcceptError::Version
//! [`Stalled`]: AcceptError::Stalled
//!
//! A stranger without the secret of a ticket gets one answer, whatever it does: not accepted, every other byte zero. Whether it is the key,
//! the secret, the version or the number of attempts, it does not learn; the receiver's log says. Who does hold the secret of a ticket is
//! told that it is used or too old, because that person has been invited and must know what to do.
//!
//! ## Limits
//!
//! Every length is checked against its cap before memory is set aside for it. At most 16 MiB are under way on a stream, and 48 MiB on a
//! connection; whoever stops reading stops the sender. Wrong tickets are looked at five times a minute from one address. Handshakes run 64
//! at a time, each for five seconds; above 16 a stranger must show that it can be reached at its address first.
//!
//! # The parts
//!
//! [`Link`], [`PageSender`] and [`PageReceiver`] are all that the engine sees. [`quic`] is the real one, [`memory`] the one for tests, with
//! virtual delay and a wire to cut; one suite of tests runs over both. [`trust`] is identities, tickets and the trust store. [`ceiling`] is
//! plain quinn, to measure against.
#![forbid(unsafe_code)]

pub mod ceiling;
pub mod codec;
mod error;
pub mod frame;
mod link;
pub mod memory;
pub mod quic;
pub mod trust;

pub use error::{AcceptError, BindError, ConnectError, LinkError, VersionRange};
pub use frame::pages::sample_compression;
pub use link::{Encoding, Link, PageFrame, PageReceiver, PageSender, Peer, Run, Section};

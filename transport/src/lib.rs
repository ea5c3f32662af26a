//! Authenticated QUIC transport: opaque sections and page runs between two agents.
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
pub use link::{Encoding, Link, PageFrame, PageReceiver, PageSender, Peer, Run, Section};

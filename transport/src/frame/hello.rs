//! The first bytes of a connection: who may be spoken to, and in which version. They keep their place in all versions to come, so that
//! each release can name the version of any other.
//!
//! ```text
//!  hello, from the side that connects (112 bytes)       answer, from the receiver (80 bytes)
//!   0  magic "MIGRATE\0"        8                         0  magic "migrate\0"        8
//!   8  oldest version known     u16                       8  verdict                  u8
//!  10  newest version known     u16                       9  length of the name       u8
//!  12  1 if a ticket is proved  u8                        10  oldest version known     u16
//!  13  length of the name       u8                        12  newest version known     u16
//!  14  0                        u16                       14  version agreed on        u16
//!  16  ticket proof             32                        16  name, padded with 0      64
//!  48  name, padded with 0      64
//! ```
//!
//! The verdict "not accepted" comes with every other byte 0: a stranger does not learn so much as a version.

use super::{Fields, FrameError};
use crate::{error::VersionRange, trust::PeerName};

/// Bytes of a hello.
pub const HELLO: usize = 112;
/// Bytes of an answer.
pub const ANSWER: usize = 80;
/// Bytes of a ticket proof.
pub const PROOF: usize = 32;

const HELLO_MAGIC: [u8; 8] = *b"MIGRATE\0";
const ANSWER_MAGIC: [u8; 8] = *b"migrate\0";

/// What the connecting side says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The versions it speaks.
    pub versions: VersionRange,
    /// What it calls itself.
    pub name: PeerName,
    /// Its proof that it holds a ticket.
    pub proof: Option<[u8; PROOF]>,
}

/// What the receiver makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// Welcome, in the version agreed on.
    Welcome = 0,
    /// A stranger, or a wrong ticket. Says no more than that.
    NotAccepted = 1,
    /// Known, but no version in common.
    Version = 2,
    /// The ticket is genuine, and used.
    TicketUsed = 3,
    /// The ticket is genuine, and too old.
    TicketExpired = 4,
    /// The ticket is good, but the receiver failed to enrol the peer.
    Failed = 5,
}

/// The receiver's reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its decision.
    pub verdict: Verdict,
    /// The versions it speaks, for those it knows.
    pub versions: VersionRange,
    /// The version agreed on, with [`Verdict::Welcome`].
    pub version: u16,
    /// What it calls itself, with [`Verdict::Welcome`].
    pub name: Option<PeerName>,
}

impl Answer {
    /// A refusal that tells nothing but its verdict.
    pub fn refusal(verdict: Verdict) -> Self {
        Self {
            verdict,
            versions: VersionRange { min: 0, max: 0 },
            version: 0,
            name: None,
        }
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; ANSWER] {
        let mut out = [0; ANSWER];
        let name = self.name.as_ref().map_or("", PeerName::as_str).as_bytes();
        out[0..8].copy_from_slice(&ANSWER_MAGIC);
        out[8] = self.verdict as u8;
        out[9] = name.len() as u8;
        out[10..12].copy_from_slice(&self.versions.min.to_le_bytes());
        out[12..14].copy_from_slice(&self.versions.max.to_le_bytes());
        out[14..16].copy_from_slice(&self.version.to_le_bytes());
        out[16..16 + name.len()].copy_from_slice(name);
        out
    }

    /// Reads them back.
    pub fn decode(bytes: &[u8; ANSWER]) -> Result<Self, FrameError> {
        let mut fields = Fields(bytes);
        expect_magic("the answer", fields.bytes(), ANSWER_MAGIC)?;
        let verdict = match fields.u8() {
            0 => Verdict::Welcome,
            1 => Verdict::NotAccepted,
            2 => Verdict::Version,
            3 => Verdict::TicketUsed,
            4 => Verdict::TicketExpired,
            5 => Verdict::Failed,
            other => {
                return Err(FrameError::Field {
                    what: "the answer's verdict",
                    got: other.into(),
                });
            }
        };
        let name_len = fields.u8();
        let versions = VersionRange {
            min: fields.u16(),
            max: fields.u16(),
        };
        let version = fields.u16();
        let name = if name_len == 0 { None } else { Some(name(fields.0, name_len)?) };
        Ok(Self {
            verdict,
            versions,
            version,
            name,
        })
    }
}

impl Hello {
    /// Its bytes.
    pub fn encode(&self) -> [u8; HELLO] {
        let mut out = [0; HELLO];
        let name = self.name.as_str().as_bytes();
        out[0..8].copy_from_slice(&HELLO_MAGIC);
        out[8..10].copy_from_slice(&self.versions.min.to_le_bytes());
        out[10..12].copy_from_slice(&self.versions.max.to_le_bytes());
        out[12] = self.proof.is_some().into();
        out[13] = name.len() as u8;
        out[16..48].copy_from_slice(&self.proof.unwrap_or_default());
        out[48..48 + name.len()].copy_from_slice(name);
        out
    }

    /// Reads them back.
    pub fn decode(bytes: &[u8; HELLO]) -> Result<Self, FrameError> {
        let mut fields = Fields(bytes);
        expect_magic("the hello", fields.bytes(), HELLO_MAGIC)?;
        let versions = VersionRange {
            min: fields.u16(),
            max: fields.u16(),
        };
        let ticket = fields.u8();
        let name_len = fields.u8();
        let _zero = fields.u16();
        let proof = fields.bytes::<PROOF>();
        let proof = match ticket {
            0 => None,
            1 => Some(proof),
            other => {
                return Err(FrameError::Field {
                    what: "the hello's ticket mark",
                    got: other.into(),
                });
            }
        };
        Ok(Self {
            versions,
            name: name(fields.0, name_len)?,
            proof,
        })
    }
}

fn expect_magic(what: &'static str, got: [u8; 8], expected: [u8; 8]) -> Result<(), FrameError> {
    if got == expected {
        Ok(())
    } else {
        Err(FrameError::Magic { what, got: got.to_vec() })
    }
}

fn name(field: &[u8], len: u8) -> Result<PeerName, FrameError> {
    let bad = || FrameError::Field {
        what: "the length or a letter of the peer's name",
        got: len.into(),
    };
    let bytes = field.get(..usize::from(len)).ok_or_else(bad)?;
    std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| PeerName::new(text).ok())
        .ok_or_else(bad)
}

//! Sections: the messages of the control stream.
//!
//! ```text
//!  0        2         4         8
//!  +--------+---------+---------+----------- - -
//!  | kind   | version | length  | payload, `length` bytes
//!  +--------+---------+---------+----------- - -
//!    u16      u16       u32       at most MAX_SECTION
//! ```

use bytes::{Bytes, BytesMut};

use super::{Chunks, Fields, FrameError, MAX_SECTION};
use crate::link::Section;

/// Bytes ahead of a section's payload.
pub const HEADER: usize = 8;

/// The header for a section, or why it cannot be sent.
pub fn header(section: &Section) -> Result<Bytes, FrameError> {
    let len = check_len(section.payload.len() as u64)?;
    let mut out = [0; HEADER];
    out[0..2].copy_from_slice(&section.kind.to_le_bytes());
    out[2..4].copy_from_slice(&section.version.to_le_bytes());
    out[4..8].copy_from_slice(&len.to_le_bytes());
    Ok(Bytes::copy_from_slice(&out))
}

fn check_len(len: u64) -> Result<u32, FrameError> {
    match u32::try_from(len) {
        Ok(short) if short as usize <= MAX_SECTION => Ok(short),
        _ => Err(FrameError::TooLong {
            what: "a section's payload",
            len,
            limit: MAX_SECTION as u64,
        }),
    }
}

/// Cuts a byte stream into sections, however it arrives.
#[derive(Debug, Default)]
pub struct SectionDecoder {
    input: Chunks,
    /// Header of the section whose payload is not complete yet.
    pending: Option<(u16, u16, usize)>,
}

impl SectionDecoder {
    /// Adds bytes in stream order.
    pub fn push(&mut self, chunk: Bytes) {
        self.input.push(chunk);
    }

    /// The next complete section, if it is there.
    pub fn next_section(&mut self) -> Result<Option<Section>, FrameError> {
        let (kind, version, len) = match self.pending {
            Some(head) => head,
            None => {
                let mut head = [0; HEADER];
                if !self.input.read_exact(&mut head) {
                    return Ok(None);
                }
                let mut fields = Fields(&head);
                let head = (fields.u16(), fields.u16(), check_len(fields.u32().into())? as usize);
                *self.pending.insert(head)
            }
        };
        if self.input.len() < len {
            return Ok(None);
        }
        self.pending = None;
        let mut chunks = self.input.split(len);
        let payload = if chunks.len() == 1 {
            chunks.swap_remove(0)
        } else {
            let mut joined = BytesMut::with_capacity(len);
            chunks.iter().for_each(|chunk| joined.extend_from_slice(chunk));
            joined.freeze()
        };
        Ok(Some(Section { kind, version, payload }))
    }

    /// Whether the stream may end here.
    pub fn end(&self) -> Result<(), FrameError> {
        match (self.pending.is_some(), self.input.len()) {
            (false, 0) => Ok(()),
            (in_payload, have) => {
                let have = have + if in_payload { HEADER } else { 0 };
                Err(FrameError::Truncated {
                    what: "a section",
                    have: have as u64,
                })
            }
        }
    }
}

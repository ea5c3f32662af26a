//! Byte layouts: fixed, little-endian, and pure. Bytes in, values out; no socket and no clock.
//!
//! Every length is checked against its cap before anything is allocated for it, and what a decoder holds never exceeds what the peer has
//! really sent plus one capped frame. The layouts are drawn beside their coders:
//!
//! - [`section`]: the control stream's messages,
//! - [`pages`]: the page streams' frames,
//! - [`hello`]: the first bytes of a connection, which never change their place.

pub mod hello;
pub mod pages;
pub mod section;

pub use pages::{PageDecoder, PageEncoder};
pub use section::SectionDecoder;

/// Bytes in a page. Fixed by the protocol, whatever the host.
pub const PAGE_SIZE: usize = 4096;
/// The longest payload of a section.
pub const MAX_SECTION: usize = 16 << 20;
/// The most page data in one frame: 256 pages.
pub const MAX_FRAME_DATA: usize = 256 * PAGE_SIZE;
/// The most runs in one frame.
pub const MAX_RUNS: usize = 1024;
/// The most pages in one run (1 TiB; only a zero run can be longer than a frame's data).
pub const MAX_RUN_PAGES: u32 = 1 << 28;
/// The first address no run may reach: user addresses have at most 56 bits.
pub const MAX_ADDRESS: u64 = 1 << 56;

/// A rule of the layouts that was broken, by its name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The magic number is another one.
    #[error("{what} must begin with its magic number, got {got:02x?}")]
    Magic {
        /// Of what.
        what: &'static str,
        /// What was there.
        got: Vec<u8>,
    },
    /// A length beyond its cap.
    #[error("{what}: {len} is over the limit of {limit}")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// The length claimed.
        len: u64,
        /// The cap.
        limit: u64,
    },
    /// A field with a value that has no meaning.
    #[error("{what} cannot be {got}")]
    Field {
        /// Which field.
        what: &'static str,
        /// Its value.
        got: u64,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended {have} bytes into {what}")]
    Truncated {
        /// Inside what.
        what: &'static str,
        /// How much of it was there.
        have: u64,
    },
    /// Two lengths that must agree do not.
    #[error("{what} must be {expected} bytes, not {got}")]
    Length {
        /// Which length.
        what: &'static str,
        /// What the runs say.
        expected: u64,
        /// What the header or the data says.
        got: u64,
    },
    /// A run's start is not on a page border.
    #[error("a run must begin at a page border, not at {start:#x}")]
    Misaligned {
        /// The start.
        start: u64,
    },
    /// A run without pages.
    #[error("a run must not be empty (at {start:#x})")]
    EmptyRun {
        /// The start.
        start: u64,
    },
    /// A run that leaves the address space.
    #[error("a run must stay in the address space: {pages} pages at {start:#x}")]
    BeyondAddressSpace {
        /// The start.
        start: u64,
        /// The length.
        pages: u32,
    },
    /// Two runs of one frame that share a page.
    #[error("the runs of a frame must not overlap (space {space}, {start:#x})")]
    Overlap {
        /// The address space.
        space: u32,
        /// Where the later run begins.
        start: u64,
    },
    /// Compressed data that does not decompress to what the runs say.
    #[error("the compressed data of a frame is damaged: {0}")]
    Zstd(String),
}

/// Reads little-endian fields off the front of a slice that the caller has measured.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((head, rest)) => {
                self.0 = rest;
                *head
            }
            None => [0; N], // unreachable: callers check the length; zero is no valid magic
        }
    }
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        self.take()
    }
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// Chunks as they arrive, consumed from the front without joining them.
#[derive(Debug, Default)]
pub(crate) struct Chunks {
    queue: std::collections::VecDeque<bytes::Bytes>,
    len: usize,
}

impl Chunks {
    pub fn push(&mut self, chunk: bytes::Bytes) {
        if !chunk.is_empty() {
            self.len += chunk.len();
            self.queue.push_back(chunk);
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Copies the first bytes into `out`, all of it, or returns false and consumes nothing.
    pub fn read_exact(&mut self, out: &mut [u8]) -> bool {
        if self.len < out.len() {
            return false;
        }
        let mut at = 0;
        while at < out.len() {
            let Some(front) = self.queue.front_mut() else { return false };
            let n = front.len().min(out.len() - at);
            out[at..at + n].copy_from_slice(&front[..n]);
            at += n;
            self.advance_front(n);
        }
        true
    }

    /// Hands out the first `n` bytes as slices of what arrived; the caller has checked that they are there.
    pub fn split(&mut self, mut n: usize) -> Vec<bytes::Bytes> {
        let mut out = Vec::with_capacity(self.queue.len().min(n / 1024 + 2));
        while n > 0 {
            let Some(mut front) = self.queue.pop_front() else { break };
            if front.len() > n {
                let head = front.split_to(n);
                self.queue.push_front(front);
                front = head;
            }
            n -= front.len();
            self.len -= front.len();
            out.push(front);
        }
        out
    }

    fn advance_front(&mut self, n: usize) {
        self.len -= n;
        if let Some(front) = self.queue.front_mut() {
            if front.len() == n {
                self.queue.pop_front();
            } else {
                let _ = front.split_to(n);
            }
        }
    }
}

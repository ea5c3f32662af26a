//! Page frames: the only thing on a page stream, one after the other until the stream ends.
//!
//! ```text
//!  0        4        6          7          8             12           16
//!  +--------+--------+----------+----------+-------------+------------+------------ - - +--------- - -
//!  | "MPG1" | runs   | encoding | reserved | wire length | raw length | 16 bytes a run  | data, `wire length` bytes
//!  +--------+--------+----------+----------+-------------+------------+------------ - - +--------- - -
//!    magic    u16      u8         u8 = 0     u32           u32
//!             1..=1024 0 raw                 raw: the same 4096 x pages of the runs that are not zero, at most 1 MiB
//!                      1 zstd                zstd: less
//!
//!  a run:
//!  0        4        8                                    16
//!  +--------+--------+------------------------------------+
//!  | space  | pages  | start address, with bit 0 = "zero" |
//!  +--------+--------+------------------------------------+
//!    u32      u32      u64; bits 1..=11 are 0
//! ```
//!
//! A zero run carries no data, whatever its length. The runs of one frame do not overlap. A zstd frame is decompressed into a buffer of
//! exactly the length that its runs claim, which is capped, so it cannot swell.

use std::io;

use bytes::{Bytes, BytesMut};
use zstd::stream::raw::{DParameter, Decoder, Encoder, InBuffer, Operation, OutBuffer};

use super::{Chunks, Fields, FrameError, MAX_FRAME_DATA, MAX_RUNS};
use crate::link::{Encoding, PageFrame, Run};

/// The first bytes of each frame.
pub const MAGIC: [u8; 4] = *b"MPG1";
/// Bytes ahead of the runs.
pub const HEADER: usize = 16;
/// Bytes of a run.
pub const RUN: usize = 16;

const RAW: u8 = 0;
const ZSTD: u8 = 1;
const LEVEL: i32 = 1;
/// A legitimate frame needs a window of at most its own 1 MiB; more would only cost the decoder memory.
const WINDOW_LOG_MAX: u32 = 20;

/// Checks the rules that concern the runs together, and returns the length of their data.
pub fn check_runs(runs: &[Run]) -> Result<usize, FrameError> {
    if runs.is_empty() {
        return Err(FrameError::Field {
            what: "a frame's number of runs",
            got: 0,
        });
    }
    if runs.len() > MAX_RUNS {
        return Err(FrameError::TooLong {
            what: "a frame's runs",
            len: runs.len() as u64,
            limit: MAX_RUNS as u64,
        });
    }
    let data: u64 = runs.iter().map(Run::data_len).sum(); // at most 1024 x 1 TiB: no overflow
    if data > MAX_FRAME_DATA as u64 {
        return Err(FrameError::TooLong {
            what: "a frame's page data",
            len: data,
            limit: MAX_FRAME_DATA as u64,
        });
    }
    // Senders walk the address space upward, so the sort is hardly ever needed.
    let key = |run: &Run| (run.space, run.start);
    if runs.is_sorted_by_key(key) {
        check_neighbours(runs)?;
    } else {
        let mut sorted = runs.to_vec();
        sorted.sort_unstable_by_key(key);
        check_neighbours(&sorted)?;
    }
    Ok(data as usize)
}

fn check_neighbours(runs: &[Run]) -> Result<(), FrameError> {
    for pair in runs.windows(2) {
        if let [a, b] = pair
            && a.space == b.space
            && b.start < a.end()
        {
            return Err(FrameError::Overlap {
                space: b.space,
                start: b.start,
            });
        }
    }
    Ok(())
}

/// Makes frames. Holds the compressor, so that its memory is used again.
pub struct PageEncoder {
    encoding: Encoding,
    zstd: Option<Encoder<'static>>,
    raw_bytes: u64,
    wire_bytes: u64,
}

impl std::fmt::Debug for PageEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageEncoder")
            .field("encoding", &self.encoding)
            .finish_non_exhaustive()
    }
}

impl Default for PageEncoder {
    fn default() -> Self {
        Self {
            encoding: Encoding::Raw,
            zstd: None,
            raw_bytes: 0,
            wire_bytes: 0,
        }
    }
}

impl PageEncoder {
    /// How the frames from now on are encoded.
    pub fn set_encoding(&mut self, encoding: Encoding) {
        self.encoding = encoding;
    }

    /// Page data taken in so far, and bytes given out.
    pub fn raw_and_wire_bytes(&self) -> (u64, u64) {
        (self.raw_bytes, self.wire_bytes)
    }

    /// One frame as chunks to be written in order. With [`Encoding::Raw`] the data chunks are passed through, not copied.
    pub fn encode(&mut self, runs: &[Run], data: Vec<Bytes>) -> Result<Vec<Bytes>, FrameError> {
        let raw_len = check_runs(runs)?;
        let given: usize = data.iter().map(Bytes::len).sum();
        if given != raw_len {
            return Err(FrameError::Length {
                what: "a frame's page data",
                expected: raw_len as u64,
                got: given as u64,
            });
        }
        let compressed = match self.encoding {
            Encoding::Zstd if raw_len > 0 => self.compress(&data, raw_len).map_err(|e| FrameError::Zstd(e.to_string()))?,
            _ => None,
        };
        let wire_len = compressed.as_ref().map_or(raw_len, Bytes::len);

        let mut head = BytesMut::with_capacity(HEADER + RUN * runs.len());
        head.extend_from_slice(&MAGIC);
        head.extend_from_slice(&(runs.len() as u16).to_le_bytes()); // check_runs capped it
        head.extend_from_slice(&[if compressed.is_some() { ZSTD } else { RAW }, 0]);
        head.extend_from_slice(&(wire_len as u32).to_le_bytes()); // at most raw_len
        head.extend_from_slice(&(raw_len as u32).to_le_bytes()); // check_runs capped it
        for run in runs {
            head.extend_from_slice(&run.space.to_le_bytes());
            head.extend_from_slice(&run.pages.to_le_bytes());
            head.extend_from_slice(&(run.start | u64::from(run.zero)).to_le_bytes());
        }

        self.raw_bytes += raw_len as u64;
        self.wire_bytes += (head.len() + wire_len) as u64;
        let mut out = Vec::with_capacity(1 + data.len());
        out.push(head.freeze());
        match compressed {
            Some(bytes) => out.push(bytes),
            None => out.extend(data),
        }
        Ok(out)
    }

    /// `None` when it does not get smaller.
    fn compress(&mut self, data: &[Bytes], raw_len: usize) -> io::Result<Option<Bytes>> {
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            None => self.zstd.insert(Encoder::new(LEVEL)?),
        };
        zstd.reinit()?;
        // Room for one byte less than raw: when that is not enough, compression does not pay.
        let mut buffer = vec![0; raw_len - 1];
        let mut output = OutBuffer::around(&mut buffer[..]);
        for chunk in data {
            let mut input = InBuffer::around(chunk);
            while input.pos() < chunk.len() {
                zstd.run(&mut input, &mut output)?;
                if output.pos() == output.capacity() {
                    return Ok(None);
                }
            }
        }
        loop {
            if zstd.finish(&mut output, true)? == 0 {
                break;
            }
            if output.pos() == output.capacity() {
                return Ok(None);
            }
        }
        let len = output.pos();
        // Not truncated in place: the frame may wait in the send window, and must not keep a whole raw buffer alive there.
        Ok(Some(Bytes::copy_from_slice(&buffer[..len])))
    }
}

/// What the header says, once checked.
#[derive(Debug, Clone, Copy)]
struct Head {
    runs: usize,
    zstd: bool,
    wire_len: usize,
    raw_len: usize,
}

impl Head {
    fn decode(bytes: &[u8; HEADER]) -> Result<Self, FrameError> {
        let mut fields = Fields(bytes);
        let magic = fields.bytes::<4>();
        if magic != MAGIC {
            return Err(FrameError::Magic {
                what: "a page frame",
                got: magic.to_vec(),
            });
        }
        let runs = usize::from(fields.u16());
        let encoding = fields.u8();
        let reserved = fields.u8();
        let (wire_len, raw_len) = (fields.u32(), fields.u32());
        if runs == 0 {
            return Err(FrameError::Field {
                what: "a frame's number of runs",
                got: 0,
            });
        }
        if runs > MAX_RUNS {
            return Err(FrameError::TooLong {
                what: "a frame's runs",
                len: runs as u64,
                limit: MAX_RUNS as u64,
            });
        }
        if encoding > ZSTD {
            return Err(FrameError::Field {
                what: "a frame's encoding",
                got: encoding.into(),
            });
        }
        if reserved != 0 {
            return Err(FrameError::Field {
                what: "a frame's reserved byte",
                got: reserved.into(),
            });
        }
        if raw_len as usize > MAX_FRAME_DATA {
            return Err(FrameError::TooLong {
                what: "a frame's page data",
                len: raw_len.into(),
                limit: MAX_FRAME_DATA as u64,
            });
        }
        let zstd = encoding == ZSTD;
        if zstd && (wire_len == 0 || wire_len >= raw_len) {
            return Err(FrameError::TooLong {
                what: "a frame's compressed data",
                len: wire_len.into(),
                limit: raw_len.saturating_sub(1).into(),
            });
        }
        if !zstd && wire_len != raw_len {
            return Err(FrameError::Length {
                what: "a raw frame's wire data",
                expected: raw_len.into(),
                got: wire_len.into(),
            });
        }
        Ok(Self {
            runs,
            zstd,
            wire_len: wire_len as usize,
            raw_len: raw_len as usize,
        })
    }
}

fn decode_run(bytes: &[u8]) -> Result<Run, FrameError> {
    let mut fields = Fields(bytes);
    let (space, pages, start) = (fields.u32(), fields.u32(), fields.u64());
    Run::new(space, start & !1, pages, start & 1 == 1)
}

enum State {
    Header,
    Runs(Head),
    Data(Head, Vec<Run>),
}

/// Cuts a byte stream into page frames, however it arrives.
pub struct PageDecoder {
    input: Chunks,
    state: State,
    zstd: Option<Decoder<'static>>,
}

impl std::fmt::Debug for PageDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageDecoder")
            .field("buffered", &self.input.len())
            .finish_non_exhaustive()
    }
}

impl Default for PageDecoder {
    fn default() -> Self {
        Self {
            input: Chunks::default(),
            state: State::Header,
            zstd: None,
        }
    }
}

impl PageDecoder {
    /// Adds bytes in stream order.
    pub fn push(&mut self, chunk: Bytes) {
        self.input.push(chunk);
    }

    /// The next complete frame, if it is there. Raw data is handed out as slices of what was pushed.
    pub fn next_frame(&mut self) -> Result<Option<PageFrame>, FrameError> {
        loop {
            match &mut self.state {
                State::Header => {
                    let mut head = [0; HEADER];
                    if !self.input.read_exact(&mut head) {
                        return Ok(None);
                    }
                    self.state = State::Runs(Head::decode(&head)?);
                }
                State::Runs(head) => {
                    let head = *head;
                    if self.input.len() < head.runs * RUN {
                        return Ok(None);
                    }
                    let mut runs = Vec::with_capacity(head.runs);
                    let mut bytes = [0; RUN];
                    for _ in 0..head.runs {
                        self.input.read_exact(&mut bytes);
                        runs.push(decode_run(&bytes)?);
                    }
                    let expected = check_runs(&runs)?;
                    if expected != head.raw_len {
                        let (expected, got) = (expected as u64, head.raw_len as u64);
                        return Err(FrameError::Length {
                            what: "a frame's raw length",
                            expected,
                            got,
                        });
                    }
                    self.state = State::Data(head, runs);
                }
                State::Data(head, runs) => {
                    let head = *head;
                    if self.input.len() < head.wire_len {
                        return Ok(None);
                    }
                    let runs = std::mem::take(runs);
                    self.state = State::Header;
                    let chunks = self.input.split(head.wire_len);
                    let data = if head.zstd {
                        vec![self.decompress(&chunks, head.raw_len)?]
                    } else {
                        chunks
                    };
                    return Ok(Some(PageFrame { runs, data }));
                }
            }
        }
    }

    /// Whether the stream may end here.
    pub fn end(&self) -> Result<(), FrameError> {
        let before = match &self.state {
            State::Header => 0,
            State::Runs(_) => HEADER,
            State::Data(head, _) => HEADER + head.runs * RUN,
        };
        match before + self.input.len() {
            0 => Ok(()),
            have => Err(FrameError::Truncated {
                what: "a page frame",
                have: have as u64,
            }),
        }
    }

    fn decompress(&mut self, chunks: &[Bytes], raw_len: usize) -> Result<Bytes, FrameError> {
        let damaged = |e: io::Error| FrameError::Zstd(e.to_string());
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            None => {
                let mut fresh = Decoder::new().map_err(damaged)?;
                fresh.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(damaged)?;
                self.zstd.insert(fresh)
            }
        };
        zstd.reinit().map_err(damaged)?;
        let mut buffer = vec![0; raw_len];
        let mut output = OutBuffer::around(&mut buffer[..]);
        let mut complete = false;
        for chunk in chunks {
            let mut input = InBuffer::around(chunk);
            while input.pos() < chunk.len() {
                if complete {
                    return Err(FrameError::Zstd("there is data after its end".into()));
                }
                let before = (input.pos(), output.pos());
                complete = zstd.run(&mut input, &mut output).map_err(damaged)? == 0;
                if !complete && (input.pos(), output.pos()) == before {
                    return Err(FrameError::Zstd("it holds more than its runs".into()));
                }
            }
        }
        let got = output.pos();
        if !complete || got != raw_len {
            return Err(FrameError::Zstd(format!("it must hold {raw_len} bytes, and ended at {got}")));
        }
        Ok(buffer.into())
    }
}
/// Compresses page data as a page stream would: (compressed bytes for each byte, bytes of pages a second). (1, 0) when there is nothing to try.
pub fn sample_compression(data: &[Bytes]) -> (f64, f64) {
    let raw: usize = data.iter().map(Bytes::len).sum();
    let start = std::time::Instant::now();
    let Ok(packed) = zstd::bulk::Compressor::new(LEVEL).and_then(|mut z| z.compress(&data.concat())) else {
        return (1.0, 0.0);
    };
    let seconds = start.elapsed().as_secs_f64();
    if raw == 0 || seconds <= 0.0 {
        return (1.0, 0.0);
    }
    (packed.len() as f64 / raw as f64, raw as f64 / seconds)
}

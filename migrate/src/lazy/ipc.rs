//! What an agent and the keeper say to each other, over a unix socket: a length, a message in bincode, descriptors beside its first byte.

use crate::{image::codec, report::FaultLatency};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

/// Bytes of one slot of the ring: the page data of a frame.
pub const SLOT: usize = 1 << 20;
/// Slots: what may be under way between the agent and the keeper.
pub const SLOTS: u32 = 16;
/// Bytes of the ring.
pub const RING: usize = SLOTS as usize * SLOT;

/// Longest message: a list of missing ranges.
const LONGEST: usize = codec::LIMIT;

/// A run of pages in a frame: name of the space, address at the source, pages, zeros.
pub type FrameRun = (u32, u64, u32, bool);

/// From the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToKeeper {
    /// The ring's descriptor comes along. `socket`: where a later agent finds the keeper.
    Setup {
        /// A path.
        socket: String,
    },
    /// A process of the copy; its userfaultfd comes along.
    Space {
        /// (start, end, name, address at the source).
        regions: Vec<(u64, u64, u32, u64)>,
        /// Ranges that are missing.
        missing: Vec<(u64, u64)>,
        /// For the memory oracle: hashes of what is missing, as [`super::audit::Audit::watch`] takes them. Then the descriptors of
        /// [`super::audit::Watched`] come along too.
        expected: Option<Vec<(u64, u64)>>,
    },
    /// Shared memory whose content follows ([`super::object`]); its descriptor comes along.
    Object {
        /// Its name at the source.
        name: u32,
        /// Bytes.
        size: u64,
        /// Ranges that are missing, by offset.
        missing: Vec<(u64, u64)>,
        /// For the memory oracle: (offset, hash) of what is missing.
        expected: Option<Vec<(u64, u64)>>,
    },
    /// The copy is about to run: from now on faults are served, and the keeper outlives the agent.
    Start,
    /// Pages that have arrived; the data of runs that are not zero lies in a slot, one after the other.
    Frame {
        /// Which slot.
        slot: u32,
        /// Somebody waits for it.
        urgent: bool,
        /// What it holds.
        runs: Vec<FrameRun>,
    },
    /// Once all frames so far are in place: what is missing?
    List,
    /// Say once more which pages tasks wait for.
    Again,
    /// The agent knows that everything has arrived.
    Bye,
}

/// From the keeper.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromKeeper {
    /// The answer to [`ToKeeper::Start`]: it has everything it needs, and can be found by a later agent.
    Ready,
    /// To a later agent; the ring's descriptor comes along.
    Hello,
    /// The answer to [`ToKeeper::List`].
    Missing {
        /// Ranges.
        missing: Vec<(u32, u64, u64)>,
    },
    /// A task waits for a page: name and address at the source.
    Fault {
        /// Name of the address space.
        name: u32,
        /// Address.
        at: u64,
    },
    /// A slot can be used again.
    Free {
        /// Which.
        slot: u32,
        /// Whether it came as urgent.
        urgent: bool,
        /// Bytes of memory its frame was for.
        bytes: u64,
        /// Pages still missing.
        left: u64,
    },
    /// Nothing is missing any more.
    Drained(Box<Stats>),
}

/// How the drain went.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Pages that were asked for, with those around them.
    pub pulled: u64,
    /// Pages that came by themselves.
    pub pushed: u64,
    /// Pages that nobody wanted any more when they came.
    pub unwanted: u64,
    /// Faults on pages without content.
    pub zero_faults: u64,
    /// From reading a fault to the page in place.
    pub latency: FaultLatency,
    /// Pages that were there although nobody had put them there: each of them would be a bug.
    pub anomalies: u64,
    /// Pages that the memory oracle compared at the end, when it watches.
    pub compared: u64,
    /// Those of them that differ.
    pub different: u64,
}

/// One end of the socket.
#[derive(Debug)]
pub struct Channel {
    /// The socket.
    pub stream: UnixStream,
    /// What a read goes to first.
    scratch: Vec<u8>,
    buf: Vec<u8>,
    fds: VecDeque<OwnedFd>,
    out: VecDeque<u8>,
}

/// A message with its length in front.
pub fn encoded<T: Serialize>(m: &T) -> io::Result<Vec<u8>> {
    let payload = codec::encode(m).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(payload.len() + 4);
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&payload);
    Ok(bytes)
}

/// The first whole message of a buffer, which is taken out of it.
pub fn decoded<T: DeserializeOwned>(buf: &mut Vec<u8>) -> io::Result<Option<T>> {
    let Some((len, rest)) = buf.split_first_chunk::<4>() else {
        return Ok(None);
    };
    let len = u32::from_le_bytes(*len) as usize;
    if len > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message that is too long"));
    }
    if rest.len() < len {
        return Ok(None);
    }
    let m = codec::decode(&rest[..len]).map_err(io::Error::other)?;
    buf.drain(..4 + len);
    Ok(Some(m))
}

impl Channel {
    /// Over a connected socket.
    pub fn new(stream: UnixStream) -> Channel {
        Channel {
            stream,
            scratch: vec![0; 64 << 10],
            buf: Vec::new(),
            fds: VecDeque::new(),
            out: VecDeque::new(),
        }
    }

    /// Sends a message, and descriptors with it, waiting as long as it takes. Not to be mixed with [`Channel::queue`].
    pub fn send<T: Serialize>(&mut self, m: &T, fds: &[&dyn AsFd]) -> io::Result<()> {
        let bytes = encoded(m)?;
        let raw: Vec<RawFd> = fds.iter().map(|f| f.as_fd().as_raw_fd()).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &control[..0] } else { &control[..] };
        let mut sent = loop {
            match sendmsg::<()>(
                self.stream.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Err(nix::Error::EINTR) => {}
                r => break r?,
            }
        };
        while sent < bytes.len() {
            match sendmsg::<()>(
                self.stream.as_raw_fd(),
                &[IoSlice::new(&bytes[sent..])],
                &[],
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Err(nix::Error::EINTR) => {}
                r => sent += r?,
            }
        }
        Ok(())
    }

    /// Queues a message; [`Channel::flush`] sends as much as the socket takes.
    pub fn queue<T: Serialize>(&mut self, m: &T) -> io::Result<()> {
        self.out.extend(encoded(m)?);
        self.flush()
    }

    /// Sends what is queued, without waiting.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            let (a, _) = self.out.as_slices();
            match sendmsg::<()>(
                self.stream.as_raw_fd(),
                &[IoSlice::new(a)],
                &[],
                MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
                None,
            ) {
                Ok(n) => drop(self.out.drain(..n)),
                Err(nix::Error::EAGAIN) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Whether something is queued.
    pub fn pending(&self) -> bool {
        !self.out.is_empty()
    }

    /// Reads what there is; `wait`: until there is something. False: the other end is gone.
    pub fn fill(&mut self, wait: bool) -> io::Result<bool> {
        let mut space = nix::cmsg_space!([RawFd; 8]);
        let flags = if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT } | MsgFlags::MSG_CMSG_CLOEXEC;
        let n = {
            let mut iov = [IoSliceMut::new(&mut self.scratch)];
            let r = match recvmsg::<()>(self.stream.as_raw_fd(), &mut iov, Some(&mut space), flags) {
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(true),
                r => r?,
            };
            for c in r.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = c {
                    // SAFETY: the kernel has just made these descriptors for us.
                    self.fds.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            r.bytes
        };
        self.buf.extend_from_slice(&self.scratch[..n]);
        Ok(n > 0)
    }

    /// The next whole message, if it is there.
    pub fn message<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        decoded(&mut self.buf)
    }

    /// Waits for the next message.
    pub fn recv<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        loop {
            if let Some(m) = self.message()? {
                return Ok(m);
            }
            if !self.fill(true)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// The next descriptor that came along.
    pub fn descriptor(&mut self) -> io::Result<OwnedFd> {
        self.fds
            .pop_front()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a message without its descriptor"))
    }

    /// The socket, and what was read of it and not taken yet.
    pub fn into_parts(self) -> (UnixStream, Vec<u8>) {
        (self.stream, self.buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_in_order() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Channel::new(a), Channel::new(b));
        let file = tempfile::tempfile().unwrap();
        a.send(&ToKeeper::Setup { socket: "s".into() }, &[&file]).unwrap();
        let missing: Vec<(u64, u64)> = (0..50_000).map(|k| (k << 20, (k << 20) + 4096)).collect();
        let writer = std::thread::spawn(move || {
            let m = ToKeeper::Space {
                regions: vec![(0, 1 << 40, 3, 0)],
                missing,
                expected: None,
            };
            a.send(&m, &[&file]).unwrap();
            a.send(&ToKeeper::Start, &[]).unwrap();
        });
        assert!(matches!(b.recv::<ToKeeper>().unwrap(), ToKeeper::Setup { socket } if socket == "s"));
        b.descriptor().unwrap();
        assert!(matches!(b.recv::<ToKeeper>().unwrap(), ToKeeper::Space { missing, .. } if missing.len() == 50_000));
        b.descriptor().unwrap();
        assert!(b.descriptor().is_err());
        assert!(matches!(b.recv::<ToKeeper>().unwrap(), ToKeeper::Start));
        writer.join().unwrap();
        assert_eq!(b.recv::<ToKeeper>().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

//! One direction of one stream: packets that arrive when the wire says so, within a window.

use std::sync::Arc;

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, sleep_until},
};

use super::Wire;
use crate::error::LinkError;

#[derive(Debug)]
struct Packet {
    bytes: Bytes,
    /// When it arrives; `None` if the wire was cut before it left.
    due: Option<Instant>,
    fin: bool,
    _window: Option<OwnedSemaphorePermit>,
}

/// One direction of one stream, as bytes.
#[derive(Debug)]
pub(super) struct Sending {
    pub wire: Wire,
    pub side: usize,
    sender: mpsc::UnboundedSender<Packet>,
    window: usize,
    permits: Arc<Semaphore>,
}

#[derive(Debug)]
pub(super) struct Receiving {
    pub wire: Wire,
    pub side: usize,
    receiver: mpsc::UnboundedReceiver<Packet>,
    /// Under way; kept here so that a dropped `recv` does not lose it.
    head: Option<Packet>,
}

/// What a stream yields.
pub(super) enum Arrival {
    Bytes(Bytes),
    End,
    Abandoned,
}

impl Sending {
    pub fn abandoned(&self) -> LinkError {
        self.wire.check(self.side).err().unwrap_or_else(|| LinkError::Abandoned {
            peer: "the other end".into(),
        })
    }

    /// All of the chunks, as one piece of time.
    pub async fn send(&mut self, chunks: Vec<Bytes>) -> Result<(), LinkError> {
        self.wire.check(self.side)?;
        let total: usize = chunks.iter().map(Bytes::len).sum();
        let wanted = total.min(self.window) as u32; // the window fits into 32 bits
        let window = tokio::select! {
            permit = self.permits.clone().acquire_many_owned(wanted) => permit.ok(),
            error = self.wire.over(self.side) => return Err(error),
        };
        let due = self.wire.transmit(self.side, total);
        let mut window = window;
        let last = chunks.len().saturating_sub(1);
        for (i, bytes) in chunks.into_iter().enumerate() {
            let packet = Packet {
                bytes,
                due,
                fin: false,
                _window: if i == last { window.take() } else { None },
            };
            self.sender.send(packet).map_err(|_| self.abandoned())?;
        }
        Ok(())
    }

    /// Ends the stream; when that will have arrived, if ever.
    pub fn end(&self) -> Result<Option<Instant>, LinkError> {
        self.wire.check(self.side)?;
        let due = self.wire.transmit(self.side, 0);
        self.sender
            .send(Packet {
                bytes: Bytes::new(),
                due,
                fin: true,
                _window: None,
            })
            .map_err(|_| self.abandoned())?;
        Ok(due)
    }

    /// Ends the stream, and waits for the acknowledgement's way back.
    pub async fn finish(self) -> Result<(), LinkError> {
        match self.end()? {
            Some(due) => {
                let back = due + self.wire.lock().config.delay;
                tokio::select! {
                    () = sleep_until(back) => self.wire.check(self.side),
                    error = self.wire.over(self.side) => Err(error),
                }
            }
            None => Err(self.wire.over(self.side).await),
        }
    }
}

impl Receiving {
    pub async fn recv(&mut self) -> Result<Arrival, LinkError> {
        if self.head.is_none() {
            tokio::select! {
                biased;
                packet = self.receiver.recv() => match packet {
                    Some(packet) => self.head = Some(packet),
                    None => {
                        // Dropped by its sender. If that was the end of the link, say so instead.
                        self.wire.check(self.side)?;
                        return Ok(Arrival::Abandoned);
                    }
                },
                error = self.wire.over(self.side) => return Err(error),
            }
        }
        let due = self.head.as_ref().and_then(|packet| packet.due);
        let cut_at = self.wire.lock().cut_at;
        match due {
            Some(due) if cut_at.is_none_or(|cut| due <= cut) => {
                tokio::select! {
                    biased;
                    () = sleep_until(due) => {}
                    error = self.wire.over(self.side) => return Err(error),
                }
                // It may have been cut while this packet was on its way.
                if self.wire.lock().cut_at.is_some_and(|cut| due > cut) {
                    return Err(self.wire.over(self.side).await);
                }
            }
            _ => return Err(self.wire.over(self.side).await),
        }
        match self.head.take() {
            Some(packet) if packet.fin => Ok(Arrival::End),
            Some(packet) => Ok(Arrival::Bytes(packet.bytes)),
            None => Ok(Arrival::Abandoned), // unreachable: the head was filled above
        }
    }
}

/// A stream that this side sends on.
pub(super) fn stream(wire: &Wire, side: usize) -> (Sending, Receiving) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let window = wire.lock().config.window.clamp(1, u32::MAX as usize);
    let sending = Sending {
        wire: wire.clone(),
        side,
        sender,
        window,
        permits: Arc::new(Semaphore::new(window)),
    };
    (
        sending,
        Receiving {
            wire: wire.clone(),
            side: 1 - side,
            receiver,
            head: None,
        },
    )
}

//! Tickets: how two hosts that have never met come to trust each other.
//!
//! ```text
//! mig1 + base32( fingerprint of the receiver, 32 | secret, 16 | checksum, 4 )      88 letters and digits, one word
//! ```
//!
//! The fingerprint is pinned by the sender while TLS is set up, so that nobody in the middle gets any further. The secret itself never
//! travels: the sender proves it with
//!
//! ```text
//! HMAC-SHA-256( secret, "migrate ticket 1" | exporter of this TLS session, 32 | sender's fingerprint | receiver's fingerprint )
//! ```
//!
//! which is worth nothing in another session, or to another sender. There is no date in a ticket, since the two hosts' clocks need not
//! agree: the receiver remembers when it made it.

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::{digest, hmac, rand};

use super::{Fingerprint, TrustError};
use crate::frame::hello::PROOF;

const PREFIX: &str = "mig1";
const SECRET: usize = 16;
const CHECKSUM: usize = 4;
const BYTES: usize = 32 + SECRET + CHECKSUM;
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// How long a ticket is good, unless [`Tickets::lasting`] says otherwise.
pub const LIFETIME: Duration = Duration::from_secs(600);
/// For how long after its time one is remembered, to say to its holder that it is used or too old.
const MEMORY: Duration = Duration::from_secs(3600);
/// The most tickets remembered at once; the oldest go first.
const MAX_TICKETS: usize = 64;
/// Wrong proofs from one address within a minute, after which no more are looked at for a while.
const MAX_FAILURES: u32 = 5;
const FAILURE_WINDOW: Duration = Duration::from_secs(60);
/// The most addresses whose failures are counted.
const MAX_SOURCES: usize = 1024;

/// A one-time invitation. [`Display`](fmt::Display) gives the word to copy; [`Debug`] hides the secret.
#[derive(Clone)]
pub struct Ticket {
    receiver: Fingerprint,
    secret: [u8; SECRET],
}

/// A sender's proof, and what it is a proof of.
pub(crate) struct Proof<'a> {
    pub exporter: &'a [u8; 32],
    pub sender: Fingerprint,
    pub receiver: Fingerprint,
}

impl Proof<'_> {
    fn message(&self) -> Vec<u8> {
        [&b"migrate ticket 1"[..], self.exporter, &self.sender.0, &self.receiver.0].concat()
    }
}

impl Ticket {
    fn generate(receiver: Fingerprint) -> Result<Self, TrustError> {
        let mut secret = [0; SECRET];
        rand::fill(&mut secret).map_err(|_| TrustError::Generate("the system has no random numbers".into()))?;
        Ok(Self { receiver, secret })
    }

    /// The identity of the receiver that made it.
    pub fn receiver(&self) -> Fingerprint {
        self.receiver
    }

    fn key(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.secret)
    }

    pub(crate) fn prove(&self, proof: &Proof<'_>) -> [u8; PROOF] {
        let mut out = [0; PROOF];
        out.copy_from_slice(hmac::sign(&self.key(), &proof.message()).as_ref());
        out
    }

    fn checksum(body: &[u8]) -> [u8; CHECKSUM] {
        let hash = digest::digest(&digest::SHA256, body);
        let mut out = [0; CHECKSUM];
        out.copy_from_slice(&hash.as_ref()[..CHECKSUM]);
        out
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("receiver", &self.receiver).finish_non_exhaustive()
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = [&self.receiver.0[..], &self.secret].concat();
        bytes.extend(Self::checksum(&bytes));
        f.write_str(PREFIX)?;
        let (mut bits, mut held) = (0u32, 0);
        for byte in bytes {
            bits = bits << 8 | u32::from(byte);
            held += 8;
            while held >= 5 {
                held -= 5;
                write!(f, "{}", char::from(ALPHABET[(bits >> held & 31) as usize]))?;
            }
        }
        if held > 0 {
            write!(f, "{}", char::from(ALPHABET[(bits << (5 - held) & 31) as usize]))
        } else {
            Ok(())
        }
    }
}

impl FromStr for Ticket {
    type Err = TrustError;

    fn from_str(text: &str) -> Result<Self, TrustError> {
        let text = text.trim().to_ascii_lowercase();
        let body = text.strip_prefix(PREFIX).ok_or(TrustError::Ticket("it does not begin with mig1"))?;
        if body.len() != (BYTES * 8).div_ceil(5) {
            return Err(TrustError::Ticket("its length is wrong"));
        }
        let mut bytes = Vec::with_capacity(BYTES);
        let (mut bits, mut held) = (0u32, 0);
        for letter in body.bytes() {
            let value = ALPHABET
                .iter()
                .position(|&c| c == letter)
                .ok_or(TrustError::Ticket("it has a letter that cannot be there"))?;
            bits = bits << 5 | value as u32; // position in 32 letters
            held += 5;
            if held >= 8 {
                held -= 8;
                bytes.push((bits >> held) as u8);
                bits &= (1 << held) - 1;
            }
        }
        let (body, checksum) = bytes.split_at(BYTES - CHECKSUM);
        // What is left of the last letter must be zero, so that each ticket has one spelling.
        if bits != 0 || checksum != Self::checksum(body) {
            return Err(TrustError::Ticket("its checksum is wrong"));
        }
        let (mut receiver, mut secret) = ([0; 32], [0; SECRET]);
        receiver.copy_from_slice(&body[..32]);
        secret.copy_from_slice(&body[32..]);
        Ok(Self {
            receiver: Fingerprint(receiver),
            secret,
        })
    }
}

/// Where [`Tickets`] gets the time from.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// What a receiver makes of a proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TicketVerdict {
    /// Good; [`Tickets::redeem`] it by this number.
    Good(u64),
    Used,
    Expired,
    Wrong,
    /// Not looked at: too many wrong ones from there.
    TooMany,
}

struct Issued {
    number: u64,
    ticket: Ticket,
    made: Instant,
    used: bool,
}

#[derive(Default)]
struct State {
    issued: Vec<Issued>,
    next: u64,
    failures: HashMap<IpAddr, (Instant, u32)>,
}

/// The tickets that a receiver has made. In memory: they end with the receiver. Cheap to clone; clones share the tickets.
#[derive(Clone)]
pub struct Tickets {
    receiver: Fingerprint,
    lifetime: Duration,
    clock: Clock,
    state: Arc<Mutex<State>>,
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tickets").field("receiver", &self.receiver).finish_non_exhaustive()
    }
}

impl Tickets {
    /// No tickets yet, for the receiver with this identity.
    pub fn new(receiver: &super::Identity) -> Self {
        Self::with_clock(receiver, Arc::new(Instant::now))
    }

    /// As [`new`](Self::new), with another clock.
    pub fn with_clock(receiver: &super::Identity, clock: Clock) -> Self {
        Self {
            receiver: receiver.fingerprint(),
            lifetime: LIFETIME,
            clock,
            state: Arc::default(),
        }
    }

    /// The same, with tickets that are good for so long. Those already out are too.
    pub fn lasting(self, lifetime: Duration) -> Self {
        Self { lifetime, ..self }
    }

    /// How long each is good.
    pub fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// Makes a ticket, good for one use within its lifetime.
    pub fn issue(&self) -> Result<Ticket, TrustError> {
        let ticket = Ticket::generate(self.receiver)?;
        let now = (self.clock)();
        let mut state = self.lock();
        state
            .issued
            .retain(|issued| now.saturating_duration_since(issued.made) < self.lifetime + MEMORY);
        if state.issued.len() >= MAX_TICKETS {
            state.issued.remove(0);
        }
        let number = state.next;
        state.next += 1;
        state.issued.push(Issued {
            number,
            ticket: ticket.clone(),
            made: now,
            used: false,
        });
        Ok(ticket)
    }

    /// How many tickets could be redeemed now.
    pub fn open(&self) -> usize {
        let now = (self.clock)();
        self.lock()
            .issued
            .iter()
            .filter(|issued| !issued.used && now.saturating_duration_since(issued.made) < self.lifetime)
            .count()
    }

    /// Looks at a proof. Only those with the right secret learn more than "wrong".
    pub(crate) fn check(&self, from: IpAddr, proof: &Proof<'_>, mac: &[u8; PROOF]) -> TicketVerdict {
        let now = (self.clock)();
        let source = source(from);
        let mut state = self.lock();
        state
            .failures
            .retain(|_, (since, _)| now.saturating_duration_since(*since) < FAILURE_WINDOW);
        let failures = state.failures.get(&source).map_or(0, |(_, count)| *count);
        if failures >= MAX_FAILURES || (failures == 0 && state.failures.len() >= MAX_SOURCES) {
            return TicketVerdict::TooMany;
        }
        let message = proof.message();
        let mut found = None;
        for issued in &state.issued {
            // Constant time for each, and all of them each time.
            if hmac::verify(&issued.ticket.key(), &message, mac).is_ok() {
                found = Some((issued.number, issued.used, now.saturating_duration_since(issued.made)));
            }
        }
        match found {
            None => {
                state.failures.entry(source).or_insert((now, 0)).1 += 1;
                TicketVerdict::Wrong
            }
            Some((_, true, _)) => TicketVerdict::Used,
            Some((_, _, age)) if age >= self.lifetime => TicketVerdict::Expired,
            Some((number, ..)) => TicketVerdict::Good(number),
        }
    }

    /// Uses up a ticket that was found good. False if somebody else was faster.
    pub(crate) fn redeem(&self, number: u64) -> bool {
        let mut state = self.lock();
        match state.issued.iter_mut().find(|issued| issued.number == number) {
            Some(issued) => !std::mem::replace(&mut issued.used, true),
            None => false,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whoever has an IPv6 address has a /64 of them.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & !u128::from(u64::MAX)).into()),
        v4 => v4,
    }
}

//! Two hosts on one machine, and a suite that every link must pass.
#![allow(dead_code)] // each test file uses its part

use std::{future::Future, net::SocketAddr, time::Duration};

use bytes::Bytes;
use migrate_transport::{
    Encoding, Link, LinkError, PageReceiver, PageSender, Run, Section,
    quic::{self, Listener, QuicLink, Tuning},
    trust::{Identity, Ticket, Tickets, TrustStore},
};
use tempfile::TempDir;

/// A host: its state directory and who it is.
pub struct Host {
    pub dir: TempDir,
    pub id: Identity,
    pub store: TrustStore,
    pub tickets: Tickets,
}

impl Host {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let id = Identity::load_or_create(dir.path()).unwrap();
        let store = TrustStore::open(dir.path()).unwrap();
        let tickets = Tickets::new(&id);
        Self { dir, id, store, tickets }
    }

    pub async fn listen(&self) -> Listener {
        self.listen_with(Tuning::default()).await
    }

    pub async fn listen_with(&self, tuning: Tuning) -> Listener {
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        Listener::bind_with(any, &self.id, self.store.clone(), self.tickets.clone(), tuning)
            .await
            .unwrap()
    }

    pub async fn connect(&self, listener: &Listener, ticket: Option<&Ticket>) -> Result<QuicLink, migrate_transport::ConnectError> {
        quic::connect(&listener.local_addr().to_string(), &self.id, &self.store, ticket).await
    }

    pub fn trust(&self, other: &Host) {
        self.store.add(other.id.fingerprint(), other.id.name()).unwrap();
    }
}

/// Two hosts that trust each other.
pub fn acquainted() -> (Host, Host) {
    let (source, destination) = (Host::new(), Host::new());
    source.trust(&destination);
    destination.trust(&source);
    (source, destination)
}

/// Source and destination, joined.
pub async fn joined(tuning: Tuning) -> (QuicLink, QuicLink, Listener, [Host; 2]) {
    let (source, destination) = acquainted();
    let listener = destination.listen_with(tuning.clone()).await;
    let address = listener.local_addr().to_string();
    let (there, here) = tokio::join!(
        quic::connect_with(&address, &source.id, &source.store, None, &tuning),
        listener.accept()
    );
    (there.unwrap(), here.unwrap(), listener, [source, destination])
}

/// Numbers that look random and are the same each time.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % below
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.roll(256) as u8).collect()
    }

    /// A legal frame: up to eight runs, data cut anywhere, every second one compressible.
    pub fn frame(&mut self) -> (Vec<Run>, Vec<Bytes>) {
        let mut at = self.roll(1 << 20) * 4096;
        let mut runs = Vec::new();
        let mut data = Vec::new();
        for _ in 0..=self.roll(8) {
            at += self.roll(64) * 4096;
            let run = Run::new(self.roll(3) as u32, at, 1 + self.roll(20) as u32, self.roll(3) == 0).unwrap();
            at = run.end();
            let len = run.data_len() as usize;
            data.extend(if self.roll(2) == 0 {
                self.bytes(len)
            } else {
                vec![self.roll(256) as u8; len]
            });
            runs.push(run);
        }
        let mut rest = Bytes::from(data);
        let mut chunks = Vec::new();
        while !rest.is_empty() {
            let len = 1 + self.roll(rest.len() as u64) as usize;
            chunks.push(rest.split_to(len));
        }
        (runs, chunks)
    }
}

pub async fn within<T>(seconds: u64, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(seconds), future).await.expect("in time")
}

/// What any two ends of a link must do.
pub async fn suite<L: Link>(mut a: L, mut b: L) {
    sections(&mut a, &mut b).await;
    sections(&mut b, &mut a).await;
    cancelled_receive(&mut a, &mut b).await;
    for encoding in [Encoding::Raw, Encoding::Zstd] {
        pages(&mut a, &mut b, encoding).await;
        pages(&mut b, &mut a, encoding).await;
    }
    many_streams(&mut a, &mut b).await;
    empty_stream(&mut a, &mut b).await;
    unsendable(&mut a).await;
    abandoned(&mut a, &mut b).await;
    assert!(a.bytes_sent() > 0 && b.bytes_sent() > 0);
    goodbye(a, b).await;
}

async fn sections<L: Link>(from: &mut L, to: &mut L) {
    let mut dice = Dice(1);
    let sizes = [0, 1, 7, 4096, 1 << 20, 0, 3];
    let sent: Vec<_> = sizes
        .iter()
        .enumerate()
        .map(|(i, &len)| Section::new(i as u16, 9, dice.bytes(len)))
        .collect();
    let sending = async {
        for section in &sent {
            from.send(section.clone()).await.unwrap();
        }
    };
    let receiving = async {
        for section in &sent {
            assert_eq!(&to.recv().await.unwrap(), section);
        }
    };
    tokio::join!(sending, receiving);
}

/// A receive that was dropped half-way loses nothing.
async fn cancelled_receive<L: Link>(from: &mut L, to: &mut L) {
    let payload = Bytes::from(Dice(2).bytes(3 << 20));
    let section = Section::new(1, 1, payload);
    let sent = section.clone();
    let sending = async { from.send(sent).await.unwrap() };
    let receiving = async {
        loop {
            tokio::select! {
                biased;
                received = to.recv() => break received.unwrap(),
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
        }
    };
    let ((), received) = tokio::join!(sending, receiving);
    assert_eq!(received, section);
}

async fn pages<L: Link>(from: &mut L, to: &mut L, encoding: Encoding) {
    let frames: Vec<_> = { (0..40).map(|seed| Dice(seed).frame()).collect() };
    let sending = async {
        let mut sender = from.open_pages().await.unwrap();
        sender.set_encoding(encoding);
        for (runs, data) in &frames {
            sender.send(runs, data.clone()).await.unwrap();
        }
        let (raw, wire) = sender.raw_and_wire_bytes();
        assert_eq!(wire < raw, encoding == Encoding::Zstd);
        sender.finish().await.unwrap();
    };
    let receiving = async {
        let mut receiver = to.accept_pages().await.unwrap();
        for (runs, data) in &frames {
            let frame = receiver.recv().await.unwrap().expect("a frame");
            assert_eq!(&frame.runs, runs);
            assert!(frame.concat() == data.concat());
        }
        assert_eq!(receiver.recv().await.unwrap(), None);
        assert_eq!(receiver.recv().await.unwrap(), None);
    };
    tokio::join!(sending, receiving);
}

async fn many_streams<L: Link>(from: &mut L, to: &mut L) {
    let mut senders = Vec::new();
    for i in 0..6u32 {
        let mut sender = from.open_pages().await.unwrap();
        let run = Run::new(i, 0, 1, false).unwrap();
        sender.send(&[run], vec![vec![i as u8; 4096].into()]).await.unwrap();
        senders.push(sender);
    }
    let mut receivers = Vec::new();
    for _ in 0..6 {
        receivers.push(to.accept_pages().await.unwrap());
    }
    for receiver in &mut receivers {
        let frame = receiver.recv().await.unwrap().unwrap();
        assert!(frame.concat().iter().all(|&byte| u32::from(byte) == frame.runs[0].space));
    }
    for sender in senders {
        sender.finish().await.unwrap();
    }
    for mut receiver in receivers {
        assert_eq!(receiver.recv().await.unwrap(), None);
    }
}

async fn empty_stream<L: Link>(from: &mut L, to: &mut L) {
    let sender = from.open_pages().await.unwrap();
    let (finished, received) = tokio::join!(sender.finish(), async { to.accept_pages().await.unwrap().recv().await });
    finished.unwrap();
    assert_eq!(received.unwrap(), None);
}

async fn unsendable<L: Link>(link: &mut L) {
    let run = Run::new(0, 0, 2, false).unwrap();
    let mut sender = link.open_pages().await.unwrap();
    for data in [vec![], vec![vec![0; 4096].into()], vec![vec![0; 8193].into()]] {
        assert!(matches!(sender.send(&[run], data).await, Err(LinkError::Unsendable(_))));
    }
    assert!(matches!(sender.send(&[], vec![]).await, Err(LinkError::Unsendable(_))));
    assert!(matches!(
        sender.send(&[run, run], vec![vec![0; 16384].into()]).await,
        Err(LinkError::Unsendable(_))
    ));
    let long = Section::new(0, 0, vec![0; migrate_transport::frame::MAX_SECTION + 1]);
    assert!(matches!(link.send(long).await, Err(LinkError::Unsendable(_))));
}

/// A page stream that is dropped does not look like one that is complete.
async fn abandoned<L: Link>(from: &mut L, to: &mut L) {
    let mut sender = from.open_pages().await.unwrap();
    sender.send(&[Run::new(0, 0, 1, true).unwrap()], vec![]).await.unwrap();
    let mut receiver = to.accept_pages().await.unwrap();
    // Let the unsendable's empty stream pass, where it is visible.
    let first = receiver.recv().await;
    let mut receiver = if matches!(first, Err(LinkError::Abandoned { .. })) {
        to.accept_pages().await.unwrap()
    } else {
        receiver
    };
    drop(sender);
    loop {
        match receiver.recv().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("an abandoned stream must not end cleanly"),
            Err(error) => {
                assert!(matches!(error, LinkError::Abandoned { .. }), "{error}");
                break;
            }
        }
    }
}

async fn goodbye<L: Link>(mut a: L, mut b: L) {
    a.close("all done\u{7}").await;
    match b.recv().await.unwrap_err() {
        LinkError::Closed { reason, clean, .. } => assert!(clean && reason.starts_with("all done"), "{reason}"),
        other => panic!("{other}"),
    }
    assert!(matches!(a.recv().await, Err(LinkError::Closed { clean: true, .. })));
    assert!(matches!(a.send(Section::new(0, 0, vec![])).await, Err(LinkError::Closed { .. })));
    assert!(b.accept_pages().await.is_err_and(|e| e.is_closed()));
    assert!(b.open_pages().await.is_err_and(|e| e.is_closed()));
}

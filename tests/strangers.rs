//! Those whom a receiver does not know: it does nothing for them, says who came, and goes on serving those that it knows. What each of them is told is the
//! transport's to test (`transport/tests`); here stands a receiver as it is used.

use migrate_harness::{Guest, Host, Receiver, eventually, two_hosts};
use migrate_transport::{
    ConnectError,
    quic::{self, Tuning},
    trust::{Identity, PeerName, Ticket, Tickets, TrustStore},
};
use std::{
    collections::BTreeMap,
    fs,
    net::{SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// Every file below a directory, with its content.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            out.extend(files(&path));
        } else {
            out.insert(path.clone(), fs::read(&path).unwrap_or_default());
        }
    }
    out
}

/// What a stranger must not change: what is in the state directory, and which processes there are.
fn untouched(host: &Host) -> (BTreeMap<PathBuf, Vec<u8>>, Vec<i32>) {
    let pids = host.processes().iter().map(|p| p.pid).collect();
    (files(&host.dir().join("state")), pids)
}

/// Somebody with an identity of its own, who would trust this receiver.
struct Stranger {
    id: Identity,
    store: TrustStore,
    _dir: tempfile::TempDir,
}

impl Stranger {
    fn new(knows: &Identity) -> Stranger {
        let dir = tempfile::tempdir().expect("a directory");
        let store = TrustStore::open(dir.path()).expect("a trust store");
        store
            .add(knows.fingerprint(), &PeerName::new("it").expect("a name"))
            .expect("a peer");
        Stranger {
            id: Identity::ephemeral().expect("an identity"),
            store,
            _dir: dir,
        }
    }

    /// From this host.
    fn connects(&self, from: &Host, to: &str, ticket: Option<&Ticket>, tuning: &Tuning) -> Result<(), ConnectError> {
        from.inside_async(async || quic::connect_with(to, &self.id, &self.store, ticket, tuning).await.map(drop))
    }
}

fn identity(host: &Host) -> Identity {
    Identity::load_or_create(&host.dir().join("state")).expect("the receiver's identity")
}

/// Whoever it knows can move a program there still.
fn serves(hosts: &migrate_harness::Hosts, receiver: &Receiver<'_>, guest: &Guest) {
    hosts.a.send(guest.pid, receiver, &["--mode", "hybrid"]).expect_code(0);
    guest.verify("moved");
    assert!(receiver.process.ended().is_none(), "{}", receiver.process.stderr());
    assert!(!receiver.process.stderr().contains("panicked"), "{}", receiver.process.stderr());
    guest.quit();
}

#[test]
fn strangers_get_nothing() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let receiver = Receiver::that_stays(&hosts.b, &[]);
    let id = identity(&hosts.b);
    let stranger = Stranger::new(&id);
    // Somebody it knows: the ticket is used.
    hosts.a.send(guest.pid, &receiver, &["--dry-run"]).expect_code(0);
    let before = untouched(&hosts.b);
    let tuning = Tuning::default();
    let tried = |ticket: Option<&Ticket>| {
        stranger
            .connects(&hosts.a, &receiver.target, ticket, &tuning)
            .expect_err("a stranger")
    };
    let logged = |what: &str| eventually(Duration::from_secs(5), || receiver.process.stderr().contains(what));

    assert!(matches!(tried(None), ConnectError::NotTrusted { .. }));
    assert!(logged(&stranger.id.fingerprint().to_string()), "{}", receiver.process.stderr());
    // Of another host: it finds out by itself that this is not the one.
    let other = Tickets::new(&Identity::ephemeral().expect("an identity"))
        .issue()
        .expect("a ticket");
    assert!(matches!(tried(Some(&other)), ConnectError::WrongHost { .. }));
    // One that was good once.
    let used: Ticket = receiver.ticket.parse().expect("a ticket");
    assert!(matches!(tried(Some(&used)), ConnectError::TicketUsed { .. }));
    assert!(logged("used"), "{}", receiver.process.stderr());
    // The right receiver, and a secret that it has not given out: guessed, one after the other, with more guesses than are looked at.
    let guesses = Tickets::new(&id);
    for _ in 0..50 {
        assert!(matches!(
            tried(Some(&guesses.issue().expect("a guess"))),
            ConnectError::TicketNotAccepted { .. }
        ));
    }
    assert!(logged("too many wrong tickets"), "{}", receiver.process.stderr());
    assert_eq!(untouched(&hosts.b), before);
    assert!(!receiver.process.stderr().contains(&receiver.ticket), "a ticket in the log");

    // From the address of all these guesses no ticket is looked at for a minute, but whom it knows it serves.
    serves(&hosts, &receiver, &guest);
}

/// A ticket that came too late is refused by name at both ends, and is good for nothing afterwards either.
#[test]
fn an_expired_ticket_is_refused() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let receiver = Receiver::that_stays(&hosts.b, &["--ticket-lifetime", "3s"]);
    thread::sleep(Duration::from_secs(3));
    let before = untouched(&hosts.b);
    for _ in 0..2 {
        let run = hosts.a.send(guest.pid, &receiver, &["--mode", "stop"]);
        run.expect_code(1);
        assert!(run.all().contains("this ticket has expired"), "{}", run.all());
    }
    // It is told after the sender has been.
    let said = || receiver.process.stderr().matches("brought a ticket that has expired").count();
    assert!(eventually(Duration::from_secs(5), || said() == 2), "{}", receiver.process.stderr());
    assert_eq!(untouched(&hosts.b), before);
    guest.verify("still at home");
    guest.quit();
}

/// A socket of host A to the receiver, or to be connected to.
fn socket(at: &str) -> UdpSocket {
    let socket = UdpSocket::bind(at).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a time-out");
    socket
}

/// First packets of connections: many clients that nobody answers.
fn first_packets(host: &Host, id: &Identity, count: usize) -> Vec<Vec<u8>> {
    let deaf = host.inside(|| socket("127.0.0.1:0"));
    let to = deaf.local_addr().expect("an address").to_string();
    let mut tuning = Tuning::default();
    tuning.connect_timeout = Duration::from_millis(200);
    let stranger = Stranger::new(id);
    let over = AtomicBool::new(false);
    thread::scope(|s| {
        s.spawn(|| {
            for _ in 0..count / 50 {
                host.inside_async(async || {
                    let calls = (0..50).map(|_| quic::connect_with(&to, &stranger.id, &stranger.store, None, &tuning));
                    for call in calls.map(Box::pin).collect::<Vec<_>>() {
                        // Polled for a moment: its first packet leaves.
                        let _ = tokio::time::timeout(Duration::from_millis(3), call).await;
                    }
                });
            }
            over.store(true, Ordering::SeqCst);
        });
        let mut out = Vec::new();
        let mut bytes = [0; 65_536];
        while !over.load(Ordering::SeqCst) {
            if let Ok(len) = deaf.recv(&mut bytes)
                && len >= 1200
            {
                out.push(bytes[..len].to_vec());
            }
        }
        out
    })
}

#[test]
fn a_flood_of_handshakes_that_nobody_goes_on_with() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let receiver = Receiver::that_stays(&hosts.b, &[]);
    let packets = first_packets(&hosts.a, &identity(&hosts.b), 500);
    assert!(packets.len() >= 300, "{} first packets", packets.len());
    let to: SocketAddr = receiver.target.parse().expect("an address");
    let pids = untouched(&hosts.b).1;
    let (before, over) = (receiver.process.peak(), AtomicBool::new(false));
    let sent = thread::scope(|s| {
        let flood = s.spawn(|| {
            let sockets: Vec<UdpSocket> = hosts.a.inside(|| (0..packets.len()).map(|_| socket("0.0.0.0:0")).collect());
            let mut sent = 0;
            while !over.load(Ordering::SeqCst) {
                for (socket, packet) in sockets.iter().zip(&packets) {
                    sent += usize::from(socket.send_to(packet, to).is_ok());
                }
                thread::sleep(Duration::from_millis(5));
            }
            sent
        });
        thread::sleep(Duration::from_secs(2));
        assert_eq!(untouched(&hosts.b).1, pids);
        serves(&hosts, &receiver, &guest);
        over.store(true, Ordering::SeqCst);
        flood.join().expect("the flood")
    });
    println!(
        "{sent} first packets, peak of the receiver {} MiB, {before} before",
        receiver.process.peak()
    );
    assert!(sent > packets.len() * 20);
    assert!(receiver.process.peak() < before + 64, "{} MiB", receiver.process.peak());
}

/// Passes packets on between one client at a time and the receiver, and keeps what the clients sent.
fn recorder(host: &Host, to: SocketAddr, kept: &Mutex<Vec<Vec<u8>>>, over: &AtomicBool, tell: impl FnOnce(String)) {
    let near = host.inside(|| socket("127.0.0.1:0"));
    let mut far = BTreeMap::<SocketAddr, UdpSocket>::new();
    near.set_read_timeout(Some(Duration::from_millis(1))).expect("a time-out");
    tell(near.local_addr().expect("an address").to_string());
    let mut bytes = [0; 65_536];
    while !over.load(Ordering::SeqCst) {
        if let Ok((len, from)) = near.recv_from(&mut bytes) {
            kept.lock().expect("packets").push(bytes[..len].to_vec());
            let out = far.entry(from).or_insert_with(|| {
                let s = host.inside(|| socket("0.0.0.0:0"));
                s.set_nonblocking(true).expect("a socket");
                s
            });
            let _ = out.send_to(&bytes[..len], to);
        }
        for (client, out) in &far {
            while let Ok(len) = out.recv(&mut bytes) {
                let _ = near.send_to(&bytes[..len], *client);
            }
        }
    }
}

#[test]
fn a_migration_heard_on_the_wire_cannot_be_repeated() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let receiver = Receiver::that_stays(&hosts.b, &[]);
    let to: SocketAddr = receiver.target.parse().expect("an address");
    let (kept, over) = (Mutex::new(Vec::new()), AtomicBool::new(false));
    let (tell, told) = std::sync::mpsc::channel();
    thread::scope(|s| {
        s.spawn(|| recorder(&hosts.a, to, &kept, &over, move |at| tell.send(at).expect("the test")));
        let by = told.recv().expect("the recorder");
        let pid = guest.pid.to_string();
        let sent = hosts
            .a
            .run(&["send", &pid, &by, "--ticket", &receiver.ticket, "--json", "--mode", "post-copy"]);
        over.store(true, Ordering::SeqCst);
        sent.expect_code(0);
    });
    guest.verify("moved by way of somebody who listens");
    let kept = kept.into_inner().expect("packets");
    assert!(kept.len() > 20, "{} packets", kept.len());
    let before = untouched(&hosts.b);
    // All of it once more, as fast as it goes and with the old pauses; from one socket, and each packet from another.
    for pause in [0, 3] {
        hosts.a.inside(|| {
            let one = socket("0.0.0.0:0");
            for packet in &kept {
                let _ = one.send_to(packet, to);
                let _ = socket("0.0.0.0:0").send_to(packet, to);
                thread::sleep(Duration::from_millis(pause));
            }
        });
        thread::sleep(Duration::from_secs(1));
        assert_eq!(untouched(&hosts.b), before);
    }
    guest.verify("after its migration was sent again");
    assert!(receiver.process.ended().is_none(), "{}", receiver.process.stderr());
    let next = Guest::start(&hosts.a, "counter", &[]);
    serves(&hosts, &receiver, &next);
    guest.quit();
}

//! Who gets in over QUIC, who does not, and what each is told.

mod common;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use common::{Dice, Host, acquainted, joined, within};
use migrate_transport::{
    AcceptError, ConnectError, Link, LinkError, PageReceiver, PageSender, Run, Section, VersionRange,
    quic::{self, Listener, Tuning},
    trust::{Ticket, Tickets},
};

/// Both ends of one attempt.
async fn attempt(
    source: &Host,
    listener: &Listener,
    ticket: Option<&Ticket>,
) -> (Result<quic::QuicLink, ConnectError>, Result<quic::QuicLink, AcceptError>) {
    within(10, async { tokio::join!(source.connect(listener, ticket), listener.accept()) }).await
}

#[tokio::test]
async fn a_ticket_enrols_both_and_serves_once() {
    let (source, other, destination) = (Host::new(), Host::new(), Host::new());
    let listener = destination.listen().await;
    let ticket = destination.tickets.issue().unwrap();
    assert_eq!(destination.tickets.open(), 1);

    let (there, here) = attempt(&source, &listener, Some(&ticket)).await;
    let (there, here) = (there.unwrap(), here.unwrap());
    assert!(there.peer().enrolled_now && here.peer().enrolled_now);
    assert_eq!(there.peer().fingerprint, destination.id.fingerprint());
    assert_eq!(here.peer().fingerprint, source.id.fingerprint());
    assert_eq!(destination.tickets.open(), 0);
    drop((there, here));

    // From now on no ticket is needed, and the old one does no harm to who is enrolled.
    for ticket in [None, Some(&ticket)] {
        let (there, here) = attempt(&source, &listener, ticket).await;
        assert!(!there.unwrap().peer().enrolled_now && !here.unwrap().peer().enrolled_now);
    }
    let listed = source.store.list().unwrap();
    assert_eq!(listed[0].addresses, [listener.local_addr().to_string()]);

    // For anybody else it is used, and its holder may know.
    let (there, here) = attempt(&other, &listener, Some(&ticket)).await;
    assert!(matches!(there.unwrap_err(), ConnectError::TicketUsed { .. }));
    assert!(matches!(here.unwrap_err(), AcceptError::TicketUsed { .. }));
    assert_eq!(other.store.list().unwrap(), []);
    assert_eq!(destination.store.list().unwrap().len(), 1);
}

#[tokio::test]
async fn one_ticket_many_hands() {
    let destination = Host::new();
    let listener = destination.listen().await;
    let ticket = destination.tickets.issue().unwrap();
    let hosts: Vec<_> = (0..6).map(|_| Host::new()).collect();
    let mut tasks = tokio::task::JoinSet::new();
    for host in hosts {
        let (ticket, address) = (ticket.clone(), listener.local_addr().to_string());
        tasks.spawn(async move {
            quic::connect(&address, &host.id, &host.store, Some(&ticket))
                .await
                .map(|link| (host, link))
        });
    }
    let mut refused = 0;
    let mut let_in = 0;
    while let Some(done) = within(10, tasks.join_next()).await {
        match done.unwrap() {
            Ok(_) => let_in += 1,
            Err(ConnectError::TicketUsed { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!((let_in, refused), (1, 5));
    assert_eq!(destination.store.list().unwrap().len(), 1);
}

#[tokio::test]
async fn a_ticket_expires() {
    let (source, mut destination) = (Host::new(), Host::new());
    let (begin, later) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let seconds = later.clone();
    let clock = Arc::new(move || begin + Duration::from_secs(seconds.load(Ordering::Relaxed)));
    destination.tickets = Tickets::with_clock(&destination.id, clock);
    let listener = destination.listen().await;
    let (early, late) = (destination.tickets.issue().unwrap(), destination.tickets.issue().unwrap());

    later.store(600, Ordering::Relaxed);
    let (there, here) = attempt(&source, &listener, Some(&late)).await;
    assert!(matches!(there.unwrap_err(), ConnectError::TicketExpired { .. }));
    assert!(matches!(here.unwrap_err(), AcceptError::TicketExpired { .. }));

    later.store(599, Ordering::Relaxed);
    let (there, here) = attempt(&source, &listener, Some(&early)).await;
    drop((there.unwrap(), here.unwrap()));
}

#[tokio::test]
async fn a_wrong_ticket_learns_nothing_and_is_not_tried_for_ever() {
    let (source, destination) = (Host::new(), Host::new());
    let listener = destination.listen().await;
    // Of the same receiver, but from another run of it.
    let forgotten = Tickets::new(&destination.id).issue().unwrap();
    for _ in 0..5 {
        let (there, here) = attempt(&source, &listener, Some(&forgotten)).await;
        assert!(matches!(there.unwrap_err(), ConnectError::TicketNotAccepted { .. }));
        assert!(matches!(here.unwrap_err(), AcceptError::WrongTicket { .. }));
    }
    // A good one is not even looked at now; whoever is trusted is not touched by it.
    let good = destination.tickets.issue().unwrap();
    let (there, here) = attempt(&source, &listener, Some(&good)).await;
    assert!(matches!(there.unwrap_err(), ConnectError::TicketNotAccepted { .. }));
    assert!(matches!(here.unwrap_err(), AcceptError::TooManyAttempts { .. }));
    source.trust(&destination);
    destination.trust(&source);
    let (there, here) = attempt(&source, &listener, None).await;
    drop((there.unwrap(), here.unwrap()));
}

#[tokio::test]
async fn a_ticket_of_another_host_stops_at_tls() {
    let (source, destination, elsewhere) = (Host::new(), Host::new(), Host::new());
    let listener = destination.listen().await;
    let ticket = elsewhere.tickets.issue().unwrap();
    let (there, here) = attempt(&source, &listener, Some(&ticket)).await;
    match there.unwrap_err() {
        ConnectError::WrongHost { expected, seen, .. } => {
            assert_eq!((expected, seen), (elsewhere.id.fingerprint(), destination.id.fingerprint()));
        }
        other => panic!("{other}"),
    }
    assert!(matches!(here.unwrap_err(), AcceptError::Handshake { .. }));
}

#[tokio::test]
async fn a_stranger_gets_the_same_refusal_always() {
    let (source, destination) = (Host::new(), Host::new());
    source.trust(&destination);
    let listener = destination.listen().await;
    let (there, here) = attempt(&source, &listener, None).await;
    assert!(matches!(there.unwrap_err(), ConnectError::NotTrusted { ours, .. } if ours == source.id.fingerprint()));
    assert!(matches!(here.unwrap_err(), AcceptError::Untrusted { fingerprint, .. } if fingerprint == source.id.fingerprint()));

    // Not even that the versions differ.
    let mut tuning = Tuning::default();
    tuning.versions = VersionRange { min: 7, max: 9 };
    let address = listener.local_addr().to_string();
    let (there, here) = tokio::join!(
        quic::connect_with(&address, &source.id, &source.store, None, &tuning),
        listener.accept()
    );
    assert!(matches!(there.unwrap_err(), ConnectError::NotTrusted { .. }));
    assert!(matches!(here.unwrap_err(), AcceptError::Untrusted { .. }));
}

#[tokio::test]
async fn an_unknown_receiver_is_not_spoken_to() {
    let (source, destination) = (Host::new(), Host::new());
    destination.trust(&source);
    let listener = destination.listen().await;
    let (there, here) = attempt(&source, &listener, None).await;
    let error = there.unwrap_err();
    assert!(matches!(error, ConnectError::Unknown { seen, .. } if seen == destination.id.fingerprint()));
    assert!(error.to_string().contains("--ticket"));
    assert!(here.is_err());
}

#[tokio::test]
async fn a_changed_identity_is_refused_even_if_trusted_elsewhere() {
    let (source, first, second) = (Host::new(), Host::new(), Host::new());
    let ticket = first.tickets.issue().unwrap();
    let listener = first.listen().await;
    let (there, here) = attempt(&source, &listener, Some(&ticket)).await;
    drop((there.unwrap(), here.unwrap()));
    let address = listener.local_addr();
    drop(listener);

    source.trust(&second);
    second.trust(&source);
    let again = rebind(&second, address).await;
    let (there, _) = attempt(&source, &again, None).await;
    match there.unwrap_err() {
        ConnectError::Changed { expected, seen, .. } => {
            assert_eq!((expected, seen), (first.id.fingerprint(), second.id.fingerprint()));
        }
        other => panic!("{other}"),
    }
    // A ticket of the new one is the way to say that this is meant.
    let ticket = second.tickets.issue().unwrap();
    let (there, here) = attempt(&source, &again, Some(&ticket)).await;
    drop((there.unwrap(), here.unwrap()));
    let (there, here) = attempt(&source, &again, None).await;
    drop((there.unwrap(), here.unwrap()));
}

/// Binds a port that another listener has just left.
async fn rebind(host: &Host, address: SocketAddr) -> Listener {
    for _ in 0..100 {
        if let Ok(listener) = Listener::bind(address, &host.id, host.store.clone(), host.tickets.clone()).await {
            return listener;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{address} stays taken");
}

#[tokio::test]
async fn versions_that_do_not_meet_are_both_named() {
    let (source, destination) = acquainted();
    let listener = destination.listen().await;
    let address = listener.local_addr().to_string();
    let mut tuning = Tuning::default();
    tuning.versions = VersionRange { min: 2, max: 4 };
    let connect = quic::connect_with(&address, &source.id, &source.store, None, &tuning);
    let (there, here) = tokio::join!(connect, listener.accept());
    match there.unwrap_err() {
        ConnectError::Link(LinkError::Version { ours, theirs }) => {
            assert_eq!((ours, theirs), (VersionRange { min: 2, max: 4 }, quic::VERSIONS));
        }
        other => panic!("{other}"),
    }
    assert!(matches!(here.unwrap_err(), AcceptError::Version { .. }));

    tuning.versions = VersionRange { min: 1, max: 4 };
    let connect = quic::connect_with(&address, &source.id, &source.store, None, &tuning);
    let (there, here) = tokio::join!(connect, listener.accept());
    assert_eq!((there.unwrap().peer().version, here.unwrap().peer().version), (1, 1));
}

#[tokio::test]
async fn every_failure_to_reach_a_host_has_its_name() {
    let host = Host::new();
    let connect = |address: &str| {
        let (address, id, store) = (address.to_owned(), host.id.clone(), host.store.clone());
        let mut tuning = Tuning::default();
        tuning.connect_timeout = Duration::from_millis(300);
        async move {
            within(5, quic::connect_with(&address, &id, &store, None, &tuning))
                .await
                .unwrap_err()
        }
    };
    for bad in ["", "host", "host:", "host:port", "host:70000", ":1", "a b:1", "::1:1"] {
        assert!(matches!(connect(bad).await, ConnectError::Address { .. }), "{bad}");
    }
    assert!(matches!(connect("no-such-host.invalid:1").await, ConnectError::Resolve { .. }));

    // A port that is free, and one where somebody listens who does not speak QUIC.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    assert!(matches!(
        connect(&silent.local_addr().unwrap().to_string()).await,
        ConnectError::NoAnswer { .. }
    ));
    let free = silent.local_addr().unwrap().to_string();
    drop(silent);
    assert!(matches!(connect(&free).await, ConnectError::Refused { .. }));

    // Something that speaks QUIC, and is no receiver.
    let other = migrate_transport::ceiling::serve(([127, 0, 0, 1], 0).into()).await.unwrap();
    assert!(matches!(
        connect(&other.local_addr().to_string()).await,
        ConnectError::NotMigrate { .. }
    ));
}

#[tokio::test]
async fn stalled_strangers_do_not_block_the_door() {
    let (source, destination) = acquainted();
    let mut tuning = Tuning::default();
    tuning.handshake_timeout = Duration::from_millis(700);
    let listener = destination.listen_with(tuning).await;
    let address = listener.local_addr();
    // A first packet that is no hello, many times over, and nothing after it.
    let noise = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for seed in 0..50 {
        noise.send_to(&Dice(seed).bytes(1200), address).unwrap();
    }
    let begun = Instant::now();
    let (there, here) = attempt(&source, &listener, None).await;
    drop((there.unwrap(), here.unwrap()));
    assert!(begun.elapsed() < Duration::from_millis(700));
}

#[tokio::test]
async fn a_peer_that_dies_is_noticed() {
    let mut tuning = Tuning::default();
    tuning.keep_alive = Duration::from_millis(100);
    tuning.idle_timeout = Duration::from_secs(20);
    // The destination lives in a runtime of its own, which is shot in the middle of a stream.
    let (source, destination) = acquainted();
    let doomed = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (address_in, address_out) = tokio::sync::oneshot::channel();
    let doomed_tuning = tuning.clone();
    doomed.spawn(async move {
        let listener = destination.listen_with(doomed_tuning).await;
        address_in.send(listener.local_addr().to_string()).unwrap();
        let mut link = listener.accept().await.unwrap();
        let mut pages = link.accept_pages().await.unwrap();
        while let Ok(Some(_)) = pages.recv().await {}
    });
    let address = address_out.await.unwrap();
    let mut link = quic::connect_with(&address, &source.id, &source.store, None, &tuning)
        .await
        .unwrap();
    let mut sender = link.open_pages().await.unwrap();
    let page = bytes::Bytes::from(vec![7; 4096]);
    let run = Run::new(0, 0, 1, false).unwrap();
    sender.send(&[run], vec![page.clone()]).await.unwrap();
    doomed.shutdown_background();

    let begun = Instant::now();
    let error = within(10, async {
        loop {
            if let Err(error) = sender.send(&[run], vec![page.clone()]).await {
                break error;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert!(matches!(error, LinkError::Closed { clean: false, .. }), "{error}");
    assert!(link.recv().await.is_err_and(|e| e.is_closed()));
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "long before the idle time-out: {:?}",
        begun.elapsed()
    );
}

/// Passes datagrams on between one client and the address, until it is told that the cable is out.
fn relay(to: SocketAddr) -> (String, Arc<AtomicBool>) {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    socket.set_nonblocking(true).unwrap();
    let out = Arc::new(AtomicBool::new(false));
    let cut = out.clone();
    tokio::spawn(async move {
        let socket = tokio::net::UdpSocket::from_std(socket).unwrap();
        let mut client = None;
        let mut bytes = vec![0; 65_536];
        while let Ok((len, from)) = socket.recv_from(&mut bytes).await {
            let next = if from == to { client } else { Some(to) };
            if from != to {
                client = Some(from);
            }
            if let Some(next) = next.filter(|_| !cut.load(Ordering::Relaxed)) {
                let _ = socket.send_to(&bytes[..len], next).await;
            }
        }
    });
    (address.to_string(), out)
}

#[tokio::test]
async fn silence_is_told_from_a_death() {
    let mut tuning = Tuning::default();
    tuning.keep_alive = Duration::from_millis(100);
    tuning.idle_timeout = Duration::from_millis(1500);
    let (source, destination) = acquainted();
    let listener = destination.listen_with(tuning.clone()).await;
    let (address, cut) = relay(listener.local_addr());
    let there = quic::connect_with(&address, &source.id, &source.store, None, &tuning);
    let (there, here) = tokio::join!(there, listener.accept());
    let (mut there, mut here) = (there.unwrap(), here.unwrap());
    cut.store(true, Ordering::Relaxed);
    let begun = Instant::now();
    let (a, b) = within(20, async { tokio::join!(there.recv(), here.recv()) }).await;
    for error in [a.unwrap_err(), b.unwrap_err()] {
        assert!(error.is_silence() && error.is_closed(), "{error}");
        assert!(error.to_string().contains("nothing was heard"), "{error}");
    }
    assert!(begun.elapsed() >= Duration::from_millis(1300), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_dropped_link_tells_its_peer() {
    let (there, mut here, _listener, _hosts) = joined(Tuning::default()).await;
    drop(there);
    let error = within(5, here.recv()).await.unwrap_err();
    assert!(matches!(error, LinkError::Closed { clean: false, .. }), "{error}");
}

/// Both ends of a second connection, on a socket of the destination's that hears the source alone.
async fn apart(there: &mut quic::QuicLink, here: &mut quic::QuicLink) -> (quic::QuicLink, quic::QuicLink) {
    let next = here.apart().unwrap();
    // Until then the first one goes on.
    for word in ["still", "here"] {
        there.send(Section::new(1, 2, word)).await.unwrap();
        here.send(Section::new(1, 2, word)).await.unwrap();
        assert_eq!(within(5, there.recv()).await.unwrap().payload, word);
        assert_eq!(within(5, here.recv()).await.unwrap().payload, word);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (there, here) = within(10, async { tokio::join!(there.again(), next) }).await;
    (there.unwrap(), here.unwrap())
}

#[tokio::test]
async fn a_connection_has_a_socket_of_its_own() {
    for any in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0"] {
        let (source, destination) = acquainted();
        let (id, store, tickets) = (&destination.id, destination.store.clone(), destination.tickets.clone());
        let listener = Listener::bind(any.parse().unwrap(), id, store, tickets).await.unwrap();
        let port = listener.local_addr().port();
        let connect = || async {
            let address = format!("127.0.0.1:{port}");
            let connecting = quic::connect(&address, &source.id, &source.store, None);
            let (there, here) = within(10, async { tokio::join!(connecting, listener.accept()) }).await;
            (there.unwrap(), here.unwrap())
        };
        let (mut first_there, mut first_here) = connect().await;
        assert!(first_there.apart().is_err(), "only who listens has a port to share");
        let (mut there, mut here) = apart(&mut first_there, &mut first_here).await;
        assert_eq!(there.peer().fingerprint, destination.id.fingerprint());
        assert_eq!(here.peer().fingerprint, source.id.fingerprint());
        assert_eq!(here.peer().address, first_here.peer().address, "the same socket of the source");
        drop((first_there, first_here));
        // Others come in as before, and what they say does not end up there.
        let (mut other_there, mut other_here) = connect().await;
        for word in ["one", "two"] {
            there.send(Section::new(1, 2, word)).await.unwrap();
            other_there.send(Section::new(3, 4, word)).await.unwrap();
            assert_eq!(within(5, here.recv()).await.unwrap().kind, 1);
            assert_eq!(within(5, other_here.recv()).await.unwrap().kind, 3);
        }
        // The port is nobody else's.
        let taken = std::net::UdpSocket::bind(("127.0.0.1", port));
        assert!(taken.is_err());
        // Nor once it is over.
        drop((there, here));
        drop(connect().await);
        assert!(std::net::UdpSocket::bind(("127.0.0.1", port)).is_err());
    }
}

#[tokio::test]
async fn links_outlive_their_listener() {
    let (mut there, mut here, listener, _hosts) = joined(Tuning::default()).await;
    listener.close().await;
    assert!(within(5, listener.accept()).await.is_err_and(|e| e.is_fatal()));
    drop(listener);
    there.send(Section::new(1, 2, &b"still here"[..])).await.unwrap();
    assert_eq!(within(5, here.recv()).await.unwrap().payload, "still here");
}

#[tokio::test]
async fn control_passes_page_streams_nobody_reads() {
    let mut tuning = Tuning::default();
    tuning.stream_window = 1 << 20;
    let (mut there, mut here, _listener, _hosts) = joined(tuning).await;
    let mut sender = there.open_pages().await.unwrap();
    let stuck = tokio::spawn(async move {
        let data = bytes::Bytes::from(vec![1; 256 * 4096]);
        loop {
            let run = Run::new(0, 0, 256, false).unwrap();
            if sender.send(&[run], vec![data.clone()]).await.is_err() {
                break;
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (sent, received) = within(5, async {
        tokio::join!(there.send(Section::new(1, 1, vec![5; 1 << 20])), here.recv())
    })
    .await;
    sent.unwrap();
    assert_eq!(received.unwrap().payload.len(), 1 << 20);
    stuck.abort();
}

#[tokio::test]
async fn a_receiver_that_was_restarted_says_so_at_once() {
    let (source, destination) = acquainted();
    let doomed = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (id, store, tickets) = (destination.id.clone(), destination.store.clone(), destination.tickets.clone());
    let (address_in, address_out) = tokio::sync::oneshot::channel();
    doomed.spawn(async move {
        let listener = Listener::bind(([127, 0, 0, 1], 0).into(), &id, store, tickets).await.unwrap();
        address_in.send(listener.local_addr()).unwrap();
        let _link = listener.accept().await.unwrap();
        std::future::pending::<()>().await;
    });
    let address = address_out.await.unwrap();
    let mut link = quic::connect(&address.to_string(), &source.id, &source.store, None).await.unwrap();
    doomed.shutdown_background();
    let _again = rebind(&destination, address).await;
    let begun = Instant::now();
    link.send(Section::new(1, 1, vec![1; 5000])).await.unwrap();
    let error = within(10, link.recv()).await.unwrap_err();
    assert!(matches!(error, LinkError::Closed { clean: false, .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(8), "long before the idle time-out");
}

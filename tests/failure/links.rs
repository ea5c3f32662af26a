//! Links that delay, reorder, lose, or carry little: a relay between the agents does to their datagrams what such a link would. The program is moved all the same, and
//! nothing of it is lost.

use crate::{Dice, copies};
use migrate_harness::{Ended, Guest, Hosts, Stdio, two_hosts};
use nix::sched::{CloneFlags, setns};
use std::{
    collections::BTreeMap,
    fs::File,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// What the relay does.
#[derive(Debug, Clone, Copy, Default)]
struct Weather {
    /// One way.
    delay: Duration,
    /// Of a hundred datagrams so many are held back by ten milliseconds more.
    late: u64,
    /// Of a hundred so many are lost.
    lost: u64,
    /// Bytes a second each way, with a queue of a quarter of a second; more is lost. 0: no limit.
    rate: u64,
}

/// One way through the relay: datagrams by when they are due.
struct Way {
    queue: BTreeMap<(Instant, u64), (Vec<u8>, SocketAddr)>,
    /// When the last byte of what was let in has left.
    busy: Instant,
    number: u64,
    dice: Dice,
}

impl Way {
    fn new(seed: u64) -> Way {
        Way {
            queue: BTreeMap::new(),
            busy: Instant::now(),
            number: 0,
            dice: Dice(seed | 1),
        }
    }

    fn percent(&mut self) -> u64 {
        (self.dice.draw() >> 20) % 100
    }

    /// False: it is lost.
    fn take(&mut self, w: Weather, bytes: &[u8], to: SocketAddr) -> bool {
        let now = Instant::now();
        if self.percent() < w.lost {
            return false;
        }
        let mut due = now + w.delay;
        if w.rate > 0 {
            self.busy = self.busy.max(now);
            if self.busy > now + Duration::from_millis(250) {
                return false;
            }
            self.busy += Duration::from_secs_f64(bytes.len() as f64 / w.rate as f64);
            due = self.busy + w.delay;
        }
        if self.percent() < w.late {
            due += Duration::from_millis(10);
        }
        self.number += 1;
        self.queue.insert((due, self.number), (bytes.to_vec(), to));
        true
    }

    fn give(&mut self, socket: &UdpSocket) {
        let now = Instant::now();
        while let Some(first) = self.queue.first_entry().filter(|e| e.key().0 <= now) {
            let (bytes, to) = first.remove();
            let _ = socket.send_to(&bytes, to);
        }
    }
}

/// A relay in the network of host A, which takes a sender's datagrams to a receiver at B. It ends with this value.
struct Relay {
    address: String,
    stop: Arc<AtomicBool>,
    passed: Arc<AtomicU64>,
    dropped: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    fn start(hosts: &Hosts, to: &str, weather: Weather) -> Relay {
        let net = File::open(format!("/proc/{}/ns/net", hosts.a.init())).expect("the host's network");
        let (to, own): (SocketAddr, String) = (to.parse().expect("an address"), format!("{}:0", hosts.a.address()));
        let (stop, passed, dropped) = (
            Arc::<AtomicBool>::default(),
            Arc::<AtomicU64>::default(),
            Arc::<AtomicU64>::default(),
        );
        let (tell, told) = std::sync::mpsc::channel();
        let shared = (stop.clone(), passed.clone(), dropped.clone());
        let thread = thread::spawn(move || {
            let (stop, passed, dropped) = shared;
            setns(net, CloneFlags::CLONE_NEWNET).expect("setns");
            let socket = |at: &str| {
                let socket = UdpSocket::bind(at).expect("a socket");
                socket.set_nonblocking(true).expect("a socket that does not wait");
                socket
            };
            let near = socket(&own);
            tell.send(near.local_addr().expect("its address").to_string()).expect("the test");
            // Every connection of the sender's has a port of its own, and gets one here.
            let mut far: BTreeMap<SocketAddr, (UdpSocket, Way)> = BTreeMap::new();
            let mut back = Way::new(7);
            let mut bytes = vec![0; 65536];
            while !stop.load(Ordering::SeqCst) {
                let mut idle = true;
                while let Some((n, from)) = received(&near, &mut bytes) {
                    idle = false;
                    let (_, way) = far.entry(from).or_insert_with(|| (socket(&own), Way::new(from.port().into())));
                    let counter = if way.take(weather, &bytes[..n], to) { &passed } else { &dropped };
                    counter.fetch_add(1, Ordering::SeqCst);
                }
                for (client, (socket, way)) in &mut far {
                    while let Some((n, _)) = received(socket, &mut bytes) {
                        idle = false;
                        let counter = if back.take(weather, &bytes[..n], *client) {
                            &passed
                        } else {
                            &dropped
                        };
                        counter.fetch_add(1, Ordering::SeqCst);
                    }
                    way.give(socket);
                }
                back.give(&near);
                if idle {
                    thread::sleep(Duration::from_micros(300));
                }
            }
        });
        Relay {
            address: told.recv().expect("the relay's address"),
            stop,
            passed,
            dropped,
            thread: Some(thread),
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn received(socket: &UdpSocket, bytes: &mut [u8]) -> Option<(usize, SocketAddr)> {
    // An error may be that of a datagram sent before, which found nobody.
    socket.recv_from(bytes).ok()
}

fn moves_through(weather: Weather, mib: &str, modes: &[&str]) {
    for mode in modes {
        let hosts = two_hosts!();
        let guest = Guest::start(&hosts.a, "ballast", &[("mib", mib), ("dirty", "2")]);
        let receiver = hosts.b.receive(&Stdio::Null);
        let relay = Relay::start(&hosts, &receiver.target, weather);
        let pid = guest.pid.to_string();
        let args = ["send", &pid, &relay.address, "--ticket", &receiver.ticket, "--json", "--mode", mode];
        let sender = hosts.a.migrate(&args).start();
        let ended = sender.wait_for(Duration::from_secs(120));
        let report: serde_json::Value = serde_json::from_str(&sender.stdout()).unwrap_or_default();
        println!(
            "{mode} over {weather:?}: {ended:?}, freeze {} ms, {} ms in all, {} datagrams, {} lost",
            report["downtime_ms"],
            report["total_ms"],
            relay.passed.load(Ordering::SeqCst),
            relay.dropped.load(Ordering::SeqCst)
        );
        assert_eq!(
            ended,
            Ended::Code(0),
            "{mode} over {weather:?}: {} {}",
            sender.stdout(),
            sender.stderr()
        );
        assert_eq!(
            receiver.process.wait_for(Duration::from_secs(60)),
            Ended::Code(0),
            "{}",
            receiver.process.stderr()
        );
        assert!(relay.passed.load(Ordering::SeqCst) > 500, "it went another way");
        let list = copies(&hosts, &guest);
        assert!(
            list.len() == 1 && list[0].0.name() == "b",
            "{mode} over {weather:?}: {} copies",
            list.len()
        );
        assert!(guest.beats(), "{mode} over {weather:?}: it stands still");
        guest.verify(&format!("{mode} over {weather:?}"));
        guest.quit();
    }
}

#[test]
fn link_that_delays() {
    let weather = Weather {
        delay: Duration::from_millis(40),
        ..Weather::default()
    };
    moves_through(weather, "24", &["hybrid", "post-copy"]);
}

#[test]
fn link_that_reorders_and_loses() {
    let weather = Weather {
        delay: Duration::from_millis(2),
        late: 10,
        lost: 1,
        ..Weather::default()
    };
    moves_through(weather, "16", &["pre-copy", "post-copy"]);
}

#[test]
fn link_that_carries_a_megabyte_a_second() {
    let weather = Weather {
        delay: Duration::from_millis(1),
        rate: 1_000_000,
        ..Weather::default()
    };
    moves_through(weather, "8", &["hybrid", "post-copy"]);
}

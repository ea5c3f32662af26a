//! Links that delay, reorder, lose, or carry little: a relay between the agents does to their datagrams what such a link would.

use crate::{Dice, Hosts};
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{setsockopt, sockopt},
};
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

/// Bytes that wait for the relay at most.
const BUFFER: usize = 32 << 20;

/// What the relay does.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    /// One way.
    pub delay: Duration,
    /// Of a hundred datagrams so many are held back by ten milliseconds more.
    pub late: u64,
    /// Of a hundred so many are lost.
    pub lost: u64,
    /// Bytes a second each way, with a queue of a quarter of a second; more is lost. 0: no limit.
    pub rate: u64,
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
            dice: Dice::of(seed),
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
pub struct Relay {
    /// What to send to in the receiver's stead.
    pub address: String,
    stop: Arc<AtomicBool>,
    passed: Arc<AtomicU64>,
    dropped: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Between the sender at A and the receiver whose HOST:PORT this is.
    pub fn start(hosts: &Hosts, to: &str, weather: Weather) -> Relay {
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
                // A burst of a sender that sees no loss is megabytes; what the kernel's own buffer drops would be another link than the one asked for.
                setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).expect("a large buffer");
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

    /// Datagrams that were passed on, or will be.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::SeqCst)
    }

    /// Datagrams that were lost on the way.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::SeqCst)
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

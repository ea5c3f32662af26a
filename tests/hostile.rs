//! Peers that are permitted and do not keep to the protocol: one that says wrong things, at the wrong time, too much, or nothing at all. The program lives on where it
//! was, nothing is started, and the agent says what was wrong. What a stranger can do is the transport's to test (`transport/tests`).

use migrate_engine::{
    dump::pages::OBJECT_SPACE,
    image::PAGE,
    wire::{self, Accept, Applied, Attached, Message, Ranges},
};
use migrate_harness::{Ended, Guest, Hosts, Receiver, Run, Stdio, eventually, two_hosts, within};
use migrate_transport::{
    Link, PageFrame, PageReceiver, PageSender, Section, codec,
    quic::{self, Listener, QuicLink},
    trust::{Identity, Ticket, Tickets, TrustStore},
};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

/// Shorter than the default of two minutes: peers stall here on purpose.
const PATIENT: [&str; 2] = ["--peer-timeout", "2s"];

/// What a receiver does at a message instead of what it should.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wrong {
    Close,
    Stall,
    /// A message of the right kind that is noise.
    Noise,
    /// A message that nobody knows.
    Unknown,
    /// Of another release.
    Version,
    /// Every message that does not belong there, this one.
    Else(u8),
    /// A message that never ends.
    Endless,
    /// More than was sent has arrived.
    Counts,
    /// All memory there could be is missing.
    Missed,
}

const EVERYWHERE: [Wrong; 11] = [
    Wrong::Close,
    Wrong::Stall,
    Wrong::Noise,
    Wrong::Unknown,
    Wrong::Version,
    Wrong::Else(0),
    Wrong::Else(1),
    Wrong::Else(2),
    Wrong::Else(3),
    Wrong::Else(4),
    Wrong::Endless,
];

/// What a conversation was, for one that repeats it.
#[derive(Clone)]
#[expect(clippy::large_enum_variant, reason = "there are a handful of them")]
enum Said {
    Message(Message),
    Pages(Vec<PageFrame>),
}

/// A receiver that does something wrong at a message, and gives up at the handover otherwise.
struct Fake {
    at: &'static str,
    /// How often it keeps to the protocol there before.
    after: u32,
    wrong: Option<Wrong>,
    /// It has done it.
    struck: Arc<AtomicBool>,
    heard: Arc<Mutex<Vec<Said>>>,
}

async fn pages(link: &mut QuicLink, bytes: u64) -> Option<(u64, u64, Vec<PageFrame>)> {
    let (mut pages, mut zero, mut frames) = (0, 0, Vec::new());
    if bytes > 0 {
        let mut stream = link.accept_pages().await.ok()?;
        while let Some(frame) = stream.recv().await.ok()? {
            for r in &frame.runs {
                *(if r.zero { &mut zero } else { &mut pages }) += u64::from(r.pages);
            }
            frames.push(frame);
        }
    }
    Some((pages, zero, frames))
}

impl Fake {
    /// Serves connections until the thread's end is wanted.
    async fn serve(self: Arc<Fake>, listener: Listener) {
        loop {
            if let Ok(link) = listener.accept().await {
                let me = self.clone();
                tokio::spawn(async move { me.talk(link).await });
            }
        }
    }

    async fn talk(&self, mut link: QuicLink) -> Option<()> {
        let mut seen = 0;
        loop {
            let m = wire::recv(&mut link).await.ok()?;
            let bytes = match &m {
                Message::Round(r) => r.bytes,
                Message::Memory(m) => m.bytes,
                _ => 0,
            };
            let (name, said) = (m.name(), Said::Message(m.clone()));
            self.heard.lock().unwrap().push(said);
            let (pages, zero, frames) = pages(&mut link, bytes).await?;
            if !frames.is_empty() {
                self.heard.lock().unwrap().push(Said::Pages(frames));
            }
            let wrong = self.wrong.filter(|_| name == self.at);
            if wrong.is_some() {
                seen += 1;
            }
            if let Some(wrong) = wrong.filter(|_| seen > self.after) {
                self.struck.store(true, Ordering::SeqCst);
                return misbehave(&mut link, wrong, &m, (pages, zero)).await;
            }
            let answer = match m {
                Message::Inventory(i) => Message::Accept(Accept {
                    host: i.tree.host,
                    fresh_pids: false,
                    shared_follows: true,
                }),
                Message::Probe(_) => Message::Pending,
                Message::Round(r) => Message::Applied(Applied {
                    number: r.number,
                    pages,
                    zero,
                    missed: Vec::new(),
                    shape_ms: 1.0,
                }),
                Message::State(_) | Message::Memory(_) => continue,
                Message::Attach(_) => Message::Attached(Attached {
                    missing: Vec::new(),
                    again: false,
                }),
                Message::Handover(_) | Message::Query(_) => Message::Aborted("this one takes nothing".into()),
                _ => return None,
            };
            wire::send(&mut link, &answer).await.ok()?;
        }
    }
}

async fn section(link: &mut QuicLink, kind: u16, version: u16, payload: Vec<u8>) -> Option<()> {
    link.send(Section::new(kind, version, payload)).await.ok()
}

async fn misbehave(link: &mut QuicLink, wrong: Wrong, m: &Message, (pages, zero): (u64, u64)) -> Option<()> {
    // The kinds of Accept, Applied, Running.
    let kind = match m {
        Message::Inventory(_) => 2,
        Message::Round(_) => 12,
        _ => 6,
    };
    let number = if let Message::Round(r) = m { r.number } else { 0 };
    let applied = |pages, missed| {
        Message::Applied(Applied {
            number,
            pages,
            zero,
            missed,
            shape_ms: f64::NAN,
        })
    };
    match wrong {
        Wrong::Close => {
            link.close("for no reason").await;
            return None;
        }
        Wrong::Stall => tokio::time::sleep(Duration::from_secs(20)).await,
        Wrong::Noise => section(link, kind, wire::VERSION, (0..=255).cycle().take(3000).collect()).await?,
        Wrong::Unknown => section(link, 77, wire::VERSION, vec![1; 10]).await?,
        Wrong::Version => section(link, kind, wire::VERSION + 1, vec![1; 10]).await?,
        Wrong::Else(which) => {
            let m = match which {
                0 => Message::Drained(Box::default()),
                1 => Message::Credit(1 << 40),
                2 => Message::Fault(wire::Fault { space: 0, at: 0x1000 }),
                3 => Message::Pending,
                _ => Message::Attached(Attached {
                    missing: Vec::new(),
                    again: false,
                }),
            };
            wire::send(link, &m).await.ok()?;
        }
        // Pieces of a message, of which there may be 256 MiB.
        Wrong::Endless => {
            for _ in 0..40 {
                section(link, 100, wire::VERSION, vec![7; 8 << 20]).await?;
            }
        }
        Wrong::Counts => wire::send(link, &applied(pages + 1, Vec::new())).await.ok()?,
        Wrong::Missed => {
            let all = |space| (space, 0, (1 << 56) - PAGE);
            let missed = (0..4).map(all).chain((0..4).map(|o| all(OBJECT_SPACE + o)));
            wire::send(link, &applied(pages, missed.collect())).await.ok()?;
        }
    }
    // What the other side says to it.
    let _ = tokio::time::timeout(Duration::from_secs(5), link.recv()).await;
    None
}

/// Sends a guest to a receiver that is not one; the sender's end, and what it had said.
fn sent_to(hosts: &Hosts, guest: &Guest, fake: Fake, mode: &str) -> (Run, Vec<Said>) {
    let heard = fake.heard.clone();
    let fake = Arc::new(fake);
    let (tell, told) = mpsc::channel();
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let run = thread::scope(|scope| {
        scope.spawn(|| {
            hosts.b.inside_async(async move || {
                let dir = tempfile::tempdir().expect("a directory");
                let id = Identity::ephemeral().expect("an identity");
                let store = TrustStore::open(dir.path()).expect("a trust store");
                let tickets = Tickets::new(&id);
                let address = format!("{}:0", hosts.b.address()).parse().expect("an address");
                let listener = Listener::bind(address, &id, store, tickets.clone()).await.expect("a listener");
                let ticket = tickets.issue().expect("a ticket").to_string();
                tell.send((listener.local_addr(), ticket)).expect("the test");
                tokio::select! {
                    () = fake.serve(listener) => {}
                    _ = ended => {}
                }
            });
        });
        let (address, ticket) = told.recv().expect("where it listens");
        let (pid, to) = (guest.pid.to_string(), address.to_string());
        let args = ["send", &pid, &to, "--ticket", &ticket, "--json", "--mode", mode];
        let run = hosts.a.run(&[&args[..], &PATIENT].concat());
        let _ = end.send(());
        run
    });
    let heard = heard.lock().unwrap().clone();
    (run, heard)
}

fn fake(at: &'static str, after: u32, wrong: Option<Wrong>) -> Fake {
    Fake {
        at,
        after,
        wrong,
        struck: Arc::default(),
        heard: Arc::default(),
    }
}

/// The program is at A, runs, and is right.
fn lives_on(hosts: &Hosts, guest: &Guest, what: &str) {
    let state = || hosts.a.process(guest.pid).map(|p| p.state);
    assert!(
        eventually(Duration::from_secs(5), || matches!(state(), Some('R' | 'S'))),
        "{what}: {:?}",
        state()
    );
    assert!(guest.beats(), "{what}: it stands still");
    guest.verify(what);
}

/// It can still be moved.
fn moves_still(hosts: &Hosts, guest: &Guest, mode: &str) {
    let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &["--mode", mode]);
    guest.verify("on b");
    assert!(moved.pid > 0);
    guest.quit();
}

fn wrong_receivers(at: &'static str, after: u32, mode: &str, more: &[Wrong]) {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "16"), ("dirty", "4"), ("shared", "1")]);
    for wrong in EVERYWHERE.iter().chain(more) {
        let what = format!("{wrong:?} at {at}, {mode}");
        let fake = fake(at, after, Some(*wrong));
        let struck = fake.struck.clone();
        let (run, _) = sent_to(&hosts, &guest, fake, mode);
        assert!(
            struck.load(Ordering::SeqCst),
            "{what}: it did not come to that: {} {}",
            run.stdout,
            run.stderr
        );
        println!("{what}: {}", run.stdout.trim());
        assert!(!run.stderr.contains("panicked"), "{what}: {}", run.stderr);
        assert_eq!(run.code, 1, "{what}: {} {}", run.stdout, run.stderr);
        lives_on(&hosts, &guest, &what);
    }
    let open = hosts.a.run(&["recover", "--json"]);
    assert!(open.stdout.contains("\"handovers\":[]"), "{}", open.stdout);
    moves_still(&hosts, &guest, mode);
}

#[test]
fn receivers_that_answer_the_inventory_wrongly() {
    wrong_receivers("Inventory", 0, "hybrid", &[]);
}

#[test]
fn receivers_that_answer_a_round_wrongly() {
    wrong_receivers("Round", 0, "pre-copy", &[Wrong::Counts, Wrong::Missed]);
}

#[test]
fn receivers_that_answer_a_later_round_wrongly() {
    wrong_receivers("Round", 1, "pre-copy", &[Wrong::Counts, Wrong::Missed]);
}

#[test]
fn receivers_that_answer_the_state_wrongly() {
    wrong_receivers("State", 0, "post-copy", &[]);
}

#[test]
fn receivers_that_answer_the_handover_wrongly() {
    wrong_receivers("Handover", 0, "hybrid", &[]);
}

/// A permitted sender, with what a real one has said.
struct Sender {
    id: Identity,
    store: TrustStore,
    _dir: tempfile::TempDir,
    target: String,
    ticket: Option<Ticket>,
}

impl Sender {
    async fn connect(&mut self) -> QuicLink {
        let link = quic::connect(&self.target, &self.id, &self.store, self.ticket.as_ref()).await;
        self.ticket = None;
        link.expect("a connection")
    }
}

/// Numbers for what is drawn at random.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        // splitmix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % n.max(1) as u64) as usize
    }
}

/// What is put in the place of something that was said.
#[expect(clippy::large_enum_variant, reason = "there are a handful of them")]
enum Instead {
    Said(Said),
    /// A section of this kind.
    Bytes(u16, Vec<u8>),
    Nothing,
    Stall,
}

/// How a conversation ended.
#[derive(Debug, Clone, PartialEq)]
enum End {
    /// The copy was released.
    Released,
    /// It was told why not.
    Told(String),
    /// It was cut off, or stopped by itself.
    Cut,
}

impl End {
    fn of(m: Message) -> Option<End> {
        match m {
            Message::Running(_) => Some(End::Released),
            Message::Aborted(why) => Some(End::Told(why)),
            Message::Refuse(blockers) => Some(End::Told(format!("{blockers:?}"))),
            _ => None,
        }
    }
}

/// Repeats a conversation until something is answered by an end.
async fn repeat(link: &mut QuicLink, what: &[Instead]) -> End {
    for said in what {
        let sent = match said {
            Instead::Nothing => Some(()),
            Instead::Stall => {
                tokio::time::sleep(Duration::from_secs(3)).await;
                None
            }
            Instead::Bytes(kind, bytes) => section(link, *kind, wire::VERSION, bytes.clone()).await,
            Instead::Said(Said::Message(m)) => wire::send(link, m).await.ok(),
            Instead::Said(Said::Pages(frames)) => push(link, frames).await,
        };
        if sent.is_none() {
            break;
        }
        let answers = matches!(said, Instead::Said(Said::Message(Message::Inventory(_) | Message::Handover(_))))
            || matches!(said, Instead::Bytes(1 | 5, _));
        if answers {
            match tokio::time::timeout(Duration::from_secs(10), wire::recv(link)).await {
                Ok(Ok(m)) => {
                    if let Some(end) = End::of(m) {
                        return end;
                    }
                }
                _ => return End::Cut,
            }
        }
    }
    // What it says to the rest, or that it is gone.
    while let Ok(Ok(m)) = tokio::time::timeout(Duration::from_millis(2500), wire::recv(link)).await {
        if let Some(end) = End::of(m) {
            return end;
        }
    }
    End::Cut
}

async fn push(link: &mut QuicLink, frames: &[PageFrame]) -> Option<()> {
    let mut pages = link.open_pages().await.ok()?;
    for frame in frames {
        pages.send(&frame.runs, frame.data.clone()).await.ok()?;
    }
    pages.end().await.ok()
}

fn kind(m: &Message) -> u16 {
    match m {
        Message::Inventory(_) => 1,
        Message::State(_) => 4,
        Message::Handover(_) => 5,
        Message::Round(_) => 11,
        Message::Memory(_) => 18,
        _ => 8,
    }
}

/// Bytes of a message with something changed.
fn garbled(m: &Message, numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = codec::encode(m).expect("a message").to_vec();
    match numbers.below(4) {
        0 => bytes.truncate(numbers.below(bytes.len())),
        1 => bytes.extend((0..1 + numbers.below(64)).map(|k| k as u8)),
        _ => {
            for _ in 0..1 + numbers.below(4) {
                let (at, bit) = (numbers.below(bytes.len()), numbers.below(8));
                bytes[at] ^= 1 << bit;
            }
        }
    }
    bytes
}

/// A message that claims what cannot be.
fn outrageous(m: &Message, numbers: &mut Numbers) -> Message {
    let everything = [(0, (1 << 56) - PAGE)];
    let mut m = m.clone();
    let twist = |tree: &mut migrate_engine::image::Tree, which: usize| match which {
        0 => tree.processes[0].parent = Some(0),
        1 => tree.processes[0].parent = Some(9),
        2 => tree.processes[0].mm = 1 << 30,
        3 => tree.processes[0].cwd.path = b"/tmp/\0/x".to_vec(),
        4 => tree.processes[0].cwd.path = b"../../../../../../etc".to_vec(),
        5 => tree.processes.clear(),
        6 => tree.mms[0].vmas.iter_mut().for_each(|v| (v.start, v.end) = (v.end, v.start)),
        7 => tree.mms[0].vmas.iter_mut().for_each(|v| v.start += 1),
        8 => tree.mms[0].vmas.truncate(1),
        9 => tree.objects.iter_mut().for_each(|o| o.size = 1 << 62),
        10 => tree.processes[0].pid = -5,
        11 => {
            let same = tree.processes[0].clone();
            tree.processes.push(same);
        }
        12 => tree.processes[0].threads.clear(),
        13 => {
            if let Some(fd) = tree.processes[0].fds.first_mut() {
                fd.description = 1 << 20;
            }
        }
        _ => tree.descriptions.clear(),
    };
    match &mut m {
        Message::Inventory(i) => match numbers.below(16) {
            15 => i.id = "../../../../tmp/x".into(),
            which => twist(&mut i.tree, which),
        },
        Message::Round(r) => match numbers.below(20) {
            15 => r.bytes = 1 << 60,
            16 => r.drops = (0..4).map(|s| (s, 0, u64::MAX)).chain([(OBJECT_SPACE, 0, u64::MAX)]).collect(),
            17 => r.expect = vec![Ranges::pack(OBJECT_SPACE, &everything), Ranges::pack(0, &everything)],
            18 => r.names.spaces = vec![7; 3],
            19 => r.names.objects.clear(),
            which => {
                if let Some(tree) = &mut r.tree {
                    twist(tree, which);
                }
            }
        },
        Message::State(s) => match numbers.below(16) {
            15 => s.expected = [0, 1 << 60][numbers.below(2)],
            which => twist(&mut s.tree, which),
        },
        Message::Memory(s) => match numbers.below(5) {
            0 => s.bytes = 1 << 60,
            1 => s.drops = (0..4).map(|o| (OBJECT_SPACE + o, PAGE - 1, u64::MAX)).collect(),
            2 => s.later = vec![Ranges::pack(OBJECT_SPACE, &everything), Ranges::pack(0, &everything)],
            3 => s.later = (0..3).map(|_| Ranges::pack(0, &[(0x1000, 0x2000)])).collect(),
            _ => s.guards = vec![vec![(0, u64::MAX)]; 3],
        },
        Message::Handover(h) => h.pages += 1,
        _ => {}
    }
    m
}

/// Pages where none belong.
fn astray(frames: &[PageFrame], numbers: &mut Numbers) -> Vec<PageFrame> {
    use migrate_transport::Run;
    let mut frames = frames.to_vec();
    let k = numbers.below(frames.len());
    let frame = &mut frames[k];
    let zeros = |space, start, pages| Run::new(space, start, pages, true).expect("a run");
    match numbers.below(5) {
        // Of an address space that is none, or an object.
        0 => frame.runs.iter_mut().for_each(|r| r.space = 9999),
        1 => frame.runs.iter_mut().for_each(|r| r.space = OBJECT_SPACE + 77),
        // Over all there is, a TiB at a time.
        2 => frame.runs = (0..8).map(|n| zeros(frame.runs[0].space, n << 40, 1 << 28)).collect(),
        // The kernel's own mappings, and the injected code's.
        3 => frame.runs.iter_mut().for_each(|r| r.start = 0x7fff_ffff_e000 - r.len()),
        _ => frame.runs.iter_mut().for_each(|r| r.start ^= 1 << 40),
    }
    if frame.runs.iter().all(|r| r.zero) {
        frame.data.clear();
    }
    frames
}

/// Conversations like a real sender's, with something wrong in each.
fn variants(heard: &[Said], numbers: &mut Numbers, count: usize) -> Vec<(String, Vec<Instead>)> {
    let plain = || heard.iter().cloned().map(Instead::Said).collect::<Vec<_>>();
    let messages: Vec<usize> = (0..heard.len()).filter(|k| matches!(heard[*k], Said::Message(_))).collect();
    let name = |k: usize| match &heard[k] {
        Said::Message(m) => m.name(),
        Said::Pages(_) => "pages",
    };
    let mut out = vec![("all as it should be".to_owned(), plain())];
    for n in 0..count {
        let k = messages[numbers.below(messages.len())];
        let Said::Message(m) = &heard[k] else { continue };
        let mut all = plain();
        let what = match n % 8 {
            // A copy is never let go with something in it that is not known.
            0 | 1 => {
                all.truncate(k + 1);
                all[k] = Instead::Bytes(kind(m), garbled(m, numbers));
                "garbled"
            }
            2 | 3 => {
                all[k] = Instead::Said(Said::Message(outrageous(m, numbers)));
                all.retain(|s| !matches!(s, Instead::Said(Said::Message(Message::Handover(_)))));
                "outrageous"
            }
            4 => {
                let at = numbers.below(heard.len());
                all[at] = Instead::Nothing;
                out.push((format!("without {}", name(at)), all));
                continue;
            }
            5 => {
                let at = numbers.below(heard.len());
                all.insert(at, Instead::Said(heard[at].clone()));
                out.push((format!("{} twice", name(at)), all));
                continue;
            }
            6 => {
                let at = numbers.below(heard.len().saturating_sub(1));
                all.swap(at, at + 1);
                out.push((format!("{} after {}", name(at), name(at + 1)), all));
                continue;
            }
            _ => {
                let Some(at) = (0..heard.len())
                    .rev()
                    .filter(|k| matches!(heard[*k], Said::Pages(_)))
                    .nth(n / 8 % 2)
                else {
                    continue;
                };
                if let Said::Pages(frames) = &heard[at] {
                    all[at] = Instead::Said(Said::Pages(astray(frames, numbers)));
                }
                "pages astray"
            }
        };
        out.push((format!("{what}: {}", m.name()), all));
    }
    // It says no more, or is gone, after each message.
    for &k in &messages {
        for stall in [false, true] {
            let mut all = plain();
            all.truncate(k + 1);
            if stall {
                all.push(Instead::Stall);
            }
            out.push((format!("{} after {}", if stall { "a stall" } else { "the end" }, name(k)), all));
        }
    }
    out
}

fn wrong_senders(mode: &str) {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "8"), ("dirty", "4"), ("shared", "1")]);
    let (run, heard) = sent_to(&hosts, &guest, fake("", 0, None), mode);
    assert_eq!(run.code, 1, "{}", run.all());
    // The second connection of the drain is another matter.
    let heard: Vec<Said> = heard
        .into_iter()
        .filter(|s| !matches!(s, Said::Message(Message::Attach(_))))
        .collect();
    assert!(heard.len() >= 4, "a conversation");
    let receiver = Receiver::that_stays(&hosts.b, &PATIENT);
    let seed = std::env::var("MIGRATE_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(|| u64::from(std::process::id()));
    let count = std::env::var("MIGRATE_CHAOS")
        .ok()
        .and_then(|s| s.parse::<usize>().ok())
        .map_or(32, |n| 480 * n);
    println!("MIGRATE_SEED={seed}, {count} conversations");
    let mut numbers = Numbers(seed);
    let dir = tempfile::tempdir().expect("a directory");
    let mut sender = Sender {
        id: Identity::ephemeral().expect("an identity"),
        store: TrustStore::open(dir.path()).expect("a trust store"),
        _dir: dir,
        target: receiver.target.clone(),
        ticket: Some(receiver.ticket.parse().expect("a ticket")),
    };
    let (mut released, mut told) = (0, 0);
    for (n, (what, mut conversation)) in variants(&heard, &mut numbers, count).into_iter().enumerate() {
        // A migration of its own each time: what became of the one before is known.
        for said in &mut conversation {
            if let Instead::Said(Said::Message(Message::Inventory(i))) = said
                && i.id.len() == 32
            {
                i.id = format!("{n:032x}");
            }
        }
        let done = hosts.a.inside_async(async || {
            let mut link = sender.connect().await;
            let done = repeat(&mut link, &conversation).await;
            link.close("the end of a test").await;
            done
        });
        assert!(
            receiver.process.ended().is_none(),
            "{what}, seed {seed}: {}",
            receiver.process.stderr()
        );
        println!("{what}: {done:?}");
        told += u32::from(matches!(done, End::Told(_)));
        if what == "all as it should be" {
            assert_eq!(done, End::Released, "{}", receiver.process.stderr());
        }
        if done == End::Released {
            // What it was told was well after all: a copy runs.
            released += 1;
            for copy in hosts.b.running("migrate-guest") {
                hosts.b.signal(copy.pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        within(
            &format!("the end of what was built: {what}, seed {seed}"),
            Duration::from_secs(20),
            || (hosts.b.running("migrate-guest").is_empty() && hosts.b.running("migrate keeper").is_empty()).then_some(()),
        );
        let stderr = receiver.process.stderr();
        assert!(!stderr.contains("panicked"), "{what}, seed {seed}: {stderr}");
    }
    println!(
        "{released} copies were released, {told} times it was told why not, peak of the receiver {} MiB",
        receiver.process.peak()
    );
    assert!(receiver.process.peak() < 400, "{} MiB", receiver.process.peak());
    receiver.process.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(
        receiver.process.wait_for(Duration::from_secs(10)),
        Ended::Code(0),
        "{}",
        receiver.process.stderr()
    );
    lives_on(&hosts, &guest, "in the end");
    moves_still(&hosts, &guest, mode);
}

#[test]
fn senders_that_say_wrong_things_of_pre_copy() {
    wrong_senders("pre-copy");
}

#[test]
fn senders_that_say_wrong_things_of_post_copy() {
    wrong_senders("post-copy");
}

//! Many migrations into one receiver at the same time, and from one host; many one after the other.

use migrate_harness::{Ended, Guest, Host, Hosts, Process, Receiver, eventually, two_hosts, within};
use nix::sys::signal::Signal;
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

const MANY: usize = 16;

/// A receiver that stays, and knows the sender's host.
fn receiver<'h>(hosts: &'h Hosts, guest: &Guest, more: &[&str]) -> Receiver<'h> {
    let receiver = Receiver::that_stays(&hosts.b, more);
    hosts.a.send(guest.pid, &receiver, &["--dry-run"]).expect_code(0);
    receiver
}

fn send<'h>(hosts: &'h Hosts, guest: &Guest, receiver: &Receiver<'_>, more: &[&str]) -> Process<'h> {
    let pid = guest.pid.to_string();
    let args = [&["send", &pid, &receiver.target, "--json"], more].concat();
    hosts.a.migrate(&args).start()
}

/// Where a guest is: exactly once.
fn place<'h>(hosts: &'h Hosts, guest: &Guest) -> &'h Host {
    // With what comes behind it: there are others whose numbers begin like this one's.
    let dir = format!("{} ", guest.dir().display());
    let on = |host: &Host| host.running(&dir).iter().filter(|p| p.command.contains("migrate-guest")).count();
    assert!(
        eventually(Duration::from_secs(45), || on(&hosts.a) + on(&hosts.b) == 1),
        "{dir}: {} and {}",
        on(&hosts.a),
        on(&hosts.b)
    );
    if on(&hosts.a) == 1 { &hosts.a } else { &hosts.b }
}

#[test]
fn sixteen_at_once_and_one_that_fails() {
    let hosts = two_hosts!();
    let guests: Vec<Guest> = (0..MANY)
        .map(|_| Guest::start(&hosts.a, "ballast", &[("mib", "8"), ("dirty", "1")]))
        .collect();
    let receiver = receiver(&hosts, &guests[0], &[]);
    let began = Instant::now();
    let senders: Vec<Process<'_>> = guests.iter().map(|g| send(&hosts, g, &receiver, &[])).collect();
    // One of them is killed at some moment: nothing of that is the others' business.
    std::thread::sleep(Duration::from_millis(900));
    senders[MANY / 2].signal(Signal::SIGKILL);
    for (n, (sender, guest)) in senders.iter().zip(&guests).enumerate() {
        let ended = sender.wait_for(Duration::from_secs(120));
        if n != MANY / 2 {
            assert_eq!(ended, Ended::Code(0), "{n}: {} {}", sender.stdout(), sender.stderr());
            assert_eq!(place(&hosts, guest).name(), "b", "{n}");
        }
    }
    println!("{MANY} programs of 8 MiB in {:?}", began.elapsed());
    let killed = &guests[MANY / 2];
    if !eventually(Duration::from_secs(3), || killed.beats()) {
        let open = hosts.a.run(&["recover", "--json"]);
        let open: serde_json::Value = serde_json::from_str(&open.stdout).unwrap_or_default();
        if let Some(id) = open["handovers"][0]["id"].as_str() {
            hosts.a.run(&["recover", id]).expect_code(0);
        }
    }
    place(&hosts, killed);
    for (n, guest) in guests.iter().enumerate() {
        assert!(guest.beats(), "{n} stands still");
        guest.verify(&format!("{n}"));
        guest.quit();
    }
    assert!(receiver.process.ended().is_none(), "{}", receiver.process.stderr());
    receiver.process.signal(Signal::SIGINT);
    receiver.process.wait_for(Duration::from_secs(20));
}

#[test]
fn more_than_a_receiver_may_take_are_refused_by_name() {
    let hosts = two_hosts!();
    let guests: Vec<Guest> = (0..3).map(|_| Guest::start(&hosts.a, "ballast", &[("mib", "8")])).collect();
    let receiver = receiver(&hosts, &guests[0], &["--at-once", "2"]);
    let slowly = ["--mode", "pre-copy", "--bandwidth", "3MB/s"];
    let busy: Vec<Process<'_>> = guests[..2].iter().map(|g| send(&hosts, g, &receiver, &slowly)).collect();
    within("two that are received", Duration::from_secs(20), || {
        busy.iter().all(|s| s.stderr().contains("pre-copy")).then_some(())
    });
    let third = send(&hosts, &guests[2], &receiver, &[]);
    assert_eq!(
        third.wait_for(Duration::from_secs(20)),
        Ended::Code(3),
        "{} {}",
        third.stdout(),
        third.stderr()
    );
    assert!(third.stdout().contains("--at-once"), "{}", third.stdout());
    assert!(guests[2].beats());
    for sender in &busy {
        assert_eq!(sender.wait_for(Duration::from_secs(60)), Ended::Code(0), "{}", sender.stderr());
    }
    let again = send(&hosts, &guests[2], &receiver, &[]);
    assert_eq!(
        again.wait_for(Duration::from_secs(30)),
        Ended::Code(0),
        "{} {}",
        again.stdout(),
        again.stderr()
    );
    for guest in &guests {
        assert_eq!(place(&hosts, guest).name(), "b");
        guest.verify("on b");
        guest.quit();
    }
    receiver.process.signal(Signal::SIGINT);
    receiver.process.wait_for(Duration::from_secs(20));
}

/// What could grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    /// KiB of memory.
    memory: u64,
    descriptors: usize,
    threads: usize,
    mappings: usize,
}

impl Size {
    /// Of a process, by its pid outside of its host.
    fn of(pid: i32) -> Size {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
        let memory = status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        let count = |dir: &str| fs::read_dir(format!("/proc/{pid}/{dir}")).map_or(0, Iterator::count);
        Size {
            memory: memory.and_then(|m| m.parse().ok()).expect("its memory"),
            descriptors: count("fd"),
            threads: count("task"),
            mappings: fs::read_to_string(format!("/proc/{pid}/maps"))
                .expect("its mappings")
                .lines()
                .count(),
        }
    }
}

fn files(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| if e.path().is_dir() { files(&e.path()) } else { 1 }).sum()
}

/// One program goes from host to host, `MIGRATE_SOAK` times, and writes its memory meanwhile; a receiver stays on each host. Nothing grows: the receivers, what is left
/// in the program, the hosts' processes, the state directories.
#[test]
fn back_and_forth_and_nothing_grows() {
    let times: usize = std::env::var("MIGRATE_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(16);
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "8"), ("dirty", "20")]);
    let [on_a, on_b] = [&hosts.a, &hosts.b].map(|h| Receiver::that_stays(h, &[]));
    hosts.a.send(guest.pid, &on_b, &["--dry-run"]).expect_code(0);
    // The other way by a ticket, the first time.
    let mut ticket = Some(on_a.ticket.as_str());
    let (mut host, mut pid) = (&hosts.a, guest.pid);
    let began = Instant::now();
    let look = |host: &Host, pid: i32| {
        let program = Size::of(host.outer(pid).expect("the program"));
        let agents = [&on_a, &on_b].map(|r| Size::of(r.process.outer()));
        let left = [&hosts.a, &hosts.b].map(|h| (h.processes().len(), files(h.dir())));
        (program, agents, left)
    };
    let mut first = None;
    let mut freezes = Vec::new();
    for n in 1..=times {
        let to = hosts.other(host);
        let receiver = if to.name() == "a" { &on_a } else { &on_b };
        let text = pid.to_string();
        let mut args = vec!["send", &text, &receiver.target, "--json", "--mode", "hybrid"];
        if let Some(ticket) = ticket.take_if(|_| to.name() == "a") {
            args.extend(["--ticket", ticket]);
        }
        let sent = host.run(&args);
        sent.expect_code(0);
        let report = sent.json();
        freezes.push(report["downtime_ms"].as_f64().expect("a freeze"));
        (host, pid) = (to, report["restored_pid"].as_i64().expect("a pid") as i32);
        // The first few load what is loaded once. Each time on the same host, since the two differ in what their agents have done.
        if n % (times / 10).max(8) == 0 {
            assert!(guest.beats(), "after {n}");
            let now = look(host, pid);
            println!("{n}: {now:?}");
            first.get_or_insert(now);
        }
    }
    guest.verify(&format!("after {times}"));
    freezes.sort_by(f64::total_cmp);
    println!(
        "{times} migrations in {:.0?}, freeze {:.1} ms in the median, {:.1} at most",
        began.elapsed(),
        freezes[freezes.len() / 2],
        freezes[freezes.len() - 1]
    );
    let (program, agents, left) = first.expect("a first look");
    let (now, agents_now, left_now) = look(host, pid);
    assert_eq!((now.descriptors, now.threads), (program.descriptors, program.threads));
    assert!(now.mappings <= program.mappings + 2, "{now:?}, at first {program:?}");
    for (now, then) in agents_now.into_iter().zip(agents) {
        assert!(now.descriptors <= then.descriptors + 2, "{now:?}, at first {then:?}");
        assert!(now.threads <= then.threads + 8, "{now:?}, at first {then:?}");
        assert!(now.memory <= then.memory + (16 << 10), "{now:?}, at first {then:?}");
    }
    for (now, then) in left_now.into_iter().zip(left) {
        assert!(now.0 <= then.0 && now.1 <= then.1 + 2, "{left_now:?}, at first {left:?}");
    }
    host.expect_end(pid, || guest.quit());
    for receiver in [on_a, on_b] {
        receiver.process.signal(Signal::SIGINT);
        assert_eq!(receiver.process.wait_for(Duration::from_secs(20)), Ended::Code(0));
    }
}

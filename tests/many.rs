//! Many migrations into one receiver at the same time, and from one host.

use migrate_harness::{Ended, Guest, Host, Hosts, Process, Receiver, eventually, two_hosts, within};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

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

//! Agents that die, and users who change their mind. Whatever happens, the program lives on exactly one side, and counts on.

mod drain;
mod links;
mod resources;
mod silence;
mod steps;

use migrate_harness::{Dice, Guest, Host, Hosts, Stdio, eventually, programs, two_hosts, within};
use nix::sys::signal::Signal;
use std::{
    fs,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, Instant},
};

/// The living copies of a guest: on which host, and with which pid.
fn copies<'a>(hosts: &'a Hosts, guest: &Guest) -> Vec<(&'a Host, i32)> {
    let dir = guest.dir().display().to_string();
    let on = |host: &'a Host| {
        let mut list = host.running(&dir);
        list.retain(|p| p.command.contains("migrate-guest"));
        list.into_iter().map(move |p| (host, p.pid)).collect::<Vec<_>>()
    };
    [on(&hosts.a), on(&hosts.b)].concat()
}

/// Waits until it beats again, with `migrate recover` on both hosts when it does not by itself; then there must be one copy.
fn lives_on_once<'a>(hosts: &'a Hosts, guest: &Guest, when: &str) -> (&'a Host, i32) {
    let beating = || {
        let before = guest.pulse().beats;
        eventually(Duration::from_secs(3), || guest.pulse().beats > before)
    };
    let alone = || eventually(Duration::from_secs(2), || copies(hosts, guest).len() == 1);
    // Killed between the handover and its answer: the original is kept stopped until somebody asks the destination.
    if !beating() || !alone() {
        recover(hosts, when);
        assert!(
            beating(),
            "{when}: the program stands still; copies: {:?}",
            names(&copies(hosts, guest))
        );
    }
    // A receiver whose sender was killed hears of it from the sender's host, unless that keeps to its rate limit for ICMP; then the copy, which
    // does nothing but wait, ends with the idle time-out of 30 s.
    let settled = eventually(Duration::from_secs(45), || copies(hosts, guest).len() == 1);
    let list = copies(hosts, guest);
    assert!(settled, "{when}: {} copies: {:?}\n{}", list.len(), names(&list), look(&list));
    list[0]
}

/// What /proc tells of processes that should not be there.
fn look(list: &[(&Host, i32)]) -> String {
    let mut text = String::new();
    for (host, pid) in list {
        let Some(outer) = host.outer(*pid) else { continue };
        for name in ["status", "syscall", "wchan", "stack", "maps"] {
            let told = fs::read_to_string(format!("/proc/{outer}/{name}")).unwrap_or_else(|e| e.to_string());
            text += &format!("--- {} {pid} {name}\n{told}\n", host.name());
        }
    }
    text
}

/// What an operator does: starts a receiver on B again, if none runs, and has A ask it.
fn recover(hosts: &Hosts, when: &str) {
    let list = hosts.a.run(&["recover", "--json"]);
    println!("{when}: open on a: {}", list.stdout.trim());
    let open: serde_json::Value = serde_json::from_str(&list.stdout).unwrap_or_default();
    let ids: Vec<String> = open["handovers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|o| o["id"].as_str().map(str::to_owned))
        .collect();
    let busy = hosts.b.running("migrate receive").into_iter().next().is_some();
    let receiver = (!busy).then(|| hosts.b.receive(&Stdio::Null));
    for id in ids {
        let run = hosts.a.run(&["recover", &id, "--json"]);
        println!("{when}: recover {id}: code {} {}", run.code, run.stdout.trim());
        assert_eq!(run.code, 0, "{when}: {}", run.stderr);
    }
    if let Some(r) = receiver {
        r.process.signal(Signal::SIGKILL);
        r.process.wait_for(Duration::from_secs(5));
    }
}

fn names(list: &[(&Host, i32)]) -> Vec<String> {
    list.iter().map(|(host, pid)| format!("{} {pid}", host.name())).collect()
}

fn goes_on(guest: &Guest, when: &str) {
    guest.verify_after_kill(when);
    // Only the counter has one.
    if !guest.dir().join("count").exists() {
        return;
    }
    let numbers = programs::numbers(&fs::read_to_string(guest.dir().join("count")).unwrap());
    programs::expect_in_order(&numbers);
    assert_eq!(numbers.first(), Some(&1));
}

/// Once the program and the agents are gone: no process on either host, and in their state directories nothing but identities, who is trusted, and what
/// became of migrations that the other side may ask about still.
fn nothing_left(hosts: &Hosts, when: &str) {
    for host in [&hosts.a, &hosts.b] {
        let left = || {
            let state = host.dir().join("state");
            let names = |dir: &str| fs::read_dir(state.join(dir)).into_iter().flatten().flatten().map(|e| e.path());
            let files = names("").filter(|p| p.is_file() && p.file_name().is_none_or(|n| n != "identity.pem"));
            let half_written = names("journal")
                .chain(names("trusted"))
                .filter(|p| p.to_string_lossy().contains(".tmp") && nameless(&state));
            let files: Vec<_> = files.chain(half_written).chain(names("keeper")).collect();
            (host.processes(), files)
        };
        let none = || {
            let (processes, files) = left();
            processes.is_empty() && files.is_empty()
        };
        assert!(
            eventually(Duration::from_secs(10), none),
            "{when}: left on {}: {:?}",
            host.name(),
            left()
        );
    }
}

/// Whether files can be written there that have no name yet. Where not, a killed agent leaves what it was writing until another one begins later.
fn nameless(dir: &Path) -> bool {
    let mut options = fs::File::options();
    options.write(true).custom_flags(nix::libc::O_TMPFILE).open(dir).is_ok()
}

/// How long a whole `send` of this guest takes here.
fn usual_time(hosts: &Hosts, options: &[(&str, &str)]) -> Duration {
    let guest = Guest::start(&hosts.a, "counter", options);
    let since = Instant::now();
    let moved = hosts.move_tree(&hosts.a, guest.pid, &Stdio::Null);
    let took = since.elapsed();
    hosts.b.signal(moved.pid, Signal::SIGKILL);
    took
}

#[derive(Clone, Copy, PartialEq)]
enum Victim {
    Sender,
    Receiver,
}

fn killed_at_random_instants(victim: Victim, rounds: u32) {
    let hosts = two_hosts!();
    killed_between(&hosts, victim, "counter", rounds);
}

fn killed_between(hosts: &Hosts, victim: Victim, name: &str, rounds: u32) {
    let mut dice = Dice::new();
    let usual = usual_time(hosts, &[]);
    let (mut stayed, mut moved) = (0, 0);
    for round in 0..rounds {
        let guest = Guest::start(&hosts.a, name, &[]);
        let receiver = hosts.b.receive(&Stdio::Null);
        let pid = guest.pid.to_string();
        let instant = dice.below(usual.mul_f64(1.1));
        let when = format!("round {round}, killed after {instant:?} of {usual:?}");
        let sender = hosts.a.migrate(&hosts.a.send_args(&pid, &receiver)).start();
        std::thread::sleep(instant);
        let agent = if victim == Victim::Sender { &sender } else { &receiver.process };
        let killed = agent.signal(Signal::SIGKILL);
        // The other agent must come to an end by itself, and soon.
        if victim == Victim::Receiver {
            let ended = sender.wait_for(Duration::from_secs(60));
            println!("{when}: the sender ended with {ended:?}");
        } else {
            sender.wait_for(Duration::from_secs(5));
        }
        let (host, at) = lives_on_once(hosts, &guest, &when);
        if host.name() == "a" {
            stayed += 1
        } else {
            moved += 1
        }
        println!(
            "{when}: {} lives on host {}",
            if killed { "killed" } else { "too late" },
            host.name()
        );
        // The program's first thread beats before the receiver has let go of the last one.
        if host.name() == "b" {
            receiver.process.wait_for(Duration::from_secs(30));
        }
        goes_on(&guest, &when);
        // It can still be moved from where it is.
        if receiver.process.ended().is_none() {
            receiver.process.signal(Signal::SIGKILL);
            receiver.process.wait_for(Duration::from_secs(5));
        }
        if host.name() == "a" {
            hosts.move_tree(host, at, &Stdio::Null);
            goes_on(&guest, &format!("{when}, moved afterwards"));
        }
        // With its children, of which one may begin just now. Where it does not run none may be.
        within("end of the guest", Duration::from_secs(10), || {
            let mut all = hosts.b.processes();
            all.retain(|p| !p.command.contains("migrate "));
            for p in &all {
                hosts.b.signal(p.pid, Signal::SIGKILL);
            }
            (all.is_empty() && copies(hosts, &guest).is_empty()).then_some(())
        });
        nothing_left(hosts, &when);
    }
    println!("{stayed} stayed, {moved} moved");
}

/// `make chaos` asks for more rounds.
fn rounds() -> u32 {
    20 * std::env::var("MIGRATE_CHAOS").ok().and_then(|c| c.parse().ok()).unwrap_or(1)
}

#[test]
fn sender_killed_at_random_instants() {
    killed_at_random_instants(Victim::Sender, rounds());
}

#[test]
fn receiver_killed_at_random_instants() {
    killed_at_random_instants(Victim::Receiver, rounds());
}

/// At the moments when it starts the keeper, which has heard nothing yet: that ends too, and leaves nothing.
#[test]
fn receiver_killed_while_it_starts_the_keeper() {
    let hosts = two_hosts!();
    for step in ["keeper's log#1", "keeper spawned#1", "sent Accept#1"] {
        let guest = Guest::start(&hosts.a, "counter", &[]);
        let (sender, receiver) = steps::standing_at(&hosts, &guest, Victim::Receiver, step, &["--mode", "post-copy"]);
        receiver.process.signal(Signal::SIGKILL);
        receiver.process.wait_for(Duration::from_secs(5));
        sender.wait_for(Duration::from_secs(60));
        let (host, _) = lives_on_once(&hosts, &guest, step);
        assert_eq!(host.name(), "a", "{step}");
        goes_on(&guest, step);
        steps::end(&hosts, &guest);
        nothing_left(&hosts, step);
    }
}

/// The program is in the vdso nearly all the time, and the agent is killed while it gets it out of there, too.
#[test]
fn sender_killed_while_the_program_looks_at_clocks() {
    let hosts = two_hosts!();
    hosts.a.foreign_vdsos(true);
    hosts.b.foreign_vdsos(true);
    killed_between(&hosts, Victim::Sender, "clocks", rounds() / 2);
}

/// The arguments of `send` for a copy that takes its time within the freeze.
fn stop_args<'s>(hosts: &Hosts, pid: &'s str, receiver: &'s migrate_harness::Receiver<'_>) -> Vec<&'s str> {
    [hosts.a.send_args_any(pid, receiver), vec!["--mode", "stop"]].concat()
}

/// In the middle of a long copy, so that the kill is before the handover for sure.
fn killed_in_the_middle(victim: Victim) {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "512")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let pid = guest.pid.to_string();
    let sender = hosts.a.migrate(&stop_args(&hosts, &pid, &receiver)).start();
    let copying = eventually(Duration::from_secs(20), || {
        sender.stderr().contains("\"freeze\"") || sender.stderr().contains("\"transfer\"")
    });
    assert!(copying, "no event says that the copy began: {}", sender.stderr());
    let agent = if victim == Victim::Sender { &sender } else { &receiver.process };
    assert!(agent.signal(Signal::SIGKILL), "it was over already");
    let ended = sender.wait_for(Duration::from_secs(60));
    if victim == Victim::Receiver {
        assert_eq!(ended, migrate_harness::Ended::Code(1), "{}", sender.stderr());
    }
    let (host, _) = lives_on_once(&hosts, &guest, "killed in the middle");
    assert_eq!(host.name(), "a", "the handover was not reached");
    guest.verify_after_kill("after the kill");
    assert!(
        eventually(Duration::from_secs(10), || hosts.b.running("migrate-guest").is_empty()),
        "remains on B"
    );
}

#[test]
fn sender_killed_in_the_middle_of_the_copy() {
    killed_in_the_middle(Victim::Sender);
}

#[test]
fn receiver_killed_in_the_middle_of_the_copy() {
    killed_in_the_middle(Victim::Receiver);
}

#[test]
fn ctrl_c_in_the_middle_thaws_and_leaves_nothing_behind() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "512")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let pid = guest.pid.to_string();
    let maps_before = fs::read_to_string(format!("/proc/{}/maps", hosts.a.outer(guest.pid).unwrap())).unwrap();
    let sender = hosts.a.migrate(&stop_args(&hosts, &pid, &receiver)).start();
    let copying = eventually(Duration::from_secs(20), || {
        sender.stderr().contains("\"freeze\"") || sender.stderr().contains("\"transfer\"")
    });
    assert!(copying, "no event says that the copy began: {}", sender.stderr());
    assert!(sender.signal(Signal::SIGINT), "it was over already");
    let since = Instant::now();
    let ended = sender.wait_for(Duration::from_secs(30));
    assert_eq!(ended, migrate_harness::Ended::Code(1), "{}", sender.stderr());
    assert!(
        since.elapsed() < Duration::from_secs(5) * migrate_harness::patience(),
        "Ctrl-C took {:?}",
        since.elapsed()
    );
    assert!(guest.beats());
    guest.verify("after Ctrl-C");
    let maps = fs::read_to_string(format!("/proc/{}/maps", hosts.a.outer(guest.pid).unwrap())).unwrap();
    let shape = |text: &str| -> Vec<String> {
        text.lines()
            .filter(|l| !l.contains("[heap]") && !l.contains("[stack]"))
            .map(str::to_string)
            .collect()
    };
    assert_eq!(shape(&maps), shape(&maps_before), "something was left in the program");
    assert!(
        eventually(Duration::from_secs(10), || hosts.b.running("migrate-guest").is_empty()),
        "remains on B"
    );
    // And then it goes through.
    if receiver.process.ended().is_none() {
        receiver.process.signal(Signal::SIGKILL);
        receiver.process.wait_for(Duration::from_secs(5));
    }
    hosts.move_tree(&hosts.a, guest.pid, &Stdio::Null);
    guest.verify("moved after all");
}

/// Before anything came: the receiver just ends.
#[test]
fn ctrl_c_at_the_receiver_while_it_waits() {
    let hosts = two_hosts!();
    let receiver = hosts.b.receive(&Stdio::Null);
    assert!(receiver.process.signal(Signal::SIGINT));
    receiver.process.wait_for(Duration::from_secs(5));
    // The port is free again.
    let again = hosts.b.receive(&Stdio::Null);
    assert!(again.process.ended().is_none());
}

/// A program that ends by itself while its memory is being copied: nothing is left anywhere, and `send` says what has become of it.
#[test]
fn the_program_ends_while_it_is_copied() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "512")]);
    let slowly = ["--mode", "pre-copy", "--bandwidth", "200MB/s"];
    let (sender, receiver) = steps::start(&hosts, &guest, Victim::Sender, &slowly, &[]);
    within("the first round", Duration::from_secs(20), || {
        sender.stderr().contains("\"pre-copy\"").then_some(())
    });
    hosts.a.signal(guest.pid, Signal::SIGKILL);
    let ended = sender.wait_for(Duration::from_secs(60));
    assert_eq!(ended, migrate_harness::Ended::Code(1), "{}", sender.stderr());
    let report: serde_json::Value = serde_json::from_str(sender.stdout().trim()).unwrap_or_default();
    assert_eq!(report["process"], "gone", "{report}");
    let error = report["error"].as_str().unwrap_or_default();
    assert!(error.contains("has ended meanwhile"), "{report}");
    receiver.process.wait_for(Duration::from_secs(60));
    within("end of the copy", Duration::from_secs(10), || {
        copies(&hosts, &guest).is_empty().then_some(())
    });
}

/// A program that is killed while it is moved ends on both sides, and both agents say so.
#[test]
fn the_program_itself_is_killed_in_the_middle() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "512")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let pid = guest.pid.to_string();
    let sender = hosts.a.migrate(&stop_args(&hosts, &pid, &receiver)).start();
    assert!(eventually(Duration::from_secs(20), || {
        sender.stderr().contains("\"freeze\"") || sender.stderr().contains("\"transfer\"")
    }));
    hosts.a.signal(guest.pid, Signal::SIGKILL);
    let ended = sender.wait_for(Duration::from_secs(60));
    println!("the sender ended with {ended:?}");
    assert!(
        eventually(Duration::from_secs(10), || {
            copies(&hosts, &guest).is_empty() || (copies(&hosts, &guest).len() == 1 && ended == migrate_harness::Ended::Code(0))
        }),
        "copies: {:?}",
        names(&copies(&hosts, &guest))
    );
}

//! Agents and links that fail while pages are still missing: tasks that need one wait, nobody ever reads a zero for it, and it goes on.

use crate::{copies, lives_on_once, names};
use migrate_harness::{Ended, Guest, Hosts, Process, Receiver, Stdio, eventually, two_hosts, within};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// 96 MiB in about five seconds.
const SLOWLY: [&str; 4] = ["--mode", "post-copy", "--bandwidth", "20MB/s"];

/// What follows is private memory, or shared, which follows in another way.
const KINDS: [&str; 2] = ["0", "1"];

/// A guest in the first second of its drain, with both agents.
fn draining(hosts: &Hosts) -> (Guest, Process<'_>, Receiver<'_>) {
    draining_with(hosts, KINDS[0])
}

fn draining_with<'h>(hosts: &'h Hosts, shared: &str) -> (Guest, Process<'h>, Receiver<'h>) {
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "96"), ("dirty", "1"), ("shared", shared)]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let pid = guest.pid.to_string();
    let args = [hosts.a.send_args_any(&pid, &receiver), SLOWLY.to_vec()].concat();
    let sender = hosts.a.migrate(&args).start();
    let began = eventually(Duration::from_secs(20), || sender.stderr().contains("\"drain\""));
    assert!(began, "no drain: {}", sender.stderr());
    std::thread::sleep(Duration::from_millis(700));
    assert!(
        sender.ended().is_none(),
        "the drain was over before anything happened: {}",
        sender.stderr()
    );
    (guest, sender, receiver)
}

/// All of it is at B, and nothing is left of the drain.
fn all_there(hosts: &Hosts, guest: &Guest, when: &str) {
    let (host, _) = lives_on_once(hosts, guest, when);
    assert_eq!(host.name(), "b", "{when}");
    guest.verify(when);
    let keepers = || hosts.b.running("migrate keeper").len();
    assert!(eventually(Duration::from_secs(10), || keepers() == 0), "{when}: a keeper stays");
    let left: Vec<_> = std::fs::read_dir(hosts.b.dir().join("state/keeper"))
        .into_iter()
        .flatten()
        .flatten()
        .collect();
    assert!(left.is_empty(), "{when}: {left:?}");
    guest.quit();
}

/// The id that `migrate recover` on A shows.
fn open_handover(hosts: &Hosts) -> String {
    let list = hosts.a.run(&["recover", "--json"]);
    let open: serde_json::Value = serde_json::from_str(&list.stdout).unwrap_or_default();
    open["handovers"][0]["id"].as_str().expect("an open hand-over").to_owned()
}

#[test]
fn receiver_killed_in_the_drain() {
    for shared in KINDS {
        let hosts = two_hosts!();
        let (guest, sender, receiver) = draining_with(&hosts, shared);
        receiver.process.signal(Signal::SIGKILL);
        receiver.process.wait_for(Duration::from_secs(5));
        std::thread::sleep(Duration::from_secs(1));
        // It waits for pages, and is there: nothing else may have become of it.
        assert_eq!(copies(&hosts, &guest).iter().filter(|c| c.0.name() == "b").count(), 1);
        assert!(sender.ended().is_none(), "{}", sender.stderr());
        let again = hosts.b.receive(&Stdio::Null);
        let ended = sender.wait_for(Duration::from_secs(60));
        assert_eq!(ended, Ended::Code(0), "{}", sender.stderr());
        all_there(&hosts, &guest, "receiver killed in the drain");
        again.process.signal(Signal::SIGINT);
        again.process.wait_for(Duration::from_secs(5));
    }
}

#[test]
fn sender_killed_in_the_drain() {
    for shared in KINDS {
        let hosts = two_hosts!();
        let (guest, sender, receiver) = draining_with(&hosts, shared);
        sender.signal(Signal::SIGKILL);
        sender.wait_for(Duration::from_secs(5));
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(
            copies(&hosts, &guest).len(),
            2,
            "the original is kept: {:?}",
            names(&copies(&hosts, &guest))
        );
        let id = open_handover(&hosts);
        let abort = hosts.a.run(&["recover", &id, "--abort"]);
        assert_eq!(abort.code, 3, "the copy runs: {} {}", abort.stdout, abort.stderr);
        let run = hosts.a.run(&["recover", &id]);
        assert_eq!(run.code, 0, "{} {}", run.stdout, run.stderr);
        assert_eq!(receiver.process.wait_for(Duration::from_secs(30)), Ended::Code(0));
        all_there(&hosts, &guest, "sender killed in the drain");
    }
}

#[test]
fn both_agents_killed_in_the_drain() {
    for shared in KINDS {
        let hosts = two_hosts!();
        let (guest, sender, receiver) = draining_with(&hosts, shared);
        for agent in [&sender, &receiver.process] {
            agent.signal(Signal::SIGKILL);
            agent.wait_for(Duration::from_secs(5));
        }
        let again = hosts.b.receive(&Stdio::Null);
        let id = open_handover(&hosts);
        let run = hosts.a.run(&["recover", &id]);
        assert_eq!(run.code, 0, "{} {}", run.stdout, run.stderr);
        all_there(&hosts, &guest, "both agents killed in the drain");
        again.process.signal(Signal::SIGINT);
        again.process.wait_for(Duration::from_secs(5));
    }
}

#[test]
fn link_cut_in_the_drain() {
    let hosts = two_hosts!();
    let (guest, sender, receiver) = draining(&hosts);
    hosts.cut();
    std::thread::sleep(Duration::from_secs(3));
    let before = guest.pulse().beats;
    hosts.join();
    let back = Instant::now();
    within("a beat after the link's return", Duration::from_secs(60), || {
        (guest.pulse().beats > before).then_some(())
    });
    println!("the program goes on {:?} after the link's return", back.elapsed());
    assert_eq!(sender.wait_for(Duration::from_secs(60)), Ended::Code(0), "{}", sender.stderr());
    assert_eq!(receiver.process.wait_for(Duration::from_secs(30)), Ended::Code(0));
    let report: serde_json::Value = serde_json::from_str(sender.stdout().trim()).unwrap_or_default();
    println!(
        "reconnects: {}, longest cut {} ms",
        report["drain"]["reconnects"], report["drain"]["longest_cut_ms"]
    );
    all_there(&hosts, &guest, "link cut in the drain");
}

/// Each child of a program that misses pages has a userfaultfd, which the keeper holds until it knows that the child has ended.
#[test]
fn link_cut_while_it_forks() {
    const FILES: u64 = 300;
    let hosts = two_hosts!();
    let options = [("kind", "forks-beside"), ("ground-mib", "1")];
    let guest = Guest::start_with(&hosts.a, "trap", &options, |c| c.open_files(FILES));
    let receiver = hosts.b.receive_as(&Stdio::Null, &[], |c| c.open_files(FILES));
    let pid = guest.pid.to_string();
    let slowly = ["--mode", "post-copy", "--bandwidth", "8MB/s"];
    let args = [hosts.a.send_args_any(&pid, &receiver), slowly.to_vec()].concat();
    let sender = hosts.a.migrate(&args).start();
    within("the drain", Duration::from_secs(20), || {
        sender.stderr().contains("\"drain\"").then_some(())
    });
    std::thread::sleep(Duration::from_millis(1500));
    assert!(sender.ended().is_none(), "the drain was over: {}", sender.stderr());
    hosts.cut();
    let before = guest.pulse().beats;
    std::thread::sleep(Duration::from_secs(3));
    let beats = guest.pulse().beats - before;
    println!("{} children while the link was cut", 4 * beats);
    hosts.join();
    assert_eq!(sender.wait_for(Duration::from_secs(60)), Ended::Code(0), "{}", sender.stderr());
    assert_eq!(receiver.process.wait_for(Duration::from_secs(30)), Ended::Code(0));
    assert!(4 * beats > 2 * FILES, "it could not fork: {beats} turns");
    all_there(&hosts, &guest, "link cut while it forks");
}

#[test]
fn the_program_ends_in_the_drain() {
    let hosts = two_hosts!();
    let (guest, sender, receiver) = draining(&hosts);
    let copy = copies(&hosts, &guest).into_iter().find(|c| c.0.name() == "b").expect("a copy on b");
    hosts.b.signal(copy.1, Signal::SIGKILL);
    // There is nothing to be sent any more; both come to an end, and so does the keeper.
    assert_eq!(sender.wait_for(Duration::from_secs(60)), Ended::Code(0), "{}", sender.stderr());
    receiver.process.wait_for(Duration::from_secs(30));
    let gone = eventually(Duration::from_secs(10), || {
        copies(&hosts, &guest).is_empty() && hosts.b.running("migrate keeper").is_empty()
    });
    assert!(gone, "left: {:?}", names(&copies(&hosts, &guest)));
}

/// It does not stop half-way, and says why.
#[test]
fn ctrl_c_in_the_drain_goes_on() {
    let hosts = two_hosts!();
    let (guest, sender, receiver) = draining(&hosts);
    assert!(sender.signal(Signal::SIGINT));
    assert!(receiver.process.signal(Signal::SIGINT));
    assert_eq!(sender.wait_for(Duration::from_secs(60)), Ended::Code(0), "{}", sender.stderr());
    receiver.process.wait_for(Duration::from_secs(30));
    assert!(sender.stderr().contains("until it has them"), "{}", sender.stderr());
    all_there(&hosts, &guest, "Ctrl-C in the drain");
}

//! A receiving host without room: for the journal, for processes, for memory; and one on which a file disappears after the preflight. The program lives on
//! where it was, nothing is left at the other host, and once there is room it moves.

use crate::{Victim, copies, steps};
use migrate_harness::{Guest, Host, Hosts, Process, Receiver, Run, Stdio, eventually, skip, two_hosts, within};
use nix::sys::signal::Signal;
use std::{fs, path::PathBuf, time::Duration};

/// It beats at A alone, nothing is at B, and it can be moved after `then`.
fn lives_on_and_moves(hosts: &Hosts, guest: &Guest, when: &str, mut then: impl FnMut()) {
    assert!(guest.beats(), "{when}: it stands still");
    let list = || copies(hosts, guest);
    assert!(
        eventually(Duration::from_secs(10), || list().len() == 1),
        "{when}: {} copies",
        list().len()
    );
    assert_eq!(list()[0].0.name(), "a", "{when}");
    let left = || hosts.b.running("migrate").len();
    assert!(
        eventually(Duration::from_secs(10), || left() == 0),
        "{when}: {:?}",
        hosts.b.running("migrate")
    );
    guest.verify(when);
    then();
    hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &[]);
    guest.verify(&format!("{when}, moved afterwards"));
    guest.quit();
}

/// Runs a command of busybox's on a host.
fn shell(host: &Host, line: &str) -> Run {
    Run::of(&host.command(["busybox", "sh", "-c", line]).start(), Duration::from_secs(20))
}

/// Gives a host a state directory of 256 KiB, with an identity in it.
fn small_state(host: &Host) -> PathBuf {
    let state = host.dir().join("state");
    let at = state.display();
    shell(
        host,
        &format!("mkdir -p {at} && busybox mount -t tmpfs -o size=256k,mode=700 none {at}"),
    )
    .expect_code(0);
    state
}

fn fill(host: &Host, state: &std::path::Path) {
    let at = state.display();
    shell(host, &format!("busybox dd if=/dev/zero of={at}/fill bs=4k; busybox df {at}"));
}

fn send(hosts: &Hosts, guest: &Guest, receiver: &Receiver<'_>) -> Run {
    hosts.a.send(guest.pid, receiver, &["--mode", "hybrid"])
}

#[test]
fn no_room_for_the_journal_of_the_receiver() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let state = small_state(&hosts.b);
    let receiver = hosts.b.receive(&Stdio::Null);
    // The sender is known by now; what is left is the journal's.
    let checked = hosts.a.send(guest.pid, &receiver, &["--dry-run"]);
    checked.expect_code(0);
    fill(&hosts.b, &state);
    let sent = send(&hosts, &guest, &receiver);
    assert_eq!(sent.code, 1, "{}", sent.all());
    assert!(sent.all().contains("No space left"), "{}", sent.all());
    receiver.process.signal(Signal::SIGINT);
    receiver.process.wait_for(Duration::from_secs(10));
    lives_on_and_moves(&hosts, &guest, "no room for the receiver's journal", || {
        shell(&hosts.b, &format!("rm {}/fill", state.display())).expect_code(0);
    });
}

#[test]
fn no_room_for_the_journal_of_the_sender() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let state = small_state(&hosts.a);
    let receiver = hosts.b.receive(&Stdio::Null);
    hosts.a.send(guest.pid, &receiver, &["--dry-run"]).expect_code(0);
    fill(&hosts.a, &state);
    let sent = send(&hosts, &guest, &receiver);
    assert_eq!(sent.code, 1, "{}", sent.all());
    assert!(sent.all().contains("No space left"), "{}", sent.all());
    receiver.process.wait_for(Duration::from_secs(20));
    lives_on_and_moves(&hosts, &guest, "no room for the sender's journal", || {
        shell(&hosts.a, &format!("rm {}/fill", state.display())).expect_code(0);
    });
}

/// A cgroup of this test's, of version 1 or 2; it goes with this value.
struct Group(PathBuf);

impl Group {
    fn new(controller: &str) -> Option<Group> {
        let unified = PathBuf::from("/sys/fs/cgroup/cgroup.controllers");
        let known = fs::read_to_string(&unified).unwrap_or_default();
        let root = if known.split_whitespace().any(|c| c == controller) {
            fs::write("/sys/fs/cgroup/cgroup.subtree_control", format!("+{controller}")).ok()?;
            PathBuf::from("/sys/fs/cgroup")
        } else {
            PathBuf::from("/sys/fs/cgroup").join(controller)
        };
        let dir = root.join(format!("migrate-test-{controller}-{}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        Some(Group(dir))
    }

    fn take(&self, outer: i32) {
        fs::write(self.0.join("cgroup.procs"), outer.to_string()).expect("a process in a cgroup");
    }

    /// Sets the first of these files that there is.
    fn limit(&self, names: [&str; 2], value: u64) {
        let name = names.into_iter().find(|n| self.0.join(n).exists()).expect("a limit");
        fs::write(self.0.join(name), value.to_string()).expect("a limit");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = eventually(Duration::from_secs(10), || fs::remove_dir(&self.0).is_ok());
    }
}

const MEMORY: [&str; 2] = ["memory.max", "memory.limit_in_bytes"];

/// Both agents, the receiver standing still before it puts the first pages in place.
fn at_its_first_round<'h>(hosts: &'h Hosts, guest: &Guest) -> (Process<'h>, Receiver<'h>) {
    let how = ["--mode", "pre-copy", "--peer-timeout", "10s"];
    steps::standing_at(hosts, guest, Victim::Receiver, "got Round#1", &how)
}

/// The receiver goes on and cannot: both agents end.
fn fails(sender: &Process<'_>, receiver: &Receiver<'_>, within: Duration) {
    receiver.process.signal(Signal::SIGCONT);
    let ended = sender.wait_for(Duration::from_secs(60));
    println!("{ended:?} {}", sender.stdout().trim());
    assert_eq!(ended, migrate_harness::Ended::Code(1), "{}", sender.stderr());
    receiver.process.wait_for(within);
}

#[test]
fn no_room_for_more_processes() {
    let hosts = two_hosts!();
    let Some(group) = Group::new("pids") else {
        return skip("no cgroup with a limit of processes can be made here");
    };
    let guest = Guest::start(&hosts.a, "threads", &[]);
    let (sender, receiver) = at_its_first_round(&hosts, &guest);
    group.take(receiver.process.outer());
    let now = fs::read_to_string(group.0.join("pids.current")).expect("their number");
    group.limit(["pids.max"; 2], now.trim().parse::<u64>().expect("a number") + 3);
    fails(&sender, &receiver, Duration::from_secs(20));
    lives_on_and_moves(&hosts, &guest, "no room for processes", || {});
}

#[test]
fn no_room_for_its_memory_is_said_before_anything_is_done() {
    let hosts = two_hosts!();
    let Some(group) = Group::new("memory") else {
        return skip("no cgroup with a limit of memory can be made here");
    };
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "192")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    group.take(receiver.process.outer());
    group.limit(MEMORY, 96 << 20);
    let sent = send(&hosts, &guest, &receiver);
    assert_eq!(sent.code, 3, "{}", sent.all());
    assert!(sent.all().contains("MiB can be had here"), "{}", sent.all());
    receiver.process.signal(Signal::SIGINT);
    receiver.process.wait_for(Duration::from_secs(10));
    lives_on_and_moves(&hosts, &guest, "no room for its memory", || {});
}

/// The kernel ends something of the receiver's then, the agent or the copy.
#[test]
fn memory_runs_out_in_a_round() {
    let hosts = two_hosts!();
    let Some(group) = Group::new("memory") else {
        return skip("no cgroup with a limit of memory can be made here");
    };
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "192")]);
    let (sender, receiver) = at_its_first_round(&hosts, &guest);
    group.take(receiver.process.outer());
    group.limit(MEMORY, 96 << 20);
    fails(&sender, &receiver, Duration::from_secs(30));
    lives_on_and_moves(&hosts, &guest, "memory ran out", || {});
}

#[test]
fn a_file_disappears_after_the_preflight() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let (sender, receiver) = steps::standing_at(&hosts, &guest, Victim::Receiver, "sent Accept#1", &["--mode", "hybrid"]);
    // All that the guest has open.
    let dir = guest.dir().display().to_string();
    shell(&hosts.b, &format!("busybox mount -t tmpfs none {dir}")).expect_code(0);
    receiver.process.signal(Signal::SIGCONT);
    let ended = sender.wait_for(Duration::from_secs(60));
    assert_eq!(ended, migrate_harness::Ended::Code(1), "{} {}", sender.stdout(), sender.stderr());
    assert!(sender.stdout().contains(&dir), "it is not named: {}", sender.stdout());
    receiver.process.wait_for(Duration::from_secs(20));
    within("the directory is back", Duration::from_secs(10), || {
        (shell(&hosts.b, &format!("busybox umount {dir}")).code == 0).then_some(())
    });
    lives_on_and_moves(&hosts, &guest, "a file had disappeared", || {});
}

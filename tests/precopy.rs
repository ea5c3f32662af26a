//! What a copy in rounds could miss: each operation is done over and over while the program is moved there and back, and the program looks for itself
//! whether every page is what it should be. The memory oracle compares each page too.

use migrate_harness::{Ended, Guest, Stdio, skip, two_hosts, within};
use std::time::Duration;

/// How it is moved.
const HOW: &[&str] = &["--mode", "pre-copy"];

/// Rounds that a migration must have had, or the operation may not have happened between two of them.
fn fewest_rounds() -> usize {
    if HOW.contains(&"pre-copy") { 2 } else { 0 }
}

fn there_and_back(kind: &str) {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "trap", &[("kind", kind)]);
    let (mut host, mut pid) = (&hosts.a, guest.pid);
    for _ in 0..2 {
        assert!(guest.beats(), "{kind} on {}", host.name());
        std::thread::sleep(Duration::from_millis(100));
        let moved = hosts.move_with(host, pid, &Stdio::Null, HOW);
        let rounds = moved.report["rounds"].as_array().map_or(0, Vec::len);
        println!(
            "{kind} from {}: {rounds} rounds, downtime {:.1} ms",
            host.name(),
            moved.number("downtime_ms")
        );
        assert!(rounds >= fewest_rounds(), "{}", moved.report);
        (host, pid) = (hosts.other(host), moved.pid);
        assert!(guest.beats(), "{kind} on {}", host.name());
        std::thread::sleep(Duration::from_millis(100));
        guest.verify(&format!("{kind}, on {}", host.name()));
    }
    host.expect_end(pid, || guest.quit());
}

macro_rules! traps {
    ($($test:ident: $kind:literal;)*) => { $(
        #[test]
        fn $test() {
            there_and_back($kind);
        }
    )* };
}
traps! {
    mappings_that_come_and_go: "new";
    a_mapping_that_moves: "moved";
    a_mapping_whose_other_half_moves: "moved-beside";
    mappings_that_change_places: "swapped";
    mappings_that_move_by_one_call: "moved-together-or-in-part";
    pages_that_move_and_leave_their_mapping: "left-behind";
    unmapped_and_mapped_again: "replaced";
    mapped_over: "mapped-over";
    grown_and_shrunk: "grown";
    the_break_up_and_down: "brk";
    a_stack_that_grows: "stack";
    rights_that_change: "protected";
    dropped_pages: "dropped";
    freed_pages: "freed";
    huge_pages: "huge";
    advice_about_forks: "fork-advice";
    private_pages_given_back_to_the_file: "file";
    holes_in_shared_memory: "punched";
    a_memfd_written_by_its_descriptor: "written-by-descriptor";
    a_memfd_that_nobody_maps: "only-a-descriptor";
    shared_memory_written_by_a_child: "written-by-a-child";
    another_kind_of_mapping_at_the_same_place: "other-backing";
    processes_that_come_and_go: "forks";
    processes_with_children_that_come_and_go: "grandchildren";
    processes_that_execute_something: "execs";
    shared_memory_written_by_workers: "written-by-workers";
    threads_that_come_and_go: "threads";
}

/// Moved whole, or refused by name; never moved wrong, and never harmed. `must`: it must be refused.
fn refused_or_right(guest: &str, options: &[(&str, &str)], must: bool, says: &[&str]) {
    let hosts = two_hosts!();
    let Ok(guest) = std::panic::catch_unwind(|| Guest::start(&hosts.a, guest, options)) else {
        skip(&format!("this kernel does not give a program {options:?}"));
        return;
    };
    guest.verify("before");
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(guest.pid, &receiver, HOW);
    if sent.code == 0 && !must {
        println!("{options:?}: moved");
        assert!(guest.beats());
        guest.verify("moved");
        return;
    }
    sent.expect_code(3).expect_says(says);
    println!("{options:?}: refused: {}", sent.json()["blockers"][0]);
    assert!(guest.beats(), "the program does not run on");
    guest.verify("after the refusal");
    let status = std::fs::read_to_string(format!("/proc/{}/status", hosts.a.outer(guest.pid).unwrap())).unwrap();
    assert!(status.contains("TracerPid:\t0"), "still traced");
    assert!(hosts.b.running("migrate-guest").is_empty(), "something was made on B");
}

#[test]
fn a_userfaultfd_of_its_own() {
    refused_or_right("trap", &[("kind", "userfaultfd")], true, &["userfaultfd"]);
}

#[test]
fn an_io_uring() {
    refused_or_right("hold", &[("what", "io-uring")], true, &["io_uring"]);
}

#[test]
fn hugetlb_pages() {
    refused_or_right("hold", &[("what", "hugetlb")], false, &["huge"]);
}

#[test]
fn shared_memory_written_from_outside_the_tree() {
    refused_or_right("trap", &[("kind", "written-from-outside")], false, &["shared", "outside"]);
}

/// What is seen of a process in the middle of its execve(2) has no vdso yet: its skeleton has to find one again.
#[test]
fn a_process_that_loses_its_vdso_and_has_one_again() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "trap", &[("kind", "executes-when-told"), ("ground-mib", "32")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let pid = guest.pid.to_string();
    let mut args = hosts.a.send_args_any(&pid, &receiver);
    args.extend([HOW, &["--bandwidth", "30MB/s"]].concat());
    let sender = hosts.a.migrate(&args).start();
    let tell = |name: &str| std::fs::write(guest.dir().join(name), "").unwrap();
    let rounds = || sender.stderr().matches("\"event\":\"round\"").count();
    let round = |n: usize| within("a round", Duration::from_secs(20), || (rounds() >= n).then_some(()));
    within("the first pages", Duration::from_secs(20), || {
        sender.stderr().contains("progress").then_some(())
    });
    tell("lose");
    // The shape that goes with the second round was seen after the first.
    round(2);
    assert!(guest.dir().join("lost").exists());
    tell("go");
    assert_eq!(sender.wait(), Ended::Code(0), "{}", sender.stderr());
    assert!(guest.beats());
    guest.verify("moved");
}

/// A program that has none at all is refused before anything is touched.
#[test]
fn a_process_without_a_vdso() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "trap", &[("kind", "executes-when-told"), ("ground-mib", "1")]);
    let tell = |name: &str| std::fs::write(guest.dir().join(name), "").unwrap();
    tell("lose");
    within("the loss", Duration::from_secs(5), || {
        guest.dir().join("lost").exists().then_some(())
    });
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(guest.pid, &receiver, HOW);
    sent.expect_code(3).expect_says(&["[vdso]"]);
    assert_eq!(sent.json()["phase"], "preflight");
    tell("go");
    guest.verify("after the refusal");
}

/// A skeleton is built before anybody has looked at the descriptors: however many there are, each must keep its number.
#[test]
fn more_descriptors_than_the_skeleton_knew_of() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "files", &[("count", "700")]);
    hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, HOW);
    guest.verify("moved in rounds");
    guest.quit();
}

/// Page tables tell what was written when all processes that can write are known; where the kernel cannot watch them, it is all compared.
#[test]
fn shared_memory_is_not_compared_when_all_who_write_it_are_known() {
    let hosts = two_hosts!();
    let options = [("mib", "64"), ("shared", "1"), ("dirty", "2"), ("period-us", "2000")];
    let guest = Guest::start(&hosts.a, "ballast", &options);
    let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &["--mode", "pre-copy", "--tracker", "wp-async"]);
    let all = moved.compared();
    println!("compared: {all:?}, downtime {:.1} ms", moved.number("downtime_ms"));
    assert!(all[0] >= 64 << 20, "{all:?}");
    assert!(
        all.len() < 3 || *all.last().unwrap() == 0,
        "the freeze compared shared memory: {all:?}"
    );
    assert!(guest.beats());
    guest.verify("on b");
    hosts.b.expect_end(moved.pid, || guest.quit());
}

/// The same with a child that writes: only what has a descriptor is compared in the freeze.
#[test]
fn shared_memory_of_two_processes_is_not_compared_either() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "trap", &[("kind", "written-by-a-child")]);
    let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &["--mode", "pre-copy", "--tracker", "wp-async"]);
    let all = moved.compared();
    println!("compared: {all:?}");
    assert!(
        all.len() < 3 || *all.last().unwrap() < all[0],
        "the freeze compared shared memory: {all:?}"
    );
    guest.verify("on b");
    hosts.b.expect_end(moved.pid, || guest.quit());
}

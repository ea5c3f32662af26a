//! What a program may do while pages are missing: each operation is done over and over while its memory arrives slowly, and the program looks for
//! itself whether every page is what it should be.

use migrate_harness::{Ended, Guest, Hosts, Stdio, skip, two_hosts, within};
use std::time::Duration;

/// Slow: 88 MiB take about two seconds, in which the operation is done hundreds of times.
const LATE: &[&str] = &["--mode", "post-copy", "--bandwidth", "40MB/s"];

fn late(kind: &str) {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "trap", &[("kind", kind)]);
    assert!(guest.beats(), "{kind}");
    let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, LATE);
    let drain = &moved.report["drain"];
    println!(
        "{kind}: freeze {:.1} ms, {} faults, {} pages pulled, {} pushed, drain {:.0} ms, {} pages compared after it",
        moved.number("downtime_ms"),
        moved.report["fault_latency_us"]["count"],
        drain["pulled"],
        drain["pushed"],
        drain["ms"].as_f64().unwrap_or(0.0),
        drain["compared"]
    );
    assert!(moved.number("pages_lazy") > 10_000.0, "{}", moved.report);
    assert!(drain["pulled"].as_u64() > Some(0), "nothing was asked for: {}", moved.report);
    assert!(guest.beats(), "{kind} on b");
    guest.verify(&format!("{kind}, on b"));
    hosts.b.expect_end(moved.pid, || guest.quit());
}

macro_rules! while_pages_are_missing {
    ($($test:ident: $kind:literal;)*) => { $(
        #[test]
        fn $test() {
            late($kind);
        }
    )* };
}
while_pages_are_missing! {
    mappings_that_come_and_go: "new";
    a_mapping_that_moves: "moved";
    a_mapping_whose_other_half_moves: "moved-beside";
    mappings_that_change_places: "swapped";
    mappings_that_move_by_one_call: "moved-together";
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
    shared_memory_written_by_a_child: "written-by-a-child";
    shared_memory_written_by_workers: "written-by-workers";
    shared_memory_in_every_way: "shared-in-every-way";
    shared_memory_that_is_mapped_twice: "doubled";
    another_kind_of_mapping_at_the_same_place: "other-backing";
    processes_that_come_and_go: "forks";
    processes_with_children_that_come_and_go: "grandchildren";
    processes_that_execute_something: "execs";
    threads_that_come_and_go: "threads";
    system_calls_that_read_and_write_it: "calls";
    threads_in_the_same_page: "touched-by-threads";
    a_handler_while_its_task_waits: "interrupted";
    pages_without_the_right_to_write: "read-only";
    proc_self_mem_says_eio_or_the_truth: "own-mem";
    children_forked_before_their_pages_came: "checked-by-children";
}

/// All of it, and nothing of it before the resume.
#[test]
fn shared_memory_follows() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "96"), ("shared", "1")]);
    let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, LATE);
    assert!(moved.number("pages_lazy") > 96.0 * 256.0 - 1.0, "{}", moved.report);
    assert!(moved.number("pages_sent") - moved.number("pages_lazy") < 1024.0, "{}", moved.report);
    println!("freeze {:.1} ms, drain {}", moved.number("downtime_ms"), moved.report["drain"]);
    assert!(guest.beats());
    guest.verify("on b");
    guest.quit();
}

#[test]
fn hybrid_goes_lazy_when_rounds_do_not_help() {
    let hosts = two_hosts!();
    // It writes as fast as it can, far more than the limit lets through.
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "96"), ("dirty", "400")]);
    let how = ["--mode", "hybrid", "--bandwidth", "80MB/s"];
    let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &how);
    let rounds = moved.report["rounds"].as_array().map_or(0, Vec::len);
    assert!(rounds >= 2, "{}", moved.report);
    assert!(moved.number("pages_lazy") > 1000.0, "{}", moved.report);
    // What the rounds delivered and nobody wrote again is not sent again.
    let (sent, zero) = (moved.number("pages_sent"), moved.number("pages_zero"));
    println!(
        "{rounds} rounds, {sent} pages and {zero} zero pages sent, {} of them late",
        moved.number("pages_lazy")
    );
    assert!(guest.beats());
    guest.verify("on b");
    guest.quit();
}

#[test]
fn nothing_is_late_when_rounds_suffice() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "64")]);
    let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &["--mode", "hybrid"]);
    assert_eq!(moved.number("pages_lazy"), 0.0, "{}", moved.report);
    guest.verify("on b");
    guest.quit();
}

/// Whether this kernel can track without stopping the program; else the test is skipped.
fn tracks() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
    let yes = (numbers.next(), numbers.next()) >= (Some(6), Some(7));
    if !yes {
        skip("this kernel cannot tell what a program writes (UFFD_FEATURE_WP_ASYNC, Linux 6.7)");
    }
    yes
}

/// What the program does not write is compared with the original once it is there.
#[test]
fn the_oracle_watches_the_drain() {
    let hosts = two_hosts!();
    if !tracks() {
        return;
    }
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "64")]);
    let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &["--mode", "post-copy"]);
    let compared = moved.report["drain"]["compared"].as_u64().unwrap_or(0);
    println!("{compared} of {} pages compared", moved.number("pages_lazy"));
    assert!(compared as f64 > 0.95 * moved.number("pages_lazy"), "{}", moved.report);
    guest.verify("on b");
    guest.quit();
}

/// What cannot follow goes in rounds before the freeze, as with pre-copy; on a kernel that cannot track it without stopping the program, within the freeze.
#[test]
fn shared_memory_does_not_lengthen_the_freeze_of_post_copy() {
    if !tracks() {
        return;
    }
    const ALL: u64 = 64 << 8;
    const FEW: u64 = 16 << 8;
    // Pages in the rounds before the freeze, and in the freeze.
    let moved = |hosts: &Hosts, kind: &str, how: &[&str]| {
        let options = [("mib", "64"), (kind, "1"), ("dirty", "2"), ("period-us", "2000")];
        let guest = Guest::start(&hosts.a, "ballast", &options);
        let moved = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, how);
        guest.verify("on b");
        guest.quit();
        let rounds = moved.report["rounds"].as_array().expect("rounds");
        let mut pages: Vec<u64> = rounds.iter().map(|r| r["pages"].as_u64().expect("pages")).collect();
        let last = pages.pop().expect("a round");
        (pages.iter().sum::<u64>(), last)
    };
    let tracked = ["--mode", "post-copy"];
    // Without a tracker, as where the kernel has none.
    let untracked = ["--mode", "post-copy", "--tracker", "soft-dirty"];
    // What only mappings lead to follows.
    for how in [&tracked[..], &untracked] {
        let (before, last) = moved(&two_hosts!(), "shared", how);
        assert!(before + last < FEW, "{how:?}: {before} and {last} pages");
    }
    // A descriptor could read what has not come.
    let (before, last) = moved(&two_hosts!(), "memfd", &tracked);
    assert!(before >= ALL && last < FEW, "{before} and {last} pages");
    let (_, last) = moved(&two_hosts!(), "memfd", &untracked);
    assert!(last >= ALL, "{last} pages");
}

#[test]
fn it_is_not_moved_on_before_its_pages_are_there() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "128")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let pid = guest.pid.to_string();
    let args = [
        hosts.a.send_args_any(&pid, &receiver),
        vec!["--mode", "post-copy", "--bandwidth", "8MB/s"],
    ]
    .concat();
    let first = hosts.a.migrate(&args).start();
    within("the drain", Duration::from_secs(20), || {
        first.stderr().contains("\"drain\"").then_some(())
    });
    let copy = hosts.b.running("migrate-guest").first().expect("the copy").pid;
    // It waits some seconds for the drain to end, then says what is in the way; and harms nothing.
    let onward = hosts.a.receive(&Stdio::Null);
    let sent = hosts.b.send(copy, &onward, &["--mode", "stop"]);
    sent.expect_code(3).expect_says(&["still arriving"]);
    assert!(guest.beats(), "it runs on meanwhile");
    assert!(first.ended().is_none(), "the drain was over: {}", first.stderr());
    guest.verify("while pages are missing");
    assert_eq!(first.wait_for(Duration::from_secs(60)), Ended::Code(0), "{}", first.stderr());
    guest.verify("after the drain");
    guest.quit();
}

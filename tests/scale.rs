//! Large trees: each moves, and the freeze a unit is printed.

use migrate_harness::{Guest, Stdio, two_hosts};

fn large(what: &str, name: &str, options: &[(&str, &str)], units: f64) {
    migrate_harness::without_oracle();
    let hosts = two_hosts!();
    let guest = Guest::start_with(&hosts.a, name, options, |c| c.open_files(20_000));
    guest.reset_gap();
    let moved = hosts.move_tree(&hosts.a, guest.pid, &Stdio::Null);
    assert!(guest.beats());
    let gap = guest.gap();
    guest.verify(&format!("after a move with {what}"));
    println!(
        "{what}: freeze {:.1} ms by the agent, {:.1} ms by the program, {:.2} us each",
        moved.number("downtime_ms"),
        gap.as_secs_f64() * 1e3,
        moved.number("downtime_ms") * 1e3 / units
    );
}

#[test]
fn a_thousand_threads() {
    large("1,000 threads", "threads", &[("count", "1000"), ("spinning", "0")], 1000.0);
}

#[test]
fn two_hundred_processes() {
    large("200 processes", "tree", &[("count", "200")], 200.0);
}

#[test]
fn twenty_thousand_mappings() {
    large("20,000 mappings", "vmas", &[("count", "20000")], 20_000.0);
}

#[test]
fn ten_thousand_open_files() {
    large("10,000 open files", "files", &[("count", "10000")], 10_000.0);
}

/// Neither agent holds more than a window of pages, whatever the tree's size.
#[test]
fn agents_stay_small() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "1024")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(guest.pid, &receiver, &[]);
    sent.expect_code(0);
    let received = receiver.wait();
    received.expect_code(0);
    for (which, run) in [("sender", &sent), ("receiver", &received)] {
        let peak = run.json()["agent_peak_rss"].as_u64().unwrap_or(0);
        assert!(peak > 0, "the {which} does not report its peak: {}", run.stdout);
        println!("{which}: peak {} MiB", peak >> 20);
        assert!(peak <= 128 << 20, "the {which} took {} MiB", peak >> 20);
    }
    guest.verify("moved");
}

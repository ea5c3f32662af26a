//! Silence for longer than a link is kept for it, around the handover: when it ends the agents settle by themselves where the program lives.

use crate::{Victim, copies, goes_on, steps};
use migrate_harness::{Ended, Guest, Hosts, Process, two_hosts};
use nix::sys::signal::Signal;
use std::time::Duration;

/// Longer than the 30 s, and than the time that the sender has asked for by then.
const SILENCE: Duration = Duration::from_secs(38);
const END: Duration = Duration::from_secs(60);

/// Stops `victim` at a step of a migration, does something, and expects both agents to end with this code and the program to be on that host.
fn at(mode: &str, step: &str, victim: Victim, during: impl FnOnce(&Hosts, [&Process<'_>; 2]), code: i32, on: &str) {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let (sender, receiver) = steps::standing_at(&hosts, &guest, victim, step, &["--mode", mode]);
    let agents = [&sender, &receiver.process];
    during(&hosts, agents);
    for agent in agents {
        let ended = agent.wait_for(END);
        assert_eq!(ended, Ended::Code(code), "{step}: {}{}", agent.stdout(), agent.stderr());
    }
    let there = copies(&hosts, &guest);
    assert_eq!(there.iter().map(|c| c.0.name()).collect::<Vec<_>>(), [on], "{step}");
    assert!(guest.beats(), "{step}: it stands still");
    goes_on(&guest, step);
    let (host, pid) = there[0];
    host.expect_end(pid, || guest.quit());
}

/// Both hosts are virtual machines that somebody pauses for a while, or share one that is.
fn both_stand_still() {
    let pause = |_: &Hosts, agents: [&Process<'_>; 2]| {
        agents.iter().for_each(|a| _ = a.signal(Signal::SIGSTOP));
        std::thread::sleep(SILENCE);
        agents.iter().for_each(|a| _ = a.signal(Signal::SIGCONT));
    };
    at("pre-copy", "sent Handover#1", Victim::Sender, pause, 0, "b");
}

fn cut(hosts: &Hosts, agents: [&Process<'_>; 2]) {
    hosts.cut();
    agents.iter().for_each(|a| _ = a.signal(Signal::SIGCONT));
    std::thread::sleep(SILENCE);
    hosts.join();
}

#[test]
fn a_long_silence_around_the_handover() {
    std::thread::scope(|s| {
        s.spawn(both_stand_still);
        // The handover never arrives: the receiver gives up, and stays to be asked.
        s.spawn(|| at("pre-copy", "before Handover#1", Victim::Sender, cut, 1, "a"));
        // The answer never arrives.
        s.spawn(|| at("pre-copy", "before Running#1", Victim::Receiver, cut, 0, "b"));
        // Everything has arrived, and the source does not hear of that.
        s.spawn(|| at("post-copy", "before Drained#1", Victim::Receiver, cut, 0, "b"));
    });
}

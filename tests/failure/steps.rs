//! Something happens at each step of the protocol and of the freeze in turn (`migrate_engine::steps`): an agent ends, both do, the link is cut. The program lives on
//! exactly once.

use crate::{Dice, Victim, copies, goes_on, lives_on_once, nothing_left};
use migrate_harness::{Guest, Hosts, Process, Receiver, Stdio, eventually, two_hosts, within};
use nix::sys::signal::Signal;
use std::{fs, time::Duration};

/// Occurrences of a step that are tried: rounds and looks come as often as they like.
const OCCURRENCES: u32 = 2;
/// Of the steps one in so many is tried, beginning with a random one; all of them with `make chaos`.
const ONE_IN: usize = 6;

/// Starts both agents, one of them with these variables.
pub fn start<'h>(hosts: &'h Hosts, guest: &Guest, victim: Victim, how: &[&str], env: &[(&str, &str)]) -> (Process<'h>, Receiver<'h>) {
    let mine = |v: Victim| if v == victim { env } else { &[] };
    let with = |c: migrate_harness::Command<'h>, v: Victim| mine(v).iter().fold(c, |c, (name, value)| c.env(name, value));
    let receiver = hosts.b.receive_as(&Stdio::Null, &[], |c| with(c, Victim::Receiver));
    let pid = guest.pid.to_string();
    let args = [hosts.a.send_args_any(&pid, &receiver), how.to_vec()].concat();
    let sender = with(hosts.a.migrate(&args), Victim::Sender).start();
    (sender, receiver)
}

/// Both agents, one of them standing still at a step.
pub fn standing_at<'h>(hosts: &'h Hosts, guest: &Guest, victim: Victim, step: &str, how: &[&str]) -> (Process<'h>, Receiver<'h>) {
    let number = (Signal::SIGSTOP as i32).to_string();
    let env = [("MIGRATE_AT", step), ("MIGRATE_AT_SIGNAL", number.as_str())];
    let (sender, receiver) = start(hosts, guest, victim, how, &env);
    let agent = if victim == Victim::Sender { &sender } else { &receiver.process };
    assert!(stands(agent), "{step}: {}", agent.stderr());
    (sender, receiver)
}

fn guest(hosts: &Hosts) -> Guest {
    Guest::start(&hosts.a, "counter", &[])
}

/// Kills the guest, wherever it is.
pub fn end(hosts: &Hosts, guest: &Guest) {
    for (host, pid) in copies(hosts, guest) {
        host.signal(pid, Signal::SIGKILL);
    }
    within("end of the guest", Duration::from_secs(10), || {
        copies(hosts, guest).is_empty().then_some(())
    });
}

/// What one agent reaches in a migration that nothing happens to.
fn steps(hosts: &Hosts, victim: Victim, how: &[&str]) -> Vec<String> {
    let log = hosts.a.dir().join("steps");
    let _ = fs::remove_file(&log);
    let guest = guest(hosts);
    let (sender, receiver) = start(hosts, &guest, victim, how, &[("MIGRATE_STEPS", &log.display().to_string())]);
    for agent in [&sender, &receiver.process] {
        let ended = agent.wait_for(Duration::from_secs(60));
        assert_eq!(ended, migrate_harness::Ended::Code(0), "{}", agent.stderr());
    }
    end(hosts, &guest);
    let text = fs::read_to_string(&log).expect("a build with debug assertions, which notes its steps");
    let often = |line: &&str| {
        line.rsplit_once('#')
            .is_none_or(|(_, n)| n.parse().is_ok_and(|n: u32| n <= OCCURRENCES))
    };
    text.lines().filter(often).map(str::to_owned).collect()
}

/// What happens at a step.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Deed {
    /// The agent that has come to it gets a signal.
    Signal(Signal),
    /// Both agents are killed.
    BothKilled,
    /// The link is cut, and comes back a second later.
    LinkCut,
}

/// How long it is cut: everything that was sent first is lost, and sent again several times.
const CUT: Duration = Duration::from_secs(1);

/// Waits for an agent that stops itself at a step; false if it has ended without coming there.
pub fn stands(agent: &Process<'_>) -> bool {
    within("the step, or the agent's end", Duration::from_secs(60), || match agent.state() {
        Some('T') => Some(true),
        _ => agent.ended().map(|_| false),
    })
}

fn at_each_step(victim: Victim, how: &[&str], deed: Deed) {
    let hosts = two_hosts!();
    let all = steps(&hosts, victim, how);
    assert!(all.len() > 20, "{all:?}");
    let every = if std::env::var_os("MIGRATE_CHAOS").is_some() { 1 } else { ONE_IN };
    let first = Dice::new().below(Duration::from_secs(every as u64)).as_secs() as usize;
    let (mut stayed, mut moved, mut missed) = (0, 0, 0);
    let tried: Vec<&String> = all.iter().skip(first).step_by(every).collect();
    for step in &tried {
        let guest = guest(&hosts);
        let signal = match deed {
            Deed::Signal(signal) => signal,
            Deed::BothKilled | Deed::LinkCut => Signal::SIGSTOP,
        };
        let number = (signal as i32).to_string();
        let (sender, receiver) = start(&hosts, &guest, victim, how, &[("MIGRATE_AT", step), ("MIGRATE_AT_SIGNAL", &number)]);
        let agent = if victim == Victim::Sender { &sender } else { &receiver.process };
        let stands = signal == Signal::SIGSTOP && stands(agent);
        match deed {
            Deed::BothKilled if stands => {
                for agent in [&sender, &receiver.process] {
                    agent.signal(Signal::SIGKILL);
                }
            }
            Deed::LinkCut if stands => {
                hosts.cut();
                agent.signal(Signal::SIGCONT);
                std::thread::sleep(CUT);
                hosts.join();
            }
            _ => {}
        }
        let ended = agent.wait_for(Duration::from_secs(60));
        // Not every migration has as many rounds as the first.
        missed += match deed {
            Deed::Signal(_) => u32::from(ended == migrate_harness::Ended::Code(0)),
            _ => u32::from(!stands),
        };
        let when = format!("{deed:?} at {step:?}, ended with {ended:?}");
        if deed == Deed::LinkCut {
            assert_eq!(ended, migrate_harness::Ended::Code(0), "{when}: {}", agent.stderr());
        }
        // What an operator does when the copy still misses pages: the sender finds the next receiver by itself.
        let waits = victim == Victim::Receiver && !eventually(Duration::from_secs(3), || sender.ended().is_some());
        let next = waits.then(|| hosts.b.receive(&Stdio::Null));
        if victim == Victim::Receiver {
            sender.wait_for(Duration::from_secs(60));
        }
        let (host, _) = lives_on_once(&hosts, &guest, &when);
        println!("{when}: lives on host {}", host.name());
        if host.name() == "a" {
            stayed += 1;
        } else {
            moved += 1;
        }
        // The other one comes to an end by itself, but for a receiver that never heard of anything.
        if victim == Victim::Sender && host.name() == "b" {
            receiver.process.wait_for(Duration::from_secs(60));
        }
        goes_on(&guest, &when);
        for r in [Some(&receiver), next.as_ref()].into_iter().flatten() {
            r.process.signal(Signal::SIGKILL);
            r.process.wait_for(Duration::from_secs(5));
        }
        end(&hosts, &guest);
        nothing_left(&hosts, &when);
    }
    println!(
        "{} of {} steps: {stayed} stayed, {moved} moved, {missed} not reached",
        tried.len(),
        all.len()
    );
    // After the decision the others no longer end an agent.
    let graceful = matches!(deed, Deed::Signal(signal) if signal != Signal::SIGKILL);
    assert!(graceful || missed as usize * 3 <= tried.len(), "too many steps were not reached");
}

const PRE_COPY: &[&str] = &["--mode", "pre-copy"];
const POST_COPY: &[&str] = &["--mode", "post-copy"];

macro_rules! at_each_step {
    ($($test:ident: $victim:ident, $how:expr, $deed:expr;)*) => { $(
        #[test]
        fn $test() {
            at_each_step(Victim::$victim, $how, $deed);
        }
    )* };
}
at_each_step! {
    sender_killed_at_each_step: Sender, PRE_COPY, Deed::Signal(Signal::SIGKILL);
    receiver_killed_at_each_step: Receiver, PRE_COPY, Deed::Signal(Signal::SIGKILL);
    sender_killed_at_each_step_of_post_copy: Sender, POST_COPY, Deed::Signal(Signal::SIGKILL);
    receiver_killed_at_each_step_of_post_copy: Receiver, POST_COPY, Deed::Signal(Signal::SIGKILL);
    sender_interrupted_at_each_step: Sender, PRE_COPY, Deed::Signal(Signal::SIGINT);
    receiver_told_to_end_at_each_step: Receiver, PRE_COPY, Deed::Signal(Signal::SIGTERM);
    sender_told_to_end_at_each_step: Sender, POST_COPY, Deed::Signal(Signal::SIGTERM);
    receiver_interrupted_at_each_step: Receiver, POST_COPY, Deed::Signal(Signal::SIGINT);
    both_agents_killed_at_each_step_of_the_sender: Sender, PRE_COPY, Deed::BothKilled;
    both_agents_killed_at_each_step_of_the_receiver: Receiver, POST_COPY, Deed::BothKilled;
    link_cut_at_each_step_of_the_sender: Sender, PRE_COPY, Deed::LinkCut;
    link_cut_at_each_step_of_the_receiver: Receiver, POST_COPY, Deed::LinkCut;
}

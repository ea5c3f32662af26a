//! Every guest is moved from A to B in rounds, verifies itself there, is moved back with its memory behind it and verifies itself again.

use migrate_harness::{Guest, Run, Stdio, need, two_hosts};
use nix::sys::signal::Signal;
use std::{thread, time::Duration};

fn there_and_back(name: &str, options: &[(&str, &str)]) {
    let hosts = two_hosts!();
    // What a guest may want to find on either host.
    hosts.b.command(["mkfifo", "-m", "600", "/run/fifo"]).start().wait();
    let guest = Guest::start(&hosts.a, name, options);
    let there = hosts.move_with(&hosts.a, guest.pid, &Stdio::Null, &["--mode", "pre-copy"]);
    assert!(guest.beats(), "guest {name} does not beat on B");
    assert_eq!(
        hosts.b.process(there.pid).map(|p| p.inner),
        Some(guest.pid),
        "the pid that the guest itself sees"
    );
    guest.verify("on B");
    let back = hosts.move_with(&hosts.b, there.pid, &Stdio::Null, &["--mode", "post-copy"]);
    assert!(guest.beats(), "guest {name} does not beat on A");
    guest.verify("back on A");
    hosts.a.expect_end(back.pid, || guest.quit());
    println!(
        "{name}: downtime {:.1} ms there, {:.1} ms back",
        there.number("downtime_ms"),
        back.number("downtime_ms")
    );
}

macro_rules! moved {
    ($($test:ident: $name:literal $options:expr;)*) => { $(
        #[test]
        fn $test() {
            there_and_back($name, $options);
        }
    )* };
}
moved! {
    a_counter_that_notices_a_second_one: "counter" &[];
    clocks_asked_without_pause: "clocks" &[];
    random_memory: "ballast" &[("mib", "128")];
    random_memory_being_written: "ballast" &[("mib", "64"), ("dirty", "50")];
    memory_of_every_kind: "memory" &[];
    threads_with_storage_locks_and_rseq: "threads" &[];
    restartable_sequences: "rseq" &[];
    handlers_that_block_every_signal: "masked" &[];
    a_thread_that_blocks_every_signal: "masked" &[("thread", "1")];
    registers_of_every_unit: "xstate" &[];
    signals_that_wait_and_handlers: "signals" &[];
    timers_of_every_kind: "timers" &[];
    interrupted_system_calls_of_every_kind: "restart" &[];
    a_tree_with_groups_sessions_and_zombies: "tree" &[];
    descriptors_of_every_kind: "fds" &[];
    sockets_with_queued_data_and_options: "sockets" &[];
    credentials_limits_and_names: "creds" &[];
    a_niceness_beside_real_time: "creds" &[("policy", "2")];
    a_niceness_of_an_idle_one: "creds" &[("policy", "5")];
}

/// The pids of the tree are taken on B: it must see its own all the same, in a namespace of its own.
#[test]
fn pids_that_are_taken_on_the_other_host() {
    let hosts = two_hosts!();
    let guest = Guest::start_with(&hosts.a, "tree", &[("count", "6")], |c| c.pid(3000));
    let taken: Vec<_> = (3000..3020)
        .map(|pid| hosts.b.command(["sleep", "1000"]).pid(pid).start())
        .collect();
    let moved = hosts.move_tree(&hosts.a, guest.pid, &Stdio::Null);
    assert!(taken.iter().all(|t| t.ended().is_none()), "a process of B was harmed");
    assert!(!(3000..3020).contains(&moved.pid), "two processes with one pid");
    assert_eq!(
        hosts.b.process(moved.pid).map(|p| p.inner),
        Some(guest.pid),
        "the pid that the guest itself sees"
    );
    guest.verify("on B, where its pids were taken");
    let back = hosts.move_tree(&hosts.b, moved.pid, &Stdio::Null);
    assert_eq!(hosts.a.process(back.pid).map(|p| p.inner), Some(guest.pid));
    guest.verify("back on A, where they are free again");
}

/// What docs/security.md says a receiver needs for programs without capabilities: it has no other.
#[test]
fn to_a_receiver_with_few_capabilities() {
    let hosts = two_hosts!();
    need!("setpriv");
    let enough = ["checkpoint_restore", "setpcap", "setgid", "setuid", "sys_ptrace"];
    for (mode, needed) in [("pre-copy", &enough[..4]), ("hybrid", &enough[..]), ("post-copy", &enough[..])] {
        let guest = Guest::start_with(&hosts.a, "ballast", &[("mib", "4"), ("dirty", "1")], |c| {
            c.under(["setpriv", "--bounding-set=-all", "--inh-caps=-all"])
        });
        let plus: String = needed.iter().map(|c| format!(",+{c}")).collect();
        let bounds = ["setpriv".into(), format!("--bounding-set=-all{plus}"), "--inh-caps=-all".into()];
        let receiver = hosts.b.receive_as(&Stdio::Null, &[], |c| c.under(bounds));
        let status = std::fs::read_to_string(format!("/proc/{}/status", receiver.process.outer())).unwrap();
        let permitted = status.lines().find_map(|l| l.strip_prefix("CapPrm:")).expect("capabilities");
        let permitted = u64::from_str_radix(permitted.trim(), 16).unwrap();
        assert_eq!(permitted.count_ones() as usize, needed.len(), "{permitted:x}");
        // The oracle looks at the copy's memory, which takes a right that a migration itself does not.
        let pid = guest.pid.to_string();
        let args = [hosts.a.send_args_any(&pid, &receiver), vec!["--mode", mode]].concat();
        let sent = hosts.a.migrate(&args).env("MIGRATE_VERIFY", "0").start();
        Run::of(&sent, Duration::from_secs(60)).expect_code(0);
        assert!(guest.beats(), "{mode}");
        guest.verify(mode);
        guest.quit();
        receiver.wait();
    }
}

/// A program that does nothing but look at clocks, between hosts that take each other's vdso for another kernel's: it is replaced, replaced
/// again ten times, and at last the real one comes back.
#[test]
fn clocks_through_the_vdso_of_another_kernel() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "clocks", &[]);
    let before = kernel_mappings(&hosts.a, guest.pid);
    hosts.a.foreign_vdsos(true);
    hosts.b.foreign_vdsos(true);
    let mut pid = guest.pid;
    let mut count = None;
    for round in 0..10 {
        let (from, to) = if round % 2 == 0 {
            (&hosts.a, &hosts.b)
        } else {
            (&hosts.b, &hosts.a)
        };
        let mode = if round % 4 < 2 { "stop" } else { "pre-copy" };
        let moved = hosts.move_with(from, pid, &Stdio::Null, &["--mode", mode]);
        pid = moved.pid;
        assert!(guest.beats(), "move {round}");
        guest.verify(&format!("after move {round}"));
        let now = kernel_mappings(to, pid);
        assert!(
            now.len() == before.len() && now.iter().all(|m| !before.contains(m)),
            "after move {round}: {now:?}"
        );
        let all = std::fs::read_to_string(format!("/proc/{}/maps", to.outer(pid).unwrap())).unwrap();
        let lines = all.lines().count();
        assert_eq!(*count.get_or_insert(lines), lines, "after move {round}: mappings\n{all}");
        println!("move {round}: downtime {:.1} ms", moved.number("downtime_ms"));
    }
    hosts.b.foreign_vdsos(false);
    let home = hosts.move_tree(&hosts.a, pid, &Stdio::Null);
    guest.verify("with the real vdso again");
    assert_eq!(kernel_mappings(&hosts.b, home.pid), before);
    guest.quit();
}

/// The kernel's mappings in a process.
fn kernel_mappings(host: &migrate_harness::Host, pid: i32) -> Vec<String> {
    let outer = host.outer(pid).expect("the guest");
    let maps = std::fs::read_to_string(format!("/proc/{outer}/maps")).expect("its mappings");
    maps.lines()
        .filter(|l| l.contains("[vvar") || l.contains("[vdso]"))
        .map(str::to_owned)
        .collect()
}

/// Both agents stand still most of the time, at whatever point they are, as on a host with far too much to do.
#[test]
fn agents_that_are_kept_from_their_cpus() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "masked", &[("thread", "1")]);
    let (mut from, mut pid) = (&hosts.a, guest.pid);
    for round in 0..4_u64 {
        let to = hosts.other(from);
        let receiver = to.receive(&Stdio::Null);
        let name = pid.to_string();
        let sender = from.migrate(&from.send_args(&name, &receiver)).start();
        let mut stops = 0;
        while sender.ended().is_none() {
            for agent in [&sender, &receiver.process] {
                agent.signal(Signal::SIGSTOP);
            }
            thread::sleep(Duration::from_millis(25));
            for agent in [&sender, &receiver.process] {
                agent.signal(Signal::SIGCONT);
            }
            stops += 1;
            thread::sleep(Duration::from_micros(300 + (stops * 977 + round * 431) % 4000));
        }
        let sent = Run::of(&sender, Duration::from_secs(1));
        sent.expect_code(0);
        receiver.wait().expect_code(0);
        pid = sent.json()["restored_pid"].as_i64().expect("the copy's pid") as i32;
        from = to;
        println!("move {round}: both stood still {stops} times");
        assert!(guest.beats(), "move {round}");
        guest.verify(&format!("after move {round}"));
    }
    guest.quit();
}

/// Ten times there and back.
#[test]
fn ten_times_there_and_back() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let mut pid = guest.pid;
    for round in 0..10 {
        pid = hosts.move_tree(&hosts.a, pid, &Stdio::Null).pid;
        assert!(guest.beats(), "round {round}, on B");
        pid = hosts.move_tree(&hosts.b, pid, &Stdio::Null).pid;
        assert!(guest.beats(), "round {round}, on A");
    }
    guest.verify("after twenty moves");
    let count = std::fs::read_to_string(guest.dir().join("count")).unwrap();
    let numbers = migrate_harness::programs::numbers(&count);
    migrate_harness::programs::expect_in_order(&numbers);
    assert_eq!(numbers[0], 1);
}

/// The original goes on too when asked.
#[test]
fn leave_running_keeps_the_original() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "4")]);
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(guest.pid, &receiver, &["--leave-running"]);
    sent.expect_code(0);
    let copy = sent.json()["restored_pid"].as_i64().unwrap() as i32;
    let (original, copy) = (hosts.a.process(guest.pid).unwrap(), hosts.b.process(copy).unwrap());
    assert!(
        !"TtZ".contains(original.state) && !"TtZ".contains(copy.state),
        "{original:?} {copy:?}"
    );
}

/// After the first contact no ticket is needed.
#[test]
fn trusted_hosts_need_no_ticket() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    let there = hosts.move_tree(&hosts.a, guest.pid, &Stdio::Null);
    let _back = hosts.move_tree(&hosts.b, there.pid, &Stdio::Null);
    let receiver = hosts.b.receive(&Stdio::Null);
    let pid = guest.pid.to_string();
    let sent = hosts.a.run(&["send", &pid, &receiver.target, "--mode", "stop", "--json"]);
    sent.expect_code(0);
    receiver.wait().expect_code(0);
    guest.verify("moved without a ticket");
}

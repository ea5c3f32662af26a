//! The hosts and the guests themselves, with nothing moved: what fails here says nothing about the program under test.

use migrate_harness::{Client, Ended, Guest, Redis, Stdio, need, programs, python, tool, two_hosts, within};
use std::{net::TcpListener, net::TcpStream, path::Path, time::Duration};

#[test]
fn hosts_reach_each_other_and_share_files() {
    let hosts = two_hosts!();
    let listener = hosts.b.inside(|| TcpListener::bind("10.77.0.2:4000").expect("a listener on B"));
    hosts
        .a
        .inside(|| TcpStream::connect_timeout(&"10.77.0.2:4000".parse().unwrap(), Duration::from_secs(2)).expect("A reaches B"));
    drop(listener);
    std::fs::write(hosts.file("shared"), "seen").unwrap();
    for host in [&hosts.a, &hosts.b] {
        let cat = host.command(["cat", &hosts.file("shared").display().to_string()]).start();
        assert_eq!(cat.wait(), Ended::Code(0));
        within("output", Duration::from_secs(1), || (cat.stdout() == "seen").then_some(()));
        host.command(["touch", "/run/private"]).start().wait();
    }
    assert!(!Path::new("/run/private").exists(), "/run of a host is not private");
}

#[test]
fn processes_are_seen_from_both_sides_and_their_ends_are_kept() {
    let hosts = two_hosts!();
    let sleep = hosts.a.command(["sleep", "1000"]).pid(4321).start();
    assert_eq!(sleep.pid, 4321);
    assert_eq!(hosts.a.process(4321).unwrap().name, "sleep");
    assert!(hosts.b.process(4321).is_none());
    assert!(sleep.signal(nix::sys::signal::Signal::SIGTERM));
    assert_eq!(sleep.wait(), Ended::Signal(15));
    assert_eq!(hosts.a.command(["sh", "-c", "exit 7"]).start().wait(), Ended::Code(7));
}

#[test]
fn a_terminal_is_the_controlling_one() {
    let hosts = two_hosts!();
    let shell = hosts.a.command(["sh", "-i"]).stdio(Stdio::Terminal).start();
    shell.type_in("tty && echo over-$((40+2)) > /dev/tty\n");
    within("answer of the shell", Duration::from_secs(5), || {
        shell.stdout().contains("over-42").then_some(())
    });
    shell.type_in("exit 3\n");
    assert_eq!(shell.wait(), Ended::Code(3));
}

#[test]
fn a_host_ends_with_its_value() {
    let hosts = two_hosts!();
    let sleep = hosts.a.command(["sleep", "1000"]).nohup().start();
    let outer = sleep.outer();
    assert!(Path::new(&format!("/proc/{outer}")).exists());
    drop(hosts);
    within("end of the host's processes", Duration::from_secs(5), || {
        (!Path::new(&format!("/proc/{outer}")).exists()).then_some(())
    });
}

fn verifies_where_it_is(name: &str, options: &[(&str, &str)]) {
    let hosts = two_hosts!();
    let mark = hosts.a.deaths();
    let guest = Guest::start(&hosts.a, name, options);
    assert!(guest.beats());
    std::thread::sleep(Duration::from_millis(300));
    guest.verify("unmoved");
    guest.verify("unmoved, a second time");
    guest.quit();
    let ended = within("end of the guest", Duration::from_secs(10), || hosts.a.ended_since(mark, guest.pid));
    assert_eq!(ended, Ended::Code(0), "{}", guest.output());
}

macro_rules! unmoved {
    ($($test:ident: $name:literal $options:expr;)*) => { $(
        #[test]
        fn $test() {
            verifies_where_it_is($name, $options);
        }
    )* };
}
unmoved! {
    guest_counter: "counter" &[];
    guest_ballast: "ballast" &[("mib", "64"), ("dirty", "10")];
    guest_memory: "memory" &[];
    guest_vmas: "vmas" &[("count", "2000")];
    guest_threads: "threads" &[];
    guest_xstate: "xstate" &[];
    guest_signals: "signals" &[];
    guest_timers: "timers" &[];
    guest_restart: "restart" &[("wait-ms", "1000")];
    guest_rseq: "rseq" &[];
    guest_tree: "tree" &[];
    guest_fds: "fds" &[];
    guest_files: "files" &[("count", "2000")];
    guest_sockets: "sockets" &[];
    guest_creds: "creds" &[];
}

/// Each kind of trap is right about itself.
#[test]
fn guest_trap() {
    let hosts = two_hosts!();
    let kinds = "new moved swapped moved-beside left-behind replaced mapped-over grown brk stack protected dropped freed huge fork-advice file punched \
                 written-by-descriptor only-a-descriptor written-by-a-child written-from-outside other-backing userfaultfd forks grandchildren \
                 execs threads";
    for kind in kinds.split_whitespace() {
        let mark = hosts.a.deaths();
        let guest = Guest::start(&hosts.a, "trap", &[("kind", kind)]);
        std::thread::sleep(Duration::from_millis(200));
        guest.verify(&format!("{kind}, unmoved"));
        guest.quit();
        let ended = within("end of the guest", Duration::from_secs(10), || hosts.a.ended_since(mark, guest.pid));
        assert_eq!(ended, Ended::Code(0), "{kind}: {}", guest.output());
    }
}

/// A random workload is right about itself, operation by operation.
#[test]
fn guest_soak() {
    let hosts = two_hosts!();
    for options in [&[("seed", "1")][..], &[("seed", "2"), ("threads", "0")]] {
        let mark = hosts.a.deaths();
        let guest = Guest::start(&hosts.a, "soak", options);
        for operations in [25_000, 50_000] {
            within("operations", Duration::from_secs(120), || {
                (guest.pulse().operations >= operations).then_some(())
            });
            guest.verify("unmoved");
        }
        guest.quit();
        let ended = within("end of the guest", Duration::from_secs(10), || hosts.a.ended_since(mark, guest.pid));
        assert_eq!(ended, Ended::Code(0), "{}", guest.output());
    }
}

#[test]
fn a_guest_says_what_differs() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "creds", &[]);
    // From outside, as a bad migration would: another limit, another priority.
    let pid = guest.pid.to_string();
    assert_eq!(hosts.a.command(["renice", "-n", "9", "-p", &pid]).start().wait(), Ended::Code(0));
    let wrong = guest.differences();
    assert!(wrong.iter().any(|w| w.contains("nice")), "{wrong:?}");
}

#[test]
fn http_counter_and_its_client() {
    let hosts = two_hosts!();
    let Some(python) = python() else {
        migrate_harness::skip("python3 is not installed");
        return;
    };
    let server = hosts
        .a
        .command([python.to_str().unwrap(), "-c", programs::PYTHON_COUNTER, "8000"])
        .start();
    within("start of the server", Duration::from_secs(20), || {
        server.stdout().contains("listening").then_some(())
    });
    let client = Client::http(&hosts, 8000, Duration::from_millis(5));
    client.wait_for(0, 20);
    client.expect_counts_on();
    assert!(client.answers().iter().all(|a| a.host == 0));
}

#[test]
fn node_counter_and_its_client() {
    let hosts = two_hosts!();
    let node = need!("node");
    let server = hosts
        .a
        .command([node.to_str().unwrap(), "-e", programs::NODE_COUNTER, "8000"])
        .start();
    within("start of the server", Duration::from_secs(20), || {
        server.stdout().contains("listening").then_some(())
    });
    let client = Client::http(&hosts, 8000, Duration::from_millis(5));
    client.wait_for(0, 20);
    client.expect_counts_on();
}

#[test]
fn redis_answers_its_client() {
    let hosts = two_hosts!();
    let _ = need!("redis-server");
    let _server = Redis::start(&hosts, &hosts.a, 6400, &[]);
    let redis = Redis::of(&hosts.a, 6400);
    assert_eq!(redis.ask(&["SET", "key", "value"]).unwrap(), "OK");
    assert_eq!(redis.ask(&["GET", "key"]).unwrap(), "value");
    assert_eq!(redis.ask(&["DEBUG", "DIGEST"]).unwrap().len(), 40);
    assert!(redis.ask(&["NONSENSE"]).is_err());
}

#[test]
fn python_is_right_when_left_alone() {
    let hosts = two_hosts!();
    let Some(python) = python() else {
        migrate_harness::skip("python3 is not installed");
        return;
    };
    let dir = hosts.file("busy");
    std::fs::create_dir(&dir).unwrap();
    let program = hosts
        .a
        .command([python.to_str().unwrap(), "-c", programs::PYTHON_BUSY, dir.to_str().unwrap()])
        .start();
    within("ten rounds", Duration::from_secs(30), || {
        program.stdout().contains("\n10\n").then_some(())
    });
    std::fs::write(dir.join("stop"), "").unwrap();
    assert_eq!(program.wait(), Ended::Code(0), "{}", program.stderr());
    assert_eq!(hosts.read("busy/verdict"), "ok\n");
}

#[test]
fn shell_counter_counts() {
    let hosts = two_hosts!();
    assert!(tool("busybox").is_some(), "busybox is not installed");
    let counter = hosts.a.command(programs::counter("0.01")).stdio(Stdio::Terminal).start();
    within("ten numbers", Duration::from_secs(10), || {
        (programs::numbers(&counter.stdout()).len() >= 10).then_some(())
    });
    programs::expect_in_order(&programs::numbers(&counter.stdout()));
}

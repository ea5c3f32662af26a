//! What cannot move is refused by preflight, with every blocker named, and not touched; or it moves whole. Never "restored without it".

use migrate_harness::{Guest, Standstill, Stdio, eventually, skip, two_hosts};
use nix::sys::signal::Signal;
use std::time::Duration;

/// `must_refuse`: moving it whole is not an answer either.
fn refused_or_whole(what: &str, must_refuse: bool, says: &[&str]) {
    let hosts = two_hosts!();
    let guest = match std::panic::catch_unwind(|| Guest::start(&hosts.a, "hold", &[("what", what)])) {
        Ok(guest) => guest,
        Err(_) => {
            skip(&format!("this kernel does not give a program {what}"));
            return;
        }
    };
    guest.verify("before");
    guest.reset_gap();
    let receiver = hosts.b.receive(&Stdio::Null);
    let machine = Standstill::watch();
    let sent = hosts.a.send(guest.pid, &receiver, &[]);
    if sent.code == 0 && !must_refuse {
        assert!(guest.beats());
        guest.verify("moved");
        return;
    }
    sent.expect_code(3);
    let json = sent.json();
    let blockers = json["blockers"].as_array().cloned().unwrap_or_default();
    assert!(!blockers.is_empty(), "no blocker is named: {json}\n{}", sent.stderr);
    for blocker in &blockers {
        for key in ["place", "reason", "fix"] {
            assert!(blocker[key].as_str().is_some_and(|t| !t.is_empty()), "{key} is missing: {blocker}");
        }
    }
    sent.expect_says(says);
    assert!(guest.beats(), "the program does not run on");
    let (gap, still) = (guest.gap(), machine.longest());
    println!("{what}: refused, longest gap {gap:?}, of this machine {still:?}: {}", blockers[0]);
    assert!(
        gap < Duration::from_millis(500) + still * 2,
        "stopped for {gap:?} by a preflight; the machine stood still for {still:?}"
    );
    guest.verify("after the refusal");
    let status = std::fs::read_to_string(format!("/proc/{}/status", hosts.a.outer(guest.pid).unwrap())).unwrap();
    assert!(status.contains("TracerPid:\t0"), "still traced");
    assert!(hosts.b.running("migrate-guest").is_empty(), "something was made on B");
    // The same from `check`, which touches nothing either; what may pass by itself is seen only in a freeze.
    let check = hosts.a.run(&["check", &guest.pid.to_string()]);
    if blockers.iter().any(|b| b["transient"] == false) {
        check.expect_says(says);
    }
    assert!(guest.beats());
}

macro_rules! refusals {
    ($($test:ident: $what:literal $must:ident [$($says:literal),*];)*) => { $(
        #[test]
        fn $test() {
            refused_or_whole($what, $must, &[$($says),*]);
        }
    )* };
}
const MUST: bool = true;
const MAY: bool = false;
refusals! {
    io_uring: "io-uring" MUST ["io_uring"];
    connected_tcp: "tcp" MUST ["tcp"];
    file_lock_flock: "flock" MUST ["lock"];
    file_lock_posix: "posix-lock" MUST ["lock"];
    file_lock_ofd: "ofd-lock" MUST ["lock"];
    file_lease: "lease" MAY ["lease", "lock"];
    sysv_shared_memory: "sysv-shm" MAY ["sysv", "shm", "shared memory"];
    packet_socket: "packet-socket" MAY ["socket"];
    raw_socket: "raw-socket" MAY ["socket"];
    netlink_socket: "netlink" MAY ["netlink", "socket"];
    vsock_socket: "vsock" MAY ["socket"];
    aio_context: "aio" MAY ["aio"];
    seccomp_filter: "seccomp" MAY ["seccomp"];
    child_in_another_network_namespace: "net-namespace" MAY ["namespace"];
    child_in_another_mount_namespace: "mount-namespace" MAY ["namespace"];
    child_in_another_user_namespace: "user-namespace" MAY ["namespace"];
    stopped_child: "stopped-child" MAY ["stopped"];
    traced_child: "traced-child" MUST ["trace"];
    unix_listener: "unix-listener" MAY ["unix", "socket"];
    unix_socket_with_a_name: "unix-datagram" MAY ["unix", "socket"];
    unix_socket_to_outside_the_tree: "unix-outside" MUST ["unix", "socket"];
    descriptors_in_flight: "rights-in-flight" MAY ["unix", "socket", "descriptor"];
    credentials_in_flight: "credentials-in-flight" MAY ["credentials"];
    packets_in_a_pipe: "packet-pipe" MAY ["packet"];
    deleted_file: "deleted-file" MAY ["deleted", "gone", "unlinked"];
    pidfd_outside_the_tree: "pidfd" MAY ["pidfd"];
    own_userfaultfd: "userfaultfd" MAY ["userfaultfd"];
    message_queue: "message-queue" MAY ["mqueue", "message queue"];
    fanotify_descriptor: "fanotify" MAY ["fanotify"];
    perf_event: "perf-event" MAY ["perf"];
    huge_page_mapping: "hugetlb" MAY ["huge"];
    open_file_in_proc: "proc-file" MAY ["/proc"];
}

/// A tree with several things: each is in the one message.
#[test]
fn every_blocker_is_listed_at_once() {
    let hosts = two_hosts!();
    let script = format!(
        "import fcntl, socket, time\n\
         lock = open('{}', 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n\
         listener = socket.create_server(('127.0.0.1', 0))\n\
         client = socket.create_connection(listener.getsockname()); served = listener.accept()\n\
         print('ready', flush=True)\n\
         time.sleep(1000)\n",
        hosts.file("locked").display()
    );
    let Some(python) = migrate_harness::python() else {
        skip("python3 is not installed");
        return;
    };
    let program = hosts.a.command([python.to_str().unwrap(), "-c", &script]).start();
    migrate_harness::within("start", Duration::from_secs(20), || {
        program.stdout().contains("ready").then_some(())
    });
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(program.pid, &receiver, &[]);
    sent.expect_code(3).expect_says(&["lock"]).expect_says(&["tcp"]);
    assert!(sent.json()["blockers"].as_array().is_some_and(|b| b.len() >= 3), "{}", sent.stdout);
    assert!(program.ended().is_none());
}

/// Stopped by its shell: what it was must be what it is, refused or moved.
#[test]
fn a_stopped_program_stays_stopped() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "counter", &[]);
    hosts.a.signal(guest.pid, Signal::SIGSTOP);
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(guest.pid, &receiver, &[]);
    let (host, pid) = match sent.code {
        3 => (&hosts.a, guest.pid),
        _ => {
            sent.expect_code(0);
            (&hosts.b, sent.json()["restored_pid"].as_i64().unwrap() as i32)
        }
    };
    assert!(guest.rests(Duration::from_millis(200)), "it runs although it was stopped");
    assert_eq!(host.process(pid).map(|p| p.state), Some('T'));
    assert!(host.signal(pid, Signal::SIGCONT));
    assert!(guest.beats());
    guest.verify("continued");
}

/// Built here, when a compiler for it is at hand.
#[test]
fn a_32_bit_program_is_refused() {
    let hosts = two_hosts!();
    let source = hosts.file("small.c");
    std::fs::write(
        &source,
        "void _start(void) { for (;;) __asm__ volatile(\"int $0x80\" : : \"a\"(29)); }\n",
    )
    .unwrap();
    let binary = hosts.file("small");
    let built = std::process::Command::new("cc")
        .args([
            "-m32",
            "-nostdlib",
            "-static",
            "-o",
            binary.to_str().unwrap(),
            source.to_str().unwrap(),
        ])
        .output();
    if !built.is_ok_and(|o| o.status.success()) {
        skip("no compiler for 32-bit programs");
        return;
    }
    let program = hosts.a.command([binary.to_str().unwrap()]).start();
    std::thread::sleep(Duration::from_millis(50));
    if program.ended().is_some() {
        skip("this kernel does not run 32-bit programs");
        return;
    }
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(program.pid, &receiver, &[]);
    sent.expect_code(3).expect_says(&["32-bit", "32 bit", "i386", "x86-64"]);
    assert!(program.ended().is_none());
}

/// A file that is not the same on the other host.
#[test]
fn a_file_that_differs_on_the_other_host_is_refused() {
    let hosts = two_hosts!();
    let file = "/run/data";
    for (host, text) in [(&hosts.a, "one content"), (&hosts.b, "another")] {
        let write = host.command(["sh", "-c", &format!("printf '%s' '{text}' > {file}")]).start();
        write.wait();
    }
    let reader = hosts
        .a
        .command(["sh", "-c", "exec 5< /run/data; while :; do sleep 0.1; done"])
        .start();
    std::thread::sleep(Duration::from_millis(100));
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(reader.pid, &receiver, &[]);
    sent.expect_code(3).expect_says(&[file]);
    hosts.b.command(["rm", file]).start().wait();
    let receiver = if receiver.process.ended().is_some() {
        hosts.b.receive(&Stdio::Null)
    } else {
        receiver
    };
    let sent = hosts.a.send(reader.pid, &receiver, &[]);
    sent.expect_code(3).expect_says(&[file]);
    assert!(reader.ended().is_none());
}

/// A port that the tree listens on is taken on the other host.
#[test]
fn a_port_in_use_on_the_other_host_is_refused() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "sockets", &[]);
    // Whatever ports it has, all of them.
    let ports = hosts.a.inside(|| std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
    let port = ports
        .lines()
        .skip(1)
        .filter(|l| l.split_whitespace().nth(3) == Some("0A"))
        .find_map(|l| u16::from_str_radix(l.split_whitespace().nth(1)?.split_once(':')?.1, 16).ok())
        .expect("a listening port");
    let _taken = hosts
        .b
        .inside(|| std::net::TcpListener::bind(("0.0.0.0", port)).expect("the port on B"));
    let receiver = hosts.b.receive(&Stdio::Null);
    let sent = hosts.a.send(guest.pid, &receiver, &[]);
    sent.expect_code(3).expect_says(&[&port.to_string()]);
    assert!(eventually(Duration::from_secs(5), || guest.beats()));
    guest.verify("after the refusal");
}

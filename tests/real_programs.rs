//! Programs that nobody here wrote, started as anyone would start them, moved with `--mode stop`.

use migrate_harness::{Client, Ended, Hosts, Process, Redis, Stdio, need, programs, python, skip, two_hosts, within};
use nix::sys::signal::Signal;
use std::{
    io::ErrorKind,
    net::TcpStream,
    time::{Duration, Instant},
};

fn count_in(text: impl Fn() -> String, at_least: usize) {
    within(&format!("{at_least} numbers"), Duration::from_secs(60), || {
        (programs::numbers(&text()).len() >= at_least).then_some(())
    });
}

/// Numbers of A's output, then of B's: one row without a gap or a repeat.
#[track_caller]
fn expect_one_row(on_a: &str, on_b: &str) {
    let (a, b) = (programs::numbers(on_a), programs::numbers(on_b));
    assert!(a.len() > 2 && b.len() > 2, "A printed {}, B printed {}", a.len(), b.len());
    assert_eq!(a[0], 0);
    programs::expect_in_order(&[a, b].concat());
}

fn start_counter<'a>(hosts: &'a Hosts, pause: &str, stdio: Stdio) -> Process<'a> {
    hosts.a.command(programs::counter(pause)).stdio(stdio).start()
}

fn moves_with_output(pause: &str, stdio: Stdio, numbers: usize) {
    let hosts = two_hosts!();
    let _ = need!("busybox");
    let counter = start_counter(&hosts, pause, stdio);
    count_in(|| counter.stdout(), numbers);
    let to = hosts.file("continued");
    hosts.move_tree(&hosts.a, counter.pid, &Stdio::File(to.clone()));
    count_in(|| hosts.read(&to), numbers);
    expect_one_row(&counter.stdout(), &hosts.read(&to));
}

#[test]
fn shell_counter_in_a_pipe() {
    moves_with_output("1", Stdio::Pipe, 3);
}

#[test]
fn shell_counter_in_a_pipe_fast() {
    moves_with_output("0.01", Stdio::Pipe, 40);
}

#[test]
fn shell_counter_in_a_terminal() {
    moves_with_output("1", Stdio::Terminal, 3);
}

#[test]
fn shell_counter_in_a_terminal_fast() {
    moves_with_output("0.01", Stdio::Terminal, 40);
}

/// The file is the tree's own: it goes on in the same file, wherever the receiver's streams lead.
fn moves_with_file(pause: &str, numbers: usize, nohup: bool) {
    let hosts = two_hosts!();
    let _ = need!("busybox");
    let out = hosts.file("numbers");
    let mut command = hosts.a.command(programs::counter(pause)).stdio(Stdio::File(out.clone()));
    if nohup {
        command = command.nohup();
    }
    let counter = command.start();
    count_in(|| hosts.read(&out), numbers);
    let there = hosts.move_tree(&hosts.a, counter.pid, &Stdio::Null);
    let so_far = programs::numbers(&hosts.read(&out)).len();
    count_in(|| hosts.read(&out), so_far + numbers);
    if nohup {
        assert!(hosts.b.signal(there.pid, nix::sys::signal::Signal::SIGHUP));
        let so_far = programs::numbers(&hosts.read(&out)).len();
        count_in(|| hosts.read(&out), so_far + numbers);
    }
    let numbers = programs::numbers(&hosts.read(&out));
    assert_eq!(numbers[0], 0);
    programs::expect_in_order(&numbers);
}

#[test]
fn shell_counter_with_a_file() {
    moves_with_file("1", 3, false);
}

#[test]
fn shell_counter_with_a_file_fast() {
    moves_with_file("0.01", 40, false);
}

#[test]
fn shell_counter_under_nohup() {
    moves_with_file("0.01", 40, true);
}

/// The receiver's own terminal shows it.
#[test]
fn shell_counter_continues_on_the_terminal_of_the_receiver() {
    let hosts = two_hosts!();
    let _ = need!("busybox");
    let counter = start_counter(&hosts, "0.05", Stdio::Terminal);
    count_in(|| counter.stdout(), 10);
    let receiver = hosts.b.receive(&Stdio::Terminal);
    let sent = hosts.a.send(counter.pid, &receiver, &[]);
    sent.expect_code(0);
    let shown = || {
        // The receiver's own words are on the same terminal: only lines of digits are the counter's. What follows the progress line, once that is
        // erased, is a line of its own.
        let text = receiver.process.stdout().replace("\x1b[2K", "\n");
        let lines = text
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty() && l.bytes().all(|b| b.is_ascii_digit()));
        lines.map(|l| format!("{l}\n")).collect::<String>()
    };
    count_in(shown, 10);
    expect_one_row(&counter.stdout(), &shown());
}

/// Typed into an interactive shell: a job of its own, in the foreground of its terminal.
#[test]
fn shell_counter_typed_into_a_shell() {
    let hosts = two_hosts!();
    let _ = need!("busybox");
    let shell = hosts.a.command(["busybox", "sh"]).stdio(Stdio::Terminal).env("PS1", "$ ").start();
    let out = hosts.file("numbers");
    shell.type_in(&format!("busybox sh -c '{}' > {}\n", programs::counter("0.02")[3], out.display()));
    count_in(|| hosts.read(&out), 20);
    // The script is an argument of the counter alone, and of what it forks for a moment: the one whose parent is the shell.
    let pid = within("the counter", Duration::from_secs(5), || {
        let jobs = hosts.a.running("sh -c i=0");
        jobs.iter().map(|p| p.pid).min()
    });
    hosts.move_tree(&hosts.a, pid, &Stdio::Null);
    let so_far = programs::numbers(&hosts.read(&out)).len();
    count_in(|| hosts.read(&out), so_far + 20);
    programs::expect_in_order(&programs::numbers(&hosts.read(&out)));
    shell.type_in("echo still-$((1+1))\n");
    within("the shell it was typed into", Duration::from_secs(5), || {
        shell.stdout().contains("still-2").then_some(())
    });
}

#[test]
fn shell_counter_ten_times_there_and_back() {
    let hosts = two_hosts!();
    let _ = need!("busybox");
    let out = hosts.file("numbers");
    let counter = start_counter(&hosts, "0.01", Stdio::File(out.clone()));
    let mut pid = counter.pid;
    for _ in 0..10 {
        pid = hosts.move_tree(&hosts.a, pid, &Stdio::Null).pid;
        pid = hosts.move_tree(&hosts.b, pid, &Stdio::Null).pid;
    }
    let so_far = programs::numbers(&hosts.read(&out)).len();
    count_in(|| hosts.read(&out), so_far + 20);
    programs::expect_in_order(&programs::numbers(&hosts.read(&out)));
}

#[test]
fn python_with_threads_pool_files_and_a_child() {
    let hosts = two_hosts!();
    let Some(python) = python() else {
        skip("python3 is not installed");
        return;
    };
    let dir = hosts.file("busy");
    std::fs::create_dir(&dir).unwrap();
    let out = hosts.file("rounds");
    let argv = [python.to_str().unwrap(), "-c", programs::PYTHON_BUSY, dir.to_str().unwrap()];
    let program = hosts.a.command(argv).stdio(Stdio::File(out.clone())).start();
    let rounds = || programs::numbers(hosts.read(&out).trim_start_matches("ready\n")).len();
    let go_on = || {
        let goal = rounds() + 10;
        within("ten rounds", Duration::from_secs(60), || (rounds() >= goal).then_some(()));
    };
    go_on();
    let there = hosts.move_tree(&hosts.a, program.pid, &Stdio::Null);
    go_on();
    let back = hosts.move_tree(&hosts.b, there.pid, &Stdio::Null);
    go_on();
    std::fs::write(dir.join("stop"), "").unwrap();
    let verdict = within("verdict", Duration::from_secs(60), || {
        let text = hosts.read("busy/verdict");
        (!text.is_empty()).then_some(text)
    });
    assert_eq!(verdict, "ok\n", "{}", hosts.read(&out));
    within("end of the program", Duration::from_secs(10), || {
        hosts.a.process(back.pid).is_none().then_some(())
    });
}

fn http_counter(argv: &[&str], wait_for: &str) {
    let hosts = two_hosts!();
    let out = hosts.file("server");
    let server = hosts.a.command(argv.iter().copied()).stdio(Stdio::File(out.clone())).start();
    within("start of the server", Duration::from_secs(30), || {
        hosts.read(&out).contains(wait_for).then_some(())
    });
    let client = Client::http(&hosts, 8000, Duration::from_millis(5));
    client.wait_for(0, 50);
    let mut pid = server.pid;
    for (from, to) in [(&hosts.a, 1), (&hosts.b, 0)] {
        let since = Instant::now();
        let moved = hosts.move_tree(from, pid, &Stdio::Null);
        client.wait_for(to, 50);
        // Freeze to first answer: the last question that A did not answer any more waited all of it.
        let answers = client.answers();
        let first = answers.iter().find(|a| a.host == to && a.came > since).expect("an answer");
        let last = answers
            .iter()
            .rfind(|a| a.host != to && a.came < first.came)
            .expect("an answer before");
        println!(
            "to host {}: freeze {:.1} ms; from the last answer there to the first answered request here {:.1} ms",
            hosts.other(from).name(),
            moved.number("downtime_ms"),
            (first.came - last.came).as_secs_f64() * 1e3
        );
        pid = moved.pid;
    }
    client.expect_counts_on();
    println!("longest wait of the client {:.1} ms", client.longest_wait().as_secs_f64() * 1e3);
}

#[test]
fn node_http_counter() {
    let node = need!("node");
    http_counter(&[node.to_str().unwrap(), "-e", programs::NODE_COUNTER, "8000"], "listening");
}

#[test]
fn python_http_counter() {
    let Some(python) = python() else {
        skip("python3 is not installed");
        return;
    };
    http_counter(&[python.to_str().unwrap(), "-c", programs::PYTHON_COUNTER, "8000"], "listening");
}

/// Those who come to the old address are turned away at once, not when the last page has come.
#[test]
fn redis_answers_while_its_pages_follow() {
    let hosts = two_hosts!();
    let _ = need!("redis-server");
    let server = Redis::start(&hosts, &hosts.a, 6400, &["--save", ""]);
    let on_a = Redis::of(&hosts.a, 6400);
    // 128 MiB.
    on_a.ask(&["DEBUG", "POPULATE", "32768", "key", "4096"]).expect("keys");
    let client = Client::redis(&hosts, 6400, Duration::from_millis(2));
    client.wait_for(0, 50);
    let moved = hosts.move_with(
        &hosts.a,
        server.pid,
        &Stdio::Null,
        &["--mode", "post-copy", "--bandwidth", "40MB/s"],
    );
    let drained = Instant::now();
    client.wait_for(1, 50);
    let answers = client.answers();
    let early = answers.iter().filter(|a| a.host == 1 && a.came < drained).count();
    println!(
        "{early} answers before the end of a drain of {:.1} s; longest wait {:.1} ms",
        moved.report["drain"]["ms"].as_f64().unwrap_or(f64::NAN) / 1e3,
        client.longest_wait().as_secs_f64() * 1e3
    );
    assert!(early >= 50, "{early} answers of {} came before the last page", answers.len());
    client.expect_counts_on();
}

/// Nor when the originals end at once: their memory goes before their sockets.
#[test]
fn nobody_waits_at_originals_that_end() {
    let hosts = two_hosts!();
    let _ = need!("redis-server");
    let server = Redis::start(&hosts, &hosts.a, 6400, &["--save", ""]);
    let knock = || {
        hosts
            .a
            .inside(|| TcpStream::connect((hosts.a.address(), 6400)).map_err(|e| e.kind()))
    };
    knock().expect("a server that listens");
    let receiver = hosts.b.receive(&Stdio::Null);
    let pid = server.pid.to_string();
    let args = [&hosts.a.send_args_any(&pid, &receiver)[..], &["--mode", "pre-copy"]].concat();
    // SIGSTOP, before it ends them.
    let at = ("MIGRATE_AT", "shut the listeners#1");
    let sender = hosts.a.migrate(&args).env(at.0, at.1).env("MIGRATE_AT_SIGNAL", "19").start();
    Redis::of(&hosts.b, 6400).wait();
    within("a closed door", Duration::from_secs(10), || {
        (knock().err() == Some(ErrorKind::ConnectionRefused)).then_some(())
    });
    assert_eq!(hosts.a.running("redis-server").len(), 1, "the original is there still");
    sender.signal(Signal::SIGCONT);
    assert_eq!(sender.wait_for(Duration::from_secs(30)), Ended::Code(0), "{}", sender.stderr());
    within("end of the original", Duration::from_secs(10), || {
        hosts.a.running("redis-server").is_empty().then_some(())
    });
}

#[test]
fn redis_with_256_mib_of_keys() {
    let hosts = two_hosts!();
    let _ = need!("redis-server");
    let server = Redis::start(&hosts, &hosts.a, 6400, &["--save", "3600 1 300 100"]);
    let on_a = Redis::of(&hosts.a, 6400);
    // 65,536 keys of 4 KiB each.
    on_a.ask(&["DEBUG", "POPULATE", "65536", "key", "4096"]).expect("keys");
    on_a.ask(&["SET", "tongue", "hello"]).expect("a key");
    let digest = on_a.ask(&["DEBUG", "DIGEST"]).expect("a digest");
    let there = hosts.move_tree(&hosts.a, server.pid, &Stdio::Null);
    let on_b = Redis::of(&hosts.b, 6400);
    on_b.wait();
    assert_eq!(on_b.ask(&["DEBUG", "DIGEST"]).expect("a digest on B"), digest);
    // It works on: writes, its background threads and its forks.
    on_b.ask(&["INCR", "visits"]).expect("a write on B");
    on_b.ask(&["UNLINK", "key:7"]).expect("the lazy-free thread");
    on_b.ask(&["BGSAVE"]).expect("a background save");
    within("end of the background save", Duration::from_secs(60), || {
        on_b.ask(&["INFO", "persistence"])
            .ok()?
            .contains("rdb_bgsave_in_progress:0")
            .then_some(())
    });
    let status = on_b.ask(&["INFO", "persistence"]).unwrap();
    assert!(status.contains("rdb_last_bgsave_status:ok"), "{status}");
    let digest = on_b.ask(&["DEBUG", "DIGEST"]).expect("a digest on B");
    let back = hosts.move_tree(&hosts.b, there.pid, &Stdio::Null);
    on_a.wait();
    assert_eq!(on_a.ask(&["DEBUG", "DIGEST"]).expect("a digest back on A"), digest);
    assert_eq!(on_a.ask(&["GET", "tongue"]).unwrap(), "hello");
    println!(
        "256 MiB of keys: downtime {:.0} ms there, {:.0} ms back",
        there.number("downtime_ms"),
        back.number("downtime_ms")
    );
    hosts.a.expect_end(back.pid, || drop(on_a.ask(&["SHUTDOWN", "NOSAVE"])));
}

//! `make demo`: two hosts on this machine, a shell counter and an HTTP counter that move from one to the other while they run.

use migrate_harness::{Client, Hosts, Moved, Stdio, programs, python, tool, within};
use std::time::Duration;

fn main() {
    migrate_harness::without_oracle();
    let Some(hosts) = Hosts::new() else {
        eprintln!("The demo makes two hosts out of namespaces: that takes root and iproute2.");
        std::process::exit(1);
    };
    println!("Two hosts on this machine, joined by a network of their own:");
    println!("  A  {}", hosts.a.address());
    println!("  B  {}\n", hosts.b.address());
    shell(&hosts);
    http(&hosts);
    println!("Both programs were moved by `migrate send PID 10.77.0.2:7878 --mode stop`; neither knows.");
}

fn tail(numbers: &[u64], count: usize) -> String {
    let from = numbers.len().saturating_sub(count);
    numbers[from..].iter().map(u64::to_string).collect::<Vec<_>>().join(" ")
}

fn tell(moved: &Moved) {
    let n = |key: &str| moved.number(key);
    println!(
        "   moved: {} processes, {} threads, {} pages with content, {:.1} MiB on the wire",
        n("processes"),
        n("threads"),
        n("pages_sent"),
        n("bytes_sent") / f64::from(1 << 20)
    );
    println!(
        "   frozen for {:.1} ms, {:.0} ms from start to end",
        n("downtime_ms"),
        n("total_ms")
    );
}

fn shell(hosts: &Hosts) {
    if tool("busybox").is_none() {
        println!("1. The shell counter is left out: busybox is not installed.\n");
        return;
    }
    println!("1. A shell counts, twenty numbers a second, on host A.");
    let command = programs::counter("0.05");
    println!("   $ busybox sh -c '{}'", command[3]);
    let counter = hosts.a.command(command).start();
    within("numbers", Duration::from_secs(20), || {
        (programs::numbers(&counter.stdout()).len() >= 20).then_some(())
    });
    let to = hosts.file("continued");
    let moved = hosts.move_tree(&hosts.a, counter.pid, &Stdio::File(to.clone()));
    within("numbers on B", Duration::from_secs(20), || {
        (programs::numbers(&hosts.read(&to)).len() >= 20).then_some(())
    });
    let (a, b) = (programs::numbers(&counter.stdout()), programs::numbers(&hosts.read(&to)));
    programs::expect_in_order(&[a.clone(), b.clone()].concat());
    tell(&moved);
    println!("   A printed ... {}", tail(&a, 6));
    println!("   B prints      {} ...", tail(&b[..6], 6));
    println!("   No number skipped, none twice.\n");
}

fn http(hosts: &Hosts) {
    let server = match (tool("node"), python()) {
        (Some(node), _) => (
            "Node.js",
            [
                node.display().to_string(),
                "-e".into(),
                programs::NODE_COUNTER.into(),
                "8000".into(),
            ],
        ),
        (None, Some(python)) => (
            "Python",
            [
                python.display().to_string(),
                "-c".into(),
                programs::PYTHON_COUNTER.into(),
                "8000".into(),
            ],
        ),
        (None, None) => {
            println!("2. The HTTP counter is left out: neither node nor python3 is installed.\n");
            return;
        }
    };
    println!(
        "2. A {} HTTP server counts requests on host A; a client asks it all the time.",
        server.0
    );
    let out = hosts.file("server");
    let process = hosts.a.command(server.1).stdio(Stdio::File(out.clone())).start();
    within("start of the server", Duration::from_secs(30), || {
        hosts.read(&out).contains("listening").then_some(())
    });
    let client = Client::http(hosts, 8000, Duration::from_millis(5));
    client.wait_for(0, 200);
    let moved = hosts.move_tree(&hosts.a, process.pid, &Stdio::Null);
    client.wait_for(1, 200);
    client.expect_counts_on();
    tell(&moved);
    let answers = client.answers();
    let last = answers.iter().rfind(|a| a.host == 0);
    let first = answers.iter().find(|a| a.host == 1);
    if let (Some(last), Some(first)) = (last, first) {
        println!(
            "   last answer of A: request {}, first answer of B: request {}",
            last.count, first.count
        );
        println!(
            "   from the one to the other: {:.1} ms",
            (first.came - last.came).as_secs_f64() * 1e3
        );
    }
    println!(
        "   {} requests, each answered once, the longest wait {:.1} ms.\n",
        answers.len(),
        client.longest_wait().as_secs_f64() * 1e3
    );
}

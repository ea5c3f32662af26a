//! A random workload is moved back and forth, as often as `MIGRATE_SOAK` says, and every page is compared: by the agents while nothing runs, by the
//! workload all the time.

use migrate_harness::{Guest, Stdio, two_hosts};
use std::time::Duration;

/// How it is moved. One line for each mode and tracker, and one test for each of these below.
const STOP: &[&str] = &["--mode", "stop"];
const PRE_COPY: &[&str] = &["--mode", "pre-copy"];
/// Slow, so that much happens while pages are missing.
const POST_COPY: &[&str] = &["--mode", "post-copy", "--bandwidth", "60MB/s"];
/// As on a kernel that tracks nothing without stopping the program: page tables are looked at after the freeze.
const UNTRACKED: &[&str] = &["--mode", "post-copy", "--tracker", "soft-dirty", "--bandwidth", "60MB/s"];
const HYBRID: &[&str] = &["--mode", "hybrid", "--max-rounds", "2", "--bandwidth", "60MB/s"];

const TRACKED: &str = "map,unmap,replace,remap,protect,write,brk,stack";

fn soak(how: &[&str], options: &[(&str, &str)]) {
    let hosts = two_hosts!();
    let mut on = None;
    let start = |options: &[(&str, &str)]| Guest::start(&hosts.a, "soak", options);
    migrate_harness::soak(how, 4, Duration::from_secs(30), options, start, |guest| {
        let (host, pid) = on.unwrap_or((&hosts.a, guest.pid));
        let mark = host.deaths();
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hosts.move_with(host, pid, &Stdio::Null, how)));
        let moved = moved.unwrap_or_else(|failed| {
            println!("on host {}, the program ended with {:?}", host.name(), host.ended_since(mark, pid));
            std::panic::resume_unwind(failed)
        });
        on = Some((hosts.other(host), moved.pid));
        moved
    });
}

/// Children and threads too. It saturates both cores: only when a soak is asked for (`make soak`), and skipped by name otherwise.
#[test]
fn everything_with_pre_copy() {
    if std::env::var_os("MIGRATE_SOAK").is_none() {
        migrate_harness::skip("a soak of everything with pre-copy runs with make soak only");
        return;
    }
    soak(PRE_COPY, &[]);
}

macro_rules! soaks {
    ($($test:ident: $how:expr, $options:expr;)*) => { $(
        #[test]
        fn $test() {
            soak($how, $options);
        }
    )* };
}
soaks! {
    everything_with_stop: STOP, &[];
    everything_with_post_copy: POST_COPY, &[];
    everything_with_hybrid: HYBRID, &[];
    memory_alone_with_post_copy: POST_COPY, &[("children", "0"), ("threads", "0"), ("ops-per-second", "20000")];
    everything_with_untracked_post_copy: UNTRACKED, &[];
    // Mappings that should be gone are found only where no thread's stack comes and goes.
    memory_alone_with_stop: STOP, &[("children", "0"), ("threads", "0"), ("ops-per-second", "20000")];
    // Without madvise(2), after which shared memory is compared by content rather than tracked.
    tracked_shared_memory: PRE_COPY, &[("children", "0"), ("threads", "0"), ("ops-per-second", "3000"), ("only", TRACKED)];
    memory_alone_with_pre_copy: PRE_COPY, &[("children", "0"), ("threads", "0"), ("ops-per-second", "20000")];
}

//! A random workload is moved back and forth, as often as `MIGRATE_SOAK` says, and every page is compared: by the agents while nothing runs, by the
//! workload all the time.

use migrate_harness::{Guest, Stdio, two_hosts, within};
use std::time::{Duration, Instant};

/// How it is moved. One line for each mode and tracker, and one test for each of these below.
const STOP: &[&str] = &["--mode", "stop"];
const PRE_COPY: &[&str] = &["--mode", "pre-copy"];

/// Operations that a soak of 200 migrations must have done in the end; a shorter one in proportion.
const OPERATIONS: u64 = 1_000_000;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn soak(how: &[&str], options: &[(&str, &str)]) {
    let migrations = number("MIGRATE_SOAK", 4);
    let seed = number("MIGRATE_SEED", u64::from(std::process::id()));
    println!("MIGRATE_SEED={seed}");
    let hosts = two_hosts!();
    let seed = seed.to_string();
    // For looking into a failure: more options of the workload, as NAME=VALUE separated by commas.
    let more = std::env::var("MIGRATE_SOAK_OPTIONS").unwrap_or_default();
    let more = more.split(',').filter_map(|o| o.split_once('='));
    let options: Vec<(&str, &str)> = [("seed", seed.as_str())]
        .into_iter()
        .chain(options.iter().copied())
        .chain(more)
        .collect();
    let guest = Guest::start(&hosts.a, "soak", &options);
    let since = Instant::now();
    let (mut host, mut pid, mut downtime, mut differences) = (&hosts.a, guest.pid, 0.0_f64, 0);
    for migration in 1..=migrations {
        let before = guest.pulse().operations;
        let mark = host.deaths();
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hosts.move_with(host, pid, &Stdio::Null, how)));
        let moved = moved.unwrap_or_else(|failed| {
            println!(
                "migration {migration}, seed {seed}: the program ended with {:?}",
                host.ended_since(mark, pid)
            );
            std::panic::resume_unwind(failed)
        });
        downtime = downtime.max(moved.number("downtime_ms"));
        (host, pid) = (hosts.other(host), moved.pid);
        // Some operations between any two migrations, beside those that go on during one.
        within("operations after a migration", Duration::from_secs(30), || {
            (guest.pulse().operations > before + OPERATIONS / 200).then_some(())
        });
        let wrong = guest.differences();
        differences += wrong.len();
        assert!(
            wrong.is_empty(),
            "after migration {migration}, on host {}, seed {seed}:\n{}\n{}",
            host.name(),
            wrong.join("\n"),
            guest.output()
        );
        if migration % 20 == 0 {
            println!(
                "{migration} migrations, {} operations, {:?}",
                guest.pulse().operations,
                since.elapsed()
            );
        }
    }
    let operations = guest.pulse().operations;
    println!(
        "{} {migrations} migrations, {operations} operations, {differences} differences, longest downtime {downtime:.1} ms, {:.0} s",
        how.join(" "),
        since.elapsed().as_secs_f64()
    );
    assert!(
        operations >= OPERATIONS / 200 * migrations,
        "only {operations} operations in {migrations} migrations"
    );
    guest.quit();
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
    // Mappings that should be gone are found only where no thread's stack comes and goes.
    memory_alone_with_stop: STOP, &[("children", "0"), ("threads", "0"), ("ops-per-second", "20000")];
    memory_alone_with_pre_copy: PRE_COPY, &[("children", "0"), ("threads", "0"), ("ops-per-second", "20000")];
}

//! A random workload that is moved back and forth.

use crate::{Guest, Moved, within};
use std::time::{Duration, Instant};

/// Operations that a soak of 200 migrations must have done in the end; a shorter one in proportion.
const OPERATIONS: u64 = 1_000_000;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Moves a workload that `start` starts with these options and that `moves` moves to the other host, as often as `MIGRATE_SOAK` says, or
/// `migrations`. After each move the workload compares all its memory. `how`: for the line that says what was done. `patience`: for
/// the operations between two migrations.
pub fn soak(
    how: &[&str],
    migrations: u64,
    patience: Duration,
    options: &[(&str, &str)],
    start: impl FnOnce(&[(&str, &str)]) -> Guest,
    mut moves: impl FnMut(&Guest) -> Moved,
) {
    let migrations = number("MIGRATE_SOAK", migrations);
    let seed = number("MIGRATE_SEED", u64::from(std::process::id()));
    println!("MIGRATE_SEED={seed}");
    let seed = seed.to_string();
    // For looking into a failure: more options of the workload, as NAME=VALUE separated by commas.
    let more = std::env::var("MIGRATE_SOAK_OPTIONS").unwrap_or_default();
    let more = more.split(',').filter_map(|o| o.split_once('='));
    let options: Vec<(&str, &str)> = [("seed", seed.as_str())]
        .into_iter()
        .chain(options.iter().copied())
        .chain(more)
        .collect();
    let guest = start(&options);
    let since = Instant::now();
    let mut downtime = 0.0_f64;
    // By the oracle across the drain; the one at the freeze compares all the others.
    let mut compared = 0;
    // Bytes of shared memory that were compared by content: in first rounds, which is all of it, and in freezes.
    let (mut shared, mut slow) = (0, 0);
    for migration in 1..=migrations {
        let before = guest.pulse().operations;
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| moves(&guest)));
        let moved = moved.unwrap_or_else(|failed| {
            println!("migration {migration}, seed {seed}");
            std::panic::resume_unwind(failed)
        });
        downtime = downtime.max(moved.number("downtime_ms"));
        let rounds = moved.compared();
        shared += rounds.first().unwrap_or(&0);
        slow += rounds.last().unwrap_or(&0);
        compared += moved.report["drain"]["compared"].as_u64().unwrap_or(0);
        // Some operations between any two migrations, beside those that go on during one.
        // A workload with a rate may hurry while nobody moves it.
        let busy = guest.dir().join("busy");
        std::fs::write(&busy, "").expect("the guest's directory");
        within("operations after a migration", patience, || {
            (guest.pulse().operations > before + OPERATIONS / 200).then_some(())
        });
        let _ = std::fs::remove_file(&busy);
        let wrong = guest.differences();
        assert!(
            wrong.is_empty(),
            "after migration {migration}, seed {seed}:\n{}\n{}",
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
        "{} {migrations} migrations, {operations} operations, 0 differences, {compared} pages compared after a drain, {} of {} MiB of shared memory compared in freezes, longest downtime {downtime:.1} ms, {:.0} s",
        how.join(" "),
        slow >> 20,
        shared >> 20,
        since.elapsed().as_secs_f64()
    );
    assert!(
        operations >= OPERATIONS / 200 * migrations,
        "only {operations} operations in {migrations} migrations"
    );
    guest.quit();
}

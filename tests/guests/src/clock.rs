//! A program that looks at the clocks all the time, as many do: none of them may go back, whatever host it is on.

use crate::kit::{Kit, Options, sys0, zeroed};
use std::{io, process::ExitCode};

/// Clocks that count from the start of a host, with their names. The C library reads them without a system call where the vdso can.
///
/// Not CLOCK_MONOTONIC_RAW: a time namespace moves it by the same offset as CLOCK_MONOTONIC, and the difference of the two is another one on
/// every host (half a second between two that have just booted).
const CLOCKS: [(libc::clockid_t, &str); 3] = [
    (libc::CLOCK_MONOTONIC, "CLOCK_MONOTONIC"),
    (libc::CLOCK_MONOTONIC_COARSE, "CLOCK_MONOTONIC_COARSE"),
    (libc::CLOCK_BOOTTIME, "CLOCK_BOOTTIME"),
];

/// Spins on the first clock, with a look at one of them in turn each time round; `--spins` readings lie between two beats. A step forward
/// of more than `--limit-ms` is a difference too.
pub fn clock(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let spins = options.number("spins", 2000);
    let limit = options.number("limit-ms", 60_000) * 1_000_000;
    let mut last = CLOCKS.map(|(id, _)| read(id));
    kit.ready()?;
    let mut round = 0;
    let code = kit.run(
        |kit| {
            for _ in 0..spins {
                look(kit, &mut last, 0, limit);
            }
            round = (round + 1) % CLOCKS.len();
            look(kit, &mut last, round, limit);
        },
        |_| {},
    );
    Ok(code)
}

fn look(kit: &mut Kit, last: &mut [u64; 3], i: usize, limit: u64) {
    let (id, name) = CLOCKS[i];
    let now = read(id);
    if now < last[i] {
        kit.differs(format!("{name} went back by {} ns to {now}", last[i] - now));
    } else if now - last[i] > limit {
        kit.differs(format!("{name} jumped by {} ns to {now}", now - last[i]));
    }
    last[i] = now;
}

fn read(clock: libc::clockid_t) -> u64 {
    let mut t: libc::timespec = zeroed();
    sys0!(clock_gettime(clock, &mut t));
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

//! `/proc/PID/timens_offsets`: how far a time namespace's clocks are from the host's (time_namespaces(7)).

use super::ParseError;
use std::io;

/// Nanoseconds to add to the host's CLOCK_MONOTONIC and CLOCK_BOOTTIME.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offsets {
    /// CLOCK_MONOTONIC.
    pub monotonic: i128,
    /// CLOCK_BOOTTIME.
    pub boottime: i128,
}

/// Parses the file: `monotonic SECONDS NANOSECONDS`, `boottime SECONDS NANOSECONDS`, the nanoseconds never negative.
pub fn parse(text: &[u8]) -> Result<Offsets, ParseError> {
    let mut offsets = Offsets::default();
    for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let bad = || ParseError::new("timens_offsets", line);
        let words: Vec<&str> = std::str::from_utf8(line).map_err(|_| bad())?.split_whitespace().collect();
        let [clock, seconds, nanos] = words[..] else { return Err(bad()) };
        let seconds: i64 = seconds.parse().map_err(|_| bad())?;
        let nanos: u32 = nanos.parse().map_err(|_| bad())?;
        let offset = i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        match clock {
            "monotonic" => offsets.monotonic = offset,
            "boottime" => offsets.boottime = offset,
            _ => return Err(bad()),
        }
    }
    Ok(offsets)
}

/// Those of a process; none where the kernel has no time namespaces. They are the ones its children will have: one that made a namespace and has
/// no child yet is told apart by no file of /proc, and the clocks read in the freeze show it.
pub fn offsets(pid: i32) -> io::Result<Offsets> {
    match super::read(pid, "timens_offsets") {
        Ok(text) => Ok(parse(&text)?),
        Err(e) if e.kind() == io::ErrorKind::NotFound && super::path(pid, "stat").exists() => Ok(Offsets::default()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_of_both_signs() {
        let offsets = parse(b"monotonic          -8 596356195\nboottime            7 394449545\n").unwrap();
        assert_eq!(offsets.monotonic, -8_000_000_000 + 596_356_195);
        assert_eq!(offsets.boottime, 7_394_449_545);
        assert_eq!(parse(b"").unwrap(), Offsets::default());
    }

    #[test]
    fn damage_is_refused() {
        for text in ["monotonic 1", "monotonic 1 -2", "realtime 1 2", "monotonic x 2", "monotonic 1 2 3"] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn own_offsets_are_readable() {
        offsets(std::process::id() as i32).unwrap();
    }
}

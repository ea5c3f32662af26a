//! Words of the command line to values: sizes, rates, durations, pids, addresses, names. Pure; every refusal says what to write instead.

use migrate_engine::report::Stdio;
use std::{net::SocketAddr, time::Duration};

/// Longest duration taken: engines add durations to instants, which must not overflow.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);

const SIZES: [(&str, u64); 9] = [
    ("B", 1),
    ("kB", 1000),
    ("MB", 1000_u64.pow(2)),
    ("GB", 1000_u64.pow(3)),
    ("TB", 1000_u64.pow(4)),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

const BITS: [(&str, u64); 5] = [
    ("bit", 1),
    ("kbit", 1000),
    ("Mbit", 1000_u64.pow(2)),
    ("Gbit", 1000_u64.pow(3)),
    ("Tbit", 1000_u64.pow(4)),
];

const TIMES: [(&str, u64); 5] = [
    ("us", 1000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// "1.5GB" and "64MiB" to bytes, rounded down.
pub fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let scale =
        unit_of(&SIZES, unit).ok_or_else(|| format!("'{unit}' is no unit of size: write B, kB, MB, GB, TB, KiB, MiB, GiB or TiB"))?;
    scaled(number, scale, 1)
}

/// "100MB/s" and "1Gbit/s" to bytes a second, rounded down, never zero.
pub fn rate(text: &str) -> Result<u64, String> {
    const UNITS: &str = "write bytes (kB/s, MB/s, GB/s, MiB/s) or bits (Mbit/s, Gbit/s)";
    let Some(amount) = text.strip_suffix("/s") else {
        return Err(format!("not a rate: {UNITS}, as in 100MB/s"));
    };
    let (number, unit) = split(amount)?;
    let bytes = if let Some(scale) = unit_of(&BITS, unit) {
        scaled(number, scale, 8)?
    } else if unit_of(&SIZES, unit).is_some() {
        size(amount)?
    } else {
        return Err(format!("'{unit}/s' is no unit of rate: {UNITS}"));
    };
    if bytes == 0 {
        return Err("a rate of less than a byte a second moves nothing".into());
    }
    Ok(bytes)
}

/// How fast a program writes its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirtyRate {
    /// MB a second; 0: not at all.
    Megabytes(u64),
    /// As fast as a core can.
    Max,
}

/// "0", "50MB/s", "max".
pub fn dirty_rate(text: &str) -> Result<DirtyRate, String> {
    match text {
        "0" => Ok(DirtyRate::Megabytes(0)),
        "max" => Ok(DirtyRate::Max),
        _ => match rate(text).map_err(|e| format!("{e}; or 0, or max"))? / 1_000_000 {
            0 => Err("less than 1 MB/s: write 0 for a program that writes nothing".into()),
            megabytes => Ok(DirtyRate::Megabytes(megabytes)),
        },
    }
}

/// "20ms", "1.5s", "5m" to a duration, never zero, at most 30 days.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text)?;
    let scale = unit_of(&TIMES, unit).ok_or_else(|| format!("'{unit}' is no unit of time: write us, ms, s, m or h, as in 20ms or 1.5s"))?;
    let duration = Duration::from_nanos(scaled(number, scale, 1)?);
    if duration.is_zero() {
        return Err("must be longer than nothing".into());
    }
    if duration > LONGEST {
        return Err("longer than 30 days".into());
    }
    Ok(duration)
}

/// A process id.
pub fn pid(text: &str) -> Result<i32, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse::<i32>() {
        Ok(pid) if digits && pid > 0 => Ok(pid),
        _ if digits && text.bytes().any(|b| b != b'0') => Err("larger than any process id".into()),
        _ => Err("a process id is a number greater than zero (see ps, pgrep)".into()),
    }
}

/// HOST:PORT of a receiver; the name is looked up later.
pub fn peer(text: &str) -> Result<String, String> {
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(format!(
            "no port: write HOST:PORT, as in {}:7878",
            if text.is_empty() { "10.0.0.2" } else { text }
        ));
    };
    match port.parse::<u16>() {
        Ok(port) if port > 0 => {}
        _ => return Err(format!("'{port}' is not a port: a number from 1 to 65535")),
    }
    let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    if let Some(v6) = bracketed {
        // A scope ("fe80::1%eth0") is part of a link-local address and not of what Ipv6Addr parses.
        let address = v6.split('%').next().unwrap_or(v6);
        return match address.parse::<std::net::Ipv6Addr>() {
            Ok(_) => Ok(text.to_owned()),
            Err(_) => Err(format!("'{v6}' is not an IPv6 address")),
        };
    }
    if host.contains(':') {
        return Err(format!("an IPv6 address goes in brackets: [{host}]:{port}"));
    }
    if host.is_empty() || !host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) {
        return Err(format!("'{host}' is neither a host name nor an address"));
    }
    Ok(text.to_owned())
}

/// ADDR:PORT to listen on; port 0 lets the kernel choose.
pub fn listen(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "write ADDR:PORT with an address of this host, as in 0.0.0.0:7878, 10.0.0.2:7878 or [::]:7878".into())
}

/// Name of a checkpoint: it becomes a directory.
pub fn name(text: &str) -> Result<String, String> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if text.is_empty() || text.len() > 100 || !text.bytes().all(fits) || text.starts_with(['.', '-']) {
        return Err("a name is 1 to 100 letters, digits, '.', '-' and '_', and starts with neither '.' nor '-'".into());
    }
    Ok(text.to_owned())
}

/// A ticket: not empty, which is what `--ticket "$(cat MISSING)"` gives.
pub fn ticket(text: &str) -> Result<String, String> {
    let ticket = text.trim();
    if ticket.is_empty() || !ticket.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("a ticket is the one word that `migrate receive` prints".into());
    }
    Ok(ticket.to_owned())
}

/// `inherit`, `null` or a file.
pub fn stdio(text: &str) -> Result<Stdio, String> {
    match text {
        "" => Err("write inherit, null or a file".into()),
        "inherit" => Ok(Stdio::Inherit),
        "null" => Ok(Stdio::Null),
        file => Ok(Stdio::File(file.into())),
    }
}

/// An argument of `check`, told apart by its form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A process of this host.
    Pid(i32),
    /// A receiver.
    Peer(String),
}

/// PID or HOST:PORT.
pub fn target(text: &str) -> Result<Target, String> {
    if text.contains(':') {
        peer(text).map(Target::Peer)
    } else if text.starts_with(|c: char| c.is_ascii_digit() || c == '-') && !text.contains('.') {
        pid(text).map(Target::Pid)
    } else {
        Err("neither a process id (a number) nor a receiver (HOST:PORT)".into())
    }
}

fn unit_of(units: &[(&str, u64)], unit: &str) -> Option<u64> {
    units.iter().find(|(name, _)| *name == unit).map(|(_, scale)| *scale)
}

/// A decimal number as digits and how many of them stand behind the point.
#[derive(Clone, Copy)]
struct Number {
    digits: u128,
    decimals: u32,
}

/// The number and the unit behind it.
fn split(text: &str) -> Result<(Number, &str), String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    if number.is_empty() {
        return Err("starts with a number, as in 20 or 1.5".into());
    }
    if unit.is_empty() {
        return Err(format!("'{number}' needs its unit"));
    }
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.contains('.') {
        return Err(format!("'{number}' is not a number: write it as in 20 or 1.5"));
    }
    if whole.len() > 19 || fraction.len() > 9 {
        return Err(format!("'{number}' has too many digits"));
    }
    // At most 28 digits: far below the 38 that fit.
    let digits = format!("{whole}{fraction}")
        .parse()
        .map_err(|_| format!("'{number}' is not a number"))?;
    let decimals = u32::try_from(fraction.len()).map_err(|_| format!("'{number}' has too many digits"))?;
    Ok((Number { digits, decimals }, unit))
}

/// number × multiply ÷ divide, rounded down.
fn scaled(number: Number, multiply: u64, divide: u64) -> Result<u64, String> {
    let too_large = || "too large".to_owned();
    let product = number.digits.checked_mul(u128::from(multiply)).ok_or_else(too_large)?;
    u64::try_from(product / (10_u128.pow(number.decimals) * u128::from(divide))).map_err(|_| too_large())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        assert_eq!(size("0B"), Ok(0));
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("1.5GB"), Ok(1_500_000_000));
        assert_eq!(size("0.5KiB"), Ok(512));
        assert_eq!(
            size("18446744073709551615B").unwrap_err(),
            "'18446744073709551615' has too many digits"
        );
        assert_eq!(size("9999999999999999999TiB").unwrap_err(), "too large");
        for bad in [
            "", "MB", "1", "1 MB", "1mb", "1Mb", "-1MB", "+1MB", "1.MB", ".5MB", "1.2.3MB", "1e3B", "0x1B", "1MB ", " 1MB", "1,5MB", "１MB",
        ] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates() {
        assert_eq!(rate("100MB/s"), Ok(100_000_000));
        assert_eq!(rate("1Gbit/s"), Ok(125_000_000));
        assert_eq!(rate("2.5Gbit/s"), Ok(312_500_000));
        assert_eq!(rate("8bit/s"), Ok(1));
        for bad in [
            "100",
            "100MB",
            "100Mb/s",
            "100MBps",
            "100mbit/s",
            "0MB/s",
            "0.0MB/s",
            "7bit/s",
            "100MB/m",
            "100MB/s/s",
            "/s",
            "MB/s",
            "-1MB/s",
        ] {
            assert!(rate(bad).is_err(), "{bad}");
        }
        assert!(rate("100Mb/s").unwrap_err().contains("Mbit/s"));
    }

    #[test]
    fn dirty_rates() {
        assert_eq!(dirty_rate("0"), Ok(DirtyRate::Megabytes(0)));
        assert_eq!(dirty_rate("50MB/s"), Ok(DirtyRate::Megabytes(50)));
        assert_eq!(dirty_rate("max"), Ok(DirtyRate::Max));
        for bad in ["", "50", "-1", "1kB/s", "Max", "0MB/s"] {
            assert!(dirty_rate(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(duration("250us"), Ok(Duration::from_micros(250)));
        assert_eq!(duration("720h"), Ok(LONGEST));
        for bad in [
            "",
            "20",
            "ms",
            "0ms",
            "0.0000001us",
            "20 ms",
            "20Ms",
            "20min",
            "1m30s",
            "-5ms",
            "+5ms",
            "1e3s",
            "721h",
            "inf",
            "nan",
            "∞s",
            "5s\n",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert_eq!(duration("20").unwrap_err(), "'20' needs its unit");
    }

    #[test]
    fn pids() {
        assert_eq!(pid("1"), Ok(1));
        assert_eq!(pid("2147483647"), Ok(i32::MAX));
        for bad in [
            "",
            "0",
            "00",
            "-1",
            "+1",
            "1.0",
            "1 ",
            "0x10",
            "abc",
            "2147483648",
            "99999999999999999999999",
        ] {
            assert!(pid(bad).is_err(), "{bad}");
        }
        assert_eq!(pid("4294967296").unwrap_err(), "larger than any process id");
    }

    #[test]
    fn peers() {
        for good in ["host:7878", "10.0.0.2:1", "a-b.example:65535", "[::1]:7878", "[fe80::1%eth0]:7878"] {
            assert_eq!(peer(good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "host",
            ":7878",
            "host:",
            "host:0",
            "host:65536",
            "host:+1x",
            "::1:7878",
            "[::1]",
            "[x]:1",
            "a b:1",
            "quic://host:1",
            "host:http",
        ] {
            assert!(peer(bad).is_err(), "{bad}");
        }
        assert!(peer("::1:7878").unwrap_err().contains("[::1]:7878"));
    }

    #[test]
    fn targets() {
        assert_eq!(target("42"), Ok(Target::Pid(42)));
        assert_eq!(target("h:1"), Ok(Target::Peer("h:1".into())));
        assert!(target("redis").unwrap_err().contains("HOST:PORT"));
        assert!(target("-3").is_err());
        assert!(target("10.0.0.2").unwrap_err().contains("HOST:PORT"));
    }

    #[test]
    fn tickets() {
        assert_eq!(ticket("abc\n").as_deref(), Ok("abc"));
        for bad in ["", " ", "a b", "a\x1b"] {
            assert!(ticket(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names() {
        assert_eq!(name("before-upgrade_1.2").as_deref(), Ok("before-upgrade_1.2"));
        for bad in ["", ".", "..", ".hidden", "-x", "a/b", "a b", "a\0", "ä", &"x".repeat(101)] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "\\PC{0,40}") {
            let _ = (size(&text), rate(&text), duration(&text), pid(&text), peer(&text), listen(&text), name(&text), target(&text));
        }

        #[test]
        fn numbers_with_units_never_panic(number in "[0-9.]{1,30}", unit in "(us|ms|s|m|h|B|kB|TB|TiB)(/s)?") {
            let text = format!("{number}{unit}");
            let _ = (size(&text), rate(&text), duration(&text));
        }

        #[test]
        fn size_is_the_product(number in 0_u64..1 << 24, unit in 0..SIZES.len()) {
            let (name, scale) = SIZES[unit];
            prop_assert_eq!(size(&format!("{number}{name}")).ok(), number.checked_mul(scale));
        }

        #[test]
        fn decimals_are_exact(thousandths in 0_u64..1 << 40) {
            prop_assert_eq!(size(&format!("{}.{:03}kB", thousandths / 1000, thousandths % 1000)), Ok(thousandths));
        }

        #[test]
        fn bits_are_eighths(number in 8_u64..1 << 40) {
            prop_assert_eq!(rate(&format!("{number}bit/s")), Ok(number / 8));
            prop_assert_eq!(rate(&format!("{number}kbit/s")), Ok(number * 125));
        }

        #[test]
        fn durations_are_exact(micros in 1_u64..1 << 40) {
            prop_assert_eq!(duration(&format!("{micros}us")), Ok(Duration::from_micros(micros)));
            prop_assert_eq!(duration(&format!("{}.{:03}ms", micros / 1000, micros % 1000)), Ok(Duration::from_micros(micros)));
        }

        #[test]
        fn pids_are_numbers(number in 1_i32..) {
            prop_assert_eq!(pid(&number.to_string()), Ok(number));
        }
    }
}

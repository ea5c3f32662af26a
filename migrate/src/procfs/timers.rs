//! /proc/PID/timers: POSIX timers (proc_pid_timers(5)), and /proc/PID/limits.

use super::{ParseError, hex, num};

/// A POSIX timer as the file describes it; the times come from timer_gettime(2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timer {
    /// Kernel's timer_t.
    pub id: i32,
    /// Signal.
    pub signal: i32,
    /// sigev_value.
    pub value: u64,
    /// sigev_notify: 0 signal, 1 none, 4 thread id.
    pub notify: i32,
    /// Target of the signal: tid for SIGEV_THREAD_ID, else the pid.
    pub target: i32,
    /// Clock id.
    pub clock: i32,
}

/// Parses /proc/PID/timers.
pub fn parse(text: &[u8]) -> Result<Vec<Timer>, ParseError> {
    let mut v: Vec<Timer> = Vec::new();
    for line in text.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
        let Some(colon) = line.iter().position(|&b| b == b':') else {
            return Err(ParseError::new("timers", line));
        };
        let (key, val) = (&line[..colon], line[colon + 1..].trim_ascii());
        if key == b"ID" {
            v.push(Timer {
                id: num("timer ID", val)?,
                signal: 0,
                value: 0,
                notify: 0,
                target: 0,
                clock: 0,
            });
            continue;
        }
        let t = v.last_mut().ok_or_else(|| ParseError::new("timers", line))?;
        match key {
            b"signal" => {
                // "64/0x5581..."
                let slash = val
                    .iter()
                    .position(|&b| b == b'/')
                    .ok_or_else(|| ParseError::new("timer signal", line))?;
                t.signal = num("timer signal", &val[..slash])?;
                let p = &val[slash + 1..];
                t.value = if p == b"(null)" {
                    0
                } else {
                    hex("timer value", p.strip_prefix(b"0x").unwrap_or(p))?
                };
            }
            b"notify" => {
                // "signal/pid.123", "none/pid.1", "thread/tid.5", "signal/tid.5"
                t.notify = match val.split(|&b| b == b'/').next().unwrap_or_default() {
                    b"none" => 1,
                    b"thread" => 2,
                    _ => 0,
                };
                if let Some(p) = val.windows(4).position(|w| w == b"tid.") {
                    t.notify |= 4;
                    t.target = num("timer notify", &val[p + 4..])?;
                } else if let Some(p) = val.windows(4).position(|w| w == b"pid.") {
                    t.target = num("timer notify", &val[p + 4..])?;
                }
            }
            b"ClockID" => t.clock = num("timer clock", val)?,
            _ => {}
        }
    }
    Ok(v)
}

/// Parses /proc/PID/limits into (soft, hard) for RLIMIT_* 0 to 15, in the kernel's order.
pub fn limits(text: &[u8]) -> Result<Vec<(u64, u64)>, ParseError> {
    let names: [&[u8]; 16] = [
        b"Max cpu time",
        b"Max file size",
        b"Max data size",
        b"Max stack size",
        b"Max core file size",
        b"Max resident set",
        b"Max processes",
        b"Max open files",
        b"Max locked memory",
        b"Max address space",
        b"Max file locks",
        b"Max pending signals",
        b"Max msgqueue size",
        b"Max nice priority",
        b"Max realtime priority",
        b"Max realtime timeout",
    ];
    names
        .iter()
        .map(|name| {
            let line = text
                .split(|&b| b == b'\n')
                .find(|l| l.starts_with(name))
                .ok_or_else(|| ParseError::new("limits", name))?;
            let mut f = line[name.len()..]
                .split(|b| b.is_ascii_whitespace())
                .filter(|w| !w.is_empty())
                .map(|w| match w {
                    b"unlimited" => Ok(u64::MAX),
                    w => num("limits", w),
                });
            match (f.next(), f.next()) {
                (Some(s), Some(h)) => Ok((s?, h?)),
                _ => Err(ParseError::new("limits", line)),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn two_timers() {
        let t = parse(b"ID: 0\nsignal: 10/0000000000000007\nnotify: signal/pid.9\nClockID: 1\nID: 3\nsignal: 34/(null)\nnotify: signal/tid.11\nClockID: 0\n").unwrap();
        assert_eq!(
            t[0],
            Timer {
                id: 0,
                signal: 10,
                value: 7,
                notify: 0,
                target: 9,
                clock: 1
            }
        );
        assert_eq!(
            t[1],
            Timer {
                id: 3,
                signal: 34,
                value: 0,
                notify: 4,
                target: 11,
                clock: 0
            }
        );
    }

    #[test]
    fn own_limits() {
        let l = limits(&std::fs::read("/proc/self/limits").unwrap()).unwrap();
        assert_eq!(l.len(), 16);
        assert!(l[7].0 > 0);
    }

    proptest! {
        #[test]
        fn never_panics(b in "(ID|signal|notify|ClockID): [ -~]{0,20}\n") {
            let _ = parse(b.as_bytes());
        }
    }
}

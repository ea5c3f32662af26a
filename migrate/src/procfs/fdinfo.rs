//! /proc/PID/fdinfo/FD (proc_pid_fdinfo(5)): offset, flags and what each kind of description adds.
//!
//! A pure parser: it takes the file's bytes, never panics, and answers `None` where a line it knows is malformed. Lines that it does
//! not know are skipped, as newer kernels add some.

/// The bits of `flags` that belong to the descriptor, not to the description.
pub const O_CLOEXEC: u32 = 0o2_000_000;

/// What a fdinfo file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// Offset.
    pub pos: u64,
    /// Open flags, O_CLOEXEC being this descriptor's.
    pub flags: u32,
    /// Mount id, as in mountinfo.
    pub mount: i32,
    /// Inode number (Linux 5.14), else 0.
    pub inode: u64,
    /// `lock:` lines without the label, e.g. "1: POSIX  ADVISORY  WRITE 691 00:22:5 0 EOF".
    pub locks: Vec<String>,
    /// eventfd: the counter.
    pub eventfd_count: Option<u64>,
    /// eventfd: EFD_SEMAPHORE (Linux 6.5).
    pub eventfd_semaphore: bool,
    /// signalfd: accepted signals, bit n-1 for signal n.
    pub sigmask: Option<u64>,
    /// timerfd.
    pub timer: Option<Timer>,
    /// epoll: what it watches.
    pub targets: Vec<Target>,
    /// inotify: its watches.
    pub watches: Vec<Watch>,
    /// pidfd: the process in the pid namespace of the /proc mount, -1 when it is gone.
    pub pid: Option<i32>,
}

/// A timerfd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timer {
    /// Clock id.
    pub clock: i32,
    /// Expirations not read.
    pub ticks: u64,
    /// timerfd_settime flags.
    pub settime_flags: u32,
    /// Nanoseconds left, 0 when disarmed.
    pub value_ns: u64,
    /// Nanoseconds between expiries.
    pub interval_ns: u64,
}

/// A descriptor that an epoll instance watches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Target {
    /// The number it was registered under.
    pub fd: i32,
    /// Event mask.
    pub events: u32,
    /// epoll_data.
    pub data: u64,
    /// Inode of the watched file, 0 on kernels that do not tell.
    pub inode: u64,
    /// Its file system's device, the kernel's own encoding (major << 20 | minor).
    pub sdev: u64,
}

/// An inotify watch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watch {
    /// Watch descriptor.
    pub wd: i32,
    /// Inode.
    pub inode: u64,
    /// Device, the kernel's own encoding (major << 20 | minor).
    pub sdev: u64,
    /// Event mask.
    pub mask: u32,
    /// Handle type for open_by_handle_at(2).
    pub handle_type: i32,
    /// Handle.
    pub handle: Vec<u8>,
}

/// Parses a whole file. `None` when it has no `pos` or `flags`, or a known line is malformed.
pub fn parse(text: &[u8]) -> Option<FdInfo> {
    let mut out = FdInfo::default();
    let (mut pos, mut flags) = (false, false);
    for line in text.split(|&b| b == b'\n') {
        let Ok(line) = std::str::from_utf8(line) else { continue };
        if let Some(rest) = line.strip_prefix("tfd:") {
            out.targets.push(target(rest)?);
            continue;
        }
        if let Some(rest) = line.strip_prefix("inotify wd:") {
            out.watches.push(watch(rest)?);
            continue;
        }
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match key {
            "pos" => {
                // A directory cookie may use the sign bit.
                out.pos = value.parse::<i64>().map(|v| v as u64).or_else(|_| value.parse()).ok()?;
                pos = true;
            }
            "flags" => {
                out.flags = u32::from_str_radix(value, 8).ok()?;
                flags = true;
            }
            "mnt_id" => out.mount = value.parse().ok()?,
            "ino" => out.inode = value.parse().ok()?,
            "lock" => out.locks.push(value.to_owned()),
            "eventfd-count" => out.eventfd_count = Some(hex(value)?),
            "eventfd-semaphore" => out.eventfd_semaphore = value != "0",
            "sigmask" => out.sigmask = Some(hex(value)?),
            "clockid" => out.timer.get_or_insert_default().clock = value.parse().ok()?,
            "ticks" => out.timer.get_or_insert_default().ticks = value.parse().ok()?,
            "settime flags" => out.timer.get_or_insert_default().settime_flags = u32::from_str_radix(value, 8).ok()?,
            "it_value" => out.timer.get_or_insert_default().value_ns = timespec(value)?,
            "it_interval" => out.timer.get_or_insert_default().interval_ns = timespec(value)?,
            "Pid" => out.pid = Some(value.parse().ok()?),
            _ => {}
        }
    }
    (pos && flags).then_some(out)
}

fn hex(s: &str) -> Option<u64> {
    u64::from_str_radix(s.trim(), 16).ok()
}

/// "(seconds, nanoseconds)" to nanoseconds.
fn timespec(s: &str) -> Option<u64> {
    let (sec, nsec) = s.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    let (sec, nsec): (u64, u64) = (sec.trim().parse().ok()?, nsec.trim().parse().ok()?);
    sec.checked_mul(1_000_000_000)?.checked_add(nsec)
}

/// The value after `label` (which ends in ':'), up to the next blank; blanks may stand between the two.
fn field<'a>(line: &'a str, label: &str) -> Option<&'a str> {
    let rest = line.split_once(label)?.1.trim_start();
    Some(rest.split_ascii_whitespace().next().unwrap_or(""))
}

/// "       5 events:       19 data:     7ffe  pos:0 ino:61af sdev:7"
fn target(rest: &str) -> Option<Target> {
    Some(Target {
        fd: rest.split_ascii_whitespace().next()?.parse().ok()?,
        events: u32::from_str_radix(field(rest, "events:")?, 16).ok()?,
        data: hex(field(rest, "data:")?)?,
        inode: field(rest, "ino:").map_or(Some(0), hex)?,
        sdev: field(rest, "sdev:").map_or(Some(0), hex)?,
    })
}

/// "1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d"
fn watch(rest: &str) -> Option<Watch> {
    let digits = field(rest, "f_handle:").unwrap_or("");
    let mut handle = Vec::with_capacity(digits.len() / 2);
    for pair in digits.as_bytes().chunks(2) {
        handle.push(u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?);
    }
    Some(Watch {
        wd: i32::from_str_radix(rest.split_ascii_whitespace().next()?, 16).ok()?,
        inode: hex(field(rest, " ino:")?)?,
        sdev: hex(field(rest, "sdev:")?)?,
        mask: u32::from_str_radix(field(rest, " mask:")?, 16).ok()?,
        handle_type: match field(rest, "fhandle-type:") {
            Some(t) => u32::from_str_radix(t, 16).ok()? as i32,
            None => 0,
        },
        handle,
    })
}

/// The kernel's own device encoding, as fdinfo prints it, in the encoding of `st_dev` (makedev(3)).
pub fn sdev_to_dev(sdev: u64) -> u64 {
    rustix::fs::makedev((sdev >> 20) as u32, (sdev & 0xf_ffff) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn plain_file() {
        let i = parse(b"pos:\t4711\nflags:\t02100002\nmnt_id:\t27\nino:\t5\nlock:\t1: FLOCK  ADVISORY  WRITE 691 00:22:5 0 EOF\n").unwrap();
        assert_eq!((i.pos, i.flags, i.mount, i.inode), (4711, 0o2_100_002, 27, 5));
        assert_eq!(i.flags & O_CLOEXEC, O_CLOEXEC);
        assert_eq!(i.locks, ["1: FLOCK  ADVISORY  WRITE 691 00:22:5 0 EOF"]);
    }

    #[test]
    fn special_kinds() {
        let head = "pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1\n";
        let with = |tail: &str| parse(format!("{head}{tail}").as_bytes());
        assert_eq!(
            with("eventfd-count:               1f\neventfd-id: 3\neventfd-semaphore: 1\n")
                .unwrap()
                .eventfd_count,
            Some(31)
        );
        assert!(with("eventfd-count: 0\neventfd-semaphore: 1\n").unwrap().eventfd_semaphore);
        assert_eq!(with("sigmask:\t0000000000000200\n").unwrap().sigmask, Some(0x200));
        let t = with("clockid: 1\nticks: 2\nsettime flags: 01\nit_value: (3, 4)\nit_interval: (0, 500)\n")
            .unwrap()
            .timer
            .unwrap();
        assert_eq!(
            (t.clock, t.ticks, t.settime_flags, t.value_ns, t.interval_ns),
            (1, 2, 1, 3_000_000_004, 500)
        );
        let e = with("tfd:        5 events: 80000019 data: ffffffffffffffff  pos:0 ino:61af sdev:7\n")
            .unwrap()
            .targets;
        assert_eq!(
            (e[0].fd, e[0].events, e[0].data, e[0].inode, e[0].sdev),
            (5, 0x8000_0019, u64::MAX, 0x61af, 7)
        );
        let w = with(
            "inotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d\n",
        );
        let w = &w.unwrap().watches[0];
        assert_eq!(
            (w.wd, w.inode, w.mask, w.handle_type, w.handle.len()),
            (3, 0x9e7e, 0x800_afce, 1, 8)
        );
        assert_eq!(sdev_to_dev(w.sdev), rustix::fs::makedev(8, 0x13));
        assert_eq!(with("Pid:\t-1\nNSpid:\t0\n").unwrap().pid, Some(-1));
    }

    #[test]
    fn refuses_what_is_not_fdinfo() {
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"pos:\tx\nflags:\t0\n"), None);
        assert_eq!(parse(b"pos:\t1\n"), None);
        assert_eq!(parse(b"pos:\t0\nflags:\t0\ntfd: 1 events:\n"), None);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn never_panics_on_near_misses(line in "(tfd:|inotify wd:|it_value: \\(|sigmask:|lock:)[0-9a-f :,()a-z_-]{0,80}") {
            let _ = parse(format!("pos:\t0\nflags:\t02\n{line}\n").as_bytes());
        }
    }
}

//! /proc/PID/status (proc_pid_status(5)).

use super::{ParseError, hex, num};

/// The fields the engine needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Status {
    pub name: String,
    pub state: u8,
    pub tgid: i32,
    pub ppid: i32,
    pub tracer: i32,
    pub umask: u32,
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    /// Ids in each pid namespace, outermost first.
    pub ns_tgid: Vec<i32>,
    pub ns_pid: Vec<i32>,
    pub ns_pgid: Vec<i32>,
    pub ns_sid: Vec<i32>,
    pub vm_rss_kb: u64,
    /// Kilobytes locked by mlock(2).
    pub vm_lck_kb: u64,
    pub sig_pending: u64,
    pub shared_pending: u64,
    pub sig_blocked: u64,
    pub sig_ignored: u64,
    pub sig_caught: u64,
    /// Inheritable, permitted, effective, bounding, ambient.
    pub caps: [u64; 5],
    pub no_new_privs: bool,
    pub seccomp: u8,
    pub thp_enabled: bool,
    pub kernel_thread: bool,
}

impl Status {
    /// Id in the innermost namespace.
    pub fn inner_pid(&self) -> i32 {
        self.ns_pid.last().copied().unwrap_or(0)
    }
    /// Group leader's id in the innermost namespace.
    pub fn inner_tgid(&self) -> i32 {
        self.ns_tgid.last().copied().unwrap_or(self.tgid)
    }
}

/// A task's name as the program has set it, spaces and all: the kernel escapes two characters, and no other.
fn name(escaped: &[u8]) -> String {
    let mut out = Vec::with_capacity(escaped.len());
    let mut bytes = escaped.iter().copied();
    while let Some(b) = bytes.next() {
        out.push(match b {
            b'\\' => bytes.next().map_or(b, |next| if next == b'n' { b'\n' } else { next }),
            b => b,
        });
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Parses the file.
pub fn parse(text: &[u8]) -> Result<Status, ParseError> {
    let mut s = Status {
        thp_enabled: true,
        ..Default::default()
    };
    fn four(what: &'static str, v: &[u8]) -> Result<[u32; 4], ParseError> {
        let f: Vec<u32> = list(what, v)?;
        f.try_into().map_err(|_| ParseError::new(what, v))
    }
    fn list<T: std::str::FromStr>(what: &'static str, v: &[u8]) -> Result<Vec<T>, ParseError> {
        v.split(|b| b.is_ascii_whitespace())
            .filter(|w| !w.is_empty())
            .map(|w| num(what, w))
            .collect()
    }
    for line in text.split(|&b| b == b'\n') {
        let Some(colon) = line.iter().position(|&b| b == b':') else {
            continue;
        };
        let (key, v) = (&line[..colon], line[colon + 1..].trim_ascii());
        match key {
            b"Name" => s.name = name(line.strip_prefix(b"Name:\t").unwrap_or(v)),
            b"State" => s.state = v.first().copied().unwrap_or(b'?'),
            b"Tgid" => s.tgid = num("Tgid", v)?,
            b"PPid" => s.ppid = num("PPid", v)?,
            b"TracerPid" => s.tracer = num("TracerPid", v)?,
            b"Umask" => s.umask = u32::from_str_radix(std::str::from_utf8(v).unwrap_or(""), 8).map_err(|_| ParseError::new("Umask", v))?,
            b"Uid" => s.uids = four("Uid", v)?,
            b"Gid" => s.gids = four("Gid", v)?,
            b"Groups" => s.groups = list("Groups", v)?,
            b"NStgid" => s.ns_tgid = list("NStgid", v)?,
            b"NSpid" => s.ns_pid = list("NSpid", v)?,
            b"NSpgid" => s.ns_pgid = list("NSpgid", v)?,
            b"NSsid" => s.ns_sid = list("NSsid", v)?,
            b"VmLck" => s.vm_lck_kb = num("VmLck", v.strip_suffix(b"kB").unwrap_or(v))?,
            b"VmRSS" => s.vm_rss_kb = num("VmRSS", v.strip_suffix(b"kB").unwrap_or(v))?,
            b"SigPnd" => s.sig_pending = hex("SigPnd", v)?,
            b"ShdPnd" => s.shared_pending = hex("ShdPnd", v)?,
            b"SigBlk" => s.sig_blocked = hex("SigBlk", v)?,
            b"SigIgn" => s.sig_ignored = hex("SigIgn", v)?,
            b"SigCgt" => s.sig_caught = hex("SigCgt", v)?,
            b"CapInh" => s.caps[0] = hex("CapInh", v)?,
            b"CapPrm" => s.caps[1] = hex("CapPrm", v)?,
            b"CapEff" => s.caps[2] = hex("CapEff", v)?,
            b"CapBnd" => s.caps[3] = hex("CapBnd", v)?,
            b"CapAmb" => s.caps[4] = hex("CapAmb", v)?,
            b"NoNewPrivs" => s.no_new_privs = v == b"1",
            b"Seccomp" => s.seccomp = num("Seccomp", v)?,
            b"THP_enabled" => s.thp_enabled = v == b"1",
            b"Kthread" => s.kernel_thread = v == b"1",
            _ => {}
        }
    }
    if s.tgid == 0 && s.ns_pid.is_empty() {
        return Err(ParseError::new("status", text));
    }
    Ok(s)
}

/// Reads /proc/PID/status.
pub fn read(pid: i32) -> std::io::Result<Status> {
    Ok(parse(&super::read(pid, "status")?)?)
}

/// Reads /proc/PID/task/TID/status.
pub fn read_task(pid: i32, tid: i32) -> std::io::Result<Status> {
    Ok(parse(&super::read(pid, &format!("task/{tid}/status"))?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn own_status() {
        let s = read(std::process::id() as i32).unwrap();
        assert_eq!(s.tgid, std::process::id() as i32);
        assert!(s.caps[3] != 0);
        assert_eq!(s.tracer, 0);
    }

    /// What /proc/PID/task/TID/comm shows is what is found here.
    #[test]
    fn names_are_those_of_comm() {
        let names: [&[u8]; 7] = [b"plain", b" spaces \t", b"back\\slash", b"\\n", b"new\nline", b"\\\\", b""];
        std::thread::spawn(move || {
            for name in names {
                let mut set = name.to_vec();
                set.push(0);
                // SAFETY: a string that ends with a zero; of this thread alone.
                assert_eq!(unsafe { libc::prctl(libc::PR_SET_NAME, set.as_ptr()) }, 0);
                // SAFETY: no pointers.
                let tid = unsafe { libc::gettid() };
                let comm = std::fs::read(format!("/proc/self/task/{tid}/comm")).unwrap();
                let comm = comm.strip_suffix(b"\n").unwrap();
                assert_eq!(comm, name);
                let status = read_task(std::process::id() as i32, tid).unwrap();
                assert_eq!(status.name.as_bytes(), name);
            }
        })
        .join()
        .unwrap();
    }

    proptest! {
        #[test]
        fn never_panics(b in "(Name|Uid|Groups|NSpid|Umask|SigPnd|State|Tgid):[ -~\t]{0,20}\n") {
            let _ = parse(b.as_bytes());
        }
    }
}

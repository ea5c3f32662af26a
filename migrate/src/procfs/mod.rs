//! Parsers of /proc: bytes in, types out, no I/O; and the thin readers that feed them.
//!
//! /proc is distrusted like a peer: a task may vanish between two reads, and names are chosen by the program (proc(5)).

pub mod fdinfo;
pub mod maps;
pub mod stat;
pub mod status;
pub mod timens;
pub mod timers;

use std::{io, path::PathBuf};

/// A malformed file of /proc.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("cannot parse {what}: {line:?}")]
pub struct ParseError {
    /// Which file or field.
    pub what: &'static str,
    /// The offending text.
    pub line: String,
}

impl ParseError {
    pub(crate) fn new(what: &'static str, line: &[u8]) -> Self {
        ParseError {
            what,
            line: String::from_utf8_lossy(&line[..line.len().min(200)]).into_owned(),
        }
    }
}

impl From<ParseError> for io::Error {
    fn from(e: ParseError) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, e)
    }
}

/// `/proc/PID/NAME`.
pub fn path(pid: i32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

/// `/proc/PID/map_files/START-END`: what a mapping maps, whatever its name is by now (proc_pid_map_files(5)).
pub fn mapped(pid: i32, start: u64, end: u64) -> PathBuf {
    path(pid, &format!("map_files/{start:x}-{end:x}"))
}

/// Reads `/proc/PID/NAME`, naming it in the error.
pub fn read(pid: i32, name: &str) -> io::Result<Vec<u8>> {
    let p = path(pid, name);
    std::fs::read(&p).map_err(|e| match e.raw_os_error() {
        // It has ended between open(2) and read(2): callers ask for that.
        Some(libc::ESRCH) => e,
        _ => io::Error::new(e.kind(), format!("{}: {e}", p.display())),
    })
}

/// A field of /proc/meminfo in bytes (proc_meminfo(5)), such as "MemAvailable". None: there is none.
pub fn meminfo(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

/// Whether what was looked at is gone: its process or thread has ended in between, most likely.
pub fn vanished(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
}

/// Thread ids of a process, ascending.
pub fn tasks(pid: i32) -> io::Result<Vec<i32>> {
    let mut v: Vec<i32> = std::fs::read_dir(path(pid, "task"))?
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    v.sort_unstable();
    Ok(v)
}

/// What a process has below it.
#[derive(Debug)]
pub struct Family {
    /// Its threads, ascending.
    pub tids: Vec<i32>,
    /// The children of each, ascending: (child, thread).
    pub children: Vec<(i32, i32)>,
}

/// Threads of a process and their children (needs CONFIG_PROC_CHILDREN).
pub fn family(pid: i32) -> io::Result<Family> {
    let mut v = Vec::new();
    let tids = tasks(pid)?;
    for &tid in &tids {
        match std::fs::read(format!("/proc/{pid}/task/{tid}/children")) {
            Ok(b) => v.extend(
                String::from_utf8_lossy(&b)
                    .split_ascii_whitespace()
                    .filter_map(|s| Some((s.parse::<i32>().ok()?, tid))),
            ),
            Err(e) if e.kind() == io::ErrorKind::NotFound && path(pid, "task").exists() => {
                if !std::path::Path::new("/proc/thread-self/children").exists() {
                    return Err(io::Error::new(
                        io::ErrorKind::Unsupported,
                        "this kernel has no /proc/PID/task/TID/children (CONFIG_PROC_CHILDREN)",
                    ));
                }
            }
            Err(e) => return Err(e),
        }
    }
    v.sort_unstable();
    Ok(Family { tids, children: v })
}

/// What a link such as /proc/PID/exe or /proc/PID/ns/net says.
pub fn link(pid: i32, name: &str) -> io::Result<Vec<u8>> {
    use std::os::unix::ffi::OsStringExt;
    Ok(std::fs::read_link(path(pid, name))?.into_os_string().into_vec())
}

pub(crate) fn num<T: std::str::FromStr>(what: &'static str, s: &[u8]) -> Result<T, ParseError> {
    std::str::from_utf8(s)
        .ok()
        .and_then(|s| s.trim().parse().ok())
        .ok_or_else(|| ParseError::new(what, s))
}

pub(crate) fn hex(what: &'static str, s: &[u8]) -> Result<u64, ParseError> {
    std::str::from_utf8(s)
        .ok()
        .and_then(|s| u64::from_str_radix(s.trim(), 16).ok())
        .ok_or_else(|| ParseError::new(what, s))
}

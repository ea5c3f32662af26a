//! /proc/PID/smaps: mappings with their VmFlags and protection keys (proc_pid_smaps(5)).

use super::{ParseError, hex, num};
use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
};

/// A mapping as the kernel prints it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// PROT_* bits.
    pub prot: u8,
    /// MAP_SHARED.
    pub shared: bool,
    /// File offset, bytes.
    pub offset: u64,
    /// (major, minor) of the file's device.
    pub dev: (u32, u32),
    /// Inode, 0 for anonymous memory.
    pub ino: u64,
    /// Name as printed: a path, "`[heap]`", "" and so on.
    pub name: Vec<u8>,
    /// The two-letter codes of VmFlags; empty when read from maps rather than smaps.
    pub vm_flags: Vec<[u8; 2]>,
    /// ProtectionKey.
    pub pkey: u8,
    /// Kilobytes resident.
    pub rss_kb: u64,
}

impl Mapping {
    /// Whether VmFlags holds a code such as `b"gd"`.
    pub fn has(&self, code: &[u8; 2]) -> bool {
        self.vm_flags.contains(code)
    }
}

fn header(line: &[u8]) -> Option<Mapping> {
    // "7f00-7f10 rw-p 00000000 08:01 123    /path"
    let mut f = line.splitn(6, |&b| b == b' ');
    let range = f.next()?;
    let dash = range.iter().position(|&b| b == b'-')?;
    let start = hex("maps", &range[..dash]).ok()?;
    let end = hex("maps", &range[dash + 1..]).ok()?;
    let p = f.next()?;
    if p.len() != 4 || end <= start {
        return None;
    }
    let prot = u8::from(p[0] == b'r') | u8::from(p[1] == b'w') << 1 | u8::from(p[2] == b'x') << 2;
    let offset = hex("maps", f.next()?).ok()?;
    let dev = f.next()?;
    let colon = dev.iter().position(|&b| b == b':')?;
    let dev = (hex("maps", &dev[..colon]).ok()? as u32, hex("maps", &dev[colon + 1..]).ok()? as u32);
    let ino = num("maps", f.next()?).ok()?;
    let name = f.next().unwrap_or_default();
    let name = &name[name.iter().position(|&b| b != b' ').unwrap_or(name.len())..];
    Some(Mapping {
        start,
        end,
        prot,
        shared: p[3] == b's',
        offset,
        dev,
        ino,
        name: unescape(name),
        ..Default::default()
    })
}

/// maps and smaps print a newline in a name as `\012`.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut i = 0;
    while i < name.len() {
        if name[i..].starts_with(b"\\012") {
            out.push(b'\n');
            i += 4;
        } else {
            out.push(name[i]);
            i += 1;
        }
    }
    out
}

/// Parses maps or smaps.
pub fn parse(text: &[u8]) -> Result<Vec<Mapping>, ParseError> {
    let mut v: Vec<Mapping> = Vec::new();
    for line in text.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
        // Field lines of smaps start with a capital; headers with a lower-case hex digit.
        if line[0].is_ascii_uppercase() {
            let m = v.last_mut().ok_or_else(|| ParseError::new("smaps", line))?;
            if let Some(rest) = line.strip_prefix(b"VmFlags:") {
                m.vm_flags = rest.split(|&b| b == b' ').filter_map(|w| w.try_into().ok()).collect();
            } else if let Some(rest) = line.strip_prefix(b"ProtectionKey:") {
                m.pkey = num("smaps ProtectionKey", rest)?;
            } else if let Some(rest) = line.strip_prefix(b"Rss:") {
                m.rss_kb = num("smaps Rss", rest.strip_suffix(b"kB").unwrap_or(rest))?;
            }
        } else {
            let m = header(line).ok_or_else(|| ParseError::new("maps", line))?;
            if v.last().is_some_and(|l| l.end > m.start) && m.name != b"[vsyscall]" {
                return Err(ParseError::new(ORDER, line));
            }
            v.push(m);
        }
    }
    Ok(v)
}

/// Reads and parses /proc/PID/smaps.
pub fn smaps(pid: i32) -> std::io::Result<Vec<Mapping>> {
    consistent(|| super::read(pid, "smaps"))
}

/// The same of the mappings that begin before `end`. The kernel walks every page of a mapping to tell of it: those behind are left alone, but for a few of which it
/// tells along with the last.
pub fn smaps_to(pid: i32, end: u64) -> std::io::Result<Vec<Mapping>> {
    consistent(|| text_to(File::open(super::path(pid, "smaps"))?, end))
}

/// Reads a list until it comes to a mapping that begins at `end` or behind.
fn text_to(file: impl Read, end: u64) -> std::io::Result<Vec<u8>> {
    // As much as the kernel makes ready at a time.
    let mut lines = BufReader::with_capacity(4096, file);
    let mut text = Vec::new();
    loop {
        let line = text.len();
        if lines.read_until(b'\n', &mut text)? == 0 {
            return Ok(text);
        }
        if header(&text[line..]).is_some_and(|m| m.start >= end) {
            text.truncate(line);
            return Ok(text);
        }
    }
}

/// Reads and parses /proc/PID/maps.
pub fn maps(pid: i32) -> std::io::Result<Vec<Mapping>> {
    consistent(|| super::read(pid, "maps"))
}

/// What [`parse`] calls two mappings of which one begins inside the other.
const ORDER: &str = "maps order";

/// The kernel gives the list out a page at a time. If a mapping grows between two pages, in a process that runs (the agent's own heaps too), it comes a second time and overlaps itself; then the list is read again.
fn consistent(mut read: impl FnMut() -> std::io::Result<Vec<u8>>) -> std::io::Result<Vec<Mapping>> {
    const TRIES: u32 = 100;
    let mut tries = 0;
    loop {
        tries += 1;
        match parse(&read()?) {
            Err(e) if e.what == ORDER && tries < TRIES => {}
            result => return Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Gives out a text as the kernel does, some records at a time, and counts how often it was asked.
    struct Records<'a>(std::slice::Iter<'a, String>, usize);

    impl Read for Records<'_> {
        fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
            self.1 += 1;
            let Some(record) = self.0.next() else { return Ok(0) };
            to[..record.len()].copy_from_slice(record.as_bytes());
            Ok(record.len())
        }
    }

    #[test]
    fn only_what_lies_before_is_read() {
        let record = |k: u64| {
            format!(
                "{:x}-{:x} rw-p 00000000 00:00 0 \nRss:  4 kB\nVmFlags: rd wr mr{}\n",
                k << 12,
                (k + 1) << 12,
                if k == 3 { " dc" } else { "" }
            )
        };
        let records: Vec<String> = (1..40).map(record).collect();
        let mut kernel = Records(records.iter(), 0);
        let list = parse(&text_to(&mut kernel, 4 << 12).unwrap()).unwrap();
        assert_eq!(list.len(), 3);
        assert_eq!((list[2].start, list[2].has(b"dc"), list[1].has(b"dc")), (3 << 12, true, false));
        assert_eq!(kernel.1, 4, "what lies behind was asked for");
        let mut kernel = Records(records.iter(), 0);
        assert_eq!(parse(&text_to(&mut kernel, u64::MAX).unwrap()).unwrap().len(), records.len());
    }

    #[test]
    fn as_the_whole_list_tells_it() {
        let child = crate::vacate::tests::Child::new(std::thread::yield_now);
        let whole = smaps(child.0).unwrap();
        let middle = whole[whole.len() / 2].start;
        let part = smaps_to(child.0, middle).unwrap();
        let key = |m: &Mapping| (m.start, m.end, m.prot, m.vm_flags.clone(), m.pkey);
        let expected: Vec<_> = whole.iter().filter(|m| m.start < middle).map(key).collect();
        assert_eq!(part.iter().map(key).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn reads_its_own_process() {
        let m = smaps(std::process::id() as i32).unwrap();
        assert!(m.iter().any(|m| m.name == b"[vdso]" && m.prot == 5));
        assert!(m.iter().any(|m| m.name == b"[stack]" && m.has(b"gd")));
        assert!(m.iter().all(|m| m.name == b"[vsyscall]" || m.has(b"mr")));
    }

    #[test]
    fn names_with_blanks_and_newlines() {
        let m = parse(b"1000-2000 rw-s 00001000 08:01 42                 /a b\\012c (deleted)\n").unwrap();
        assert_eq!(m[0].name, b"/a b\nc (deleted)");
        assert_eq!(
            (m[0].start, m[0].end, m[0].shared, m[0].offset, m[0].ino),
            (0x1000, 0x2000, true, 0x1000, 42)
        );
    }

    #[test]
    fn a_list_that_changed_while_it_was_read_is_read_again() {
        let texts = ["1000-2000 rw-p 0 0:0 0 \n1000-3000 rw-p 0 0:0 0 \n", "1000-3000 rw-p 0 0:0 0 \n"];
        let mut n = 0;
        let list = consistent(|| {
            n += 1;
            Ok(texts[n - 1].into())
        });
        assert_eq!((list.unwrap().len(), n), (1, 2));
        assert!(consistent(|| Ok(texts[0].into())).is_err(), "for ever");
        assert!(consistent(|| Ok("zz".into())).is_err());
    }

    #[test]
    fn refuses_overlap_and_garbage() {
        assert!(parse(b"1000-3000 rw-p 0 0:0 0 \n2000-4000 rw-p 0 0:0 0 \n").is_err());
        assert!(parse(b"zz\n").is_err());
        assert!(parse(b"Size: 4 kB\n").is_err());
    }

    proptest! {
        #[test]
        fn never_panics(b in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&b);
        }
    }
}

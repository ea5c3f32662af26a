//! Everything that reads bytes which somebody else wrote: what a peer sends, what files hold, what the kernel says of a program that chose its names.
//!
//! A target takes any bytes and must neither panic nor grow beyond what its input pays for; where a value comes out of them it must survive being written and
//! read again. `make fuzz` lets libFuzzer look for inputs (`tests/fuzz/run`, a package of its own since it takes a C++ compiler), and what it found worth keeping lies
//! in `corpus/`, one file a target, and is tried with every `make test`.

use bytes::Bytes;
use migrate_engine::{
    arch::vdso,
    checkpoint,
    image::{Tree, Vma},
    journal::{Entry, Journal},
    lazy::ipc::{self, FromKeeper, ToKeeper},
    procfs::{fdinfo, maps, stat, status, timens, timers},
    restore::{plan, shape},
    wire::{Message, Ranges, RoundStart},
};
use migrate_transport::{
    Encoding, codec,
    frame::{
        PageDecoder, PageEncoder, SectionDecoder,
        hello::{ANSWER, Answer, HELLO, Hello},
        section,
    },
    trust::{Fingerprint, PeerName, Ticket, TrustStore},
};
use std::{cell::OnceCell, fs, path::Path};

/// Takes any bytes.
pub type Target = fn(&[u8]);

/// All of them, by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("sections", sections),
    ("page_frames", page_frames),
    ("hello", hello),
    ("ticket", ticket),
    ("trust", trust),
    ("message", message),
    ("shape", shape),
    ("keeper", keeper),
    ("journal", journal),
    ("checkpoint", image),
    ("maps", maps_text),
    ("fdinfo", |data| drop(fdinfo::parse(data))),
    ("stat", |data| drop(stat::parse(data))),
    ("status", |data| drop(status::parse(data))),
    ("timers", |data| drop(timers::parse(data))),
    ("timens", |data| drop(timens::parse(data))),
    ("vdso", vdso_image),
];

/// Feeds pieces whose lengths the first byte says.
fn pieces(data: &[u8]) -> impl Iterator<Item = Bytes> {
    let (first, rest) = data.split_first().unwrap_or((&0, &[]));
    rest.chunks(usize::from(*first).max(1) * 3).map(Bytes::copy_from_slice)
}

fn sections(data: &[u8]) {
    let mut decoder = SectionDecoder::default();
    for piece in pieces(data) {
        decoder.push(piece);
        loop {
            match decoder.next_section() {
                Ok(Some(s)) => {
                    assert!(s.payload.len() <= data.len());
                    let mut again = SectionDecoder::default();
                    again.push(section::header(&s).expect("it was legal"));
                    again.push(s.payload.clone());
                    assert_eq!(again.next_section().ok().flatten(), Some(s));
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    let _ = decoder.end();
}

fn page_frames(data: &[u8]) {
    let mut decoder = PageDecoder::default();
    for piece in pieces(data) {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    let claimed: u64 = frame.runs.iter().map(|r| r.data_len()).sum();
                    assert_eq!(claimed, frame.data_len() as u64);
                    for encoding in [Encoding::Raw, Encoding::Zstd] {
                        let mut encoder = PageEncoder::default();
                        encoder.set_encoding(encoding);
                        let mut again = PageDecoder::default();
                        let written = encoder.encode(&frame.runs, frame.data.clone()).expect("it was legal");
                        written.into_iter().for_each(|chunk| again.push(chunk));
                        let read = again.next_frame().expect("what was written").expect("whole");
                        assert_eq!((&read.runs, read.concat()), (&frame.runs, frame.concat()));
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    let _ = decoder.end();
}

fn hello(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<HELLO>()
        && let Ok(said) = Hello::decode(bytes)
    {
        let again = Hello::decode(&said.encode()).expect("what was written");
        assert_eq!(format!("{again:?}"), format!("{said:?}"));
    }
    if let Some(bytes) = data.first_chunk::<ANSWER>()
        && let Ok(said) = Answer::decode(bytes)
    {
        let again = Answer::decode(&said.encode()).expect("what was written");
        assert_eq!(format!("{again:?}"), format!("{said:?}"));
    }
}

fn ticket(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(ticket) = text.parse::<Ticket>() {
        let again: Ticket = ticket.to_string().parse().expect("what was written");
        assert_eq!(again.receiver(), ticket.receiver());
    }
    if let Ok(fingerprint) = text.parse::<Fingerprint>() {
        assert_eq!(fingerprint.to_string().parse::<Fingerprint>().ok(), Some(fingerprint));
    }
}

/// A directory in memory for the readers of files, one a thread.
fn dir<R>(with: impl FnOnce(&Path) -> R) -> R {
    thread_local! {
        static DIR: OnceCell<tempfile::TempDir> = const { OnceCell::new() };
    }
    let make = || {
        let memory = Path::new("/dev/shm");
        let made = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        made.expect("a directory")
    };
    DIR.with(|dir| with(dir.get_or_init(make).path()))
}

fn trust(data: &[u8]) {
    dir(|dir| {
        let store = TrustStore::open(dir).expect("a trust store");
        let someone: Fingerprint = "11".repeat(32).parse().expect("a fingerprint");
        if !matches!(store.get(&someone), Ok(Some(_))) {
            let name = PeerName::new("someone").expect("a name");
            let _ = store.add(someone, &name);
        }
        let file = dir.join("trusted").join("11".repeat(32));
        assert!(file.exists(), "peers are kept elsewhere");
        fs::write(&file, data).expect("a file in memory");
        let _ = store.list();
        let _ = fs::remove_file(&file);
    });
}

fn unpacked(ranges: &[Ranges]) {
    for r in ranges {
        if let Some(list) = r.unpack() {
            assert!(list.is_sorted() && list.iter().all(|r| r.0 < r.1));
        }
    }
}

fn message(data: &[u8]) {
    let Ok(m) = codec::decode::<Message>(data) else { return };
    let tree = match &m {
        Message::Inventory(i) => Some(&i.tree),
        Message::State(s) => Some(&s.tree),
        Message::Round(r) => r.tree.as_ref(),
        _ => None,
    };
    if let Some(tree) = tree.filter(|t| t.validate().is_ok()) {
        let _ = plan::sessions(&tree.processes);
    }
    match &m {
        Message::Memory(m) => unpacked(&m.later),
        Message::Round(r) => unpacked(&r.expect),
        Message::Attached(a) => unpacked(&a.missing),
        Message::Handover(h) => unpacked(h.later.as_deref().unwrap_or_default()),
        _ => {}
    }
    let bytes = codec::encode(&m).expect("it was read");
    let again: Message = codec::decode(&bytes).expect("what was written");
    // Not a number is not equal to itself.
    assert_eq!(codec::encode(&again).expect("as before"), bytes);
}

/// A skeleton follows from one tree to the next, both the peer's.
fn shape(data: &[u8]) {
    let Ok((old, new)) = codec::decode::<(RoundStart, RoundStart)>(data) else {
        return;
    };
    let (Some(from), Some(to)) = (&old.tree, &new.tree) else { return };
    let fits = |t: &Tree, r: &RoundStart| t.validate().is_ok() && !t.processes.is_empty() && r.names.fit(t);
    if !fits(from, &old) || !fits(to, &new) {
        return;
    }
    let losses = shape::losses(old.names.of(from), new.names.of(to));
    assert!(losses.ranges.iter().all(|r| r.1 <= r.2));
    let empty: &[Vma] = &[];
    for mm in &to.mms {
        let _ = shape::mappings(empty, &mm.vmas, &|_, _| true);
    }
}

fn keeper(data: &[u8]) {
    let mut buf = data.to_vec();
    while let Ok(Some(_)) = ipc::decoded::<ToKeeper>(&mut buf) {}
    let mut buf = data.to_vec();
    while let Ok(Some(_)) = ipc::decoded::<FromKeeper>(&mut buf) {}
}

fn journal(data: &[u8]) {
    dir(|dir| {
        let file = dir.join("journal").join(format!("{:032x}.source", 1));
        if fs::write(&file, data).is_err() {
            fs::create_dir_all(dir.join("journal")).expect("a directory");
            fs::write(&file, data).expect("a file in memory");
        }
        for entry in Journal::list(dir).expect("a directory to read") {
            let _: Vec<i32> = Entry::alive(&entry);
        }
        let _ = fs::remove_file(&file);
    });
}

fn image(data: &[u8]) {
    dir(|dir| {
        let file = checkpoint::path(dir, "c").expect("a name");
        // Its checksum is right: who writes one can do that too.
        let mut whole = data.to_vec();
        whole.extend(blake3::hash(data).as_bytes());
        fs::write(&file, &whole).expect("a file in memory");
        let _ = checkpoint::show(dir, "c");
        let _ = checkpoint::pages_of(dir, "c", &mut |_, _| Ok(()));
        let _ = fs::remove_file(&file);
    });
}

fn maps_text(data: &[u8]) {
    if let Ok(list) = maps::parse(data) {
        list.iter().for_each(|m| assert!(m.start < m.end));
    }
}

fn vdso_image(data: &[u8]) {
    let _ = vdso::functions(data);
    if let Some(head) = vdso::head(data) {
        let _ = head.original(data.to_vec());
    }
}

/// The inputs of a corpus file: each with its length, four bytes, in front.
pub fn inputs(corpus: &[u8]) -> Vec<&[u8]> {
    let mut out = Vec::new();
    let mut rest = corpus;
    while let Some((len, tail)) = rest.split_first_chunk::<4>() {
        let Some((input, tail)) = tail.split_at_checked(u32::from_le_bytes(*len) as usize) else {
            break;
        };
        out.push(input);
        rest = tail;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_before_stays_found() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
        for (name, target) in TARGETS {
            let file = dir.join(name);
            let corpus = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            let inputs = inputs(&corpus);
            assert!(!inputs.is_empty(), "{name} has no inputs");
            for input in inputs {
                target(input);
                // Cut short, and with one bit turned: near to what is right.
                target(&input[..input.len() / 2]);
                if let Some(middle) = input.len().checked_sub(1).map(|l| l / 2) {
                    let mut bent = input.to_vec();
                    bent[middle] ^= 1;
                    target(&bent);
                }
            }
        }
    }
}

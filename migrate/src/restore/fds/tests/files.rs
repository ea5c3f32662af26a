//! Files, objects.

use super::*;
use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
};

#[test]
fn files_keep_offset_and_flags() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    fs::write(&path, b"0123456789").unwrap();
    let mut file = OpenOptions::new().read(true).append(true).open(&path).unwrap();
    file.seek(SeekFrom::Start(4)).unwrap();
    let mut other = File::from(copy(file.as_raw_fd()).1);
    let mut s = String::new();
    other.read_to_string(&mut s).unwrap();
    assert_eq!(s, "456789");
    assert_eq!(file.stream_position().unwrap(), 4, "the original is untouched");
    let listing = File::open(dir.path()).unwrap();
    copy(listing.as_raw_fd());
}

#[test]
fn files_opened_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    fs::write(&a, b"first").unwrap();
    fs::write(&b, b"other").unwrap();
    let files = [&a, &b].map(|p| File::open(p).unwrap());
    (&files[0]).seek(SeekFrom::Start(1)).unwrap();
    let (t, _) = dumped(&[files[0].as_raw_fd(), files[1].as_raw_fd()]);
    let mut early = Early::open(&t.descriptions);
    // The second is replaced by the same content before the freeze.
    let id = fs::metadata(&b).unwrap().modified().unwrap();
    fs::remove_file(&b).unwrap();
    fs::write(&b, b"other").unwrap();
    File::options().write(true).open(&b).unwrap().set_modified(id).unwrap();
    let made = build(input(&t, &[]), &[], &StdioFds::open(&Stdio::Null).unwrap(), &mut early).unwrap();
    let read = |i: usize| {
        let mut s = String::new();
        File::from(made.fds[i].as_ref().unwrap().try_clone().unwrap())
            .read_to_string(&mut s)
            .unwrap();
        s
    };
    assert_eq!((read(0).as_str(), read(1).as_str()), ("irst", "other"));
    assert!(rustix::fs::fstat(made.fds[1].as_ref().unwrap()).unwrap().st_nlink == 1);
}

#[test]
fn files_that_differ_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    fs::write(&path, b"one").unwrap();
    let reader = File::open(&path).unwrap();
    let (t, _) = dumped(&[reader.as_raw_fd()]);
    let check = |t: &Tables| {
        let mut blockers = Vec::new();
        preflight(input(t, &[]), &mut blockers);
        blockers
    };
    assert!(check(&t).is_empty());
    fs::write(&path, b"three").unwrap();
    assert!(check(&t)[0].reason.contains("has 5 bytes here and 3 there"));
    fs::write(&path, b"two").unwrap();
    assert!(check(&t)[0].reason.contains("was modified"), "{:?}", check(&t));
    // One that the tree writes may have grown since the inventory, not shrunk; at the freeze it is exact.
    let writer = OpenOptions::new().append(true).open(&path).unwrap();
    let (t, _) = dumped(&[reader.as_raw_fd(), writer.as_raw_fd()]);
    fs::write(&path, b"longer").unwrap();
    assert!(check(&t).is_empty(), "{:?}", check(&t));
    assert!(build(input(&t, &[]), &[], &StdioFds::open(&Stdio::Null).unwrap(), &mut Early::default()).is_err());
    fs::write(&path, b"").unwrap();
    assert!(check(&t)[0].reason.contains("not on storage both hosts share"));
    fs::remove_file(&path).unwrap();
    assert!(check(&t)[0].reason.contains("is missing on this host"));
    // What the kernel makes up at each look is only looked for.
    let kernel = File::open("/proc/sys/kernel/ostype").unwrap();
    assert!(check(&dumped(&[kernel.as_raw_fd()]).0).is_empty());
}

#[test]
fn objects_have_offsets_of_their_own() {
    let mut a = tempfile::tempfile().unwrap();
    a.write_all(b"unlinked").unwrap();
    let mut b = OpenOptions::new()
        .read(true)
        .open(format!("/proc/self/fd/{}", a.as_raw_fd()))
        .unwrap();
    b.seek(SeekFrom::Start(2)).unwrap();
    let (t, fds) = copies(&[a.as_raw_fd(), b.as_raw_fd()]);
    assert_eq!(t.descriptions.len(), 2);
    let mut out = String::new();
    let [mut a2, mut b2] = <[OwnedFd; 2]>::try_from(fds).unwrap().map(File::from);
    b2.read_to_string(&mut out).unwrap();
    assert_eq!(out, "linked");
    assert_eq!(a2.stream_position().unwrap(), 8);
    a2.write_all(b"!").unwrap();
    assert_eq!(b2.read_at(&mut [0; 4], 8).unwrap(), 1, "both are one file");

    let memfd = rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::ALLOW_SEALING | rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut memfd = File::from(memfd);
    memfd.write_all(b"sealed").unwrap();
    let seals = rustix::fs::SealFlags::WRITE | rustix::fs::SealFlags::SHRINK;
    rustix::fs::fcntl_add_seals(&memfd, seals).unwrap();
    let (_, copy) = copy(memfd.as_raw_fd());
    assert_eq!(rustix::fs::fcntl_get_seals(&copy).unwrap(), seals);
    assert!(
        fs::read_link(format!("/proc/self/fd/{}", copy.as_raw_fd()))
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("/memfd:m")
    );
}

#[test]
fn shared_anonymous_memory_looks_the_same() {
    let object = Object {
        kind: crate::image::ObjectKind::SharedAnonymous,
        size: 8192,
        owner: (0, 0, 0o100_777),
        seals: 0,
    };
    let fd = create_objects(&[object]).unwrap().remove(0);
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
    assert_eq!(link.to_str().unwrap(), "/dev/zero (deleted)");
    assert_eq!(rustix::fs::fstat(&fd).unwrap().st_size, 8192);
}

#[test]
fn many_files_are_fast() {
    let dir = tempfile::tempdir().unwrap();
    if raise_limit() < 16_000 {
        eprintln!("skipped: the hard limit of open files (ulimit -Hn) is under 16000");
        return;
    }
    let files: Vec<File> = (0..2000).map(|i| File::create(dir.path().join(i.to_string())).unwrap()).collect();
    let numbers: Vec<RawFd> = files.iter().map(|f| f.as_raw_fd()).collect();
    let (t, _) = dumped(&numbers);
    let stdio = StdioFds::open(&Stdio::Null).unwrap();
    for mut early in [Early::default(), Early::open(&t.descriptions)] {
        let start = std::time::Instant::now();
        let made = build(input(&t, &[]), &[], &stdio, &mut early).unwrap();
        let took = start.elapsed();
        println!("{} files in {took:?}", made.fds.len());
        assert!(took.as_secs() < 5);
    }
}

//! Pipes, fifos, devices, standard streams.

use super::*;
use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
};

#[test]
fn pipes_keep_what_is_in_flight() {
    let (mut read, mut write) = std::io::pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(&write, 16384).unwrap();
    rustix::fs::fcntl_setfl(&read, rustix::fs::OFlags::NONBLOCK).unwrap();
    let data: Vec<u8> = (0..9000u32).map(|i| i as u8).collect();
    write.write_all(&data).unwrap();
    let extra = OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{}", write.as_raw_fd()))
        .unwrap();
    let (t, fds) = copies(&[read.as_raw_fd(), write.as_raw_fd(), extra.as_raw_fd()]);
    assert_eq!((t.descriptions.len(), t.pipes[0].capacity), (3, 16384));
    let [r, w, e] = <[OwnedFd; 3]>::try_from(fds).unwrap();
    drop(w);
    let (mut r, mut e) = (File::from(r), File::from(e));
    e.write_all(b"end").unwrap();
    drop(e);
    let mut got = Vec::new();
    r.read_to_end(&mut got).unwrap();
    assert_eq!((&got[..9000], &got[9000..]), (&data[..], &b"end"[..]));
    let mut first = vec![0; 9000];
    read.read_exact(&mut first).unwrap();
    assert_eq!(first, data, "the original still has it");
}

#[test]
fn pipes_without_an_end_and_packet_pipes() {
    let (read, mut write) = std::io::pipe().unwrap();
    write.write_all(b"last words").unwrap();
    drop(write);
    hung_up(&read);
    let mut s = String::new();
    File::from(copy(read.as_raw_fd()).1).read_to_string(&mut s).unwrap();
    assert_eq!(s, "last words", "and then the end");

    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::DIRECT | rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let (t, fds) = copies(&[read.as_raw_fd(), write.as_raw_fd()]);
    assert_ne!(t.descriptions[1].flags & libc::O_DIRECT as u32, 0);
    rustix::io::write(&fds[1], b"ab").unwrap();
    rustix::io::write(&fds[1], b"c").unwrap();
    assert_eq!(rustix::io::read(&fds[0], &mut [0; 16]).unwrap(), 2, "packets stay apart");
}

#[test]
fn fifos() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let both = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let read = OpenOptions::new().read(true).open(&path).unwrap();
    (&both).write_all(b"fifo").unwrap();
    let (t, o) = dumped(&[both.as_raw_fd(), read.as_raw_fd()]);
    assert!(matches!(t.descriptions[0].kind, Kind::Fifo { .. }));
    drop((both, read));
    settle(|| {
        // Without a reader an open for writing is refused: the buffer is gone too.
        let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
        rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).is_err()
    });
    let mut made = built(&t, o);
    let mut buffer = [0; 16];
    let [both, read] = [0, 1].map(|i| File::from(made.fds[i].take().unwrap()));
    assert_eq!((&read).read(&mut buffer).unwrap(), 4);
    (&both).write_all(b"more").unwrap();
    assert_eq!((&read).read(&mut buffer).unwrap(), 4);
}

#[test]
fn devices_and_standard_streams() {
    let zero = File::open("/dev/zero").unwrap();
    let copy = File::from(copy(zero.as_raw_fd()).1);
    assert_eq!((&copy).read(&mut [1; 8]).unwrap(), 8);

    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    fs::write(&log, b"before\n").unwrap();
    let stdio = StdioFds::open(&Stdio::File(log.clone())).unwrap();
    let stream = |stream, flags: i32| Description {
        flags: flags as u32,
        owner: None,
        signal: 0,
        kind: Kind::Stdio {
            stream,
            was: "/dev/pts/0".into(),
        },
    };
    let watching = Description {
        kind: Kind::Epoll {
            entries: vec![crate::image::EpollEntry {
                fd: 0,
                description: 0,
                events: 1,
                data: 0,
            }],
        },
        ..stream(0, libc::O_RDWR)
    };
    let t = Tables {
        descriptions: vec![
            stream(0, libc::O_RDWR),
            stream(1, libc::O_RDWR | libc::O_NONBLOCK),
            stream(2, libc::O_RDWR),
            watching,
        ],
        ..Tables::default()
    };
    let made = build(input(&t, &[]), &[], &stdio, &mut Early::default()).unwrap();
    fill_epoll(&t.descriptions, &made).unwrap();
    let fd = |i: usize| made.fds[i].as_ref().unwrap();
    rustix::io::write(fd(1), b"out\n").unwrap();
    rustix::io::write(fd(2), b"err\n").unwrap();
    assert_eq!(fs::read_to_string(&log).unwrap(), "before\nout\nerr\n");
    assert_eq!(rustix::io::read(fd(0), &mut [0; 8]).unwrap(), 0);
}

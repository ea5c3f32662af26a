//! Round trips: a descriptor of this process is dumped, built again, and both must behave alike; the original must not notice.

use super::*;
use crate::{
    dump::{
        fds::{
            Mode, Source, Tables, dump_selected,
            tests::{hung_up, settle},
        },
        objects::ObjectTable,
    },
    report::Stdio,
};
use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd, RawFd},
        unix::{
            fs::FileExt,
            net::{UnixDatagram, UnixStream},
        },
    },
};

const CLOCKS: Clocks = Clocks {
    monotonic_ns: 0,
    boottime_ns: 0,
    realtime_ns: 0,
};

fn dumped(fds: &[RawFd]) -> (Tables, ObjectTable) {
    let pid = std::process::id() as i32;
    let (mut objects, mut blockers) = (ObjectTable::new(), Vec::new());
    let source = Source { pid, inner_pid: pid };
    let tables = dump_selected(&[source], &mut objects, Mode::Frozen, &mut blockers, &|fd| fds.contains(&fd)).unwrap();
    assert!(blockers.is_empty(), "{blockers:?}");
    (tables, objects)
}

fn input<'a>(tables: &'a Tables, objects: &'a [Object]) -> Input<'a> {
    Input {
        processes: &[],
        descriptions: &tables.descriptions,
        pipes: &tables.pipes,
        objects,
        mms: &[],
        clocks: CLOCKS,
    }
}

fn built(tables: &Tables, objects: ObjectTable) -> Built {
    let (objects, sources) = objects.into_parts();
    let fds = create_objects(&objects).unwrap();
    for ((o, from), to) in objects.iter().zip(sources).zip(&fds) {
        let mut content = vec![0; o.size as usize];
        File::from(from).read_exact_at(&mut content, 0).unwrap();
        File::from(to.try_clone().unwrap()).write_all_at(&content, 0).unwrap();
    }
    let mut built = build(
        input(tables, &objects),
        &fds,
        &StdioFds::open(&Stdio::Null).unwrap(),
        &mut Early::default(),
    )
    .unwrap();
    open_pidfds(&tables.descriptions, &mut built, Some).unwrap();
    set_owners(&tables.descriptions, &built, Some).unwrap();
    fill_epoll(&tables.descriptions, &built).unwrap();
    seal_objects(&objects, &fds).unwrap();
    built
}

/// Copies of descriptors, in the order given.
fn copies(fds: &[RawFd]) -> (Tables, Vec<OwnedFd>) {
    let (tables, objects) = dumped(fds);
    let mut made = built(&tables, objects);
    // The copies must look like the originals to a second dump, but for what names the host's own numbers.
    // (An epoll instance is not asked again: it has the original's numbers.)
    let is_epoll = |i: usize| matches!(tables.descriptions[i].kind, Kind::Epoll { .. });
    let numbers = made.fds.iter().enumerate().filter(|(i, _)| !is_epoll(*i));
    let own: Vec<RawFd> = numbers.filter_map(|(_, f)| f.as_ref()).map(|f| f.as_raw_fd()).collect();
    let (again, _) = dumped(&own);
    for (i, d) in tables.descriptions.iter().enumerate().filter(|(i, _)| !is_epoll(*i)) {
        let number = made.fds[i].as_ref().unwrap().as_raw_fd();
        let there = again.fds[0].iter().find(|f| f.fd == number).unwrap();
        assert_eq!(again.descriptions[there.description as usize].flags, d.flags, "flags of {d:?}");
    }
    let of = |fd: &RawFd| tables.fds[0].iter().find(|f| f.fd == *fd).unwrap().description as usize;
    let out = fds.iter().map(|fd| made.fds[of(fd)].take().unwrap()).collect();
    (tables, out)
}

fn copy(fd: RawFd) -> (Tables, OwnedFd) {
    let (t, mut fds) = copies(&[fd]);
    (t, fds.remove(0))
}

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
fn eventfds() {
    use nix::sys::eventfd::{EfdFlags, EventFd};
    let plain = EventFd::from_value_and_flags(5, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
    plain.write(u64::MAX - 10).unwrap();
    let count = |fd: &OwnedFd| {
        let mut b = [0; 8];
        rustix::io::read(fd, &mut b).map(|_| u64::from_ne_bytes(b))
    };
    assert_eq!(count(&copy(plain.as_raw_fd()).1).unwrap(), u64::MAX - 5);
    assert_eq!(plain.read().unwrap(), u64::MAX - 5);
    let semaphore = EventFd::from_value_and_flags(2, EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK).unwrap();
    let fd = copy(semaphore.as_raw_fd()).1;
    assert_eq!((count(&fd).unwrap(), count(&fd).unwrap()), (1, 1));
    assert!(count(&fd).is_err());
}

#[test]
fn signalfds() {
    let mask = 1 << 9 | 1 << 63;
    let fd = crate::sys::fdcalls::signalfd(mask).unwrap();
    let (t, copy) = copy(fd.as_raw_fd());
    assert_eq!(t.descriptions[0].kind, Kind::SignalFd { mask });
    assert_eq!(dumped(&[copy.as_raw_fd()]).0.descriptions[0].kind, Kind::SignalFd { mask });
}

#[test]
fn timerfds() {
    use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};
    let ms = |n: i64| Timespec {
        tv_sec: n / 1000,
        tv_nsec: n % 1000 * 1_000_000,
    };
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK).unwrap();
    let setting = Itimerspec {
        it_value: ms(1),
        it_interval: ms(50),
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &setting).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(120));
    let (t, fd) = copy(timer.as_raw_fd());
    let Kind::TimerFd {
        ticks,
        value_ns,
        interval_ns,
        ..
    } = t.descriptions[0].kind
    else {
        panic!("{t:?}")
    };
    assert!(ticks >= 3 && value_ns > 0 && value_ns <= 50_000_000, "{ticks} {value_ns}");
    assert_eq!(interval_ns, 50_000_000);
    let mut b = [0; 8];
    rustix::io::read(&fd, &mut b).unwrap();
    assert!(u64::from_ne_bytes(b) >= ticks);
    rustix::io::read(&timer, &mut b).unwrap();
    assert!(u64::from_ne_bytes(b) >= ticks, "the original still has its ticks");

    // A time of day stays one.
    let day = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::empty()).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let then = Itimerspec {
        it_value: ms(now.as_millis() as i64 + 3_600_000),
        it_interval: ms(0),
    };
    timerfd_settime(&day, TimerfdTimerFlags::ABSTIME, &then).unwrap();
    let (t, o) = dumped(&[day.as_raw_fd()]);
    let (objects, _) = o.into_parts();
    let mut at = input(&t, &objects);
    // Ten minutes pass between the freeze and now.
    at.clocks.realtime_ns = now.as_nanos() as u64 - 600_000_000_000;
    let made = build(at, &[], &StdioFds::open(&Stdio::Null).unwrap(), &mut Early::default()).unwrap();
    let left = rustix::time::timerfd_gettime(made.fds[0].as_ref().unwrap())
        .unwrap()
        .it_value
        .tv_sec;
    assert!((2990..=3000).contains(&left), "{left}");
}

#[test]
fn epoll_entries_keep_number_events_and_data() {
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
    let outer = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let inner = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let (a, mut b) = UnixStream::pair().unwrap();
    let events: Vec<OwnedFd> = (0..3)
        .map(|_| rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap())
        .collect();
    inner
        .add(&a, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, u64::MAX))
        .unwrap();
    outer.add(&inner.0, EpollEvent::new(EpollFlags::EPOLLIN, 1)).unwrap();
    for (i, e) in events.iter().enumerate() {
        outer.add(e, EpollEvent::new(EpollFlags::EPOLLIN, 10 + i as u64)).unwrap();
    }
    let mut all = vec![outer.0.as_raw_fd(), inner.0.as_raw_fd(), a.as_raw_fd(), b.as_raw_fd()];
    all.extend(events.iter().map(|e| e.as_raw_fd()));
    let (t, fds) = copies(&all);
    let path = format!("/proc/self/fdinfo/{}", fds[0].as_raw_fd());
    let targets = crate::procfs::fdinfo::parse(&fs::read(path).unwrap()).unwrap().targets;
    let mut numbers: Vec<RawFd> = targets.iter().map(|t| t.fd).collect();
    numbers.sort_unstable();
    let mut expected: Vec<RawFd> = events.iter().map(|e| e.as_raw_fd()).chain([inner.0.as_raw_fd()]).collect();
    expected.sort_unstable();
    assert_eq!(numbers, expected, "{t:?}");
    rustix::io::write(&fds[5], &1u64.to_ne_bytes()).unwrap();
    let mut out = [EpollEvent::empty(); 4];
    let copy = Epoll(fds[0].try_clone().unwrap());
    assert_eq!((copy.wait(&mut out, EpollTimeout::ZERO).unwrap(), out[0].data()), (1, 11));
    rustix::io::write(&fds[3], b"x").unwrap();
    let copy = Epoll(fds[1].try_clone().unwrap());
    assert_eq!((copy.wait(&mut out, EpollTimeout::ZERO).unwrap(), out[0].data()), (1, u64::MAX));
    assert_eq!(outer.wait(&mut out, EpollTimeout::ZERO).unwrap(), 0, "the original saw nothing");
    b.write_all(b"y").unwrap();
    assert_eq!(outer.wait(&mut out, EpollTimeout::ZERO).unwrap(), 1);
}

#[test]
fn inotify_keeps_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let (x, y) = (dir.path().join("x"), dir.path().join("y"));
    fs::create_dir(&x).unwrap();
    fs::create_dir(&y).unwrap();
    use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init, remove_watch};
    let fd = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
    for _ in 0..4 {
        let wd = add_watch(&fd, &x, WatchFlags::CREATE).unwrap();
        remove_watch(&fd, wd).unwrap();
    }
    let first = add_watch(&fd, &x, WatchFlags::CREATE).unwrap();
    let second = add_watch(&fd, &y, WatchFlags::ALL_EVENTS | WatchFlags::ONLYDIR).unwrap();
    while rustix::io::read(&fd, &mut [0; 4096]).is_ok() {}
    let (t, copy) = copy(fd.as_raw_fd());
    let Kind::Inotify { watches } = &t.descriptions[0].kind else {
        panic!("{t:?}")
    };
    let mut wds: Vec<i32> = watches.iter().map(|w| w.wd).collect();
    wds.sort_unstable();
    assert_eq!(wds, [first, second]);
    File::create(x.join("new")).unwrap();
    let mut event = [0; 4096];
    let n = rustix::io::read(&copy, &mut event).unwrap();
    assert!(n >= 16);
    assert_eq!(i32::from_ne_bytes(event[..4].try_into().unwrap()), first);
}

#[test]
fn unix_streams_keep_bytes_and_shutdown() {
    let (mut a, mut b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    b.write_all(b"to a").unwrap();
    b.write_all(&[7; 100_000]).unwrap();
    a.write_all(b"to b").unwrap();
    a.shutdown(std::net::Shutdown::Write).unwrap();
    a.set_read_timeout(Some(std::time::Duration::from_secs(3))).unwrap();
    let (t, fds) = copies(&[a.as_raw_fd(), b.as_raw_fd()]);
    assert!(
        matches!(
            &t.descriptions[0].kind,
            Kind::UnixPair {
                peer: Some(1),
                shutdown: 2,
                ..
            }
        ),
        "{:?}",
        t.descriptions[0]
    );
    let [a2, b2] = <[OwnedFd; 2]>::try_from(fds).unwrap().map(UnixStream::from);
    assert_eq!(a2.read_timeout().unwrap(), Some(std::time::Duration::from_secs(3)));
    for (mut a, mut b) in [(a, b), (a2, b2)] {
        let mut s = String::new();
        b.read_to_string(&mut s).unwrap();
        assert_eq!(s, "to b");
        drop(b);
        let mut v = Vec::new();
        a.read_to_end(&mut v).unwrap();
        assert_eq!((v.len(), &v[..4]), (100_004, &b"to a"[..]));
    }
}

#[test]
fn unix_messages_stay_apart() {
    let (a, b) = UnixDatagram::pair().unwrap();
    for m in [&b"one"[..], b"", b"three"] {
        b.send(m).unwrap();
    }
    let (_, fds) = copies(&[a.as_raw_fd(), b.as_raw_fd()]);
    let [a2, _b2] = <[OwnedFd; 2]>::try_from(fds).unwrap().map(UnixDatagram::from);
    for a in [a, a2] {
        a.set_nonblocking(true).unwrap();
        let mut buffer = [0; 16];
        let lengths: Vec<usize> = std::iter::from_fn(|| a.recv(&mut buffer).ok()).collect();
        assert_eq!(lengths, [3, 0, 5]);
    }
    // A queue larger than a new socket's send buffer takes.
    let (a, b) = UnixStream::pair().unwrap();
    socket2::SockRef::from(&b).set_send_buffer_size(4 << 20).unwrap();
    b.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while let Ok(n) = (&b).write(&[1; 100]) {
        sent += n;
    }
    drop(b);
    hung_up(&a);
    let mut copy = UnixStream::from(copy(a.as_raw_fd()).1);
    let mut v = Vec::new();
    copy.read_to_end(&mut v).unwrap();
    assert_eq!(v.len(), sent);
}

#[test]
fn tcp_listener_with_options() {
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.set_only_v6(true).unwrap();
    socket.set_tcp_nodelay(true).unwrap();
    socket.set_keepalive(true).unwrap();
    socket.set_recv_buffer_size(100_000).unwrap();
    socket.set_linger(Some(std::time::Duration::from_secs(4))).unwrap();
    socket.bind(&"[::1]:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    socket.listen(77).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let (t, o) = dumped(&[socket.as_raw_fd()]);
    assert!(matches!(t.descriptions[0].kind, Kind::Tcp { backlog: Some(77), local: Some(l), .. } if l == address));
    let mut blockers = Vec::new();
    preflight(input(&t, &[]), &mut blockers);
    assert!(
        blockers[0].reason.contains(&format!("port {} is in use here", address.port())),
        "{blockers:?}"
    );
    let before = dumped(&[socket.as_raw_fd()]).0;
    drop(socket);
    settle(|| TcpListener::bind(address).is_ok());
    let made = built(&t, o);
    let fd = made.fds[0].as_ref().unwrap();
    assert_eq!(dumped(&[fd.as_raw_fd()]).0.descriptions, before.descriptions);
    let listener = TcpListener::from(fd.try_clone().unwrap());
    let client = TcpStream::connect(address).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    assert!(accepted.nodelay().unwrap());
    drop(client);
}

#[test]
fn tcp_that_was_only_created_or_bound() {
    let fresh = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let (t, _) = copy(fresh.as_raw_fd());
    let Kind::Tcp {
        socket,
        local: None,
        backlog: None,
    } = &t.descriptions[0].kind
    else {
        panic!("{t:?}")
    };
    assert!(socket.options.is_empty(), "{socket:?}");
    let missing: std::net::SocketAddr = "203.0.113.9:80".parse().unwrap();
    let reason = socket::probe(socket, Some(missing)).unwrap_err().0;
    assert!(reason.contains("the address 203.0.113.9 is not on this host"), "{reason}");
}

#[test]
fn udp_sockets() {
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(peer.local_addr().unwrap()).unwrap();
    socket.set_broadcast(true).unwrap();
    socket.set_ttl(9).unwrap();
    let address = socket.local_addr().unwrap();
    let (t, o) = dumped(&[socket.as_raw_fd()]);
    drop(socket);
    settle(|| UdpSocket::bind(address).is_ok());
    let made = built(&t, o);
    let copy = UdpSocket::from(made.fds[0].as_ref().unwrap().try_clone().unwrap());
    assert_eq!(
        (copy.local_addr().unwrap(), copy.peer_addr().unwrap()),
        (address, peer.local_addr().unwrap())
    );
    assert!(copy.broadcast().unwrap() && copy.ttl().unwrap() == 9);
    copy.send(b"hello").unwrap();
    assert_eq!(peer.recv(&mut [0; 9]).unwrap(), 5);
}

#[test]
fn pidfds_and_owners() {
    let me = std::process::id() as i32;
    let pid = rustix::process::Pid::from_raw(me).unwrap();
    let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK).unwrap();
    let (t, _) = copy(fd.as_raw_fd());
    assert_eq!(t.descriptions[0].kind, Kind::PidFd { pid: me });
    let (a, b) = UnixStream::pair().unwrap();
    crate::sys::fdcalls::set_owner(&a, 1, me).unwrap();
    crate::sys::fdcalls::set_signal(&a, 40).unwrap();
    let (t, fds) = copies(&[a.as_raw_fd(), b.as_raw_fd()]);
    assert_eq!((t.descriptions[0].owner, t.descriptions[0].signal), (Some((1, me)), 40));
    assert_eq!(crate::sys::fdcalls::owner(&fds[0]).unwrap(), (1, me));
    assert_eq!(crate::sys::fdcalls::signal(&fds[0]).unwrap(), 40);
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

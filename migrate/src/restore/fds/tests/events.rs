//! Event descriptors, epoll, pidfds, owners.

use super::*;
use std::{
    fs::{self, File},
    io::Write,
    os::unix::net::UnixStream,
};

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
    let (objects, ..) = o.into_parts();
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

/// An event loop as real programs have it: epoll, a socket pair that wakes it, a listener, a timer, a log, in another process.
#[test]
fn an_asyncio_server() {
    let program = r#"
import asyncio, os, sys, signal
os.closerange(3, 1000)  # what the test runner leaked
log = open(sys.argv[1], "a"); log.write("started\n"); log.flush()
async def main():
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)
    os.eventfd(3)
    os.write(1, b"ready\n")
    await asyncio.sleep(60)
asyncio.run(main())
"#;
    let dir = tempfile::tempdir().unwrap();
    let mut child = std::process::Command::new("python3")
        .args(["-c", program])
        .arg(dir.path().join("log"))
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("python3 is needed");
    let mut ready = [0; 6];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
    // It goes on to wait in epoll; stopped, it stays there.
    std::thread::sleep(std::time::Duration::from_millis(50));
    let pid = child.id() as i32;
    let signal = |s| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), s).unwrap();
    signal(nix::sys::signal::Signal::SIGSTOP);
    let (mut objects, mut blockers) = (ObjectTable::new(), Vec::new());
    let source = Source { pid, inner_pid: 7 };
    let tables = crate::dump::fds::dump(
        &[source],
        &mut objects,
        Mode::Frozen,
        &mut crate::dump::fds::Known::default(),
        &mut blockers,
    );
    signal(nix::sys::signal::Signal::SIGKILL);
    child.wait().unwrap();
    let tables = tables.unwrap();
    assert!(blockers.is_empty(), "{blockers:?}");
    let made = built(&tables, objects);
    let kind = |fd: i32| &tables.descriptions[tables.fds[0].iter().find(|f| f.fd == fd).unwrap().description as usize].kind;
    assert!(matches!(kind(0), Kind::Device { .. }));
    assert!(matches!(kind(1), Kind::Stdio { stream: 1, .. }));
    let count = |f: fn(&Kind) -> bool| tables.descriptions.iter().filter(|d| f(&d.kind)).count();
    assert_eq!(count(|k| matches!(k, Kind::UnixPair { peer: Some(_), .. })) % 2, 0);
    assert_eq!(count(|k| matches!(k, Kind::EventFd { count: 3, .. })), 1);
    let (i, local) = tables
        .descriptions
        .iter()
        .enumerate()
        .find_map(|(i, d)| match d.kind {
            Kind::Tcp { local: Some(l), .. } => Some((i, l)),
            _ => None,
        })
        .unwrap();
    let epoll = tables
        .descriptions
        .iter()
        .position(|d| matches!(&d.kind, Kind::Epoll { entries } if entries.len() >= 2))
        .unwrap();
    let epoll = nix::sys::epoll::Epoll(made.fds[epoll].as_ref().unwrap().try_clone().unwrap());
    let mut events = [nix::sys::epoll::EpollEvent::empty(); 4];
    assert_eq!(epoll.wait(&mut events, nix::sys::epoll::EpollTimeout::ZERO).unwrap(), 0);
    let client = std::net::TcpStream::connect(local).unwrap();
    assert_eq!(epoll.wait(&mut events, nix::sys::epoll::EpollTimeout::ZERO).unwrap(), 1);
    assert!(made.fds[i].is_some());
    drop(client);
}

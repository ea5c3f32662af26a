//! Refusals, sharing and speed, on this test process's own descriptors and on small children.

use super::*;
use crate::image::ObjectKind;
use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    process::{Command, Stdio as Process},
};

fn me() -> Source {
    let pid = std::process::id() as i32;
    Source { pid, inner_pid: pid }
}

fn dump_own(fds: &[RawFd], mode: Mode) -> (Tables, Vec<Blocker>, ObjectTable) {
    let (mut objects, mut blockers) = (ObjectTable::new(), Vec::new());
    let wanted = |fd: i32| fds.contains(&fd);
    let tables = dump_selected(&[me()], &mut objects, mode, &mut Known::default(), &mut blockers, &wanted).unwrap();
    (tables, blockers, objects)
}

fn dump_child(pid: u32, fds: &[RawFd]) -> (Tables, Vec<Blocker>) {
    let (mut objects, mut blockers) = (ObjectTable::new(), Vec::new());
    let source = Source {
        pid: pid as i32,
        inner_pid: pid as i32,
    };
    let tables = dump_selected(&[source], &mut objects, Mode::Frozen, &mut Known::default(), &mut blockers, &|fd| {
        fds.contains(&fd)
    })
    .unwrap();
    (tables, blockers)
}

/// Waits for something that a child forked by another test can delay: until it calls execve it has all descriptors of this process.
#[track_caller]
pub(crate) fn settle(condition: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed().as_secs() < 10, "it never settles");
        std::thread::yield_now();
    }
}

/// Waits until nobody has the other end any more.
#[track_caller]
pub(crate) fn hung_up(fd: impl AsFd) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    settle(|| {
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
        fds[0].revents().contains(PollFlags::HUP)
    });
}

/// The one blocker of a descriptor, whose reason must contain `words`.
#[track_caller]
fn refused(fd: impl AsFd, words: &str) -> Blocker {
    let fd = fd.as_fd().as_raw_fd();
    let (tables, mut blockers, _) = dump_own(&[fd], Mode::Frozen);
    assert_eq!(blockers.len(), 1, "{blockers:?} {tables:?}");
    let b = blockers.remove(0);
    assert!(b.reason.contains(words), "{b}");
    assert!(
        b.place.starts_with(&format!("pid {} (", me().pid)) && b.place.ends_with(&format!(" fd {fd}")),
        "{b}"
    );
    assert!(tables.fds[0].is_empty());
    b
}

#[test]
fn dup_shares_and_open_does_not() {
    let path = std::env::current_exe().unwrap();
    let a = File::open(&path).unwrap();
    let b = a.try_clone().unwrap();
    let c = File::open(&path).unwrap();
    let mut fds = [a.as_raw_fd(), b.as_raw_fd(), c.as_raw_fd()];
    let (t, blockers, _) = dump_own(&fds, Mode::Frozen);
    assert!(blockers.is_empty(), "{blockers:?}");
    let of = |fd| t.fds[0].iter().find(|f| f.fd == fd).unwrap();
    assert_eq!(of(fds[0]).description, of(fds[1]).description);
    assert_ne!(of(fds[0]).description, of(fds[2]).description);
    assert!(of(fds[0]).cloexec);
    fds.sort_unstable();
    assert_eq!(t.fds[0].iter().map(|f| f.fd).collect::<Vec<_>>(), fds);
    assert_eq!(t.descriptions.len(), 2);
}

#[test]
fn fork_shares() {
    let file = tempfile::tempfile().unwrap();
    let mut children: Vec<_> = (0..3)
        .map(|_| Command::new("sleep").arg("60").stdin(file.try_clone().unwrap()).spawn().unwrap())
        .collect();
    let sources: Vec<Source> = children
        .iter()
        .map(|c| Source {
            pid: c.id() as i32,
            inner_pid: c.id() as i32,
        })
        .collect();
    // A child has its descriptors in place only once it runs the new program.
    for s in &sources {
        while fs::read_link(format!("/proc/{}/exe", s.pid)).unwrap() == std::env::current_exe().unwrap() {
            std::thread::yield_now();
        }
    }
    let (mut objects, mut blockers) = (ObjectTable::new(), Vec::new());
    let t = dump_selected(&sources, &mut objects, Mode::Frozen, &mut Known::default(), &mut blockers, &|fd| {
        fd == 0
    });
    for c in &mut children {
        c.kill().unwrap();
        c.wait().unwrap();
    }
    let t = t.unwrap();
    assert!(blockers.is_empty(), "{blockers:?}");
    assert_eq!(t.descriptions.len(), 1);
    assert!(t.fds.iter().all(|p| p.len() == 1 && p[0].description == 0 && !p[0].cloexec));
    assert!(matches!(&objects.objects()[0].kind, ObjectKind::Unlinked { .. }));
}

fn cpu_time() -> std::time::Duration {
    let used = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).unwrap();
    let of = |t: nix::sys::time::TimeVal| std::time::Duration::from_micros((t.tv_sec() * 1_000_000 + t.tv_usec()) as u64);
    of(used.user_time()) + of(used.system_time())
}

#[test]
fn ten_thousand_files_are_fast() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    if limit.current.is_some_and(|n| n < 16_000) {
        eprintln!("skipped: the hard limit of open files (ulimit -Hn) is under 16000");
        return;
    }
    let count = 10_000;
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<File> = (0..count).map(|i| File::create(dir.path().join(i.to_string())).unwrap()).collect();
    let low = files.iter().map(|f| f.as_raw_fd()).min().unwrap();
    let mine: std::collections::HashSet<RawFd> = files.iter().map(|f| f.as_raw_fd()).collect();
    for round in 0..3 {
        let (mut objects, mut blockers) = (ObjectTable::new(), Vec::new());
        let (start, busy) = (std::time::Instant::now(), cpu_time());
        let t = dump_selected(&[me()], &mut objects, Mode::Frozen, &mut Known::default(), &mut blockers, &|fd| {
            fd >= low && mine.contains(&fd)
        })
        .unwrap();
        let took = start.elapsed();
        println!(
            "round {round}: {count} files in {took:?}, {:?} of processor time",
            cpu_time() - busy
        );
        assert_eq!(t.descriptions.len(), count);
        assert!(took.as_secs() < 5);
    }
}

#[test]
fn names_that_look_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log (deleted)");
    let file = File::create(&path).unwrap();
    let (t, blockers, _) = dump_own(&[file.as_raw_fd()], Mode::Frozen);
    assert!(blockers.is_empty(), "{blockers:?}");
    assert!(matches!(&t.descriptions[0].kind, Kind::File { file, .. } if file.path.ends_with(b"log (deleted)")));
    fs::remove_file(&path).unwrap();
    let (t, blockers, objects) = dump_own(&[file.as_raw_fd()], Mode::Frozen);
    assert!(blockers.is_empty(), "{blockers:?}");
    assert!(matches!(t.descriptions[0].kind, Kind::Object { object: 0, .. }));
    assert_eq!(
        objects.objects()[0].kind,
        ObjectKind::Unlinked {
            dir: dir.path().to_str().unwrap().into()
        }
    );
}

#[test]
fn replaced_linked_and_locked_files() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
    let file = File::create(&a).unwrap();
    fs::hard_link(&a, &c).unwrap();
    fs::remove_file(&a).unwrap();
    refused(&file, "still has another name");
    File::create(&a).unwrap();
    refused(&file, "still has another name");
    let other = File::create(&b).unwrap();
    other.lock().unwrap();
    refused(&other, "file lock (flock, WRITE)");
    let status = File::open(format!("/proc/{}/status", me().pid)).unwrap();
    refused(&status, "shows a process of this host");
}

#[test]
fn kernel_objects() {
    let hosts = File::open("/proc/self/ns/uts").unwrap();
    refused(&hosts, "belongs to this host's kernel");
    let netlink = socket2::Socket::new(socket2::Domain::from(libc::AF_NETLINK), socket2::Type::RAW, None).unwrap();
    refused(&netlink, "a netlink socket");
    let raw = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::RAW, Some(socket2::Protocol::ICMPV4)).unwrap();
    refused(&raw, "a raw IP socket");
    if let Ok(master) = File::open("/dev/ptmx") {
        refused(&master, "master side of a pseudo-terminal");
    }
}

#[test]
fn sockets_with_state() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    assert!(refused(&client, "open TCP connection to 127.0.0.1").transient);
    // One that waits to be accepted does not keep its listener from moving.
    assert!(dump_own(&[listener.as_raw_fd()], Mode::Frozen).1.is_empty());
    let (server, _) = listener.accept().unwrap();
    assert!(dump_own(&[listener.as_raw_fd()], Mode::Frozen).1.is_empty());
    server.shutdown(std::net::Shutdown::Both).unwrap();

    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    udp.send_to(b"x", udp.local_addr().unwrap()).unwrap();
    assert!(refused(&udp, "UDP datagrams").transient);
    assert!(dump_own(&[udp.as_raw_fd()], Mode::Inventory).1.is_empty());
    assert_eq!(udp.recv(&mut [0; 8]).unwrap(), 1);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let named = UnixListener::bind(&path).unwrap();
    refused(&named, "listens on");
    let to = UnixStream::connect(&path).unwrap();
    refused(&to, "leads outside the tree, to a socket that has not accepted it");
    let (accepted, _) = named.accept().unwrap();
    refused(&to, "leads outside the tree, to /");
    drop(accepted);
    let loose = UnixDatagram::unbound().unwrap();
    refused(&loose, "unconnected unix socket");
}

#[test]
fn filters_and_descriptors_in_flight() {
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    // "Accept all": one instruction, return 0xffff bytes.
    let code = [socket2::SockFilter::new(6, 0, 0, 0xffff)];
    socket2::SockRef::from(&udp).attach_filter(&code).unwrap();
    refused(&udp, "BPF filter of 1 instructions");

    let (a, b) = UnixStream::pair().unwrap();
    let rights = [a.as_raw_fd()];
    let message = [nix::sys::socket::ControlMessage::ScmRights(&rights)];
    let data = [std::io::IoSlice::new(b"fd")];
    nix::sys::socket::sendmsg::<()>(a.as_raw_fd(), &data, &message, nix::sys::socket::MsgFlags::empty(), None).unwrap();
    let (_, blockers, _) = dump_own(&[a.as_raw_fd(), b.as_raw_fd()], Mode::Frozen);
    assert_eq!(blockers.len(), 1, "{blockers:?}");
    assert!(blockers[0].transient && blockers[0].reason.contains("in flight"));
}

#[test]
fn pipes_that_lead_outside() {
    let (read, mut write) = std::io::pipe().unwrap();
    refused(&read, "is written by a process outside the tree");
    refused(&write, "is read by a process outside the tree");
    // Both ends: a pipe of the tree.
    let (t, blockers, _) = dump_own(&[read.as_raw_fd(), write.as_raw_fd()], Mode::Frozen);
    assert!(blockers.is_empty() && t.pipes.len() == 1);
    // The other end is gone: its own again, with what was written.
    write.write_all(b"left").unwrap();
    drop(write);
    hung_up(&read);
    let (t, blockers, _) = dump_own(&[read.as_raw_fd()], Mode::Frozen);
    assert!(blockers.is_empty(), "{blockers:?}");
    assert_eq!(t.pipes[0].data, b"left");
}

#[test]
fn standard_streams_of_a_child() {
    let mut child = Command::new("sleep")
        .arg("60")
        .stdin(Process::piped())
        .stdout(Process::piped())
        .stderr(Process::piped())
        .spawn()
        .unwrap();
    let (t, blockers) = dump_child(child.id(), &[0, 1, 2]);
    assert!(blockers.is_empty(), "{blockers:?}");
    let streams: Vec<u8> = t
        .descriptions
        .iter()
        .map(|d| match &d.kind {
            Kind::Stdio { stream, was } if was.starts_with("pipe:[") => *stream,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(streams, [0, 1, 2]);
    // Something to read from outside: it could be lost.
    child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    let (_, blockers) = dump_child(child.id(), &[0, 1, 2]);
    assert!(blockers.len() == 1 && blockers[0].transient, "{blockers:?}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_terminal_is_split_by_number() {
    let pty = nix::pty::openpty(None, None).unwrap();
    let child = |stdio: &dyn Fn() -> OwnedFd| {
        Command::new("sh")
            .args(["-c", "exec 9<&0; exec sleep 60 </dev/fd/0"])
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap()
    };
    let mut c = child(&|| pty.slave.try_clone().unwrap());
    while fs::read_to_string(format!("/proc/{}/comm", c.id())).unwrap() != "sleep\n" {
        std::thread::yield_now();
    }
    let (t, blockers) = dump_child(c.id(), &[0, 1, 2, 9]);
    c.kill().unwrap();
    c.wait().unwrap();
    assert!(blockers.is_empty(), "{blockers:?}");
    let stream = |fd: i32| {
        let d = t.fds[0].iter().find(|f| f.fd == fd).unwrap().description;
        match t.descriptions[d as usize].kind {
            Kind::Stdio { stream, .. } => stream,
            ref other => panic!("{other:?}"),
        }
    };
    assert_eq!([stream(0), stream(1), stream(2)], [0, 1, 2]);
    // A shell's spare descriptor of the terminal follows a standard one that shares its description.
    assert_eq!(stream(9), 1);
    // Not as a standard stream: refused.
    refused(&pty.slave, "terminal");
}

#[test]
fn epoll_of_a_number_that_was_reused() {
    let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let (a, b) = UnixStream::pair().unwrap();
    let keep = a.try_clone().unwrap();
    epoll
        .add(&a, nix::sys::epoll::EpollEvent::new(nix::sys::epoll::EpollFlags::EPOLLIN, 7))
        .unwrap();
    let number = a.as_raw_fd();
    let all = [epoll.0.as_raw_fd(), number, b.as_raw_fd(), keep.as_raw_fd()];
    let (t, blockers, _) = dump_own(&all, Mode::Frozen);
    assert!(blockers.is_empty(), "{blockers:?}");
    let entries = t.descriptions.iter().find_map(|d| match &d.kind {
        Kind::Epoll { entries } => Some(entries.clone()),
        _ => None,
    });
    assert_eq!(entries.unwrap()[0].data, 7);
    drop(a);
    let (_, blockers, _) = dump_own(&[all[0], all[2], all[3]], Mode::Frozen);
    assert!(blockers.iter().any(|b| b.reason.contains("closed or reused")), "{blockers:?}");
}

#[test]
fn memfds_and_their_seals() {
    let fd = rustix::fs::memfd_create("data", rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, 5000).unwrap();
    rustix::fs::fcntl_add_seals(&fd, rustix::fs::SealFlags::GROW).unwrap();
    let (t, blockers, objects) = dump_own(&[fd.as_raw_fd()], Mode::Frozen);
    assert!(blockers.is_empty(), "{blockers:?}");
    assert!(matches!(t.descriptions[0].kind, Kind::Object { object: 0, pos: 0 }));
    let o = &objects.objects()[0];
    assert_eq!(
        (&o.kind, o.size, o.seals),
        (&ObjectKind::Memfd(b"data".to_vec()), 5000, rustix::fs::SealFlags::GROW.bits())
    );
}

#[test]
fn flags_are_those_of_the_open() {
    let dir = tempfile::tempdir().unwrap();
    let file = OpenOptions::new().append(true).create(true).open(dir.path().join("log")).unwrap();
    let (t, _, _) = dump_own(&[file.as_raw_fd()], Mode::Frozen);
    assert_eq!(t.descriptions[0].flags, (libc::O_WRONLY | libc::O_APPEND) as u32);
    let tmp = tempfile::tempfile_in(dir.path()).unwrap();
    let (t, _, _) = dump_own(&[tmp.as_raw_fd()], Mode::Frozen);
    assert_eq!(t.descriptions[0].flags, libc::O_RDWR as u32);
}

#[test]
fn an_order_known_before_is_a_hint() {
    let same: Vec<OwnedFd> = (0..40).map(|_| File::open("/dev/null").unwrap().into()).collect();
    // Every third shares its description with the one before.
    let all: Vec<OwnedFd> = same
        .iter()
        .enumerate()
        .flat_map(|(i, fd)| [fd.try_clone().ok(), (i % 3 == 0).then(|| fd.try_clone().unwrap())])
        .flatten()
        .collect();
    let numbers: Vec<RawFd> = all.iter().map(AsRawFd::as_raw_fd).collect();
    let look = |mode, known: &mut Known| {
        let (mut objects, mut blockers) = (ObjectTable::new(), Vec::new());
        dump_selected(&[me()], &mut objects, mode, known, &mut blockers, &|fd| numbers.contains(&fd)).unwrap()
    };
    let plain = look(Mode::Frozen, &mut Known::default());
    assert_eq!(plain.descriptions.len(), 40);
    let mut known = Known::default();
    assert_eq!(look(Mode::Inventory, &mut known), plain);
    assert_eq!(look(Mode::Frozen, &mut known), plain);
    for wrong in [1, 2, 7, 13] {
        let mut known = Known {
            order: known.order.mixed(wrong),
            ..Known::default()
        };
        assert_eq!(look(Mode::Frozen, &mut known), plain, "{wrong}");
    }
}

/// What fresh sockets are like is known from an earlier look; what this one has been given since is not.
#[test]
fn options_are_found_with_what_an_inventory_has_left() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = socket2::SockRef::from(&listener);
    let number = listener.as_raw_fd();
    let look = |mode, known: &mut Known| {
        let (mut objects, mut blockers) = (ObjectTable::new(), Vec::new());
        let tables = dump_selected(&[me()], &mut objects, mode, known, &mut blockers, &|fd| fd == number).unwrap();
        assert!(blockers.is_empty(), "{blockers:?}");
        match &tables.descriptions[..] {
            [
                Description {
                    kind: Kind::Tcp { socket, .. },
                    ..
                },
            ] => socket.options.clone(),
            other => panic!("{other:?}"),
        }
    };
    let mut known = Known::default();
    let before = look(Mode::Inventory, &mut known);
    socket.set_keepalive(true).unwrap();
    let kept = look(Mode::Frozen, &mut known);
    assert_ne!(kept, before);
    assert_eq!(kept, look(Mode::Frozen, &mut Known::default()));
    socket.set_keepalive(false).unwrap();
    assert_eq!(look(Mode::Frozen, &mut known), before);
}

//! Holds one thing that no migration carries yet, and can say whether it still works.

use crate::kit::{Kit, Options, sys, sys0, zeroed};
use std::{
    ffi::CString,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
    os::unix::net::{UnixDatagram, UnixListener, UnixStream},
    process::ExitCode,
};

/// Does it still work?
type Works = Box<dyn FnMut() -> io::Result<()>>;

fn lost(what: &str) -> io::Error {
    io::Error::other(what)
}

fn io_uring() -> io::Result<Works> {
    let mut params = [0_u32; 30];
    let fd = sys!(syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()))? as i32;
    Ok(Box::new(move || {
        // Nothing submitted, nothing to wait for: an intact ring returns 0.
        sys!(syscall(libc::SYS_io_uring_enter, fd, 0, 0, 0, 0_usize, 0)).map(drop)
    }))
}

fn tcp() -> io::Result<Works> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut served, _) = listener.accept()?;
    drop(listener);
    Ok(Box::new(move || {
        client.write_all(b"ping")?;
        let mut bytes = [0; 4];
        served.read_exact(&mut bytes)?;
        if &bytes == b"ping" { Ok(()) } else { Err(lost("other bytes")) }
    }))
}

fn lock(kit: &Kit, kind: &str) -> io::Result<Works> {
    let path = kit.dir().join("locked");
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)?;
    let fd = file.as_raw_fd();
    let mut range = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: 0,
        l_start: 0,
        l_len: 10,
        l_pid: 0,
    };
    match kind {
        "flock" => drop(sys!(flock(fd, libc::LOCK_EX))?),
        "posix-lock" => drop(sys!(fcntl(fd, libc::F_SETLK, &range))?),
        "ofd-lock" => drop(sys!(fcntl(fd, libc::F_OFD_SETLK, &range))?),
        _ => drop(sys!(fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK))?),
    }
    let kind = kind.to_string();
    let name = CString::new(path.to_string_lossy().as_ref())?;
    Ok(Box::new(move || {
        let _keep = &file;
        if kind == "lease" {
            return match sys!(fcntl(fd, libc::F_GETLEASE)) {
                Ok(libc::F_WRLCK) => Ok(()),
                other => Err(lost(&format!("lease: {other:?}"))),
            };
        }
        // Another process must not get it.
        let child = sys!(fork())?;
        if child == 0 {
            let other = sys0!(open(name.as_ptr(), libc::O_RDWR));
            range.l_type = libc::F_WRLCK as i16;
            let got = match kind.as_str() {
                "flock" => sys0!(flock(other, libc::LOCK_EX | libc::LOCK_NB)),
                _ => sys0!(fcntl(other, libc::F_SETLK, &range)),
            };
            sys0!(_exit(i32::from(got == 0)));
        }
        let mut status = 0;
        sys!(waitpid(child, &mut status, 0))?;
        if libc::WEXITSTATUS(status) == 0 {
            Ok(())
        } else {
            Err(lost("the lock is not held"))
        }
    }))
}

fn sysv_shared_memory() -> io::Result<Works> {
    let id = sys!(shmget(libc::IPC_PRIVATE, 8192, 0o600 | libc::IPC_CREAT))?;
    let at = sys!(shmat(id, std::ptr::null(), 0))?.cast::<u64>();
    // SAFETY: attached, writable, 8 KiB.
    unsafe { at.write_volatile(4711) };
    Ok(Box::new(move || {
        // SAFETY: as above; a mapping that is gone ends the guest, which is a failure too.
        if unsafe { at.read_volatile() } != 4711 {
            return Err(lost("content"));
        }
        let again = sys!(shmat(id, std::ptr::null(), 0))?.cast::<u64>();
        // SAFETY: as above.
        let same = unsafe {
            again.write_volatile(4711);
            at.read_volatile() == 4711
        };
        sys0!(shmdt(again.cast()));
        if same { Ok(()) } else { Err(lost("not the same segment")) }
    }))
}

fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<Works> {
    let fd = sys!(socket(domain, kind, protocol))?;
    Ok(Box::new(move || {
        let (mut is, mut size) = (0_i32, 4_u32);
        sys!(getsockopt(fd, libc::SOL_SOCKET, libc::SO_DOMAIN, (&raw mut is).cast(), &mut size))?;
        if is == domain { Ok(()) } else { Err(lost("another socket")) }
    }))
}

fn aio() -> io::Result<Works> {
    let mut context = 0_usize;
    sys!(syscall(libc::SYS_io_setup, 4, &mut context))?;
    Ok(Box::new(move || {
        let mut event = [0_u64; 4];
        let limit: libc::timespec = zeroed();
        match sys!(syscall(libc::SYS_io_getevents, context, 0, 1, event.as_mut_ptr(), &limit)) {
            Ok(0) => Ok(()),
            other => Err(lost(&format!("{other:?}"))),
        }
    }))
}

fn seccomp() -> io::Result<Works> {
    // Every call is allowed but getcpu, which fails with ENOANO.
    #[repr(C)]
    struct Op(u16, u8, u8, u32);
    let program = [
        Op(0x20, 0, 0, 0),
        Op(0x15, 0, 1, libc::SYS_getcpu as u32),
        Op(0x06, 0, 0, 0x0005_0000 | libc::ENOANO as u32),
        Op(0x06, 0, 0, 0x7fff_0000),
    ];
    #[repr(C)]
    struct Program(u16, *const Op);
    sys!(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
    sys!(prctl(libc::PR_SET_SECCOMP, 2, &Program(4, program.as_ptr())))?;
    Ok(Box::new(|| match sys!(syscall(libc::SYS_getcpu, 0_usize, 0_usize, 0_usize)) {
        Err(e) if e.raw_os_error() == Some(libc::ENOANO) => Ok(()),
        other => Err(lost(&format!("the filter does not filter: {other:?}"))),
    }))
}

fn child_that(act: impl FnOnce() -> io::Result<()>) -> io::Result<i32> {
    let mut pipe = [0; 2];
    sys!(pipe(pipe.as_mut_ptr()))?;
    let pid = sys!(fork())?;
    if pid == 0 {
        sys0!(prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL));
        let done = act().is_ok() as u8;
        sys0!(write(pipe[1], (&raw const done).cast(), 1));
        loop {
            sys0!(pause());
        }
    }
    let mut done = 0_u8;
    sys!(read(pipe[0], (&raw mut done).cast(), 1))?;
    sys0!(close(pipe[0]));
    sys0!(close(pipe[1]));
    if done == 1 {
        Ok(pid)
    } else {
        Err(lost("the child could not do it"))
    }
}

fn namespace(flag: i32, name: &'static str) -> io::Result<Works> {
    let pid = child_that(|| sys!(unshare(flag)).map(drop))?;
    Ok(Box::new(move || {
        let of = |who: String| std::fs::read_link(format!("/proc/{who}/ns/{name}"));
        if of(pid.to_string())? == of("self".into())? {
            Err(lost("the child's namespace is gone"))
        } else {
            Ok(())
        }
    }))
}

fn stopped() -> io::Result<Works> {
    let pid = child_that(|| Ok(()))?;
    sys!(kill(pid, libc::SIGSTOP))?;
    let mut status = 0;
    sys!(waitpid(pid, &mut status, libc::WUNTRACED))?;
    Ok(Box::new(move || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        if stat.rsplit_once(") ").is_some_and(|(_, r)| r.starts_with('T')) {
            Ok(())
        } else {
            Err(lost("the child is not stopped"))
        }
    }))
}

fn traced() -> io::Result<Works> {
    let pid = child_that(|| Ok(()))?;
    sys!(ptrace(libc::PTRACE_SEIZE, pid, 0, 0))?;
    Ok(Box::new(move || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        if status.contains(&format!("TracerPid:\t{}", std::process::id())) {
            Ok(())
        } else {
            Err(lost("not traced any more"))
        }
    }))
}

/// Traces a process until it is killed.
pub fn trace(pid: &str) -> ExitCode {
    let pid: i32 = pid.parse().unwrap_or(0);
    if let Err(error) = sys!(ptrace(libc::PTRACE_SEIZE, pid, 0, 0)) {
        eprintln!("trace {pid}: {error}");
        return ExitCode::FAILURE;
    }
    println!("tracing");
    loop {
        std::thread::sleep(std::time::Duration::from_secs(60));
    }
}

fn descriptor(fd: i32, probe: impl Fn(i32) -> io::Result<()> + 'static) -> Works {
    Box::new(move || probe(fd))
}

/// `--what KIND`; `--list 1` names the kinds.
pub fn hold(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let what = options.text("what").unwrap_or("");
    let dir = kit.dir().to_path_buf();
    let mut works: Works = match what {
        "io-uring" => io_uring()?,
        "tcp" => tcp()?,
        "flock" | "posix-lock" | "ofd-lock" | "lease" => lock(&kit, what)?,
        "sysv-shm" => sysv_shared_memory()?,
        "packet-socket" => socket(libc::AF_PACKET, libc::SOCK_RAW, 0x0300)?,
        "raw-socket" => socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?,
        "netlink" => socket(libc::AF_NETLINK, libc::SOCK_RAW, 0)?,
        "vsock" => socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?,
        "aio" => aio()?,
        "seccomp" => seccomp()?,
        "net-namespace" => namespace(libc::CLONE_NEWNET, "net")?,
        "mount-namespace" => namespace(libc::CLONE_NEWNS, "mnt")?,
        "user-namespace" => namespace(libc::CLONE_NEWUSER, "user")?,
        "stopped-child" => stopped()?,
        "traced-child" => traced()?,
        "unix-listener" => {
            let path = dir.join("hold.sock");
            let listener = UnixListener::bind(&path)?;
            Box::new(move || {
                let _client = UnixStream::connect(&path)?;
                listener.accept().map(drop)
            })
        }
        "unix-datagram" => {
            let path = dir.join("hold.dgram");
            let socket = UnixDatagram::bind(&path)?;
            Box::new(move || {
                UnixDatagram::unbound()?.send_to(b"x", &path)?;
                socket.recv(&mut [0; 8]).map(drop)
            })
        }
        "unix-outside" => {
            // The other end is in a process that has left the tree.
            let (mine, theirs) = UnixStream::pair()?;
            let middle = sys!(fork())?;
            if middle == 0 {
                if sys0!(fork()) == 0 {
                    sys0!(setsid());
                    let mut stream = theirs;
                    let mut byte = [0];
                    while stream.read(&mut byte).is_ok_and(|n| n == 1) {
                        let _ = stream.write_all(&byte);
                    }
                    sys0!(_exit(0));
                }
                sys0!(_exit(0));
            }
            sys!(waitpid(middle, std::ptr::null_mut(), 0))?;
            drop(theirs);
            let mut mine = mine;
            Box::new(move || {
                mine.write_all(b"x")?;
                mine.read_exact(&mut [0])
            })
        }
        "rights-in-flight" => {
            let (left, right) = UnixStream::pair()?;
            let mut space = [0_u64; 4];
            space[0] = 20;
            space[1] = u64::from(libc::SOL_SOCKET as u32) | (u64::from(libc::SCM_RIGHTS as u32) << 32);
            space[2] = left.as_raw_fd() as u64;
            let mut byte = 7_u8;
            let mut iov = libc::iovec {
                iov_base: (&raw mut byte).cast(),
                iov_len: 1,
            };
            let mut msg: libc::msghdr = zeroed();
            msg.msg_iov = &mut iov;
            msg.msg_iovlen = 1;
            msg.msg_control = space.as_mut_ptr().cast();
            msg.msg_controllen = 24;
            sys!(sendmsg(left.as_raw_fd(), &msg, 0))?;
            let waiting = right;
            Box::new(move || {
                let _keep = &left;
                let mut n = 0_i32;
                sys!(ioctl(waiting.as_raw_fd(), libc::FIONREAD, &mut n))?;
                if n == 1 { Ok(()) } else { Err(lost("the message is gone")) }
            })
        }
        "credentials-in-flight" => {
            let (mut left, mut right) = UnixStream::pair()?;
            let on = 1_i32;
            sys!(setsockopt(
                right.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PASSCRED,
                (&raw const on).cast(),
                4
            ))?;
            left.write_all(b"who")?;
            Box::new(move || {
                let mut bytes = [0; 3];
                right.read_exact(&mut bytes)?;
                left.write_all(b"who")?;
                if &bytes == b"who" { Ok(()) } else { Err(lost("other bytes")) }
            })
        }
        "packet-pipe" => {
            let mut pipe = [0; 2];
            sys!(pipe2(pipe.as_mut_ptr(), libc::O_DIRECT | libc::O_NONBLOCK))?;
            let put = move |bytes: &[u8]| sys!(write(pipe[1], bytes.as_ptr().cast(), bytes.len()));
            put(b"one")?;
            put(b"two!")?;
            Box::new(move || {
                for expected in [&b"one"[..], b"two!"] {
                    let mut bytes = [0_u8; 64];
                    let n = sys!(read(pipe[0], bytes.as_mut_ptr().cast(), 64))? as usize;
                    if &bytes[..n] != expected {
                        return Err(lost("the packets ran together"));
                    }
                    put(expected)?;
                }
                Ok(())
            })
        }
        "deleted-file" => {
            let path = dir.join("deleted");
            std::fs::write(&path, b"still here")?;
            let mut file = std::fs::OpenOptions::new().read(true).write(true).open(&path)?;
            std::fs::remove_file(&path)?;
            // Under which name it was deleted is of no use to anyone; what it holds is.
            kit.ignore(format!("fd {}:", file.as_raw_fd()));
            kit.moves(&file);
            Box::new(move || {
                use std::io::Seek;
                let mut text = String::new();
                file.rewind()?;
                file.read_to_string(&mut text)?;
                if text == "still here" { Ok(()) } else { Err(lost("other content")) }
            })
        }
        "pidfd" => descriptor(sys!(syscall(libc::SYS_pidfd_open, libc::getppid(), 0))? as i32, |fd| {
            sys!(syscall(libc::SYS_pidfd_send_signal, fd, 0, 0_usize, 0)).map(drop)
        }),
        "userfaultfd" => {
            let fd = sys!(syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK))? as i32;
            let mut api = [0xaa_u64, 0, 0];
            sys!(ioctl(fd, 0xc018_aa3f, api.as_mut_ptr()))?;
            descriptor(fd, |fd| match sys!(read(fd, [0_u8; 64].as_mut_ptr().cast(), 64)) {
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
                other => Err(lost(&format!("{other:?}"))),
            })
        }
        "message-queue" => {
            let name = CString::new("/guest")?;
            let fd = sys!(mq_open(
                name.as_ptr(),
                libc::O_RDWR | libc::O_CREAT | libc::O_NONBLOCK,
                0o600,
                0_usize
            ))?;
            sys!(mq_send(fd, c"x".as_ptr(), 1, 0))?;
            descriptor(fd, |fd| {
                let mut room = vec![0_u8; 64 << 10];
                sys!(mq_receive(fd, room.as_mut_ptr().cast(), room.len(), std::ptr::null_mut()))?;
                sys!(mq_send(fd, c"x".as_ptr(), 1, 0)).map(drop)
            })
        }
        "fanotify" => descriptor(sys!(fanotify_init(libc::FAN_CLASS_NOTIF | libc::FAN_NONBLOCK, 0))?, |fd| {
            match sys!(read(fd, [0_u8; 64].as_mut_ptr().cast(), 64)) {
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
                other => Err(lost(&format!("{other:?}"))),
            }
        }),
        "perf-event" => {
            let mut attr = [0_u64; 16];
            // A software clock of this process.
            attr[0] = 1 | (128 << 32);
            let fd = sys!(syscall(libc::SYS_perf_event_open, attr.as_mut_ptr(), 0, -1, -1, 0))? as i32;
            descriptor(fd, |fd| match sys!(read(fd, [0_u8; 8].as_mut_ptr().cast(), 8)) {
                Ok(8) => Ok(()),
                other => Err(lost(&format!("{other:?}"))),
            })
        }
        "hugetlb" => {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
            let area = crate::memory::Area::map(2 << 20, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)?;
            area.set(5, 6);
            Box::new(move || if area.word(5) == 6 { Ok(()) } else { Err(lost("content")) })
        }
        "proc-file" => {
            let path = CString::new(format!("/proc/{}/status", sys0!(getppid())))?;
            descriptor(sys!(open(path.as_ptr(), libc::O_RDONLY))?, |fd| {
                match sys!(pread(fd, [0_u8; 16].as_mut_ptr().cast(), 16, 0)) {
                    Ok(16) => Ok(()),
                    other => Err(lost(&format!("{other:?}"))),
                }
            })
        }
        "nothing" => Box::new(|| Ok(())),
        _ => return Err(io::Error::other(format!("unknown kind {what:?}"))),
    };
    works()?;
    kit.ready()?;
    let what = what.to_string();
    Ok(kit.run(
        |_| {},
        |kit| {
            let result = works();
            kit.expect(&what, result);
        },
    ))
}

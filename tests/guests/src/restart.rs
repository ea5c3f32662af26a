//! System calls that wait, one thread each, over and over: none may end with EINTR, none early, none late.

use crate::{
    kit::{Kit, Options, now_ns, set_of, sys, sys0, zeroed},
    memory::Area,
};
use std::{
    io,
    process::ExitCode,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

type Outcome = Result<(), String>;

/// A waiting call: its name, and the call, told how many nanoseconds to wait.
type Call = (&'static str, Box<dyn FnMut(u64) -> Outcome + Send>);

fn timespec(ns: u64) -> libc::timespec {
    libc::timespec {
        tv_sec: (ns / 1_000_000_000) as i64,
        tv_nsec: (ns % 1_000_000_000) as i64,
    }
}

fn zero(result: io::Result<i32>) -> Outcome {
    match result {
        Ok(0) => Ok(()),
        Ok(n) => Err(format!("returned {n}")),
        Err(e) => Err(e.to_string()),
    }
}

fn error_is<T: std::fmt::Debug>(result: io::Result<T>, expected: i32) -> Outcome {
    match result {
        Err(e) if e.raw_os_error() == Some(expected) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

fn pair() -> io::Result<[i32; 2]> {
    let mut fds = [0; 2];
    sys!(socketpair(
        libc::AF_UNIX,
        libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
        0,
        fds.as_mut_ptr()
    ))?;
    Ok(fds)
}

fn pipe() -> io::Result<[i32; 2]> {
    let mut fds = [0; 2];
    sys!(pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC))?;
    Ok(fds)
}

fn timed(shared: usize) -> io::Result<Vec<Call>> {
    let quiet = pipe()?;
    let socket = pair()?;
    let word = shared;
    let poll_fd = move || libc::pollfd {
        fd: quiet[0],
        events: libc::POLLIN,
        revents: 0,
    };
    let epoll = sys!(epoll_create1(libc::EPOLL_CLOEXEC))?;
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 5,
    };
    sys!(epoll_ctl(epoll, libc::EPOLL_CTL_ADD, quiet[0], &mut event))?;
    let never = libc::SIGRTMIN() + 11;
    let set = set_of(&[never]);
    // Inherited by every thread started later.
    sys!(pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()))?;
    let mut calls: Vec<Call> = Vec::new();
    let mut add = |name: &'static str, call: Box<dyn FnMut(u64) -> Outcome + Send>| calls.push((name, call));
    add(
        "nanosleep",
        Box::new(|ns| zero(sys!(nanosleep(&timespec(ns), std::ptr::null_mut())))),
    );
    add(
        "clock_nanosleep relative",
        Box::new(
            |ns| match sys0!(clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &timespec(ns), std::ptr::null_mut())) {
                0 => Ok(()),
                e => Err(format!("error {e}")),
            },
        ),
    );
    add(
        "clock_nanosleep absolute",
        Box::new(|ns| {
            let until = timespec(now_ns() + ns);
            match sys0!(clock_nanosleep(
                libc::CLOCK_MONOTONIC,
                libc::TIMER_ABSTIME,
                &until,
                std::ptr::null_mut()
            )) {
                0 => Ok(()),
                e => Err(format!("error {e}")),
            }
        }),
    );
    add(
        "poll",
        Box::new(move |ns| zero(sys!(poll(&mut poll_fd(), 1, (ns / 1_000_000) as i32)))),
    );
    add(
        "ppoll",
        Box::new(move |ns| zero(sys!(ppoll(&mut poll_fd(), 1, &timespec(ns), &crate::kit::empty_set())))),
    );
    add(
        "select",
        Box::new(move |ns| {
            let mut set: libc::fd_set = zeroed();
            sys0!(FD_SET(quiet[0], &mut set));
            let mut limit = libc::timeval {
                tv_sec: (ns / 1_000_000_000) as i64,
                tv_usec: (ns % 1_000_000_000 / 1000) as i64,
            };
            zero(sys!(select(
                quiet[0] + 1,
                &mut set,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                &mut limit
            )))
        }),
    );
    add(
        "epoll_wait",
        Box::new(move |ns| {
            let mut out: libc::epoll_event = libc::epoll_event { events: 0, u64: 0 };
            zero(sys!(epoll_wait(epoll, &mut out, 1, (ns / 1_000_000) as i32)))
        }),
    );
    add(
        "epoll_pwait",
        Box::new(move |ns| {
            let mut out: libc::epoll_event = libc::epoll_event { events: 0, u64: 0 };
            zero(sys!(epoll_pwait(
                epoll,
                &mut out,
                1,
                (ns / 1_000_000) as i32,
                &crate::kit::empty_set()
            )))
        }),
    );
    add(
        "futex wait relative",
        Box::new(move |ns| {
            error_is(
                sys!(syscall(
                    libc::SYS_futex,
                    word,
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    0,
                    &timespec(ns)
                )),
                libc::ETIMEDOUT,
            )
        }),
    );
    add(
        "futex wait absolute",
        Box::new(move |ns| {
            let until = timespec(now_ns() + ns);
            error_is(
                sys!(syscall(
                    libc::SYS_futex,
                    word,
                    libc::FUTEX_WAIT_BITSET,
                    0,
                    &until,
                    0_usize,
                    u32::MAX
                )),
                libc::ETIMEDOUT,
            )
        }),
    );
    add(
        "sigtimedwait",
        Box::new(move |ns| {
            let set = set_of(&[never]);
            error_is(sys!(sigtimedwait(&set, std::ptr::null_mut(), &timespec(ns))), libc::EAGAIN)
        }),
    );
    add(
        "recv with SO_RCVTIMEO",
        Box::new(move |ns| {
            let limit = libc::timeval {
                tv_sec: (ns / 1_000_000_000) as i64,
                tv_usec: (ns % 1_000_000_000 / 1000) as i64,
            };
            let size = size_of::<libc::timeval>() as u32;
            sys!(setsockopt(
                socket[0],
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const limit).cast(),
                size
            ))
            .map_err(|e| e.to_string())?;
            let mut byte = 0_u8;
            error_is(sys!(recv(socket[0], (&raw mut byte).cast(), 1, 0)), libc::EAGAIN)
        }),
    );
    Ok(calls)
}

/// Calls that wait for something the verification does; each returns only when it happened.
fn woken(wake: &mut Vec<Box<dyn FnMut() -> io::Result<()>>>) -> io::Result<Vec<Call>> {
    let mut calls: Vec<Call> = Vec::new();
    let put = |fd: i32| -> Box<dyn FnMut() -> io::Result<()>> {
        Box::new(move || sys!(write(fd, 1_u64.to_le_bytes().as_ptr().cast(), 8)).map(drop))
    };
    let read8 = |fd: i32| -> Box<dyn FnMut(u64) -> Outcome + Send> {
        Box::new(move |_| {
            let mut word = 0_u64;
            match sys!(read(fd, (&raw mut word).cast(), 8)) {
                Ok(8) if word == 1 => Ok(()),
                other => Err(format!("{other:?}, read {word}")),
            }
        })
    };
    let p = pipe()?;
    calls.push(("read on a pipe", read8(p[0])));
    wake.push(put(p[1]));
    let s = pair()?;
    calls.push(("read on a unix socket", read8(s[0])));
    wake.push(put(s[1]));
    let e = sys!(eventfd(0, libc::EFD_CLOEXEC))?;
    calls.push(("read on an eventfd", read8(e)));
    wake.push(put(e));

    let full = pipe()?;
    let size = sys!(fcntl(full[0], libc::F_GETPIPE_SZ))? as usize;
    let filling = vec![7_u8; size];
    sys!(write(full[1], filling.as_ptr().cast(), size))?;
    calls.push((
        "write on a full pipe",
        Box::new(move |_| {
            let bytes = [7_u8; 4096];
            match sys!(write(full[1], bytes.as_ptr().cast(), 4096)) {
                Ok(4096) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        }),
    ));
    wake.push(Box::new(move || {
        let mut bytes = [0_u8; 4096];
        match sys!(read(full[0], bytes.as_mut_ptr().cast(), 4096)) {
            Ok(4096) if bytes == [7; 4096] => Ok(()),
            other => Err(io::Error::other(format!("full pipe: {other:?}"))),
        }
    }));

    let silent = pipe()?;
    let epoll = sys!(epoll_create1(libc::EPOLL_CLOEXEC))?;
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 9,
    };
    sys!(epoll_ctl(epoll, libc::EPOLL_CTL_ADD, silent[0], &mut event))?;
    calls.push((
        "epoll_wait without end",
        Box::new(move |_| {
            let mut out = libc::epoll_event { events: 0, u64: 0 };
            let result = sys!(epoll_wait(epoll, &mut out, 1, -1));
            let data = out.u64;
            let mut word = 0_u64;
            sys0!(read(silent[0], (&raw mut word).cast(), 8));
            match result {
                Ok(1) if data == 9 => Ok(()),
                other => Err(format!("{other:?}, data {data}")),
            }
        }),
    ));
    wake.push(put(silent[1]));

    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    calls.push(("accept", Box::new(move |_| listener.accept().map(drop).map_err(|e| e.to_string()))));
    wake.push(Box::new(move || std::net::TcpStream::connect(address).map(drop)));

    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let to = datagrams.local_addr()?;
    calls.push((
        "recv on UDP",
        Box::new(move |_| match datagrams.recv(&mut [0; 16]) {
            Ok(3) => Ok(()),
            other => Err(format!("{other:?}")),
        }),
    ));
    wake.push(Box::new(move || {
        std::net::UdpSocket::bind("127.0.0.1:0")?.send_to(b"abc", to).map(drop)
    }));

    // A child that ends when its pipe closes, for wait4.
    let order = pipe()?;
    let child = Arc::new(Mutex::new(fork_child(order)?));
    calls.push(("wait4", {
        let child = Arc::clone(&child);
        Box::new(move |_| {
            let pid = *child.lock().unwrap_or_else(|e| e.into_inner());
            let mut status = 0;
            let result = sys!(wait4(pid, &mut status, 0, std::ptr::null_mut()));
            if let Ok(next) = fork_child(order) {
                *child.lock().unwrap_or_else(|e| e.into_inner()) = next;
            }
            match result {
                Ok(p) if p == pid && libc::WEXITSTATUS(status) == 9 => Ok(()),
                other => Err(format!("{other:?}, status {status:#x}")),
            }
        })
    }));
    wake.push(put(order[1]));
    Ok(calls)
}

fn fork_child(order: [i32; 2]) -> io::Result<i32> {
    let pid = sys!(fork())?;
    if pid == 0 {
        let mut word = 0_u64;
        // A child that is moved while it waits must not see EINTR either; its exit code would tell.
        let ended = sys!(read(order[0], (&raw mut word).cast(), 8));
        sys0!(_exit(if ended.is_ok_and(|n| n == 8) { 9 } else { 1 }));
    }
    Ok(pid)
}

#[derive(Default)]
struct Record {
    wrong: Vec<String>,
    late: Vec<u64>,
    turns: u64,
}

/// `--wait-ms N` for the calls with a limit of their own.
pub fn restart(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let wait = options.number("wait-ms", 3000) * 1_000_000;
    // How much later than asked a call may come back: the freeze, and a busy machine. Starting its time anew is more than that.
    let slack = options.number("slack-ms", 1000) * 1_000_000;
    let page = Area::read_write(4096)?;
    let mut wake = Vec::new();
    let timed = timed(page.at.addr())?;
    let woken = woken(&mut wake)?;
    let mut records = Vec::new();
    let mut start = |name: &'static str, mut call: Box<dyn FnMut(u64) -> Outcome + Send>, timed: bool| -> io::Result<()> {
        let record = Arc::new(Mutex::new(Record::default()));
        records.push((name, Arc::clone(&record), timed));
        thread::Builder::new()
            .name(name.chars().take(15).collect())
            .stack_size(128 << 10)
            .spawn(move || {
                loop {
                    let began = now_ns();
                    let result = call(wait);
                    let took = now_ns() - began;
                    let mut record = record.lock().unwrap_or_else(|e| e.into_inner());
                    record.turns += 1;
                    if let Err(e) = result {
                        record.wrong.push(format!("{name}: {e} after {} ms", took / 1_000_000));
                    }
                    if timed && took + 2_000_000 < wait {
                        record
                            .wrong
                            .push(format!("{name}: came back after {} ms of {}", took / 1_000_000, wait / 1_000_000));
                    }
                    if timed && took > wait + slack {
                        record.late.push(took);
                    }
                }
            })?;
        Ok(())
    };
    for (name, call) in timed {
        start(name, call, true)?;
    }
    for (name, call) in woken {
        start(name, call, false)?;
    }
    thread::sleep(Duration::from_millis(50));
    kit.ready()?;
    let mut expected_turns = 0;
    Ok(kit.run(
        |_| {},
        |kit| {
            expected_turns += 1;
            for wake in &mut wake {
                let result = wake();
                kit.expect("waking", result);
            }
            // A relative timeout starts anew at each of the two moves there and back: the kernel tells nobody what was left of it.
            let wait = 3 * wait;
            // Every timed call that was under way comes back within this.
            let until = now_ns() + wait + slack + 200_000_000;
            while now_ns() < until {
                thread::sleep(Duration::from_millis(5));
                kit.beat();
            }
            // When nothing ran at all, in a freeze or on a busy machine, nobody could come back.
            let stood_still = kit.longest_gap_ns();
            for (name, record, timed) in &records {
                let mut record = record.lock().unwrap_or_else(|e| e.into_inner());
                for took in record.late.drain(..).filter(|took| *took > wait + slack + stood_still) {
                    kit.differs(format!(
                        "{name}: came back only after {} ms of {}",
                        took / 1_000_000,
                        wait / 1_000_000
                    ));
                }
                for wrong in record.wrong.drain(..) {
                    kit.differs(wrong);
                }
                if *timed {
                    kit.check(record.turns > 0, format!("{name} never comes back"));
                    record.turns = 0;
                } else {
                    kit.equal(&format!("times that {name} came back"), record.turns, expected_turns);
                }
            }
        },
    ))
}

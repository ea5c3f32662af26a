//! Descriptors: files with offsets and flags, descriptions shared after fork and dup, and what is not a file.

use crate::kit::{Kit, Options, set_of, sys, sys0, zeroed};
use std::{ffi::CString, io, process::ExitCode};

fn open(kit: &Kit, name: &str, flags: i32) -> io::Result<i32> {
    let path = CString::new(kit.dir().join(name).to_string_lossy().as_ref())?;
    sys!(open(path.as_ptr(), flags, 0o640))
}

fn device(path: &str, flags: i32) -> io::Result<i32> {
    let path = CString::new(path)?;
    sys!(open(path.as_ptr(), flags))
}

fn put(fd: i32, bytes: &[u8]) -> io::Result<isize> {
    sys!(write(fd, bytes.as_ptr().cast(), bytes.len()))
}

fn get(fd: i32, at_most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; at_most];
    let n = sys!(read(fd, bytes.as_mut_ptr().cast(), at_most))?;
    bytes.truncate(n as usize);
    Ok(bytes)
}

fn offset(fd: i32) -> i64 {
    sys0!(lseek(fd, 0, libc::SEEK_CUR))
}

fn ready_now(fd: i32, events: i16) -> i16 {
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    sys0!(poll(&mut poll, 1, 0));
    poll.revents
}

fn watch(epoll: i32, fd: i32, events: i32, data: u64) -> io::Result<()> {
    let mut event = libc::epoll_event {
        events: events as u32,
        u64: data,
    };
    sys!(epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event)).map(drop)
}

fn happened(epoll: i32) -> Vec<(u32, u64)> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
    let n = sys0!(epoll_wait(epoll, events.as_mut_ptr(), 16, 0)).max(0) as usize;
    let mut list: Vec<(u32, u64)> = events[..n].iter().map(|e| (e.events, e.u64)).collect();
    list.sort_unstable();
    list
}

/// `--count N` open files, each with an offset of its own, every tenth a duplicate of the one before.
pub fn many(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let count = options.number("count", 10_000) as usize;
    let text: Vec<u8> = (0..64 << 10).map(|i| (i % 251) as u8).collect();
    for i in 0..64 {
        std::fs::write(kit.dir().join(format!("file-{i}")), &text)?;
    }
    let mut fds = Vec::with_capacity(count);
    for i in 0..count {
        let fd = if i % 10 == 9 {
            sys!(dup(fds[i - 1]))?
        } else {
            let fd = open(
                &kit,
                &format!("file-{}", i % 64),
                if i % 3 == 0 {
                    libc::O_RDWR
                } else {
                    libc::O_RDONLY | libc::O_CLOEXEC
                },
            )?;
            sys!(lseek(fd, (i * 7 % 60_000) as i64, libc::SEEK_SET))?;
            fd
        };
        fds.push(fd);
    }
    kit.ready()?;
    Ok(kit.run(
        |_| {},
        |kit| {
            let mut wrong = 0;
            for (i, fd) in fds.iter().enumerate() {
                let of = if i % 10 == 9 { i - 1 } else { i };
                let at = of * 7 % 60_000;
                let mut byte = 0_u8;
                let good =
                    offset(*fd) == at as i64 && sys0!(pread(*fd, (&raw mut byte).cast(), 1, at as i64)) == 1 && byte == (at % 251) as u8;
                wrong += usize::from(!good);
            }
            kit.equal("descriptors that differ", wrong, 0);
            // A duplicate shares its offset.
            for pair in fds.chunks(10).filter(|c| c.len() == 10).take(50) {
                let here = offset(pair[8]);
                sys0!(lseek(pair[8], here + 1, libc::SEEK_SET));
                kit.equal("offset through the duplicate", offset(pair[9]), here + 1);
                sys0!(lseek(pair[9], here, libc::SEEK_SET));
            }
        },
    ))
}

/// One of each kind.
pub fn fds(mut kit: Kit) -> io::Result<ExitCode> {
    let (rw, new) = (libc::O_RDWR, libc::O_CREAT | libc::O_TRUNC);
    let plain = open(&kit, "plain", rw | new)?;
    put(plain, b"0123456789")?;
    sys!(lseek(plain, 4, libc::SEEK_SET))?;
    let dup = sys!(dup(plain))?;
    let dup_far = sys!(fcntl(plain, libc::F_DUPFD_CLOEXEC, 500))?;
    let again = open(&kit, "plain", libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW)?;
    sys!(lseek(again, 9, libc::SEEK_SET))?;
    let append = open(&kit, "append", libc::O_WRONLY | new | libc::O_APPEND | libc::O_NOATIME)?;
    put(append, b"before ")?;
    let path_only = open(&kit, "plain", libc::O_PATH)?;
    let directory = open(&kit, ".", libc::O_RDONLY | libc::O_DIRECTORY)?;
    let write_only = open(&kit, "write-only", libc::O_WRONLY | new)?;
    sys!(lseek(write_only, 100, libc::SEEK_SET))?;
    let shared_with_child = open(&kit, "plain", libc::O_RDONLY)?;

    let null = device("/dev/null", rw)?;
    let zero = device("/dev/zero", libc::O_RDONLY)?;
    let random = device("/dev/urandom", libc::O_RDONLY)?;
    let full_device = device("/dev/full", libc::O_WRONLY)?;

    let event = sys!(eventfd(41, libc::EFD_NONBLOCK))?;
    let semaphore = sys!(eventfd(3, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))?;
    let signals = set_of(&[libc::SIGUSR2, libc::SIGRTMIN() + 6]);
    sys!(pthread_sigmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut()))?;
    let signal = sys!(signalfd(-1, &signals, libc::SFD_NONBLOCK))?;
    let value = libc::sigval {
        sival_ptr: 55 as *mut libc::c_void,
    };
    let queue = move || sys!(sigqueue(libc::getpid(), libc::SIGRTMIN() + 6, value));
    queue()?;

    let mut half = [0; 2];
    sys!(pipe2(half.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC))?;
    put(half[1], b"in flight")?;
    let mut full = [0; 2];
    sys!(pipe2(full.as_mut_ptr(), libc::O_NONBLOCK))?;
    sys!(fcntl(full[0], libc::F_SETPIPE_SZ, 1 << 18))?;
    let filling: Vec<u8> = (0..1_u32 << 18).map(|i| (i % 253) as u8).collect();
    put(full[1], &filling)?;
    let mut widowed = [0; 2];
    sys!(pipe(widowed.as_mut_ptr()))?;
    put(widowed[1], b"last words")?;
    sys!(close(widowed[1]))?;
    let mut broken = [0; 2];
    sys!(pipe(broken.as_mut_ptr()))?;
    sys!(close(broken[0]))?;
    sys0!(signal(libc::SIGPIPE, libc::SIG_IGN));
    // In a directory of the host's own: on the files that both hosts of a test see, it would be one fifo with both copies at it.
    if let Err(error) = sys!(mkfifo(c"/run/fifo".as_ptr(), 0o600))
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(error);
    }
    let fifo = device("/run/fifo", rw | libc::O_NONBLOCK)?;
    put(fifo, b"fifo data")?;

    let inner = sys!(epoll_create1(libc::EPOLL_CLOEXEC))?;
    let outer = sys!(epoll_create1(0))?;
    watch(inner, half[0], libc::EPOLLIN, 0xaaaa_bbbb_cccc_dddd)?;
    watch(inner, event, libc::EPOLLIN | libc::EPOLLET, 2)?;
    watch(inner, semaphore, libc::EPOLLIN | libc::EPOLLONESHOT, 3)?;
    watch(outer, inner, libc::EPOLLIN, 4)?;
    // The one-shot is used up before the move, the edge seen.
    happened(inner);
    // A descriptor that was watched, duplicated and closed: only the duplicate keeps it alive.
    let watched = sys!(eventfd(1, libc::EFD_NONBLOCK))?;
    watch(outer, watched, libc::EPOLLIN, 5)?;
    let inner_now = happened(inner);
    let outer_now = happened(outer);

    let inotify = sys!(inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC))?;
    std::fs::create_dir_all(kit.dir().join("watched"))?;
    let watched_path = CString::new(kit.dir().join("watched").to_string_lossy().as_ref())?;
    let other_path = CString::new(kit.dir().join("plain").to_string_lossy().as_ref())?;
    // The first number is given back, so that the one that stays is 2.
    let first = sys!(inotify_add_watch(inotify, other_path.as_ptr(), libc::IN_MODIFY))?;
    let wd = sys!(inotify_add_watch(inotify, watched_path.as_ptr(), libc::IN_CREATE | libc::IN_DELETE))?;
    sys!(inotify_rm_watch(inotify, first))?;
    let _ = get(inotify, 4096);

    let name = CString::new("fds")?;
    let memfd = sys!(memfd_create(name.as_ptr(), 0))?;
    put(memfd, b"memfd data")?;

    // A child that shares one description: it moves the offset when told.
    let mut order = [0; 2];
    sys!(pipe(order.as_mut_ptr()))?;
    let mut answer = [0; 2];
    sys!(pipe(answer.as_mut_ptr()))?;
    let child = sys!(fork())?;
    if child == 0 {
        sys0!(close(order[1]));
        loop {
            match get(order[0], 1) {
                Ok(b) if b.is_empty() => sys0!(_exit(0)),
                Ok(_) => {}
                Err(_) => sys0!(_exit(1)),
            }
            let said = if get(shared_with_child, 3).is_ok_and(|b| b.len() == 3) {
                b"y"
            } else {
                b"n"
            };
            let _ = put(answer[1], said);
        }
    }
    sys!(close(order[0]))?;
    sys!(close(answer[1]))?;
    // One for the portrait to compare: the standard streams may change, this must not.
    let unlinked_free = open(&kit, "plain", rw | libc::O_NONBLOCK | libc::O_SYNC)?;

    kit.ready()?;
    let mut first_time = true;
    let code = kit.run(
        |_| {},
        |kit| {
            let first = std::mem::replace(&mut first_time, false);
            if first {
                kit.equal("offset", offset(plain), 4);
                kit.equal("offset of another opening", offset(again), 9);
                kit.equal("offset of a write-only file", offset(write_only), 100);
            }
            let here = offset(plain);
            sys0!(lseek(dup_far, (here + 1) % 10, libc::SEEK_SET));
            kit.equal("offset through duplicates", [offset(plain), offset(dup)], [(here + 1) % 10; 2]);
            let cloexec = |fd: i32| sys0!(fcntl(fd, libc::F_GETFD)) & libc::FD_CLOEXEC;
            kit.equal(
                "close-on-exec",
                [cloexec(plain), cloexec(dup), cloexec(dup_far), cloexec(again)],
                [0, 0, 1, 1],
            );
            let size = || std::fs::metadata(format!("/proc/self/fd/{append}")).map_or(0, |m| m.len());
            let before = size();
            sys0!(lseek(append, 0, libc::SEEK_SET));
            let wrote = put(append, b"after ");
            kit.expect("append", wrote);
            kit.equal("size after appending", size(), before + 6);
            let flags = sys0!(fcntl(path_only, libc::F_GETFL));
            kit.check(flags & libc::O_PATH != 0, format!("O_PATH is lost: {flags:#o}"));
            kit.check(get(path_only, 1).is_err(), "an O_PATH descriptor can be read");
            let inside = sys!(faccessat(directory, c"plain".as_ptr(), libc::R_OK, 0));
            kit.expect("directory descriptor", inside);
            for (what, fd) in [("/dev/zero", zero), ("/dev/urandom", random)] {
                let got = get(fd, 16).map(|b| b.len());
                let got = kit.expect(what, got);
                kit.equal(what, got, Some(16));
            }
            let wrote = put(null, b"gone");
            kit.expect("/dev/null", wrote);
            let wrote = put(full_device, b"x").map_err(|e| e.raw_os_error());
            kit.equal("/dev/full", wrote.err().flatten(), Some(libc::ENOSPC));

            // An edge that was seen may be reported once more: the interface allows it, and a watch can only be made anew.
            let mut events = happened(inner);
            events.retain(|e| e.1 != 2);
            kit.equal("events of the inner epoll", events, inner_now.clone());
            kit.equal("events of the outer epoll", happened(outer), outer_now.clone());
            // An edge comes again after a write, the used-up one-shot does not.
            let wrote = put(event, &1_u64.to_le_bytes());
            kit.expect("eventfd write", wrote);
            kit.check(happened(inner).iter().any(|e| e.1 == 2), "no new edge from the eventfd");
            let got = get(event, 8);
            let count = kit.expect("eventfd read", got);
            kit.equal("eventfd", count, Some(42_u64.to_le_bytes().to_vec()));
            let wrote = put(event, &41_u64.to_le_bytes());
            kit.expect("eventfd write", wrote);
            happened(inner);
            let got = get(semaphore, 8);
            let one = kit.expect("semaphore read", got);
            kit.equal("semaphore", one, Some(1_u64.to_le_bytes().to_vec()));
            let wrote = put(semaphore, &1_u64.to_le_bytes());
            kit.expect("semaphore write", wrote);

            let got = get(signal, 128);
            if let Some(bytes) = kit.expect("signalfd", got) {
                let number = bytes.first_chunk::<4>().map_or(0, |b| u32::from_le_bytes(*b));
                kit.equal("signal from signalfd", number as i32, libc::SIGRTMIN() + 6);
            }
            kit.check(get(signal, 128).is_err(), "signalfd holds a second signal");
            let queued = queue();
            kit.expect("sigqueue", queued);

            let got = get(half[0], 100);
            let bytes = kit.expect("half-full pipe", got);
            kit.equal("half-full pipe", bytes, Some(b"in flight".to_vec()));
            kit.check(
                get(half[0], 1).is_err_and(|e| e.raw_os_error() == Some(libc::EAGAIN)),
                "the pipe is not empty, or blocks",
            );
            let wrote = put(half[1], b"in flight");
            kit.expect("pipe write", wrote);
            kit.equal("pipe size", sys0!(fcntl(full[0], libc::F_GETPIPE_SZ)), 1 << 18);
            kit.equal("full pipe takes more", ready_now(full[1], libc::POLLOUT), 0);
            let got = get(full[0], 1 << 18);
            let bytes = kit.expect("full pipe", got);
            kit.check(bytes.is_some_and(|b| b == filling), "content of the full pipe differs");
            let wrote = put(full[1], &filling);
            kit.equal("filling the pipe again", kit_len(wrote), 1 << 18);
            if first {
                let got = get(widowed[0], 100).unwrap_or_default();
                kit.equal("pipe without a writer", got, b"last words".to_vec());
            }
            kit.equal("end of the pipe without a writer", get(widowed[0], 1).ok(), Some(vec![]));
            let wrote = put(broken[1], b"x").map_err(|e| e.raw_os_error());
            kit.equal("pipe without a reader", wrote.err().flatten(), Some(libc::EPIPE));
            let got = get(fifo, 100);
            let bytes = kit.expect("fifo", got);
            kit.equal("fifo", bytes, Some(b"fifo data".to_vec()));
            let wrote = put(fifo, b"fifo data");
            kit.expect("fifo", wrote);

            let new_file = kit.dir().join("watched/new");
            let made = std::fs::write(&new_file, b"");
            kit.expect("file in the watched directory", made);
            let got = get(inotify, 4096);
            if let Some(bytes) = kit.expect("inotify", got) {
                let word = |i: usize| {
                    bytes
                        .get(i * 4..i * 4 + 4)
                        .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                };
                kit.equal("inotify event", (word(0) as i32, word(1)), (wd, libc::IN_CREATE));
            }
            let _ = std::fs::remove_file(new_file);
            let _ = get(inotify, 4096);

            let mut bytes = [0_u8; 10];
            sys0!(pread(memfd, bytes.as_mut_ptr().cast(), 10, 0));
            kit.equal("memfd", &bytes, b"memfd data");
            kit.equal("offset of the memfd", offset(memfd), 10);

            sys0!(lseek(shared_with_child, 2, libc::SEEK_SET));
            let told = put(order[1], b"x").and_then(|_| get(answer[0], 1));
            let said = kit.expect("child that shares a description", told);
            kit.equal("child that shares a description", said, Some(b"y".to_vec()));
            kit.equal("offset that the child moved", offset(shared_with_child), 5);
            kit.check(
                sys0!(fcntl(unlinked_free, libc::F_GETFL)) & libc::O_SYNC == libc::O_SYNC,
                "O_SYNC is lost",
            );
        },
    );
    sys0!(close(order[1]));
    let mut status = 0;
    sys0!(waitpid(child, &mut status, 0));
    let _: libc::stat = zeroed();
    Ok(code)
}

fn kit_len(result: io::Result<isize>) -> isize {
    result.unwrap_or(-1)
}

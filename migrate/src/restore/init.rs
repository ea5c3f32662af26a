//! The init of a fresh pid namespace: reaps what is orphaned there and ends when nobody is left (pid_namespaces(7)).

use std::{io, sync::atomic::AtomicU32};

/// Makes a pid and a mount namespace with an init process and a /proc of their own; returns the init's pid here.
///
/// `word` is the address of the decision word, mapped shared in this process: at 2 the init ends and the namespace with it.
pub fn spawn(word: u64) -> io::Result<i32> {
    let args = [
        (libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u64,
        0,
        0,
        0,
        libc::SIGCHLD as u64,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    // SAFETY: like fork, without CLONE_VM. The child makes only async-signal-safe calls and never returns.
    let pid = super::super::sys::check(unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) })? as i32;
    if pid == 0 {
        run(word)
    }
    Ok(pid)
}

fn run(word: u64) -> ! {
    // SAFETY: raw system calls on constants and stack memory, in a process of a single thread; `word` is mapped for as long as it runs.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0);
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        for fd in 0..3 {
            libc::dup2(null, fd);
        }
        libc::close(null);
        libc::prctl(libc::PR_SET_NAME, c"migrate-init".as_ptr());
        libc::mount(
            std::ptr::null(),
            c"/".as_ptr(),
            std::ptr::null(),
            libc::MS_REC | libc::MS_SLAVE,
            std::ptr::null(),
        );
        libc::mount(
            c"proc".as_ptr(),
            c"/proc".as_ptr(),
            c"proc".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            std::ptr::null(),
        );
        libc::setsid();
        let word = AtomicU32::from_ptr(word as *mut u32);
        let nap = |ms: i64| {
            let t = libc::timespec {
                tv_sec: ms / 1000,
                tv_nsec: ms % 1000 * 1_000_000,
            };
            libc::nanosleep(&t, std::ptr::null_mut());
        };
        loop {
            match word.load(std::sync::atomic::Ordering::Acquire) {
                0 => nap(20),
                1 => break,
                _ => libc::_exit(0),
            }
        }
        loop {
            while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) > 0 {}
            if alone() {
                libc::_exit(0);
            }
            nap(200);
        }
    }
}

/// Whether this namespace's /proc shows no process but pid 1.
fn alone() -> bool {
    let mut buf = [0u8; 4096];
    // SAFETY: getdents64 fills at most the buffer; entries are read within the length it returned.
    unsafe {
        let fd = libc::open(c"/proc".as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY);
        if fd < 0 {
            return false;
        }
        let mut others = false;
        loop {
            let n = libc::syscall(libc::SYS_getdents64, fd, buf.as_mut_ptr(), buf.len());
            if n <= 0 {
                break;
            }
            let mut at = 0usize;
            while at + 19 < n as usize {
                let len = u16::from_ne_bytes([buf[at + 16], buf[at + 17]]) as usize;
                let name = &buf[at + 19..];
                if name[0].is_ascii_digit() && !(name[0] == b'1' && name[1] == 0) {
                    others = true;
                }
                if len == 0 {
                    break;
                }
                at += len;
            }
        }
        libc::close(fd);
        !others
    }
}

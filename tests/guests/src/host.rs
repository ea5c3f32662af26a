//! A test host: new network, mount, pid, uts and ipc namespaces, and a first process that starts what it is asked to and reaps everything.
//!
//! Descriptor 0 is a SOCK_SEQPACKET socket to the harness. When it closes, the first process ends, and the kernel ends the host with it.

use crate::kit::{sys, sys0};
use crate::wire::{Said, Spawn};
use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::fd::{AsRawFd, RawFd},
    process::ExitCode,
};

pub(crate) const CONTROL: RawFd = 0;

/// Entry point; `name` becomes the host's name. The directory `kept` of this machine stays visible, also where the host has a /run or /dev/shm of its own.
pub fn main(name: &str, kept: Option<&str>) -> ExitCode {
    match unshare_and_fork(name, kept) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("host {name}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn unshare_and_fork(name: &str, kept: Option<&str>) -> io::Result<ExitCode> {
    let flags = libc::CLONE_NEWNET | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;
    sys!(unshare(flags))?;
    let pid = sys!(fork())?;
    if pid == 0 {
        sys!(prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        return first_process(name, kept);
    }
    say(&Said::Up { init: pid });
    let mut status = 0;
    sys!(close(CONTROL))?;
    sys!(waitpid(pid, &mut status, 0))?;
    Ok(ExitCode::SUCCESS)
}

fn mount(what: &str, at: &str, kind: &str, flags: libc::c_ulong) -> io::Result<()> {
    let (what, at, kind) = (CString::new(what)?, CString::new(at)?, CString::new(kind)?);
    sys!(mount(what.as_ptr(), at.as_ptr(), kind.as_ptr(), flags, std::ptr::null()))?;
    Ok(())
}

fn first_process(name: &str, kept: Option<&str>) -> io::Result<ExitCode> {
    mount("none", "/", "none", libc::MS_REC | libc::MS_PRIVATE)?;
    mount("proc", "/proc", "proc", 0)?;
    let kept = kept.map(|at| File::open(at).map(|dir| (at, dir))).transpose()?;
    for at in ["/run", "/dev/shm"] {
        mount("tmpfs", at, "tmpfs", 0)?;
    }
    if let Some((at, dir)) = kept {
        fs::create_dir_all(at)?;
        mount(&format!("/proc/self/fd/{}", dir.as_raw_fd()), at, "none", libc::MS_BIND)?;
    }
    let host = CString::new(name)?;
    sys!(sethostname(host.as_ptr(), name.len()))?;
    let signals = child_signals()?;
    sys!(fcntl(CONTROL, libc::F_SETFD, libc::FD_CLOEXEC))?;
    loop {
        if wait(signals)? {
            match receive()? {
                None => return Ok(ExitCode::SUCCESS),
                Some((spawn, fds)) => start(&spawn, &fds),
            }
            reap();
        }
    }
}

/// A descriptor that tells of ended children. Children start with nothing blocked; only this process takes SIGCHLD and the control
/// descriptor through poll.
pub(crate) fn child_signals() -> io::Result<RawFd> {
    let mut set = crate::kit::empty_set();
    sys0!(sigaddset(&mut set, libc::SIGCHLD));
    sys!(sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()))?;
    sys!(signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))
}

/// Waits for news, and reaps; true when the control descriptor has something to read, if only its end.
pub(crate) fn wait(signals: RawFd) -> io::Result<bool> {
    let mut fds = [CONTROL, signals].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    sys!(poll(fds.as_mut_ptr(), 2, -1))?;
    if fds[1].revents != 0 {
        let mut info = [0_u8; 128];
        let _ = sys!(read(signals, info.as_mut_ptr().cast(), info.len()));
        reap();
    }
    Ok(fds[0].revents != 0)
}

pub(crate) fn reap() {
    loop {
        let mut status = 0;
        let pid = sys0!(waitpid(-1, &mut status, libc::WNOHANG));
        if pid <= 0 {
            return;
        }
        say(&Said::Reaped { pid, status });
    }
}

/// One write for each: a message on a socket, a line on the port of a virtual machine.
pub(crate) fn say(said: &Said) {
    let mut bytes = serde_json::to_vec(said).unwrap_or_default();
    bytes.push(b'\n');
    let _ = sys!(write(CONTROL, bytes.as_ptr().cast(), bytes.len()));
}

fn receive() -> io::Result<Option<(Spawn, Vec<RawFd>)>> {
    let mut bytes = vec![0_u8; 128 << 10];
    let mut space = [0_u64; 16];
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut msg: libc::msghdr = crate::kit::zeroed();
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = space.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&space);
    let n = sys!(recvmsg(CONTROL, &mut msg, libc::MSG_CMSG_CLOEXEC))?;
    if n == 0 {
        return Ok(None);
    }
    let mut fds = Vec::new();
    // SCM_RIGHTS is the only kind of control message on this socket: a 16-byte header, then the descriptors.
    let len = usize::try_from(space[0]).unwrap_or(0);
    if msg.msg_controllen >= 16 && len > 16 {
        for i in 0..(len - 16) / 4 {
            let word = space[2 + i / 2];
            fds.push(((word >> (32 * (i % 2))) & 0xffff_ffff) as RawFd);
        }
    }
    let spawn = serde_json::from_slice(&bytes[..n as usize]).map_err(io::Error::other)?;
    Ok(Some((spawn, fds)))
}

/// Starts a command; its descriptors are closed here.
pub(crate) fn start(spawn: &Spawn, fds: &[RawFd]) {
    let strings = |list: &mut dyn Iterator<Item = String>| list.filter_map(|s| CString::new(s).ok()).collect::<Vec<_>>();
    let argv = strings(&mut spawn.argv.iter().cloned());
    let env = strings(&mut spawn.env.iter().map(|(k, v)| format!("{k}={v}")));
    let pointers = |list: &[CString]| list.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>();
    let (argv_p, env_p) = (pointers(&argv), pointers(&env));
    if let Some(pid) = spawn.want_pid {
        let _ = std::fs::write("/proc/sys/kernel/ns_last_pid", format!("{}", pid - 1));
    }
    // The pipe closes at exec, or carries the error number.
    let mut pipe = [0; 2];
    sys0!(pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC));
    let pid = sys0!(fork());
    if pid == 0 {
        let Err(error) = become_command(spawn, fds, &argv_p, &env_p);
        let code = error.raw_os_error().unwrap_or(libc::EINVAL).to_le_bytes();
        let _ = sys!(write(pipe[1], code.as_ptr().cast(), 4));
        sys0!(_exit(127));
    }
    sys0!(close(pipe[1]));
    for fd in fds {
        sys0!(close(*fd));
    }
    let mut code = [0_u8; 4];
    let n = sys0!(read(pipe[0], code.as_mut_ptr().cast(), 4));
    sys0!(close(pipe[0]));
    let id = spawn.id;
    if pid < 0 || n == 4 {
        let error = io::Error::from_raw_os_error(i32::from_le_bytes(code)).to_string();
        say(&Said::Failed { id, error });
    } else {
        say(&Said::Spawned { id, pid });
    }
}

fn become_command(
    spawn: &Spawn,
    fds: &[RawFd],
    argv: &[*const libc::c_char],
    env: &[*const libc::c_char],
) -> Result<std::convert::Infallible, io::Error> {
    let set = crate::kit::empty_set();
    sys!(sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut()))?;
    sys0!(signal(libc::SIGPIPE, libc::SIG_DFL));
    if spawn.setsid {
        sys!(setsid())?;
    } else {
        sys!(setpgid(0, 0))?;
    }
    for (i, fd) in fds.iter().take(3).enumerate() {
        sys!(dup2(*fd, i as RawFd))?;
    }
    // Nothing of whoever started the tests is handed on: a job server's pipe, for one, leads out of every tree.
    sys!(syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC))?;
    if spawn.terminal {
        sys!(ioctl(0, libc::TIOCSCTTY, 0))?;
    }
    if spawn.nohup {
        sys0!(signal(libc::SIGHUP, libc::SIG_IGN));
    }
    if let Some(n) = spawn.nofile {
        let limit = libc::rlimit { rlim_cur: n, rlim_max: n };
        sys!(setrlimit(libc::RLIMIT_NOFILE, &limit))?;
    }
    let cwd = CString::new(spawn.cwd.as_str())?;
    sys!(chdir(cwd.as_ptr()))?;
    if let Some(uid) = spawn.uid {
        sys!(setgroups(0, std::ptr::null()))?;
        sys!(setresgid(uid, uid, uid))?;
        sys!(setresuid(uid, uid, uid))?;
    }
    sys!(execve(argv[0], argv.as_ptr(), env.as_ptr()))?;
    Err(io::Error::other("exec came back"))
}

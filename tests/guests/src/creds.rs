//! What a process is and may do.

use crate::kit::{Kit, Options, sys, sys0, zeroed};
use std::{ffi::CString, io, process::ExitCode};

const NOBODY: u32 = 65534;

fn capabilities() -> io::Result<[u32; 6]> {
    let header = [0x2008_0522_u32, 0];
    let mut data = [0_u32; 6];
    sys!(syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()))?;
    Ok(data)
}

fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let header = [0x2008_0522_u32, 0];
    let low = |v: u64| v as u32;
    let high = |v: u64| (v >> 32) as u32;
    let data = [
        low(effective),
        low(permitted),
        low(inheritable),
        high(effective),
        high(permitted),
        high(inheritable),
    ];
    sys!(syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr())).map(drop)
}

fn control(option: i32) -> i32 {
    sys0!(prctl(option, 0, 0, 0, 0))
}

/// Everything that has no line in /proc, by name.
fn image() -> Vec<(&'static str, i64)> {
    let mut death = 0_i32;
    let mut reaper = 0_i32;
    sys0!(prctl(libc::PR_GET_PDEATHSIG, &mut death));
    sys0!(prctl(libc::PR_GET_CHILD_SUBREAPER, &mut reaper));
    let umask = sys0!(umask(0));
    sys0!(umask(umask));
    let io_class = sys0!(syscall(libc::SYS_ioprio_get, 1, 0));
    let mut list = vec![
        ("parent-death signal", i64::from(death)),
        ("child subreaper", i64::from(reaper)),
        ("dumpable", control(libc::PR_GET_DUMPABLE).into()),
        ("keep capabilities", control(libc::PR_GET_KEEPCAPS).into()),
        ("secure bits", control(libc::PR_GET_SECUREBITS).into()),
        ("no new privileges", control(libc::PR_GET_NO_NEW_PRIVS).into()),
        ("timer slack", control(libc::PR_GET_TIMERSLACK).into()),
        ("huge pages off", control(libc::PR_GET_THP_DISABLE).into()),
        ("machine check policy", control(libc::PR_MCE_KILL_GET).into()),
        ("umask", umask.into()),
        ("personality", sys0!(personality(0xffff_ffff)).into()),
        ("io priority", io_class),
        ("nice", sys0!(getpriority(libc::PRIO_PROCESS, 0)).into()),
        ("policy", sys0!(sched_getscheduler(0)).into()),
    ];
    for (i, word) in capabilities().unwrap_or_default().into_iter().enumerate() {
        let names = [
            "effective low",
            "permitted low",
            "inheritable low",
            "effective high",
            "permitted high",
            "inheritable high",
        ];
        list.push((names[i], word.into()));
    }
    list
}

/// Only ever lower: raising a hard limit needs a capability that root may lack.
fn limit(resource: libc::__rlimit_resource_t, soft: u64, hard: u64) -> io::Result<()> {
    let mut old: libc::rlimit = zeroed();
    sys!(getrlimit(resource, &mut old))?;
    let new = libc::rlimit {
        rlim_cur: soft.min(old.rlim_max),
        rlim_max: hard.min(old.rlim_max),
    };
    sys!(setrlimit(resource, &new)).map(drop)
}

/// The title, as programs that rename themselves set it: over their own arguments.
fn retitle() -> io::Result<()> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit_once(") ").map(|(_, r)| r.split(' ').collect()).unwrap_or_default();
    let at: usize = fields.get(48 - 3).and_then(|f| f.parse().ok()).unwrap_or(0);
    let end: usize = fields.get(49 - 3).and_then(|f| f.parse().ok()).unwrap_or(0);
    let title = b"guest: creds\0";
    if at == 0 || end - at < title.len() {
        return Err(io::Error::other("no room for a title"));
    }
    // SAFETY: the kernel put the arguments there, writable, and nobody reads them as strings any more.
    unsafe { std::ptr::copy_nonoverlapping(title.as_ptr(), at as *mut u8, title.len()) };
    Ok(())
}

/// Becomes nobody with two capabilities, and everything else as unlike the default as it can be. `policy`: of sched(7), by its number.
pub fn creds(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    std::fs::create_dir_all(kit.dir().join("home"))?;
    let home = CString::new(kit.dir().join("home").to_string_lossy().as_ref())?;
    // As nobody it must still write here.
    for path in [kit.dir().to_path_buf(), kit.dir().join("control"), kit.dir().join("home")] {
        std::os::unix::fs::chown(&path, Some(NOBODY), Some(NOBODY))?;
    }
    sys!(chdir(home.as_ptr()))?;
    sys0!(umask(0o027));

    limit(libc::RLIMIT_NOFILE, 100, 200)?;
    limit(libc::RLIMIT_CORE, 0, 4096)?;
    limit(libc::RLIMIT_STACK, 4 << 20, 16 << 20)?;
    limit(libc::RLIMIT_NPROC, 5000, 6000)?;
    limit(libc::RLIMIT_SIGPENDING, 111, 222)?;
    limit(libc::RLIMIT_FSIZE, 1 << 30, 1 << 31)?;
    limit(libc::RLIMIT_RTPRIO, 0, 3)?;
    let policy = options.number("policy", libc::SCHED_BATCH as u64) as i32;
    let mut parameters: libc::sched_param = zeroed();
    parameters.sched_priority = i32::from(policy == libc::SCHED_RR);
    sys!(sched_setscheduler(0, policy, &parameters))?;
    sys!(setpriority(libc::PRIO_PROCESS, 0, 7))?;
    sys!(syscall(libc::SYS_ioprio_set, 1, 0, (2 << 13) | 6))?;
    sys!(personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong))?;
    sys!(prctl(libc::PR_SET_CHILD_SUBREAPER, 1))?;
    sys!(prctl(libc::PR_SET_TIMERSLACK, 123_456))?;
    sys!(prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0))?;
    std::fs::write("/proc/self/oom_score_adj", "321")?;
    std::fs::write("/proc/self/coredump_filter", "0x13")?;
    sys!(prctl(libc::PR_SET_NAME, c"creds-guest".as_ptr()))?;
    crate::kit::bind(0)?;

    let (chown, bind) = (1_u64 << 0, 1_u64 << 10);
    // Out of the bounding set, then only two are kept, one of them ambient.
    sys!(prctl(libc::PR_CAPBSET_DROP, 25, 0, 0, 0))?;
    sys!(prctl(libc::PR_CAPBSET_DROP, 31, 0, 0, 0))?;
    // SECBIT_NO_SETUID_FIXUP stays set, so the change of user alters nothing by itself.
    sys!(prctl(libc::PR_SET_SECUREBITS, 1 << 2))?;
    let groups = [10, 20, 30, 4_000_000];
    sys!(setgroups(groups.len(), groups.as_ptr()))?;
    sys!(setresgid(NOBODY, NOBODY, 12))?;
    sys!(setresuid(NOBODY, NOBODY, 1234))?;
    set_capabilities(chown, chown | bind, bind)?;
    sys!(prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, 10, 0, 0))?;
    sys!(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
    // No parent-death signal of the root's: its parent stays behind, and the copy's would be the agent.
    sys!(prctl(libc::PR_SET_DUMPABLE, 1))?;
    retitle()?;

    // A child that may not be dumped, with a parent-death signal of its own.
    let mut order = [0; 2];
    sys!(pipe(order.as_mut_ptr()))?;
    let mut answer = [0; 2];
    sys!(pipe(answer.as_mut_ptr()))?;
    let child = sys!(fork())?;
    if child == 0 {
        sys0!(close(order[1]));
        sys!(prctl(libc::PR_SET_PDEATHSIG, libc::SIGUSR1))?;
        sys!(prctl(libc::PR_SET_DUMPABLE, 0))?;
        let before = image();
        loop {
            let mut byte = 0_u8;
            if !sys!(read(order[0], (&raw mut byte).cast(), 1)).is_ok_and(|n| n == 1) {
                sys0!(_exit(0));
            }
            byte = if image() == before { b'y' } else { b'n' };
            sys0!(write(answer[1], (&raw const byte).cast(), 1));
        }
    }
    let before = image();
    let groups_before = {
        let (mut r, mut e, mut s) = (0, 0, 0);
        sys0!(getresgid(&mut r, &mut e, &mut s));
        (r, e, s)
    };
    kit.ready()?;
    let code = kit.run(
        |_| {},
        |kit| {
            for (now, before) in image().into_iter().zip(&before) {
                if now != *before {
                    kit.differs(format!("{}: now {:#x}, before {:#x}", now.0, now.1, before.1));
                }
            }
            let (mut r, mut e, mut s) = (0, 0, 0);
            sys0!(getresuid(&mut r, &mut e, &mut s));
            kit.equal("user ids", (r, e, s), (NOBODY, NOBODY, 1234));
            sys0!(getresgid(&mut r, &mut e, &mut s));
            kit.equal("group ids", (r, e, s), groups_before);
            let mut byte = b'x';
            sys0!(write(order[1], (&raw const byte).cast(), 1));
            sys0!(read(answer[0], (&raw mut byte).cast(), 1));
            kit.check(byte == b'y', "the child that may not be dumped is not as it was");
            let made = std::fs::write("made-here", b"");
            kit.expect("file in the working directory", made);
            let _ = std::fs::remove_file("made-here");
        },
    );
    sys0!(kill(child, libc::SIGKILL));
    Ok(code)
}

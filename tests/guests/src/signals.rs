//! Signals: handlers, masks, alternate stacks, and signals that wait, with what they carry.

use crate::kit::{Kit, set_of, sys, sys0, within, zeroed};
use std::{
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

static HANDLED: AtomicU32 = AtomicU32::new(0);
static STACK_AT: AtomicUsize = AtomicUsize::new(0);
static INSIDE: AtomicBool = AtomicBool::new(false);
static LEAVE: AtomicBool = AtomicBool::new(false);
static LAST_CODE: AtomicI64 = AtomicI64::new(0);

extern "C" fn count(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let here = 0_u8;
    STACK_AT.store((&raw const here).addr(), Ordering::SeqCst);
    // SAFETY: the kernel hands a siginfo to a handler set with SA_SIGINFO.
    LAST_CODE.store(unsafe { (*info).si_code.into() }, Ordering::SeqCst);
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

/// Stays in the handler, on the alternate stack, until told to leave.
extern "C" fn stay(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    INSIDE.store(true, Ordering::SeqCst);
    while !LEAVE.load(Ordering::SeqCst) {
        std::hint::spin_loop();
    }
    INSIDE.store(false, Ordering::SeqCst);
}

/// sigaction as the kernel has it: handler, flags, restorer, mask.
type KernelAction = [u64; 4];

fn kernel_actions() -> Vec<KernelAction> {
    (1..=64)
        .map(|signal| {
            let mut action: KernelAction = [0; 4];
            sys0!(syscall(libc::SYS_rt_sigaction, signal, 0_usize, action.as_mut_ptr(), 8));
            action
        })
        .collect()
}

fn set_action(signal: i32, handler: usize, flags: i32, mask: &[i32]) -> io::Result<()> {
    let mut action: libc::sigaction = zeroed();
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    action.sa_mask = set_of(mask);
    sys!(sigaction(signal, &action, std::ptr::null_mut())).map(drop)
}

fn queue(signal: i32, value: usize) -> io::Result<()> {
    let value = libc::sigval {
        sival_ptr: value as *mut libc::c_void,
    };
    sys!(sigqueue(libc::getpid(), signal, value)).map(drop)
}

/// The next waiting signal of a set: number, code, sender, value.
fn take(set: &libc::sigset_t) -> Option<(i32, i32, i32, usize)> {
    let mut info: libc::siginfo_t = zeroed();
    let limit: libc::timespec = zeroed();
    // Not the C library's function, which hides SI_TKILL.
    let signal = sys!(syscall(libc::SYS_rt_sigtimedwait, set, &mut info, &limit, 8)).ok()? as i32;
    // SAFETY: queued with sigqueue or tgkill: sender and value are there (a value of zero for tgkill).
    let (pid, value) = unsafe { (info.si_pid(), info.si_value().sival_ptr.addr()) };
    Some((signal, info.si_code, pid, value))
}

/// Sets everything up and keeps signals waiting, of the process and of one thread.
pub fn signals(mut kit: Kit) -> io::Result<ExitCode> {
    let rt = libc::SIGRTMIN();
    let waiting = [libc::SIGUSR2, libc::SIGWINCH, rt + 1, rt + 2, rt + 3];
    let set = set_of(&waiting);
    sys!(pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()))?;

    let count_at = count as *const () as usize;
    set_action(
        libc::SIGUSR1,
        count_at,
        libc::SA_SIGINFO | libc::SA_ONSTACK,
        &[libc::SIGHUP, rt + 7],
    )?;
    set_action(libc::SIGURG, count_at, libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_NODEFER, &[])?;
    set_action(rt + 8, count_at, libc::SA_SIGINFO | libc::SA_RESETHAND, &[libc::SIGINT])?;
    set_action(rt + 9, stay as *const () as usize, libc::SA_SIGINFO | libc::SA_ONSTACK, &[])?;
    set_action(libc::SIGCHLD, libc::SIG_DFL, libc::SA_NOCLDWAIT | libc::SA_NOCLDSTOP, &[])?;
    set_action(libc::SIGHUP, libc::SIG_IGN, 0, &[])?;
    set_action(libc::SIGTTOU, libc::SIG_IGN, 0, &[])?;

    let mut room = vec![0_u8; 64 << 10];
    let stack = libc::stack_t {
        ss_sp: room.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: room.len(),
    };
    sys!(sigaltstack(&stack, std::ptr::null_mut()))?;

    // Waiting for the process: real-time ones in the order they came, each; ordinary ones once.
    let me = std::process::id() as i32;
    let arm = move || -> io::Result<()> {
        queue(rt + 2, 900)?;
        for value in [11, 12, 13, usize::MAX, 14] {
            queue(rt + 1, value)?;
        }
        queue(libc::SIGUSR2, 77)?;
        sys!(kill(libc::getpid(), libc::SIGWINCH))?;
        // Waiting for the main thread alone.
        sys!(syscall(libc::SYS_tgkill, me, me, rt + 3))?;
        Ok(())
    };
    arm()?;
    // The thread's own come first, then the lowest number.
    let expected = vec![
        (rt + 3, libc::SI_TKILL, me, 0),
        (libc::SIGUSR2, libc::SI_QUEUE, me, 77),
        (libc::SIGWINCH, libc::SI_USER, me, 0),
        (rt + 1, libc::SI_QUEUE, me, 11),
        (rt + 1, libc::SI_QUEUE, me, 12),
        (rt + 1, libc::SI_QUEUE, me, 13),
        (rt + 1, libc::SI_QUEUE, me, usize::MAX),
        (rt + 1, libc::SI_QUEUE, me, 14),
        (rt + 2, libc::SI_QUEUE, me, 900),
    ];

    // A thread inside a handler, on a stack of its own; and one that sleeps and is woken by signals with SA_RESTART only.
    let in_handler = {
        thread::Builder::new().name("in-handler".into()).spawn(move || -> io::Result<()> {
            let mut room = vec![0_u8; 64 << 10];
            let stack = libc::stack_t {
                ss_sp: room.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: room.len(),
            };
            sys!(sigaltstack(&stack, std::ptr::null_mut()))?;
            sys!(syscall(libc::SYS_tgkill, libc::getpid(), libc::syscall(libc::SYS_gettid), rt + 9))?;
            let mut none: libc::stack_t = zeroed();
            none.ss_flags = libc::SS_DISABLE;
            sys!(sigaltstack(&none, std::ptr::null_mut()))?;
            Ok(())
        })?
    };
    let sleeper_errors = Arc::new(AtomicU32::new(0));
    let mut pipe = [0; 2];
    sys!(pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC))?;
    {
        let errors = Arc::clone(&sleeper_errors);
        thread::Builder::new().name("sleeper".into()).spawn(move || {
            loop {
                let mut byte = 0_u8;
                if sys!(read(pipe[0], (&raw mut byte).cast(), 1)).is_err() {
                    errors.fetch_add(1, Ordering::SeqCst);
                }
            }
        })?;
    }
    while !INSIDE.load(Ordering::SeqCst) {
        thread::yield_now();
    }
    // The sleeper is in its read by now.
    thread::sleep(Duration::from_millis(100));
    let actions = kernel_actions();
    kit.ready()?;
    let mut in_handler = Some(in_handler);
    let code = kit.run(
        |_| {},
        |kit| {
            for (i, (now, before)) in kernel_actions().iter().zip(&actions).enumerate() {
                kit.equal(&format!("action of signal {}", i + 1), *now, *before);
            }
            let mut got = Vec::new();
            while let Some(one) = take(&set) {
                got.push(one);
            }
            kit.equal("signals that waited", got, expected.clone());
            let again = arm();
            kit.expect("queueing again", again);

            let handled = HANDLED.load(Ordering::SeqCst);
            sys0!(raise(libc::SIGUSR1));
            kit.equal("handler runs", HANDLED.load(Ordering::SeqCst), handled + 1);
            kit.check(
                room.as_ptr_range().contains(&(STACK_AT.load(Ordering::SeqCst) as *const u8)),
                "the handler did not run on the alternate stack",
            );
            kit.equal("si_code of raise", LAST_CODE.load(Ordering::SeqCst), i64::from(libc::SI_TKILL));
            sys0!(raise(libc::SIGURG));
            kit.check(
                !room.as_ptr_range().contains(&(STACK_AT.load(Ordering::SeqCst) as *const u8)),
                "a handler without SA_ONSTACK ran on the alternate stack",
            );
            if let Some(thread) = in_handler.take() {
                kit.check(INSIDE.load(Ordering::SeqCst), "the thread left its handler too early");
                LEAVE.store(true, Ordering::SeqCst);
                let back = within(Duration::from_secs(10), || thread.is_finished());
                kit.check(back, "the thread in the handler does not come back");
                if back {
                    kit.check(matches!(thread.join(), Ok(Ok(()))), "the thread in the handler failed");
                }
            }
            sys0!(kill(libc::getpid(), libc::SIGURG));
            let wrote = sys!(write(pipe[1], [1_u8].as_ptr().cast(), 1));
            kit.expect("write to the sleeper", wrote);
            kit.equal("reads that failed", sleeper_errors.load(Ordering::SeqCst), 0);
            // The handler that resets itself: used up once.
            if actions[(rt + 7) as usize][0] != 0 && kernel_actions()[(rt + 7) as usize][0] != 0 {
                let handled = HANDLED.load(Ordering::SeqCst);
                sys0!(raise(rt + 8));
                kit.equal("one-time handler runs", HANDLED.load(Ordering::SeqCst), handled + 1);
                kit.equal("one-time handler is gone", kernel_actions()[(rt + 7) as usize][0], 0);
                let set_again = set_action(rt + 8, count_at, libc::SA_SIGINFO | libc::SA_RESETHAND, &[libc::SIGINT]);
                kit.expect("sigaction", set_again);
            }
        },
    );
    Ok(code)
}

//! Interval timers, POSIX timers with their numbers, and timer descriptors.

use crate::kit::{Kit, now_ns, set_of, sys, sys0, zeroed};
use std::{
    io,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

static ALARMS: AtomicU64 = AtomicU64::new(0);
static TICKS: AtomicU64 = AtomicU64::new(0);
static VALUES: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_alarm(_: i32) {
    ALARMS.fetch_add(1, Ordering::SeqCst);
}
extern "C" fn on_tick(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: a timer signal carries the value given at its creation.
    let value = unsafe { (*info).si_value().sival_ptr.addr() as u64 };
    VALUES.fetch_or(value, Ordering::SeqCst);
    TICKS.fetch_add(1, Ordering::SeqCst);
}

const HOUR: i64 = 3600;

fn spec(first: i64, first_ns: i64, every: i64, every_ns: i64) -> libc::itimerspec {
    libc::itimerspec {
        it_value: libc::timespec {
            tv_sec: first,
            tv_nsec: first_ns,
        },
        it_interval: libc::timespec {
            tv_sec: every,
            tv_nsec: every_ns,
        },
    }
}

fn create(clock: i32, notify: i32, signal: i32, value: usize) -> io::Result<i32> {
    let mut event: libc::sigevent = zeroed();
    event.sigev_notify = notify;
    event.sigev_signo = signal;
    event.sigev_value = libc::sigval {
        sival_ptr: value as *mut libc::c_void,
    };
    if notify == libc::SIGEV_THREAD_ID {
        event.sigev_notify_thread_id = sys!(syscall(libc::SYS_gettid))? as i32;
    }
    let mut id = 0_i32;
    sys!(syscall(libc::SYS_timer_create, clock, &event, &mut id))?;
    Ok(id)
}

fn set(id: i32, spec: &libc::itimerspec) -> io::Result<()> {
    sys!(syscall(libc::SYS_timer_settime, id, 0, spec, 0_usize)).map(drop)
}

/// Seconds left, and the interval.
fn left(id: i32) -> io::Result<(f64, f64)> {
    let mut spec: libc::itimerspec = zeroed();
    sys!(syscall(libc::SYS_timer_gettime, id, &mut spec))?;
    let seconds = |t: libc::timespec| t.tv_sec as f64 + t.tv_nsec as f64 / 1e9;
    Ok((seconds(spec.it_value), seconds(spec.it_interval)))
}

/// Timers with gaps in their numbers; long ones whose rest is compared, short ones that must go on firing.
pub fn timers(mut kit: Kit) -> io::Result<ExitCode> {
    let tick = libc::SIGRTMIN() + 4;
    let mut action: libc::sigaction = zeroed();
    action.sa_sigaction = on_alarm as *const () as usize;
    action.sa_flags = libc::SA_RESTART;
    sys!(sigaction(libc::SIGALRM, &action, std::ptr::null_mut()))?;
    action.sa_sigaction = on_tick as *const () as usize;
    action.sa_flags = libc::SA_RESTART | libc::SA_SIGINFO;
    sys!(sigaction(tick, &action, std::ptr::null_mut()))?;

    let real = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: 20_000,
        },
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: 20_000,
        },
    };
    sys!(setitimer(libc::ITIMER_REAL, &real, std::ptr::null_mut()))?;
    let long = libc::itimerval {
        it_interval: libc::timeval { tv_sec: 7, tv_usec: 5 },
        it_value: libc::timeval { tv_sec: HOUR, tv_usec: 0 },
    };
    sys!(setitimer(libc::ITIMER_VIRTUAL, &long, std::ptr::null_mut()))?;
    sys!(setitimer(libc::ITIMER_PROF, &long, std::ptr::null_mut()))?;

    // Numbers 1, 3, 4 and 6 stay.
    let mut made = Vec::new();
    for i in 0..8 {
        made.push(match i {
            1 => create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, tick, 0x10)?,
            3 => create(libc::CLOCK_REALTIME, libc::SIGEV_NONE, 0, 0)?,
            4 => create(libc::CLOCK_MONOTONIC, libc::SIGEV_THREAD_ID, tick, 0x20)?,
            6 => create(libc::CLOCK_BOOTTIME, libc::SIGEV_SIGNAL, tick, 0x40)?,
            _ => create(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0)?,
        });
    }
    for i in [0, 2, 5, 7] {
        sys!(syscall(libc::SYS_timer_delete, made[i]))?;
    }
    let (ticking, idle, threaded, hourly) = (made[1], made[3], made[4], made[6]);
    set(ticking, &spec(0, 15_000_000, 0, 15_000_000))?;
    set(idle, &spec(HOUR, 0, 12, 34))?;
    set(threaded, &spec(0, 25_000_000, 0, 25_000_000))?;
    set(hourly, &spec(HOUR, 0, 0, 0))?;

    // A blocked timer signal counts its overruns.
    let blocked = libc::SIGRTMIN() + 5;
    let mask = set_of(&[blocked]);
    sys!(pthread_sigmask(libc::SIG_BLOCK, &mask, std::ptr::null_mut()))?;
    let overrun = create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, blocked, 0x80)?;
    set(overrun, &spec(0, 5_000_000, 0, 5_000_000))?;

    let fd = sys!(timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK))?;
    sys!(timerfd_settime(fd, 0, &spec(0, 30_000_000, 0, 30_000_000), std::ptr::null_mut()))?;
    let long_fd = sys!(timerfd_create(libc::CLOCK_REALTIME, 0))?;
    sys!(timerfd_settime(long_fd, 0, &spec(HOUR, 0, 5, 0), std::ptr::null_mut()))?;
    // Fires once while nobody reads it: the expiration must still be there afterwards.
    let unread = sys!(timerfd_create(libc::CLOCK_MONOTONIC, 0))?;
    sys!(timerfd_settime(unread, 0, &spec(0, 1, 0, 0), std::ptr::null_mut()))?;

    let start = now_ns();
    let mut fd_ticks = 0_u64;
    thread::sleep(Duration::from_millis(40));
    // Timer signals wait for a moment each time.
    let me = std::process::id();
    kit.ignore("process status ShdPnd");
    kit.ignore(format!("task {me} status ShdPnd"));
    kit.ignore(format!("task {me} status SigPnd"));
    kit.ready()?;
    let mut unread_seen = false;
    Ok(kit.run(
        |_| {},
        |kit| {
            let elapsed = (now_ns() - start) as f64 / 1e9;
            let (alarms, ticks) = (ALARMS.load(Ordering::SeqCst), TICKS.load(Ordering::SeqCst));
            VALUES.store(0, Ordering::SeqCst);
            let until = now_ns() + 300_000_000;
            while now_ns() < until {
                thread::sleep(Duration::from_millis(10));
            }
            kit.check(ALARMS.load(Ordering::SeqCst) - alarms >= 5, "ITIMER_REAL does not fire");
            kit.check(TICKS.load(Ordering::SeqCst) - ticks >= 10, "POSIX timers do not fire");
            kit.equal("values that timer signals carried", VALUES.load(Ordering::SeqCst), 0x30);
            for (what, id, interval) in [
                ("CLOCK_REALTIME timer", idle, 12.000_000_034),
                ("CLOCK_BOOTTIME timer", hourly, 0.0),
            ] {
                let got = left(id);
                if let Some((left, every)) = kit.expect(what, got) {
                    let passed = HOUR as f64 - left;
                    // A freeze may or may not count; starting anew is an error.
                    kit.check(
                        passed <= elapsed + 1.5 && passed >= elapsed.min(0.04),
                        format!("{what}: {passed} s passed of {elapsed}"),
                    );
                    kit.check((every - interval).abs() < 1e-6, format!("{what}: interval {every}"));
                }
            }
            for (what, which) in [("ITIMER_VIRTUAL", libc::ITIMER_VIRTUAL), ("ITIMER_PROF", libc::ITIMER_PROF)] {
                let mut now: libc::itimerval = zeroed();
                sys0!(getitimer(which, &mut now));
                kit.check(
                    now.it_value.tv_sec >= HOUR - 60 && now.it_value.tv_sec <= HOUR,
                    format!("{what}: {} s left", now.it_value.tv_sec),
                );
                // In jiffies: the kernel rounds up.
                kit.check(
                    now.it_interval.tv_sec == 7 && now.it_interval.tv_usec < 20_000,
                    format!("{what}: interval {}.{:06}", now.it_interval.tv_sec, now.it_interval.tv_usec),
                );
            }
            let mut info: libc::siginfo_t = zeroed();
            let none: libc::timespec = zeroed();
            let got = sys!(sigtimedwait(&mask, &mut info, &none));
            kit.check(got.is_ok_and(|s| s == blocked), "the signal of the blocked timer does not wait");
            // SAFETY: a timer signal carries the value given at its creation.
            let value = unsafe { info.si_value().sival_ptr.addr() };
            kit.equal("value of the blocked timer", value, 0x80);

            let mut count = 0_u64;
            let got = sys!(read(fd, (&raw mut count).cast(), 8));
            kit.expect("timerfd", got);
            fd_ticks += count;
            kit.check(count >= 9, format!("timerfd: {count} expirations in 300 ms"));
            let mut now: libc::itimerspec = zeroed();
            let got = sys!(timerfd_gettime(long_fd, &mut now));
            kit.expect("timerfd_gettime", got);
            let passed = HOUR - now.it_value.tv_sec;
            kit.check(
                passed <= elapsed as i64 + 2 && now.it_interval.tv_sec == 5,
                format!("long timerfd: {passed} s passed"),
            );
            if !unread_seen {
                unread_seen = true;
                let mut poll = libc::pollfd {
                    fd: unread,
                    events: libc::POLLIN,
                    revents: 0,
                };
                kit.equal("expired timerfd is readable", sys0!(poll(&mut poll, 1, 0)), 1);
                if poll.revents != 0 {
                    let mut count = 0_u64;
                    sys0!(read(unread, (&raw mut count).cast(), 8));
                    kit.equal("expirations of the unread timerfd", count, 1);
                }
            }
        },
    ))
}

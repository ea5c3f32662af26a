//! timerfd_create(2).

use super::{Failed, Tried, set_status};
use crate::{
    image::{Clocks, Description, Kind},
    sys::fdcalls,
};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create, timerfd_settime,
};
use std::{io, os::fd::OwnedFd};

const BILLION: u64 = 1_000_000_000;

fn timespec(ns: u64) -> Timespec {
    Timespec {
        tv_sec: (ns / BILLION) as i64,
        tv_nsec: (ns % BILLION) as _,
    }
}

/// Makes a timer that expires when the original would have.
///
/// What is left counts from the freeze, on a clock the tree takes with it; only a time of day (CLOCK_REALTIME with TFD_TIMER_ABSTIME)
/// stays that time of day.
pub(super) fn build(d: &Description, clocks: &Clocks) -> Result<OwnedFd, Failed> {
    let Kind::TimerFd {
        clock,
        ticks,
        settime_flags,
        value_ns,
        interval_ns,
    } = d.kind
    else {
        return Err(io::Error::other("not a timer")).tried(|| "timerfd".into());
    };
    let (id, now) = match clock {
        libc::CLOCK_REALTIME => (TimerfdClockId::Realtime, ClockId::Realtime),
        libc::CLOCK_MONOTONIC => (TimerfdClockId::Monotonic, ClockId::Monotonic),
        libc::CLOCK_BOOTTIME => (TimerfdClockId::Boottime, ClockId::Boottime),
        libc::CLOCK_REALTIME_ALARM => (TimerfdClockId::RealtimeAlarm, ClockId::Realtime),
        libc::CLOCK_BOOTTIME_ALARM => (TimerfdClockId::BoottimeAlarm, ClockId::Boottime),
        other => return Err(io::Error::other(format!("unknown clock {other}"))).tried(|| "timerfd_create".into()),
    };
    let fd = timerfd_create(id, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK).tried(|| "timerfd_create".into())?;
    let flags = TimerfdTimerFlags::from_bits_retain(settime_flags);
    let base = match (flags.contains(TimerfdTimerFlags::ABSTIME), now) {
        _ if value_ns == 0 => 0,
        (false, _) => 0,
        (true, ClockId::Realtime) => clocks.realtime_ns,
        (true, clock) => {
            let t = clock_gettime(clock);
            t.tv_sec as u64 * BILLION + t.tv_nsec as u64
        }
    };
    let setting = Itimerspec {
        it_value: timespec(base.saturating_add(value_ns)),
        it_interval: timespec(interval_ns),
    };
    timerfd_settime(&fd, flags, &setting).tried(|| "timerfd_settime".into())?;
    if ticks != 0 {
        fdcalls::set_timer_ticks(&fd, ticks).tried(|| "ioctl TFD_IOC_SET_TICKS (needs CONFIG_CHECKPOINT_RESTORE)".into())?;
    }
    set_status(&fd, d.flags)?;
    Ok(fd)
}

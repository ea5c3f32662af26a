//! timerfd_create(2).

use super::{
    DumpError, Mode,
    context::{Context, Shape},
    owner::Owner,
    sharing::Open,
    table,
};
use crate::image::Kind;

/// Reads the timer from fdinfo.
///
/// A periodic timer that has expired stays stopped in the kernel until somebody reads it or asks for it, and fdinfo then shows neither
/// the expirations since nor the time left. timerfd_gettime(2) through a duplicate brings both up to date and changes nothing that the
/// process can see.
pub(super) fn shape(context: &mut Context<'_>, open: &Open) -> Result<Shape, DumpError> {
    let missing = || std::io::Error::other("timerfd without a timer");
    let mut timer = context.info(open).timer.ok_or_else(|| context.error(open, "fdinfo", missing()))?;
    if context.mode == Mode::Frozen && timer.interval_ns != 0 && timer.ticks != 0 {
        let fd = context.duplicate(open)?;
        rustix::time::timerfd_gettime(&fd).map_err(|e| context.error(open, "timerfd_gettime", e))?;
        let (process, number) = context.at(open);
        let info = table::info(&process.dirs, number).map_err(|e| context.error(open, "fdinfo", e))?;
        timer = info.timer.ok_or_else(|| context.error(open, "fdinfo", missing()))?;
    }
    let kind = Kind::TimerFd {
        clock: timer.clock,
        ticks: timer.ticks,
        settime_flags: timer.settime_flags,
        value_ns: timer.value_ns,
        interval_ns: timer.interval_ns,
    };
    Ok(Shape::Ready(kind, Owner::default()))
}

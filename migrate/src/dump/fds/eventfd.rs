//! eventfd(2).

use super::{
    DumpError,
    context::{Context, Shape},
    owner::Owner,
    sharing::Open,
};
use crate::image::Kind;

/// Reads the counter from fdinfo.
pub(super) fn shape(context: &mut Context<'_>, open: &Open) -> Result<Shape, DumpError> {
    let info = context.info(open);
    let semaphore = info.eventfd_semaphore;
    let Some(count) = info.eventfd_count else {
        return Err(context.error(open, "fdinfo", std::io::Error::other("eventfd without a count")));
    };
    Ok(Shape::Ready(Kind::EventFd { count, semaphore }, Owner::default()))
}

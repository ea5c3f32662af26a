//! signalfd(2).

use super::{
    DumpError,
    context::{Context, Shape},
    owner::Owner,
    sharing::Open,
};
use crate::image::Kind;

/// Reads the mask from fdinfo. Signals not read yet are pending signals of the process and move with it.
pub(super) fn shape(context: &mut Context<'_>, open: &Open) -> Result<Shape, DumpError> {
    match context.info(open).sigmask {
        Some(mask) => Ok(Shape::Ready(Kind::SignalFd { mask }, Owner::default())),
        None => Err(context.error(open, "fdinfo", std::io::Error::other("signalfd without a mask"))),
    }
}

//! `migrate demo`.

use crate::cli::Rest;
use migrate_engine::report::Failure;

/// Refuses: it is not there yet.
pub fn run(_: &Rest) -> anyhow::Result<u8> {
    Err(Failure::failed("demo", 0, "not part of this version; it comes later").into())
}

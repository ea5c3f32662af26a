//! As many mappings as asked for.

use crate::{
    kit::{Kit, Options},
    memory::{Area, PAGE},
};
use std::{io, process::ExitCode};

/// `--count N` mappings of one page, of which every second is read-only, so that the kernel cannot merge them.
pub fn vmas(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let count = options.number("count", 20_000) as usize;
    let all = Area::read_write(count * PAGE)?;
    all.fill(1);
    for page in (0..count).step_by(2) {
        let one = Area {
            at: all.at.wrapping_add(page * PAGE / 8),
            len: PAGE,
        };
        one.protect(libc::PROT_READ)?;
    }
    kit.ready()?;
    Ok(kit.run(|_| {}, |kit| all.verify(kit, "mappings", 1)))
}

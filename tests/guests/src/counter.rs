//! A counter that notices when it is not the only one.

use crate::kit::{Kit, Options};
use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::FileExt,
    process::ExitCode,
    time::Duration,
};

/// Appends 1, 2, 3 ... to `DIR/count`. `DIR/lease` holds the last number: when it is not the one this process wrote, another one counts
/// too.
pub fn counter(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let every = Duration::from_micros(options.number("every-us", 1000));
    let lease = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(kit.dir().join("lease"))?;
    lease.write_all_at(&0_u64.to_le_bytes(), 0)?;
    let mut list = OpenOptions::new().append(true).create(true).open(kit.dir().join("count"))?;
    kit.moves(&list);
    kit.ready()?;
    let mut n = 0_u64;
    let code = kit.run(
        |kit| {
            let mut word = [0; 8];
            let read = lease.read_exact_at(&mut word, 0);
            kit.expect("lease", read);
            kit.equal("lease: another copy counts", u64::from_le_bytes(word), n);
            n += 1;
            let written = lease.write_all_at(&n.to_le_bytes(), 0);
            kit.expect("lease", written);
            let written = list.write_all(format!("{n}\n").as_bytes());
            kit.expect("count", written);
            std::thread::sleep(every);
        },
        |_| {},
    );
    Ok(code)
}

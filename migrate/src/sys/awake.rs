//! Idle cpus that do not sleep, while somebody waits for every step of ours.
//!
//! A freeze is a dozen threads that wake each other in turn, and a missing page half a dozen. A cpu that has nothing to do in between sleeps, and waking it costs
//! tens of microseconds, in a virtual machine with an exit to its host each time. Who asks for a latency of 0 (Documentation/power/pm_qos_interface.rst) has idle
//! cpus poll instead, for as long as the file is open. It is given back when this process ends, however it ends.

use std::{
    fs::{File, OpenOptions},
    io::Write,
};

/// Takes what is asked for as 32 bits, in microseconds.
const LATENCY: &str = "/dev/cpu_dma_latency";

/// Keeps the cpus of this host awake until it is dropped. Without the file, or the right to it, it does nothing.
#[derive(Debug)]
pub struct Awake {
    _asked: Option<File>,
}

impl Awake {
    /// From now on.
    pub fn hold() -> Awake {
        let ask = || {
            let mut file = OpenOptions::new().write(true).open(LATENCY)?;
            file.write_all(&0_i32.to_ne_bytes()).map(|()| file)
        };
        let asked = ask()
            .inspect_err(|e| tracing::debug!(error = %e, "idle cpus of this host may sleep"))
            .ok();
        Awake { _asked: asked }
    }
}

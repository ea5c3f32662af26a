//! The first process of a virtual machine: what [`crate::host`] is to a host of namespaces, with lines over a virtio port instead of
//! messages over a socket, and files instead of descriptors that come along.

use crate::wire::{Said, Spawn};
use crate::{
    host::{CONTROL, child_signals, reap, say, start, wait},
    kit::{sys, sys0},
};
use std::{
    ffi::CString,
    fs::OpenOptions,
    io,
    os::fd::{IntoRawFd, RawFd},
    process::ExitCode,
};

/// Entry point, with the port's device; comes back only with an error.
pub fn main(port: &str) -> ExitCode {
    if let Err(error) = first_process(port) {
        eprintln!("first process: {error}");
    }
    sys0!(sync());
    sys0!(reboot(libc::RB_POWER_OFF));
    ExitCode::FAILURE
}

/// Serves until the other end of the port is closed.
fn first_process(port: &str) -> io::Result<()> {
    let port = CString::new(port)?;
    let fd = sys!(open(port.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC))?;
    sys!(dup3(fd, CONTROL, libc::O_CLOEXEC))?;
    let signals = child_signals()?;
    say(&Said::Up { init: 1 });
    let (mut heard, mut bytes) = (Vec::new(), vec![0_u8; 64 << 10]);
    loop {
        if !wait(signals)? {
            continue;
        }
        let n = sys!(read(CONTROL, bytes.as_mut_ptr().cast(), bytes.len()))?;
        if n == 0 {
            return Ok(());
        }
        heard.extend_from_slice(&bytes[..n as usize]);
        while let Some(end) = heard.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = heard.drain(..=end).collect();
            let spawn: Spawn = serde_json::from_slice(&line).map_err(io::Error::other)?;
            match streams(&spawn) {
                Ok(fds) => start(&spawn, &fds),
                Err(e) => say(&Said::Failed {
                    id: spawn.id,
                    error: format!("its outputs: {e}"),
                }),
            }
            reap();
        }
    }
}

fn streams(spawn: &Spawn) -> io::Result<Vec<RawFd>> {
    let null = OpenOptions::new().read(true).open("/dev/null")?;
    let mut fds = vec![null.into_raw_fd()];
    for path in spawn.outputs.iter().flatten() {
        fds.push(OpenOptions::new().append(true).create(true).open(path)?.into_raw_fd());
    }
    Ok(fds)
}

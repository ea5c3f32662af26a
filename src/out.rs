//! Writing that never panics: `println!` does when nobody reads.

use std::io::{self, ErrorKind, Write};

/// Writes to stdout. A reader that went away is not our failure (`migrate list | head -1`); a full disk is.
pub fn stdout(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Writes one JSON value and a newline to stdout.
pub fn json(value: &impl serde::Serialize) -> io::Result<()> {
    stdout(&format!("{}\n", serde_json::to_string(value)?))
}

/// Writes to stderr in one call, so that lines of several threads stay whole; there is nowhere to report a failure of this.
pub fn stderr(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

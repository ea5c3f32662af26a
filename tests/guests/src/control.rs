//! The control file: one small regular file that a guest and its test both keep open. It is read and written with `pread` and `pwrite`
//! alone, so that it needs nothing of a migration but an open file.
//!
//! ```text
//!  0  u64  state of the guest          32  u64  longest gap between two beats, ns
//!  8  u64  request of the test         40  u64  the guest's clock at the last beat, ns
//! 16  u64  number of the last request  48  u64  beats
//!          that the guest carried out  56  u64  pid as the guest sees it
//! 24  u64  number of this request      64  u64  operations, of guests that count them
//!                                      72  u64  gap after which it was on another host, ns
//!                                      80  text of the last verdict, of guests without a directory
//! ```

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

/// Where a guest stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Still setting up.
    Starting,
    /// Set up, beating.
    Ready,
    /// Verified, nothing differs.
    Ok,
    /// Something differs: the verdict file says what.
    Differs,
}

/// What a test may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Nothing yet.
    None,
    /// Compare everything with what was recorded at the start, and go on.
    Verify,
    /// Forget the longest gap.
    ResetGap,
    /// End, with exit code 0 if every verification was well.
    Quit,
}

/// One reading of the guest's side.
#[derive(Debug, Clone, Copy)]
pub struct Pulse {
    /// State.
    pub state: State,
    /// Number of the last request carried out.
    pub done: u64,
    /// Longest gap between two beats, nanoseconds.
    pub longest_gap_ns: u64,
    /// The guest's clock at the last beat, nanoseconds.
    pub last_beat_ns: u64,
    /// Beats so far.
    pub beats: u64,
    /// The guest's own pid, as it sees it.
    pub pid: u64,
    /// Operations so far, of guests that count them.
    pub operations: u64,
    /// The gap between its last beat on one host and its first on another, nanoseconds.
    pub gap_at_move_ns: u64,
}

/// Bytes of a verdict that are kept.
const VERDICT: usize = 2048;

/// The open control file.
#[derive(Debug)]
pub struct Control(File);

impl Control {
    /// Creates or opens it.
    pub fn open(path: &Path) -> io::Result<Control> {
        Control::of(OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?)
    }

    /// An open file becomes one.
    pub fn of(file: File) -> io::Result<Control> {
        if file.metadata()?.len() < 80 {
            file.set_len(80)?;
        }
        Ok(Control(file))
    }

    /// The same file once more.
    pub fn again(&self) -> io::Result<Control> {
        self.0.try_clone().map(Control)
    }

    fn read(&self, at: u64) -> io::Result<u64> {
        let mut word = [0; 8];
        self.0.read_exact_at(&mut word, at)?;
        Ok(u64::from_le_bytes(word))
    }

    fn write(&self, at: u64, word: u64) -> io::Result<()> {
        self.0.write_all_at(&word.to_le_bytes(), at)
    }

    /// Test side: asks for something; the returned number shows up in [`Pulse::done`] when it is done.
    pub fn ask(&self, request: Request) -> io::Result<u64> {
        let number = self.read(24)? + 1;
        let code = match request {
            Request::None => 0,
            Request::Verify => 1,
            Request::ResetGap => 2,
            Request::Quit => 3,
        };
        self.write(8, code)?;
        self.write(24, number)?;
        Ok(number)
    }

    /// Test side: how the guest is.
    pub fn pulse(&self) -> io::Result<Pulse> {
        let state = match self.read(0)? {
            0 => State::Starting,
            1 => State::Ready,
            2 => State::Ok,
            _ => State::Differs,
        };
        Ok(Pulse {
            state,
            done: self.read(16)?,
            longest_gap_ns: self.read(32)?,
            last_beat_ns: self.read(40)?,
            beats: self.read(48)?,
            pid: self.read(56)?,
            operations: self.read(64)?,
            gap_at_move_ns: self.read(72)?,
        })
    }

    /// Guest side: a request not carried out yet, with its number.
    pub fn pending(&self) -> io::Result<Option<(u64, Request)>> {
        let mut words = [0; 24];
        self.0.read_exact_at(&mut words, 8)?;
        let word = |i: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&words[i * 8..i * 8 + 8]);
            u64::from_le_bytes(w)
        };
        if word(2) == word(1) {
            return Ok(None);
        }
        let request = match word(0) {
            1 => Request::Verify,
            2 => Request::ResetGap,
            3 => Request::Quit,
            _ => Request::None,
        };
        Ok(Some((word(2), request)))
    }

    /// Guest side: a request was carried out.
    pub fn done(&self, number: u64) -> io::Result<()> {
        self.write(16, number)
    }

    /// Guest side: what differs, for whoever has no directory in common with it; of long texts the beginning.
    pub fn verdict(&self, text: &str) -> io::Result<()> {
        let text = &text.as_bytes()[..text.len().min(VERDICT)];
        self.0.write_all_at(text, 80)?;
        self.0.set_len(80 + text.len() as u64)
    }

    /// What that said.
    pub fn said(&self) -> io::Result<String> {
        let mut text = vec![0; (self.0.metadata()?.len() as usize).saturating_sub(80).min(VERDICT)];
        self.0.read_exact_at(&mut text, 80)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Guest side: where it stands.
    pub fn state(&self, state: State) -> io::Result<()> {
        self.write(
            0,
            match state {
                State::Starting => 0,
                State::Ready => 1,
                State::Ok => 2,
                State::Differs => 3,
            },
        )
    }

    /// Guest side: operations so far.
    pub fn operations(&self, number: u64) -> io::Result<()> {
        self.write(64, number)
    }

    /// Guest side: it is on another host than at the beat before.
    pub fn moved(&self, gap_ns: u64) -> io::Result<()> {
        self.write(72, gap_ns)
    }

    /// Guest side: a beat.
    pub fn beat(&self, longest_gap_ns: u64, now_ns: u64, beats: u64, pid: u64) -> io::Result<()> {
        let mut words = [0; 32];
        for (i, w) in [longest_gap_ns, now_ns, beats, pid].iter().enumerate() {
            words[i * 8..i * 8 + 8].copy_from_slice(&w.to_le_bytes());
        }
        self.0.write_all_at(&words, 32)
    }
}

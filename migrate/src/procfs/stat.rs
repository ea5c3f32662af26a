//! /proc/PID/stat (proc_pid_stat(5)).

use super::{ParseError, num};
use crate::image::Layout;

/// The fields the engine needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stat {
    /// State letter.
    pub state: u8,
    /// Parent.
    pub ppid: i32,
    /// Process group.
    pub pgrp: i32,
    /// Session.
    pub session: i32,
    /// Controlling terminal's device number, 0 for none.
    pub tty: i32,
    /// PF_* flags of the task.
    pub flags: u32,
    /// Start time in clock ticks since boot; with the pid it names a process uniquely within a boot.
    pub start_time: u64,
    /// Addresses; `brk` is not in this file.
    pub layout: Layout,
    /// Signal to the parent at exit.
    pub exit_signal: i32,
    /// Wait status of a zombie.
    pub exit_code: i32,
}

/// Parses the file; the name may hold anything, so it is skipped from the last `)`.
pub fn parse(text: &[u8]) -> Result<Stat, ParseError> {
    let close = text.iter().rposition(|&b| b == b')').ok_or_else(|| ParseError::new("stat", text))?;
    let f: Vec<&[u8]> = text[close + 1..]
        .split(|b| b.is_ascii_whitespace())
        .filter(|w| !w.is_empty())
        .collect();
    // f[0] is field 3 of the manual page.
    let get = |n: usize| f.get(n - 3).copied().ok_or_else(|| ParseError::new("stat", text));
    let n = |k: usize| -> Result<u64, ParseError> { num("stat", get(k)?) };
    let i = |k: usize| -> Result<i32, ParseError> { num("stat", get(k)?) };
    Ok(Stat {
        state: get(3)?[0],
        ppid: i(4)?,
        pgrp: i(5)?,
        session: i(6)?,
        tty: i(7)?,
        flags: n(9)? as u32,
        start_time: n(22)?,
        layout: Layout {
            start_code: n(26)?,
            end_code: n(27)?,
            start_stack: n(28)?,
            start_data: n(45)?,
            end_data: n(46)?,
            start_brk: n(47)?,
            arg_start: n(48)?,
            arg_end: n(49)?,
            env_start: n(50)?,
            env_end: n(51)?,
            brk: 0,
        },
        exit_signal: i(38)?,
        exit_code: i(52)?,
    })
}

/// Reads /proc/PID/stat.
pub fn read(pid: i32) -> std::io::Result<Stat> {
    Ok(parse(&super::read(pid, "stat")?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn own_stat() {
        let s = read(std::process::id() as i32).unwrap();
        assert!(s.layout.start_code != 0 && s.layout.start_stack != 0 && s.start_time > 0);
    }

    #[test]
    fn a_name_with_parentheses() {
        let mut t = b"1 (a) b (c)) S 2 3 4 0 -1 64 ".to_vec();
        t.extend(std::iter::repeat_n(b"7 ".as_slice(), 43).flatten());
        let s = parse(&t).unwrap();
        assert_eq!((s.state, s.ppid, s.pgrp, s.session, s.flags, s.start_time), (b'S', 2, 3, 4, 64, 7));
    }

    proptest! {
        #[test]
        fn never_panics(b in "[0-9() a-z-]{0,300}") {
            let _ = parse(b.as_bytes());
        }
    }
}

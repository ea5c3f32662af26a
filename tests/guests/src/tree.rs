//! A tree: children, grandchildren, groups, sessions, the dead that nobody has waited for.

use crate::{
    kit::{Kit, Options, sys, sys0},
    memory::Area,
};
use std::{io, process::ExitCode, thread, time::Duration};

const WORDS: usize = 16;
const COMMAND: usize = 0;
const ANSWER: usize = 1;

/// Each member has a row of words in memory that the whole tree shares: a command, an answer, and what it sees of itself.
#[derive(Clone, Copy)]
struct Board(Area);

impl Board {
    fn get(self, row: usize, word: usize) -> u64 {
        self.0.word(row * WORDS + word)
    }
    fn set(self, row: usize, word: usize, value: u64) {
        self.0.set(row * WORDS + word, value);
    }
    fn describe(self, row: usize) {
        let ids = [
            sys0!(getpid()),
            sys0!(getppid()),
            sys0!(getpgrp()),
            sys0!(getsid(0)),
            sys0!(syscall(libc::SYS_gettid)) as i32,
            sys0!(nice(0)),
        ];
        ids.iter().enumerate().for_each(|(i, id)| self.set(row, 2 + i, *id as u64));
    }
    fn described(self, row: usize) -> Vec<u64> {
        (2..8).map(|w| self.get(row, w)).collect()
    }
}

/// What a member does: answers each command with what it sees, until told to end.
fn member(board: Board, row: usize) -> ! {
    let mut seen = 0;
    loop {
        let command = board.get(row, COMMAND);
        if command != seen {
            seen = command;
            if command == u64::MAX {
                sys0!(_exit((row % 200) as i32));
            }
            board.describe(row);
            board.set(row, ANSWER, command);
        }
        thread::sleep(Duration::from_millis(5));
        // The whole tree ends with its root, however that ends.
        if sys0!(getppid()) == 1 {
            sys0!(_exit(1));
        }
    }
}

fn die(how: i32) -> io::Result<i32> {
    let pid = sys!(fork())?;
    if pid == 0 {
        if how >= 0 {
            sys0!(_exit(how));
        }
        sys0!(signal(-how, libc::SIG_DFL));
        sys0!(kill(libc::getpid(), -how));
        sys0!(_exit(99));
    }
    Ok(pid)
}

/// Is it a zombie by now?
fn wait_dead(pid: i32) {
    for _ in 0..1000 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')) {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// `--count N` members: by number a plain child, the leader of a group, a member of the last group, the leader of a session, or a
/// grandchild.
pub fn tree(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let count = options.number("count", 12) as usize;
    let bytes = ((count + 1) * WORDS * 8).next_multiple_of(4096);
    let (rw, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    let board = Board(Area::map(bytes, rw, shared, -1, 0)?);
    let mut children = Vec::new();
    let mut group = 0;
    let mut row = 0;
    while row < count {
        let (mine, kind) = (row, row % 5);
        // A grandchild uses the row after its parent's.
        row += if kind == 4 { 2 } else { 1 };
        let pid = sys!(fork())?;
        if pid == 0 {
            match kind {
                1 => drop(sys!(setpgid(0, 0))),
                2 if group != 0 => drop(sys!(setpgid(0, group))),
                3 => drop(sys!(setsid())),
                4 if mine + 1 < count => {
                    sys0!(nice(3));
                    if sys!(fork())? == 0 {
                        sys0!(setpgid(0, 0));
                        member(board, mine + 1);
                    }
                    // A zombie of its own.
                    die(5)?;
                }
                _ => {}
            }
            member(board, mine);
        }
        if kind == 1 {
            let _ = sys!(setpgid(pid, pid));
            group = pid;
        }
        children.push((mine, pid));
    }
    let rows = count;
    let mut epoch = 0;
    let mut ask = || -> Result<(), usize> {
        epoch += 1;
        (0..rows).for_each(|r| board.set(r, COMMAND, epoch));
        for _ in 0..10_000 {
            if (0..rows).all(|r| board.get(r, ANSWER) == epoch) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(2));
        }
        Err((0..rows).filter(|r| board.get(*r, ANSWER) != epoch).count())
    };
    ask().map_err(|n| io::Error::other(format!("{n} members do not answer")))?;
    let before: Vec<Vec<u64>> = (0..rows).map(|r| board.described(r)).collect();

    let ends = [0, 7, 255, -libc::SIGKILL, -libc::SIGTERM, -libc::SIGUSR1];
    let mut dead: Vec<(i32, i32)> = Vec::new();
    for end in ends {
        let pid = die(end)?;
        wait_dead(pid);
        dead.push((pid, end));
    }
    kit.ready()?;
    let code = kit.run(
        |_| {},
        |kit| {
            if let Err(n) = ask() {
                kit.differs(format!("{n} of {rows} members do not answer"));
            }
            for (r, before) in before.iter().enumerate() {
                kit.equal(
                    &format!("member {r} (pid, parent, group, session, tid, nice)"),
                    board.described(r),
                    before.clone(),
                );
            }
            for (pid, end) in dead.drain(..) {
                let mut status = 0;
                let got = sys!(waitpid(pid, &mut status, libc::WNOHANG));
                kit.check(got.as_ref().is_ok_and(|g| *g == pid), format!("zombie {pid}: waitpid says {got:?}"));
                let says = if libc::WIFEXITED(status) {
                    libc::WEXITSTATUS(status)
                } else {
                    -libc::WTERMSIG(status)
                };
                kit.equal(&format!("how zombie {pid} ended"), says, end);
            }
            // New ones, for the next time.
            for end in ends {
                match die(end) {
                    Ok(pid) => {
                        wait_dead(pid);
                        dead.push((pid, end));
                    }
                    Err(e) => kit.differs(format!("fork: {e}")),
                }
            }
        },
    );
    // Bottom up: a member that is told to end is waited for by its parent or dies with it.
    for (row, pid) in children {
        board.set(row, COMMAND, u64::MAX);
        let mut status = 0;
        sys0!(waitpid(pid, &mut status, 0));
    }
    Ok(code)
}

//! A program with so much memory, which writes to it when it is told: what the engine is measured on.
//!
//! It is the bench itself, started once more: [`Target::play`] comes first in `main`.

// Not each bench needs all of it.
#![allow(dead_code)]

use crate::random::random;
use migrate_engine::{image::Vma, source};
use std::{
    env,
    hint::black_box,
    io::{BufRead, BufReader, Write, stdin},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

/// Makes a process the program: its MiB.
const ROLE: &str = "MIGRATE_BENCH_TARGET";
const PAGE: usize = 4096;

/// Ends when dropped.
pub struct Target {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// An address in its memory.
    at: u64,
}

impl Target {
    /// Is the program, in a process that was started as such; false in any other.
    pub fn play() -> bool {
        let Some(mib) = env::var(ROLE).ok().and_then(|m| m.parse::<usize>().ok()) else {
            return false;
        };
        let mut memory = random(mib << 20);
        println!("{}", memory.as_ptr() as u64 + (memory.len() / 2) as u64);
        for percent in stdin().lines().map_while(|l| l.ok()?.parse::<usize>().ok()) {
            if let Some(stride) = (PAGE * 100).checked_div(percent) {
                memory.iter_mut().step_by(stride).for_each(|b| *b = b.wrapping_add(1));
                black_box(&mut memory);
            }
            println!("done");
        }
        true
    }

    /// Starts it with so many MiB of random data.
    pub fn start(mib: usize) -> Target {
        let mut child = Command::new(env::current_exe().expect("this program"))
            .env(ROLE, mib.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program, once more");
        let orders = child.stdin.take().expect("a pipe");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut target = Target {
            child,
            orders,
            answers,
            at: 0,
        };
        target.at = target.answer().parse().expect("an address");
        target
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Has it write to so many of a hundred pages, spread evenly.
    pub fn dirty(&mut self, percent: usize) {
        writeln!(self.orders, "{percent}").expect("it listens");
        assert_eq!(self.answer(), "done");
    }

    /// The mapping that its memory is in, as `send` sees it.
    pub fn memory(&self) -> Vma {
        let dumped = source::inventory(self.pid()).expect("an inventory");
        let found = dumped.tree.mms[0].vmas.iter().find(|v| (v.start..v.end).contains(&self.at));
        found.expect("its memory").clone()
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        line.trim_end().to_owned()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! Memory that somebody else writes to meanwhile: a thread, or another process.

use super::model::{fill, is_zero};
use crate::{
    kit::{Numbers, sys0},
    memory::{Area, PAGE},
};
use std::sync::atomic::{Ordering, fence};

/// Pages with one writer, and a board that says for each the version being written and the version written. Whoever reads a page between two equal
/// readings of the board knows what it must hold, whichever of the two is lost.
#[derive(Clone, Copy)]
pub struct Lane {
    number: u64,
    area: Area,
    board: Area,
    /// A memfd behind it: odd pages are then written through the descriptor.
    fd: i32,
}

// SAFETY: every page has one writer at a time, and readers go by the board.
unsafe impl Send for Lane {}

impl Lane {
    pub fn new(number: u64, pages: usize, flags: i32, fd: i32) -> std::io::Result<Lane> {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        Ok(Lane {
            number,
            area: Area::map(pages * PAGE, rw, flags, fd, 0)?,
            board: Area::map((pages * 16).next_multiple_of(PAGE), rw, shared, -1, 0)?,
            fd,
        })
    }

    pub fn pages(self) -> usize {
        self.area.len / PAGE
    }

    fn address(self, page: usize) -> usize {
        self.area.at as usize + page * PAGE
    }

    fn seed(self, page: usize, version: u64) -> u64 {
        1 << 61 | self.number << 52 | (page as u64) << 40 | version
    }

    /// The one writer's next version of a page.
    pub fn write(self, page: usize) {
        let version = self.board.word(2 * page + 1) + 1;
        self.board.set(2 * page, version);
        fence(Ordering::SeqCst);
        let seed = self.seed(page, version);
        if self.fd >= 0 && page % 2 == 1 {
            let mut buffer = [0_u64; PAGE / 8];
            fill(buffer.as_mut_ptr() as usize, seed);
            sys0!(pwrite(self.fd, buffer.as_ptr().cast(), PAGE, (page * PAGE) as i64));
        } else {
            fill(self.address(page), seed);
        }
        fence(Ordering::SeqCst);
        self.board.set(2 * page + 1, version);
    }

    /// Compares a page, or finds it being written and says nothing.
    pub fn check(self, page: usize) -> Result<(), String> {
        let begun = self.board.word(2 * page);
        let done = self.board.word(2 * page + 1);
        fence(Ordering::SeqCst);
        let at = self.address(page);
        let first = self.area.word(page * (PAGE / 8));
        let well = match done {
            0 => is_zero(at),
            _ => super::model::holds(at, self.seed(page, done)),
        };
        fence(Ordering::SeqCst);
        let steady = begun == done && self.board.word(2 * page) == begun;
        if well || !steady {
            return Ok(());
        }
        Err(format!(
            "lane {} page {page} at {at:x}: expected version {done}, found first word {first:x} (version {}){}",
            self.number,
            first & ((1 << 40) - 1),
            if is_zero(at) { ", zeros" } else { "" }
        ))
    }

    /// All pages; the first few that differ.
    pub fn check_all(self) -> Vec<String> {
        (0..self.pages()).filter_map(|p| self.check(p).err()).take(5).collect()
    }

    /// So many writes, each after a look at another page; `rest` sleeps a little in between, as long as `go_on` says so.
    pub fn work(self, seed: u64, writes: u64, rest_us: u64, mut go_on: impl FnMut() -> bool) -> Result<(), String> {
        let mut numbers = Numbers::new(seed);
        for _ in 0..writes {
            if !go_on() {
                break;
            }
            let draw = numbers.draw() >> 8;
            self.check((draw >> 16) as usize % self.pages())?;
            self.write(draw as usize % self.pages());
            if rest_us > 0 {
                std::thread::sleep(std::time::Duration::from_micros((draw >> 32) % (2 * rest_us)));
            }
        }
        Ok(())
    }
}

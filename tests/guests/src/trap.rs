//! One operation that a copy in rounds could miss, over and over: `trap --kind NAME [--period-us N] [--ground-mib N]`.
//!
//! Each kind does its operation once a period, on memory of which it knows what every page must hold, while some other memory is written so that
//! there is something to send in every round.

mod late;
mod mappings;
mod objects;
mod tasks;

use crate::{
    kit::{Kit, Numbers, Options, sys},
    memory::{Area, PAGE},
    soak::{
        model::{Page, fill, holds, is_zero},
        ops::FILE_SEED,
    },
};
use std::{
    io,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

const READ: i32 = libc::PROT_READ;
const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const SHARED: i32 = libc::MAP_SHARED | libc::MAP_ANONYMOUS;

/// What a kind is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    /// The operation, and a look at a part.
    Step,
    /// A look at everything.
    Verify,
}

type Trap = Box<dyn FnMut(&mut Kit, Call) -> io::Result<()>>;

/// Pages and what they must hold.
struct Patch {
    at: usize,
    pages: Vec<Page>,
    /// Of a private file mapping: the page of the file at its start.
    file: u64,
}

/// Every page that is ever written is another one.
static SEED: AtomicU64 = AtomicU64::new(1);

fn pointer(at: usize) -> *mut libc::c_void {
    at as *mut libc::c_void
}

/// mmap(2) where the kernel likes, or exactly there.
fn map_at(at: usize, pages: usize, flags: i32, fd: i32) -> io::Result<usize> {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED };
    Ok(sys!(mmap(pointer(at), pages * PAGE, BOTH, flags | fixed, fd, 0))? as usize)
}

fn unmap(at: usize, pages: usize) -> io::Result<()> {
    sys!(munmap(pointer(at), pages * PAGE)).map(drop)
}

impl Patch {
    /// A new mapping of zeros.
    fn map(pages: usize, flags: i32) -> io::Result<Patch> {
        Ok(Patch::at(map_at(0, pages, flags, -1)?, pages, Page::Zero))
    }

    /// What is there already.
    fn at(at: usize, pages: usize, holds: Page) -> Patch {
        Patch {
            at,
            pages: vec![holds; pages],
            file: 0,
        }
    }

    /// A new mapping with something in every page.
    fn filled(pages: usize, flags: i32) -> io::Result<Patch> {
        let mut patch = Patch::map(pages, flags)?;
        (0..pages).for_each(|p| patch.write(p));
        Ok(patch)
    }

    fn len(&self) -> usize {
        self.pages.len()
    }

    fn address(&self, page: usize) -> usize {
        self.at + page * PAGE
    }

    fn write(&mut self, page: usize) {
        let seed = SEED.fetch_add(1, Ordering::Relaxed);
        fill(self.address(page), seed);
        self.pages[page] = Page::Seed(seed);
    }

    fn check(&mut self, kit: &mut Kit, what: &str, page: usize) {
        let at = self.address(page);
        let well = match self.pages[page] {
            Page::Zero => is_zero(at),
            Page::Seed(seed) => holds(at, seed),
            Page::Base => holds(at, FILE_SEED + self.file + page as u64),
            Page::Unknown => true,
            Page::Freed(seed) => {
                holds(at, seed) || {
                    let gone = is_zero(at);
                    if gone {
                        self.pages[page] = Page::Zero;
                    }
                    gone
                }
            }
        };
        if !well {
            // SAFETY: the page was read just now.
            let first = unsafe { (at as *const u64).read_volatile() };
            let found = if is_zero(at) { "zeros".into() } else { format!("number {first}") };
            let last = SEED.load(Ordering::Relaxed);
            kit.differs(format!(
                "{what}: page {page} of {} at {at:x}: expected {:?}, found {found}, last written number {last}",
                self.len(),
                self.pages[page]
            ));
            self.pages[page] = Page::Unknown;
        }
    }

    fn check_all(&mut self, kit: &mut Kit, what: &str) {
        (0..self.len()).for_each(|p| self.check(kit, what, p));
    }

    /// A few pages at random, or all.
    fn look(&mut self, kit: &mut Kit, what: &str, call: Call, numbers: &mut Numbers) {
        match call {
            Call::Verify => self.check_all(kit, what),
            Call::Step => (0..4).for_each(|_| {
                let page = below(numbers, self.len());
                self.check(kit, what, page);
            }),
        }
    }

    fn advise(&self, first: usize, n: usize, advice: i32) -> io::Result<()> {
        sys!(madvise(pointer(self.address(first)), n * PAGE, advice)).map(drop)
    }

    fn protect(&self, first: usize, n: usize, prot: i32) -> io::Result<()> {
        sys!(mprotect(pointer(self.address(first)), n * PAGE, prot)).map(drop)
    }
}

fn below(numbers: &mut Numbers, n: usize) -> usize {
    (numbers.draw() >> 16) as usize % n.max(1)
}

/// The guest.
pub fn trap(mut kit: Kit, options: &Options) -> io::Result<ExitCode> {
    let kind = options.text("kind").unwrap_or("").to_string();
    crate::soak::ops::make_file(&kit.dir().join("file"))?;
    // So that the C library needs no mappings meanwhile.
    drop(std::hint::black_box(Vec::<u8>::with_capacity(8 << 20)));
    // Four rounds or so: of this memory a few pages are written in every period.
    let ground = Area::read_write((options.number("ground-mib", 64) as usize) << 20)?;
    ground.fill(1);
    let mut numbers = Numbers::new(3);
    for line in ["mapping ", "task ", "process status Threads"] {
        kit.ignore(line);
    }
    if kind == "interrupted" {
        // Its timer's signal may be pending when it is looked at.
        kit.ignore("process status ShdPnd");
    }
    let mut run = mappings::kind(&kind)
        .or_else(|| objects::kind(&kind, &mut kit))
        .or_else(|| tasks::kind(&kind, &mut kit))
        .or_else(|| late::kind(&kind))
        .unwrap_or_else(|| Err(io::Error::other(format!("there is no kind {kind:?}"))))?;
    for _ in 0..8 {
        run(&mut kit, Call::Step)?;
    }
    kit.rest(Duration::from_micros(options.number("period-us", 2000)));
    kit.ready()?;
    let run = std::cell::RefCell::new(run);
    let go = |kit: &mut Kit, call| {
        let done = run.borrow_mut()(kit, call);
        kit.expect(&kind, done);
    };
    Ok(kit.run(
        |kit| {
            for _ in 0..16 {
                ground.fill_page(below(&mut numbers, ground.len / PAGE), 1);
            }
            go(kit, Call::Step);
        },
        |kit| {
            ground.verify(kit, "memory beside it", 1);
            go(kit, Call::Verify);
        },
    ))
}

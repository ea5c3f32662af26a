//! What every page must hold, and whether it does.

use crate::{
    kit::{Numbers, sys},
    memory::PAGE,
};
use std::{collections::VecDeque, fmt::Write, io};

pub const NONE: i32 = libc::PROT_NONE;
pub const READ: i32 = libc::PROT_READ;
pub const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;
const WORDS: usize = PAGE / 8;

/// The content of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    Zero,
    /// [`fill`] with this seed.
    Seed(u64),
    /// After MADV_FREE: what it was, or zeros; once seen as zeros it stays zeros.
    Freed(u64),
    /// What the object behind the mapping holds there.
    Base,
    /// It differed, and that was said.
    Unknown,
}

/// The page becomes the stream of this seed, which is also its first word: a wrong page tells which one it is.
pub fn fill(at: usize, seed: u64) {
    let to = at as *mut u64;
    let mut numbers = Numbers::new(seed);
    for i in 0..WORDS {
        let word = if i == 0 { seed } else { numbers.draw() };
        // SAFETY: callers hand in pages that their model says are mapped and writable; if not, the fault is what is looked for.
        unsafe { to.add(i).write_volatile(word) };
    }
}

/// Is the page that stream?
pub fn holds(at: usize, seed: u64) -> bool {
    let mut numbers = Numbers::new(seed);
    (0..WORDS).all(|i| word(at, i) == if i == 0 { seed } else { numbers.draw() })
}

pub fn is_zero(at: usize) -> bool {
    (0..WORDS).all(|i| word(at, i) == 0)
}

fn word(at: usize, i: usize) -> u64 {
    // SAFETY: as in `fill`, for reading.
    unsafe { (at as *const u64).add(i).read_volatile() }
}

/// Memory that several mappings show: an object of the kernel's, or a file on disk that nobody changes.
pub struct Object {
    /// Of a memfd, while it is open.
    pub fd: Option<i32>,
    pub pages: Vec<Page>,
    pub file: bool,
}

/// A mapping, or a part of one that lives on its own.
pub struct Region {
    pub at: usize,
    pub pages: Vec<Page>,
    pub prot: Vec<i32>,
    /// Object and the first page in it.
    pub object: Option<(usize, usize)>,
    pub shared: bool,
    /// The heap: it has its own calls.
    pub heap: bool,
}

impl Region {
    pub fn end(&self) -> usize {
        self.at + self.pages.len() * PAGE
    }
    pub fn address(&self, page: usize) -> usize {
        self.at + page * PAGE
    }
    pub fn anonymous(&self) -> bool {
        self.object.is_none()
    }
    pub fn kind(&self) -> &'static str {
        match (self.heap, self.object, self.shared) {
            (true, ..) => "heap",
            (_, None, _) => "private anonymous",
            (_, Some(_), true) => "shared",
            (_, Some(_), false) => "private mapping of an object",
        }
    }
}

struct Entry {
    op: u64,
    what: &'static str,
    from: usize,
    to: usize,
}

/// The program's own idea of its memory.
pub struct Model {
    pub regions: Vec<Region>,
    pub objects: Vec<Option<Object>>,
    /// Number of the present operation, which is the seed of what it writes.
    pub op: u64,
    history: VecDeque<Entry>,
    pub problems: Vec<String>,
}

const HISTORY: usize = 16384;

impl Model {
    pub fn new(first_op: u64) -> Model {
        Model {
            regions: Vec::with_capacity(1024),
            objects: Vec::with_capacity(64),
            op: first_op,
            history: VecDeque::with_capacity(HISTORY),
            problems: Vec::with_capacity(64),
        }
    }

    /// Remembers what was done to these addresses.
    pub fn note(&mut self, what: &'static str, from: usize, bytes: usize) {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(Entry {
            op: self.op,
            what,
            from,
            to: from + bytes,
        });
    }

    pub fn differs(&mut self, what: String) {
        if self.problems.len() < 50 {
            self.problems.push(what);
        }
    }

    pub fn mapped_pages(&self) -> usize {
        self.regions.iter().map(|r| r.pages.len()).sum()
    }

    /// Cuts a region in two; the part from `page` on is the last region then.
    fn split(&mut self, r: usize, page: usize) {
        let region = &mut self.regions[r];
        let tail = Region {
            at: region.address(page),
            pages: region.pages.split_off(page),
            prot: region.prot.split_off(page),
            object: region.object.map(|(o, first)| (o, first + page)),
            ..*region
        };
        self.regions.push(tail);
    }

    /// Pages `first..first + n` become a region of their own; its index.
    pub fn isolate(&mut self, r: usize, first: usize, n: usize) -> usize {
        if first + n < self.regions[r].pages.len() {
            self.split(r, first + n);
        }
        if first == 0 {
            return r;
        }
        self.split(r, first);
        self.regions.len() - 1
    }

    /// Takes a region out, and its object when nothing else leads to that.
    pub fn forget(&mut self, r: usize) -> Region {
        let region = self.regions.swap_remove(r);
        if let Some((o, _)) = region.object {
            self.drop_unused(o);
        }
        region
    }

    /// An object that no mapping and no descriptor leads to is gone.
    pub fn drop_unused(&mut self, o: usize) {
        let mapped = self.regions.iter().any(|r| r.object.is_some_and(|(other, _)| other == o));
        if let Some(object) = &self.objects[o]
            && !mapped
            && object.fd.is_none()
            && !object.file
        {
            self.objects[o] = None;
        }
    }

    pub fn add_object(&mut self, object: Object) -> usize {
        match self.objects.iter().position(Option::is_none) {
            Some(free) => {
                self.objects[free] = Some(object);
                free
            }
            None => {
                self.objects.push(Some(object));
                self.objects.len() - 1
            }
        }
    }

    /// A page was written as a whole.
    pub fn wrote(&mut self, r: usize, page: usize) {
        let seed = self.op;
        let region = &mut self.regions[r];
        match region.object {
            Some((o, first)) if region.shared => {
                if let Some(object) = &mut self.objects[o] {
                    object.pages[first + page] = Page::Seed(seed);
                }
            }
            _ => region.pages[page] = Page::Seed(seed),
        }
    }

    fn expected(&self, r: usize, page: usize) -> Page {
        let region = &self.regions[r];
        match (region.pages[page], region.object) {
            (Page::Base, Some((o, first))) => self.objects[o].as_ref().map_or(Page::Unknown, |object| object.pages[first + page]),
            (own, _) => own,
        }
    }

    /// Compares one page; it must be readable.
    pub fn check(&mut self, r: usize, page: usize) {
        let at = self.regions[r].address(page);
        let expected = self.expected(r, page);
        let well = match expected {
            Page::Zero => is_zero(at),
            Page::Seed(seed) => holds(at, seed),
            Page::Freed(seed) => {
                holds(at, seed) || {
                    let gone = is_zero(at);
                    if gone {
                        self.regions[r].pages[page] = Page::Zero;
                    }
                    gone
                }
            }
            Page::Base | Page::Unknown => true,
        };
        if !well {
            self.report(r, page, expected);
        }
    }

    fn report(&mut self, r: usize, page: usize, expected: Page) {
        let region = &self.regions[r];
        let at = region.address(page);
        let first = word(at, 0);
        let found = if is_zero(at) {
            "zeros".to_string()
        } else if holds(at, first) {
            format!("all that operation {first} wrote")
        } else {
            let same = (0..WORDS).position(|i| word(at, i) != 0).unwrap_or(0);
            format!("first word {first}, first word that is not zero: number {same}")
        };
        let own = region.pages[page];
        let text = format!(
            "page {at:x}, {page} of {} in {:x}-{:x} ({}, protection {}): expected {expected:?}, found {found}; at operation {}\n{}",
            region.pages.len(),
            region.at,
            region.end(),
            region.kind(),
            region.prot[page],
            self.op,
            self.explain(at)
        );
        self.differs(text);
        match (own, self.regions[r].object) {
            (Page::Base, Some((o, first))) => {
                if let Some(object) = &mut self.objects[o] {
                    object.pages[first + page] = Page::Unknown;
                }
            }
            _ => self.regions[r].pages[page] = Page::Unknown,
        }
    }

    /// What was done to an address, latest last.
    pub fn explain(&self, at: usize) -> String {
        let mut text = String::new();
        let hits: Vec<&Entry> = self.history.iter().rev().filter(|e| e.from <= at && at < e.to).take(12).collect();
        for e in hits.iter().rev() {
            let _ = writeln!(text, "    operation {}: {} {:x}-{:x}", e.op, e.what, e.from, e.to);
        }
        if hits.is_empty() {
            text = format!("    nothing of the last {} operations", self.history.len());
        }
        text
    }

    /// Every page, those without rights too.
    pub fn verify(&mut self) {
        for r in 0..self.regions.len() {
            let mut page = 0;
            while page < self.regions[r].pages.len() {
                let region = &self.regions[r];
                let run = region.prot[page..].iter().take_while(|p| **p == region.prot[page]).count();
                let (at, prot) = (region.address(page), region.prot[page]);
                if prot == NONE
                    && let Err(e) = protect(at, run, READ)
                {
                    let around = mapped_around(at, run * PAGE);
                    self.differs(format!("mprotect of {run} pages at {at:x}: {e}\n{}{around}", self.explain(at)));
                    page += run;
                    continue;
                }
                for p in page..page + run {
                    self.check(r, p);
                }
                if prot == NONE {
                    let _ = protect(at, run, NONE);
                }
                page += run;
            }
        }
    }

    /// The kernel's list: each page of ours in it, with its rights. `known`: with these, nothing else may be mapped. Only for when nobody wants to
    /// move the tree: an open file of /proc is in the way.
    pub fn verify_mappings(&mut self, known: Option<&[(usize, usize)]>) {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let mut list: Vec<(usize, usize, String)> = Vec::new();
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let Some((a, b)) = words.next().and_then(|w| w.split_once('-')) else {
                continue;
            };
            if let (Ok(a), Ok(b)) = (usize::from_str_radix(a, 16), usize::from_str_radix(b, 16)) {
                list.push((a, b, words.next().unwrap_or("").to_string()));
            }
        }
        let mut wrong = Vec::new();
        for region in &self.regions {
            for (page, prot) in region.prot.iter().enumerate() {
                let at = region.address(page);
                let i = list.partition_point(|m| m.1 <= at);
                let perms = list.get(i).filter(|m| m.0 <= at).map_or("nothing", |m| &m.2);
                let rights = ["---", "r--", "", "rw-"][*prot as usize & 3];
                let kind = if region.shared { 's' } else { 'p' };
                if !perms.starts_with(rights) || !perms.ends_with(kind) {
                    wrong.push(format!("{at:x} is mapped {perms}, not {rights}{kind}\n{}", self.explain(at)));
                    break;
                }
            }
        }
        if let Some(known) = known {
            let mut ours: Vec<(usize, usize)> = known.to_vec();
            ours.extend(self.regions.iter().map(|r| (r.at, r.end())));
            ours.sort_unstable();
            for (a, b, perms) in &list {
                let mut at = *a;
                for o in ours.iter().filter(|o| o.1 > *a && o.0 < *b) {
                    if o.0 > at {
                        break;
                    }
                    at = at.max(o.1);
                }
                if at < *b {
                    wrong.push(format!("{at:x}-{b:x} is mapped {perms}, and should not be\n{}", self.explain(at)));
                }
            }
        }
        wrong.into_iter().for_each(|w| self.differs(w));
    }
}

/// What the kernel has mapped there and in the neighbourhood.
pub fn mapped_around(at: usize, bytes: usize) -> String {
    const NEAR: usize = 16 * PAGE;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let near = |line: &&str| {
        let range = line.split_whitespace().next().and_then(|r| r.split_once('-'));
        range.is_some_and(|(a, b)| {
            let number = |text| usize::from_str_radix(text, 16).unwrap_or(0);
            number(a) < at + bytes + NEAR && number(b) + NEAR > at
        })
    };
    maps.lines().filter(near).map(|line| format!("    mapped: {line}\n")).collect()
}

/// mprotect(2) of whole pages.
pub fn protect(at: usize, pages: usize, prot: i32) -> io::Result<()> {
    sys!(mprotect(at as *mut libc::c_void, pages * PAGE, prot)).map(drop)
}

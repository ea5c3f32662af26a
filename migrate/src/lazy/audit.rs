//! The memory oracle across the drain, for `--verify`: once nothing is missing, every page that has followed and that the program has not written
//! since is held against its hash at the freeze, where the program has it by now.
//!
//! [`crate::oracle`] compares before the release, when what follows is not there. Afterwards the program runs, and writes; so the keeper puts pages in place
//! write-protected (UFFDIO_COPY_MODE_WP, resolved by the kernel alone: UFFD_FEATURE_WP_ASYNC), and what is still protected has not been written: PAGEMAP_SCAN
//! tells. It is looked at before and after the reading. What the table says of where a page of the source is now gets examined with it.
//!
//! Not looked at: children forked meanwhile (the kernel gives their userfaultfd, not their pid; what they see they see of the same pages), pages in
//! ranges without content, which are not protected, and kernels without WP_ASYNC (before 6.7).

use super::table::Table;
use crate::{image::PAGE, oracle, pages::PageSet, sys::pagemap::Pagemap};
use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

/// Bytes read at a time.
const PIECE: u64 = 256 << 10;
/// Differences that are put into words.
const WORDS: usize = 8;

/// What the source says of an address space.
#[derive(Debug)]
struct Expected {
    /// What followed, by addresses at the source.
    followed: PageSet,
    /// (address, [`value`]) of pages that are not zero, ascending.
    hashes: Vec<(u64, u64)>,
}

/// A process's memory and page tables. Both files belong to the address space that it had when they were opened, whatever it executes later; so the agent
/// opens them while it is a skeleton, and passes them on: by the time the keeper hears of the process it may have ended.
#[derive(Debug)]
pub struct Watched {
    memory: File,
    pagemap: Pagemap,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Audit {
    /// By the table's indices.
    watched: HashMap<usize, Watched>,
    expected: HashMap<u32, Expected>,
}

/// How the comparison went.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Pages compared.
    pub pages: u64,
    /// Pages that differ.
    pub different: u64,
    /// The first of them.
    pub words: Vec<String>,
}

/// A page's [`oracle::hash`]; 0 for zeros.
pub(super) fn value(page: &[u8]) -> u64 {
    if page.iter().all(|b| *b == 0) { 0 } else { oracle::hash(page) }
}

impl Audit {
    /// A process that the table knows as `space` is about to run. `missing`: what it misses of `name`; `hashes` of it at the source.
    pub fn watch(&mut self, space: usize, watched: Watched, name: u32, missing: &[(u64, u64)], hashes: Vec<(u64, u64)>) {
        self.watched.insert(space, watched);
        let followed = PageSet::from_ranges(missing.iter().copied());
        self.expected.insert(name, Expected { followed, hashes });
    }

    /// It has ended.
    pub fn forget(&mut self, space: usize) {
        self.watched.remove(&space);
    }

    /// Whether pages are to be put in place write-protected.
    pub fn on(&self) -> bool {
        !self.watched.is_empty()
    }

    /// Compares what has not been written. Nothing may be missing any more: a read would wait for the caller itself.
    pub fn compare(&self, table: &Table) -> Compared {
        let mut out = Compared::default();
        for (space, w) in &self.watched {
            for r in table.regions(*space) {
                let Some(expected) = self.expected.get(&r.name) else { continue };
                // Gone, or about to be: nothing to say of it.
                let _ = w.look(r.start, r.end, &mut |at, found| {
                    let origin = at - r.start + r.origin;
                    if !expected.followed.contains(origin) {
                        return;
                    }
                    let index = expected.hashes.binary_search_by_key(&origin, |h| h.0);
                    let wanted = index.map_or(0, |i| expected.hashes[i].1);
                    out.pages += 1;
                    if found != wanted {
                        out.different += 1;
                        if out.words.len() < WORDS {
                            out.words
                                .push(format!("page {at:#x} of space {:#x}, {origin:#x} at the source, differs", r.name));
                        }
                    }
                });
            }
        }
        out
    }
}

impl Watched {
    /// Of a process that stands still.
    pub fn open(pid: i32) -> io::Result<Watched> {
        Ok(Watched {
            memory: File::open(format!("/proc/{pid}/mem"))?,
            pagemap: Pagemap::open(pid)?,
        })
    }

    /// From the descriptors that another process sent, in the order of [`Watched::descriptors`].
    pub fn from_fds(memory: OwnedFd, pagemap: OwnedFd) -> Watched {
        Watched {
            memory: File::from(memory),
            pagemap: Pagemap::from_fd(pagemap),
        }
    }

    /// What to send.
    pub fn descriptors(&self) -> [&dyn AsFd; 2] {
        [&self.memory, &self.pagemap]
    }

    /// Every page of a range that is there and has not been written, with its value.
    fn look(&self, start: u64, end: u64, take: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
        let mut before = Vec::new();
        self.pagemap.unwritten(start, end, &mut before)?;
        let mut found = Vec::new();
        let mut buf = vec![0; PIECE as usize];
        for (a, b) in before {
            for at in (a..b).step_by(PIECE as usize) {
                let some = &mut buf[..(b - at).min(PIECE) as usize];
                // Unmapped meanwhile: the second look does not find it either.
                if self.memory.read_exact_at(some, at).is_ok() {
                    let pages = some.chunks(PAGE as usize).zip((at..).step_by(PAGE as usize));
                    found.extend(pages.map(|(page, at)| (at, value(page))));
                }
            }
        }
        let mut after = Vec::new();
        self.pagemap.unwritten(start, end, &mut after)?;
        let after = PageSet::from_ranges(after);
        found.iter().filter(|(at, _)| after.contains(*at)).for_each(|(at, v)| take(*at, *v));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lazy::table::Region,
        sys::{region::Region as Shared, uffd::Userfault},
    };

    /// Pages arrive in this process; one is written, one was another at the source, and one lies where it should not.
    #[test]
    fn what_differs_shows_and_what_was_written_does_not() {
        if !crate::track::wp_async::available() || !rustix::process::geteuid().is_root() {
            eprintln!("skipped: no asynchronous write protection here");
            return;
        }
        const N: u64 = 16;
        let memfd = || rustix::fs::memfd_create("audit", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let from = memfd();
        rustix::fs::ftruncate(&from, N * PAGE).unwrap();
        let from = Shared::map(&from, (N * PAGE) as usize, 0).unwrap();
        // Shared memory works like any other here, and this process may write it without a pointer.
        let to = memfd();
        rustix::fs::ftruncate(&to, N * PAGE).unwrap();
        let to = Shared::map(&to, (N * PAGE) as usize, 0).unwrap();
        let at = to.local(0, (N * PAGE) as usize);
        let mut hashes = Vec::new();
        let origin = 1 << 30;
        for p in 0..N {
            // The last page is zeros.
            let page = vec![if p == N - 1 { 0 } else { p as u8 + 1 }; PAGE as usize];
            from.write((p * PAGE) as usize, &page);
            if p < N - 1 {
                hashes.push((origin + p * PAGE, value(&page)));
            }
        }
        let fd = Userfault::own_missing().unwrap();
        fd.register_missing(at, at + N * PAGE, true).unwrap();
        let mut table = Table::default();
        let region = Region {
            start: at,
            end: at + N * PAGE,
            name: 3,
            origin,
        };
        let space = table.add([region], [(at, at + N * PAGE)]);
        let mut audit = Audit::default();
        let me = std::process::id() as i32;
        let watched = || Watched::open(me).unwrap();
        audit.watch(space, watched(), 3, &[(origin, origin + N * PAGE)], hashes.clone());
        assert!(audit.on());
        assert_eq!(fd.copy(at, from.local(0, (N * PAGE) as usize), N * PAGE, true), (N * PAGE, None));
        table.filled(space, at, at + N * PAGE);
        let right = audit.compare(&table);
        assert_eq!((right.pages, right.different), (N, 0), "{:?}", right.words);
        to.write((5 * PAGE) as usize, b"written");
        let written = audit.compare(&table);
        assert_eq!((written.pages, written.different), (N - 1, 0), "{:?}", written.words);
        hashes[7].1 ^= 1;
        audit.watch(space, watched(), 3, &[(origin, origin + N * PAGE)], hashes);
        let other = audit.compare(&table);
        assert_eq!((other.pages, other.different, other.words.len()), (N - 1, 1, 1));
        // The table is wrong about where: every page is at its neighbour's place.
        let mut shifted = Table::default();
        shifted.add(
            [Region {
                end: region.end - PAGE,
                origin: origin + PAGE,
                ..region
            }],
            [],
        );
        assert_eq!(audit.compare(&shifted).different, N - 2);
    }
}

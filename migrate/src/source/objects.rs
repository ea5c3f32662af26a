//! What was sent of shared memory and unlinked files, by content.
//!
//! Such an object may be written through any mapping of it, by write(2) on a descriptor, from outside the tree, and holes may be punched into
//! it; no tracker sees all of that. So a hash of every page that was sent is kept (16 bytes of blake3), and a round sends the pages whose hash
//! differs. That reads the whole object each round and inside the freeze, about 1 s a GiB on one core: right, and slow for large objects. Where
//! [`super::shared`] knows better which pages may have been written, only those are looked at, and sent whatever they hold.

use crate::{image::PAGE, pages::PageSet};
use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// First bytes of a page's blake3; all zero: unknown, so that the page differs from whatever is there.
pub type Hash = [u8; 16];

/// The hash of a page.
pub fn hash(page: &[u8]) -> Hash {
    let mut out = [0; 16];
    out.copy_from_slice(&blake3::hash(page).as_bytes()[..16]);
    out
}

/// What was sent of an object.
#[derive(Debug, Default)]
struct Sent {
    pages: HashMap<u64, Hash>,
    /// Of these, all whose content at the destination is not known: they were found dirty, and no round has delivered them since.
    owed: BTreeSet<u64>,
}

impl Sent {
    fn owe(&mut self, at: u64) {
        self.pages.insert(at, [0; 16]);
        self.owed.insert(at);
    }

    fn forget(&mut self, at: u64) -> bool {
        self.owed.remove(&at);
        self.pages.remove(&at).is_some()
    }
}

/// What was sent of each object, by its name in page runs.
#[derive(Debug, Default)]
pub struct Contents {
    sent: HashMap<u32, Sent>,
}

/// How an object differs from what was sent of it.
#[derive(Debug, Default)]
pub struct Changed {
    /// Pages to send.
    pub dirty: PageSet,
    /// Pages that were sent and are holes now.
    pub gone: PageSet,
}

impl Contents {
    /// Whether anything of an object was sent, or is going to be.
    pub fn knows(&self, name: u32) -> bool {
        self.sent.contains_key(&name)
    }

    /// Forgets an object.
    pub fn forget(&mut self, name: u32) {
        self.sent.remove(&name);
    }

    /// Takes all pages for sent with content that no page has.
    pub fn resend_all(&mut self) {
        for sent in self.sent.values_mut() {
            sent.pages.values_mut().for_each(|h| *h = [0; 16]);
            sent.owed.extend(sent.pages.keys());
        }
    }

    /// What was really sent of an object: (name, page, hash). Not what the look had found there: a page that was changed between the look and the read,
    /// and back again before the next look, would seem to be what the destination has.
    pub fn sent(&mut self, pages: &[(u32, u64, Hash)]) {
        for (name, at, hash) in pages {
            let Some(sent) = self.sent.get_mut(name) else { continue };
            if *hash == [0; 16] {
                sent.owe(*at);
            } else {
                sent.pages.insert(*at, *hash);
                sent.owed.remove(at);
            }
        }
    }

    /// Compares an object of `size` bytes with what was sent. The caller sends what differs, and says so with [`Contents::sent`].
    pub fn changed(&mut self, name: u32, file: &File, size: u64) -> io::Result<Changed> {
        let sent = self.sent.entry(name).or_default();
        let mut out = Changed::default();
        let mut there = PageSet::new();
        for &(start, end) in &crate::dump::pages::data(file.as_fd(), size)? {
            there.insert(start, end);
            let mut buf = vec![0u8; 1 << 20];
            let mut at = start;
            while at < end {
                let n = ((end - at) as usize).min(buf.len());
                read_full(file, at, &mut buf[..n])?;
                for (k, page) in buf[..n].chunks(PAGE as usize).enumerate() {
                    let at = at + k as u64 * PAGE;
                    if sent.pages.get(&at) != Some(&hash(page)) {
                        sent.owe(at);
                        out.dirty.insert(at, at + PAGE);
                    }
                }
                at += n as u64;
            }
        }
        let gone: Vec<u64> = sent.pages.keys().copied().filter(|at| !there.contains(*at)).collect();
        for at in gone {
            sent.forget(at);
            out.gone.insert(at, at + PAGE);
        }
        Ok(out)
    }

    /// The same, when only pages of `touched` can have changed since the last look: they are sent without being compared.
    pub fn touched(&mut self, name: u32, file: &File, size: u64, touched: &PageSet) -> io::Result<Changed> {
        let sent = self.sent.entry(name).or_default();
        let owed = PageSet::from_ranges(sent.owed.iter().map(|at| (*at, at + PAGE)));
        let mut out = Changed::default();
        for &(start, end) in touched.union(&owed).ranges() {
            let there = crate::dump::pages::data_pages(file.as_fd(), start, end.min(size))?;
            there.iter().for_each(|at| out.dirty.insert(*at, at + PAGE));
            for at in (start..end).step_by(PAGE as usize) {
                if out.dirty.contains(at) {
                    sent.owe(at);
                } else if sent.forget(at) {
                    out.gone.insert(at, at + PAGE);
                }
            }
        }
        Ok(out)
    }
}

/// Where shared memory has content, without looking for it where nothing can have changed: that takes 20 ms a GiB.
///
/// Memory without a descriptor gets a page by being touched, which changes the number of its blocks, and loses one by madvise(2) with MADV_REMOVE, which sets its
/// change time; swapped pages count as before. So as long as both are what they were before the last look for content, the same pages have it.
#[derive(Debug, Default)]
pub struct Extent {
    seen: Option<Seen>,
    pages: PageSet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    blocks: u64,
    /// Seconds and nanoseconds.
    changed: (i64, i64),
}

/// Change times are as coarse as the kernel's ticks, before Linux 6.13: one that is as old as this tells of the next change.
const SETTLED: Duration = Duration::from_millis(100);

impl Extent {
    /// Where it has content now.
    pub fn look(&mut self, fd: BorrowedFd<'_>, size: u64) -> io::Result<&PageSet> {
        let stat = rustix::fs::fstat(fd)?;
        let now = Seen {
            blocks: stat.st_blocks as u64,
            changed: (stat.st_ctime, stat.st_ctime_nsec as i64),
        };
        if self.seen != Some(now) {
            let changed = UNIX_EPOCH + Duration::new(stat.st_ctime.max(0) as u64, stat.st_ctime_nsec as u32);
            let settled = SystemTime::now().duration_since(changed).is_ok_and(|age| age > SETTLED);
            self.pages = PageSet::from_ranges(crate::dump::pages::data(fd, size)?);
            self.seen = settled.then_some(now);
        }
        Ok(&self.pages)
    }
}

fn read_full(file: &File, at: u64, buf: &mut [u8]) -> io::Result<()> {
    let mut got = 0;
    while got < buf.len() {
        match file.read_at(&mut buf[got..], at + got as u64)? {
            0 => break,
            n => got += n,
        }
    }
    buf[got..].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn writes_holes_and_growth_show() {
        let mut f = tempfile::tempfile().unwrap();
        f.write_all(&[1u8; 5 * 4096]).unwrap();
        let mut c = Contents::default();
        assert_eq!(c.changed(7, &f, 5 * 4096).unwrap().dirty.pages(), 5);
        assert_eq!(c.changed(7, &f, 5 * 4096).unwrap().dirty.pages(), 5, "not sent yet");
        let all: Vec<_> = (0..5).map(|p| (7, p * 4096, hash(&[1; 4096]))).collect();
        c.sent(&all);
        assert!(c.changed(7, &f, 5 * 4096).unwrap().dirty.is_empty());
        f.write_all_at(&[2], 2 * 4096 + 9).unwrap();
        assert_eq!(c.changed(7, &f, 5 * 4096).unwrap().dirty.ranges(), [(2 * 4096, 3 * 4096)]);
        f.set_len(4096).unwrap();
        let less = c.changed(7, &f, 4096).unwrap();
        assert_eq!(less.gone.ranges(), [(4096, 5 * 4096)]);
        f.set_len(3 * 4096).unwrap();
        let more = c.changed(7, &f, 3 * 4096).unwrap();
        assert!(more.gone.is_empty() && more.dirty.pages() <= 2);
    }

    /// Against a look at everything, its naive twin.
    #[test]
    fn where_memory_has_content_is_known_after_every_change() {
        use crate::sys::{fdcalls, region::Region};
        const PAGES: usize = 64;
        let size = (PAGES * 4096) as u64;
        let f = File::from(fdcalls::shared_anonymous(size).unwrap());
        let memory = Region::map(&f, PAGES * 4096, 0).unwrap();
        let mut extent = Extent::default();
        let mut check = |what: &str| {
            let all = crate::dump::pages::data(f.as_fd(), size).unwrap();
            assert_eq!(extent.look(f.as_fd(), size).unwrap().ranges(), all, "{what}");
        };
        check("nothing");
        let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for turn in 0..40 {
            memory.write(turn % 16 * 2 * 4096, &[1]);
            check("a page was touched");
            // One is lost and another gained: as many as before. Now and then just after a look that could rely on the times.
            if turn % 4 == 0 {
                std::thread::sleep(SETTLED + Duration::from_millis(10));
                check("some time later");
            }
            nix::fcntl::fallocate(&f, punch, (turn % 16 * 2 * 4096) as i64, 4096).unwrap();
            memory.write((turn * 7 % 16 * 2 + 1) * 4096, &[1]);
            check("one was lost and another gained");
        }
    }

    /// Against the comparison by content, its naive twin.
    #[test]
    fn what_is_said_to_be_touched_is_sent_and_nothing_else() {
        let name = 7;
        let page = |n: u64| (n * 4096, (n + 1) * 4096);
        let fd = rustix::fs::memfd_create("object", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let f = File::from(fd);
        f.set_len(8 * 4096).unwrap();
        f.write_all_at(&[1; 6 * 4096], 0).unwrap();
        let all: Vec<_> = (0..6).map(|p| (name, p * 4096, hash(&[1; 4096]))).collect();
        let (mut c, mut twin) = (Contents::default(), Contents::default());
        for c in [&mut c, &mut twin] {
            assert_eq!(c.changed(name, &f, 8 * 4096).unwrap().dirty.pages(), 6);
            c.sent(&all[..5]);
        }
        f.write_all_at(&[2; 4096], 4096).unwrap();
        let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(&f, punch, 2 * 4096, 4096).unwrap();
        let expected = twin.changed(name, &f, 8 * 4096).unwrap();
        // Page 5 was never delivered.
        assert_eq!(expected.dirty.ranges(), [page(1), page(5)]);
        assert_eq!(expected.gone.ranges(), [page(2)]);
        let touched = PageSet::from_ranges([page(1), page(2), page(7)]);
        let found = c.touched(name, &f, 8 * 4096, &touched).unwrap();
        assert_eq!(
            (found.dirty.ranges(), found.gone.ranges()),
            (expected.dirty.ranges(), expected.gone.ranges())
        );
        c.sent(&[(name, 4096, hash(&[2; 4096])), (name, 5 * 4096, [0; 16])]);
        let rest = c.touched(name, &f, 8 * 4096, &PageSet::new()).unwrap();
        assert_eq!(rest.dirty.ranges(), [page(5)]);
        c.sent(&[(name, 5 * 4096, hash(&[1; 4096]))]);
        assert!(c.touched(name, &f, 8 * 4096, &PageSet::new()).unwrap().dirty.is_empty());
        assert!(c.changed(name, &f, 8 * 4096).unwrap().dirty.is_empty());
        c.resend_all();
        assert_eq!(c.touched(name, &f, 8 * 4096, &PageSet::new()).unwrap().dirty.pages(), 5);
    }
}

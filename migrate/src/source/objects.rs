//! Shared memory and unlinked files, compared by content: what changed since it was sent last.
//!
//! Such an object may be written through any mapping of it, by write(2) on a descriptor, from outside the tree, and holes may be punched into
//! it; no tracker sees all of that. So a hash of every page that was sent is kept (16 bytes of blake3), and a round sends the pages whose hash
//! differs. That reads the whole object each round and inside the freeze, about 1 s a GiB on one core: right, and slow for large objects.

use crate::{image::PAGE, pages::PageSet};
use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
};

/// First bytes of a page's blake3; all zero: unknown, so that the page differs from whatever is there.
pub type Hash = [u8; 16];

/// The hash of a page.
pub fn hash(page: &[u8]) -> Hash {
    let mut out = [0; 16];
    out.copy_from_slice(&blake3::hash(page).as_bytes()[..16]);
    out
}

/// What was sent of each object, by its name in page runs.
#[derive(Debug, Default)]
pub struct Contents {
    sent: HashMap<u32, HashMap<u64, Hash>>,
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
    /// Forgets an object.
    pub fn forget(&mut self, name: u32) {
        self.sent.remove(&name);
    }

    /// Takes all pages for sent with content that no page has.
    pub fn resend_all(&mut self) {
        self.sent.values_mut().flat_map(HashMap::values_mut).for_each(|h| *h = [0; 16]);
    }

    /// What was really sent of an object: (name, page, hash). Not what the look had found there: a page that was changed between the look and the read,
    /// and back again before the next look, would seem to be what the destination has.
    pub fn sent(&mut self, pages: &[(u32, u64, Hash)]) {
        for (name, at, hash) in pages {
            if let Some(sent) = self.sent.get_mut(name) {
                sent.insert(*at, *hash);
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
                    if sent.get(&at) != Some(&hash(page)) {
                        sent.insert(at, [0; 16]);
                        out.dirty.insert(at, at + PAGE);
                    }
                }
                at += n as u64;
            }
        }
        sent.retain(|&at, _| {
            let keep = there.contains(at);
            if !keep {
                out.gone.insert(at, at + PAGE);
            }
            keep
        });
        Ok(out)
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
}

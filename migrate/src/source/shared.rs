//! Shared memory in rounds: by page tables where they tell everything, else by content.
//!
//! Memory that is shared and anonymous (mmap(2) with MAP_SHARED | MAP_ANONYMOUS) has no name and no descriptor: it is written through the page tables
//! of the processes that map it, which are those that were there when it was made, and their children. If all of them are tracked
//! ([`crate::track::shared`]) the union of what they wrote is what changed. So a look trusts the page tables for an object when
//!
//! - the same mappings of it, of the same address spaces, were tracked at the look before and at this one, and nobody else maps it;
//! - nobody was forked since the look before began, no child of before is unaccounted for ([`Listener`]), and every tracked process that is there was
//!   found by both looks (lists of children may be incomplete while processes end, proc_pid_children(5));
//! - no descriptor leads to it. Only the frozen tree is asked that: such a descriptor can only be had through /proc/PID/map_files, which takes
//!   privileges, and one that was opened, written through and closed between two looks is the one thing that goes unnoticed. The file's times do not tell, since
//!   they change with every write through a page table as well;
//! - madvise(2) has never dropped any of it: it is not told whether from the page tables (MADV_DONTNEED) or for good (MADV_REMOVE), nor when it
//!   has happened.
//!
//! Otherwise it is compared by content, which is always right: [`super::objects`]. So a fork costs one slow look, and that is the price of everything
//! that is not understood here. Memfds and unlinked files are always compared: their descriptors reach whoever they are sent to.

use super::objects::{Changed, Contents};
use crate::{
    image::{Backing, Kind, ObjectKind, Tree, Vma},
    pages::PageSet,
    procfs::{self, maps::Mapping},
    restore::rebuild::Names,
    track::listener::Listener,
};
use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    sync::Arc,
};

/// Smaller mappings are compared as fast as they are tracked.
const LEAST: u64 = 64 << 10;
/// Looks in a row in which children could not be told apart, after which page tables are not trusted any more.
const PATIENCE: u32 = 3;
/// Of the memory that is available so much may go to page tables: 2 MiB for each GiB of each mapping.
const SHARE: u64 = 16;

/// A mapping of an object: address space by name, start, end, offset in the object.
type Mapper = (u32, u64, u64, u64);

#[derive(Debug, Default)]
struct Look {
    /// Forks when it began.
    births: u64,
    /// Every process that may write was found.
    complete: bool,
    /// Of each object its mappings, if all of them were tracked.
    objects: HashMap<u32, Vec<Mapper>>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Shared {
    contents: Contents,
    listener: Option<Arc<Listener>>,
    last: Look,
    now: Look,
    /// The mappings that this look tracks, with what was written, where that is known: by address space and start.
    written: HashMap<(u32, u64), Option<PageSet>>,
    puzzled: u32,
    /// Page tables are not trusted any more.
    given_up: bool,
}

/// Whether a mapping is of the kind that page tables tell everything of.
pub fn trackable(m: &Mapping) -> bool {
    m.shared && m.name.starts_with(b"/dev/zero") && m.end - m.start >= LEAST
}

/// The same, of a tree that was read.
pub fn tracked(tree: &Tree, v: &Vma) -> bool {
    let Backing::Object { object, .. } = v.backing else { return false };
    let known = tree.objects.get(object as usize);
    v.shared && v.len() >= LEAST && known.is_some_and(|o| o.kind == ObjectKind::SharedAnonymous)
}

impl Shared {
    /// What was sent of all objects.
    pub fn contents(&mut self) -> &mut Contents {
        &mut self.contents
    }

    /// A look begins: nothing of the tree has been read for it.
    pub fn begin(&mut self) {
        self.now = Look {
            births: self.listener.as_ref().map_or(0, |f| f.births()),
            complete: true,
            objects: HashMap::new(),
        };
        self.written.clear();
    }

    /// Whether this tree's shared memory is worth listening to forks, and then who does.
    pub fn listen(&mut self, tree: &Tree) -> Option<Arc<Listener>> {
        if self.given_up {
            return None;
        }
        let mapped: u64 = tree
            .mms
            .iter()
            .flat_map(|m| &m.vmas)
            .filter(|v| tracked(tree, v))
            .map(Vma::len)
            .sum();
        if mapped == 0 || mapped / 512 > procfs::meminfo("MemAvailable").unwrap_or(0) / SHARE {
            return None;
        }
        if self.listener.is_none() {
            match Listener::start() {
                Ok(f) => self.listener = Some(Arc::new(f)),
                Err(e) => self.give_up(&e.to_string()),
            }
        }
        self.listener.clone()
    }

    /// Before newcomers are tracked: whether those that were `born` with tracked memory may be now. They are children whose inherited tracking has to be given
    /// up for that, which is done when it is clear that no other child is there.
    pub fn adopt_children(&mut self, born: usize) -> bool {
        let Some(listener) = &self.listener else { return true };
        let waiting = listener.children();
        if waiting == 0 {
            self.puzzled = 0;
            return true;
        }
        if waiting == born && listener.births() == self.now.births {
            listener.let_go();
            self.puzzled = 0;
            return true;
        }
        self.puzzled += 1;
        if self.puzzled < PATIENCE {
            return false;
        }
        self.give_up("children cannot be told apart");
        true
    }

    fn give_up(&mut self, why: &str) {
        if !self.given_up {
            tracing::debug!(why, "shared memory is compared from here on");
        }
        self.given_up = true;
        self.listener = None;
    }

    /// Page tables are not trusted any more: no process has to be watched.
    pub fn given_up(&self) -> bool {
        self.given_up
    }

    /// A process that is tracked and there was not found.
    pub fn incomplete(&mut self) {
        self.now.complete = false;
    }

    /// A mapping is tracked, and what it said.
    pub fn saw(&mut self, space: u32, start: u64, written: Option<PageSet>) {
        self.written.insert((space, start), written);
    }

    /// Of each object all of whose mappings are tracked: these, and if all of them know it what was written, by offset.
    fn mappers(&self, tree: &Tree, names: &Names) -> HashMap<u32, (Vec<Mapper>, Option<PageSet>)> {
        let mut out: HashMap<u32, (Vec<Mapper>, Option<PageSet>)> = HashMap::new();
        let mut untracked = HashSet::new();
        for (mm, space) in tree.mms.iter().zip(&names.spaces) {
            for v in &mm.vmas {
                let Backing::Object { object, offset, .. } = v.backing else {
                    continue;
                };
                let Some(name) = names.objects.get(object as usize) else { continue };
                let (mappers, all) = out.entry(*name).or_insert_with(|| (Vec::new(), Some(PageSet::new())));
                mappers.push((*space, v.start, v.end, offset));
                match (self.written.get(&(*space, v.start)), all.as_mut()) {
                    (Some(Some(w)), Some(all)) => {
                        let shifted = w.ranges().iter().map(|r| (r.0 - v.start + offset, r.1 - v.start + offset));
                        all.extend(&PageSet::from_ranges(shifted));
                    }
                    (Some(_), _) => *all = None,
                    (None, _) => drop(untracked.insert(*name)),
                }
            }
        }
        let open = tree.descriptions.iter().filter_map(|d| match d.kind {
            Kind::Object { object, .. } => names.objects.get(object as usize).copied(),
            _ => None,
        });
        untracked.extend(open);
        out.retain(|name, _| !untracked.contains(name));
        out
    }

    /// How the objects of a tree differ from what was sent of them, by their names, and how many bytes were compared for that. `without`: names of objects
    /// that nothing is sent of.
    pub fn changed(
        &mut self,
        tree: &Tree,
        names: &Names,
        files: &[File],
        without: &HashSet<u32>,
    ) -> io::Result<(Vec<(u32, Changed)>, u64)> {
        let mut out = Vec::new();
        let mut compared = 0;
        let mut mappers = self.mappers(tree, names);
        if let Some(why) = self.listener.as_ref().and_then(|l| l.useless()) {
            self.give_up(why);
        }
        let births = self.listener.as_ref().map_or(0, |f| f.births());
        let children = self.listener.as_ref().map_or(0, |f| f.children());
        self.now.complete &= children == 0 && !self.given_up;
        let trusted = self.last.complete && self.now.complete && births == self.last.births;
        for ((o, file), name) in tree.objects.iter().zip(files).zip(&names.objects) {
            if without.contains(name) {
                out.push((*name, Changed::default()));
                continue;
            }
            let mut touched = None;
            if let Some((mut who, written)) = mappers.remove(name) {
                // The frozen tree's processes may be in another order.
                who.sort_unstable();
                if trusted && self.last.objects.get(name) == Some(&who) {
                    touched = written;
                }
                self.now.objects.insert(*name, who);
            }
            let changed = match touched {
                Some(touched) => self.contents.touched(*name, file, o.size, &touched)?,
                None => {
                    compared += o.size;
                    self.contents.changed(*name, file, o.size)?
                }
            };
            out.push((*name, changed));
        }
        if compared > 0 {
            let forks = births - self.last.births.min(births);
            let (before, now) = (self.last.complete, self.now.complete);
            tracing::debug!(compared, forks, children, before, now, "shared memory is compared");
        }
        self.last = std::mem::take(&mut self.now);
        Ok((out, compared))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        image::{Host, Mm, Object, VmaFlags},
        source::objects::hash,
    };
    use std::os::unix::fs::FileExt;

    const NAME: u32 = 0x8000_0000;
    const SIZE: u64 = 32 * 4096;
    const AT: u64 = 0x7000_0000;

    /// As many processes as address spaces, which all map the whole of one object.
    fn tree(at: &[u64]) -> (Tree, Names) {
        let mut tree = Tree::empty(Host::default());
        tree.objects.push(Object {
            kind: ObjectKind::SharedAnonymous,
            size: SIZE,
            owner: (0, 0, 0),
            seals: 0,
        });
        for start in at {
            let vma = Vma {
                start: *start,
                end: start + SIZE,
                prot: 3,
                shared: true,
                backing: Backing::Object {
                    object: 0,
                    offset: 0,
                    writable: true,
                },
                flags: VmaFlags::default(),
                pkey: 0,
                name: None,
            };
            tree.mms.push(Mm {
                vmas: vec![vma],
                ..Mm::default()
            });
        }
        let names = Names {
            spaces: (0..at.len() as u32).collect(),
            objects: vec![NAME],
        };
        (tree, names)
    }

    struct Source {
        shared: Shared,
        file: File,
    }

    impl Source {
        /// A look at mappings that say this; everything that it finds is sent. Bytes compared, pages sent.
        fn look(&mut self, tree: &(Tree, Names), said: &[(u64, Option<&[u64]>)]) -> (u64, Vec<u64>) {
            self.shared.begin();
            for (space, (at, written)) in said.iter().enumerate() {
                let pages = written.map(|w| PageSet::from_ranges(w.iter().map(|p| (at + p * 4096, at + (p + 1) * 4096))));
                self.shared.saw(space as u32, *at, pages);
            }
            self.finish(tree)
        }

        fn finish(&mut self, (tree, names): &(Tree, Names)) -> (u64, Vec<u64>) {
            let file = [self.file.try_clone().unwrap()];
            let (changes, compared) = self.shared.changed(tree, names, &file, &HashSet::new()).unwrap();
            let ranges = changes[0].1.dirty.ranges();
            let pages: Vec<u64> = ranges.iter().flat_map(|r| (r.0..r.1).step_by(4096)).collect();
            let mut page = [0; 4096];
            let sent = pages.iter().map(|at| {
                self.file.read_exact_at(&mut page, *at).unwrap();
                (NAME, *at, hash(&page))
            });
            let sent: Vec<_> = sent.collect();
            self.shared.contents().sent(&sent);
            (compared, pages.iter().map(|at| at / 4096).collect())
        }

        fn write(&self, page: u64, byte: u8) {
            self.file.write_all_at(&[byte; 4096], page * 4096).unwrap();
        }
    }

    #[test]
    fn page_tables_are_trusted_when_the_same_mappings_were_tracked_before() {
        let fd = rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut s = Source {
            shared: Shared::default(),
            file: File::from(fd),
        };
        s.file.set_len(SIZE).unwrap();
        s.write(1, 1);
        let one = tree(&[AT]);
        assert_eq!(s.look(&one, &[(AT, None)]), (SIZE, vec![1]));
        // Said to be written, wherever it was.
        s.write(2, 1);
        s.write(3, 1);
        assert_eq!(s.look(&one, &[(AT, Some(&[2, 3]))]), (0, vec![2, 3]));
        assert_eq!(s.look(&one, &[(AT, Some(&[]))]), (0, vec![]));
        // Another process maps it, not tracked yet: what it has written is found by content, and from the next look on by its page tables.
        let two = tree(&[AT, 2 * AT]);
        s.write(4, 1);
        assert_eq!(s.look(&two, &[(AT, Some(&[]))]), (SIZE, vec![4]));
        s.write(5, 1);
        assert_eq!(s.look(&two, &[(AT, Some(&[])), (2 * AT, None)]), (SIZE, vec![5]));
        s.write(6, 1);
        assert_eq!(s.look(&two, &[(AT, Some(&[])), (2 * AT, Some(&[6]))]), (0, vec![6]));
        // The same processes in another order.
        let (turned, mut names) = tree(&[2 * AT, AT]);
        names.spaces.reverse();
        s.shared.begin();
        s.shared.saw(0, AT, Some(PageSet::new()));
        s.shared.saw(1, 2 * AT, Some(PageSet::new()));
        assert_eq!(s.finish(&(turned, names)).0, 0);
        // It has ended, and may have written before.
        s.write(7, 1);
        assert_eq!(s.look(&one, &[(AT, Some(&[]))]), (SIZE, vec![7]));
        // One that is there was not found, now and then before.
        for _ in 0..2 {
            s.shared.begin();
            s.shared.saw(0, AT, Some(PageSet::new()));
            s.shared.incomplete();
            assert_eq!(s.finish(&one).0, SIZE);
        }
        assert_eq!(s.look(&one, &[(AT, Some(&[]))]).0, SIZE);
        assert_eq!(s.look(&one, &[(AT, Some(&[]))]).0, 0);
        // A descriptor leads to it.
        let mut open = tree(&[AT]);
        open.0.descriptions.push(crate::image::Description {
            flags: 2,
            owner: None,
            signal: 0,
            kind: Kind::Object { object: 0, pos: 0 },
        });
        assert_eq!(s.look(&open, &[(AT, Some(&[]))]).0, SIZE);
    }
}

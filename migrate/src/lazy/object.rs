//! Shared memory whose content follows, as the keeper has it.
//!
//! Private memory that is missing is not there: the kernel asks for it at the first touch. Shared memory cannot be treated so, because the kernel's event does not
//! tell whether a program drops a range from its own page tables (MADV_DONTNEED), after which the content that is still to come has to be there, or for
//! everybody (MADV_REMOVE), after which it has to be zeros. So the pages of shared memory that follow are made at once, without their content
//! (fallocate(2)), and the mappings are registered for *minor* faults (Linux 5.14): the kernel asks before it maps a page that is there. Then each page tells by itself
//! what it is:
//!
//! - there and missing: its content has not come; whoever touches it waits;
//! - there: its content has come; it is mapped (UFFDIO_CONTINUE), as often as somebody has dropped it from his page tables;
//! - not there: it was dropped for everybody, or never had content. Zeros.
//!
//! Content is written through a mapping of the keeper's own, in which a page that is not there is an error and not made anew (UFFD_FEATURE_SIGBUS): a page that was
//! dropped a moment before stays dropped.
//!
//! Where the kernel makes huge pages of shared memory (shmem_enabled in /sys/kernel/mm/transparent_hugepage, "never" unless somebody has changed it), MADV_COLLAPSE
//! maps pages without asking (seen on Linux 6.18): there it is not done ([`possible`]), and shared memory comes before the resume.
//!
//! Nobody can reach the memory but through the mappings of the tree, all of which are registered: this is done for
//! shared anonymous memory without descriptors alone, since read(2) asks nobody.

use super::audit;
use crate::{
    image::PAGE,
    sys::{
        mem,
        region::Region,
        uffd::{self, Userfault},
    },
};
use std::{collections::HashMap, fs, io, os::fd::AsRawFd, path::Path};

/// Whether the content of shared memory can follow on this host.
pub fn possible() -> bool {
    uffd::minor_works() && !makes_huge_pages(Path::new("/sys/kernel/mm/transparent_hugepage"))
}

/// Whether huge pages of shared memory are made, by the settings in this directory (the kernel's admin-guide/mm/transhuge).
fn makes_huge_pages(dir: &Path) -> bool {
    let sizes = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let chosen = |at: &Path| {
        let text = fs::read_to_string(at.join("shmem_enabled")).unwrap_or_default();
        let word = text.split_ascii_whitespace().find_map(|w| w.strip_prefix('[')?.strip_suffix(']'));
        word.is_some_and(|w| !["never", "deny", "inherit"].contains(&w))
    };
    chosen(dir) || sizes.filter(|p| p.is_dir()).any(|p| chosen(&p))
}

/// See the module.
#[derive(Debug)]
pub struct Object {
    memory: Region,
    /// Registers `memory`.
    _refusing: Userfault,
    /// For the memory oracle: hashes of the pages that follow, by offset; those of zeros are left out.
    expected: Option<HashMap<u64, u64>>,
}

/// What became of some pages.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Put {
    /// Pages written.
    pub pages: u64,
    /// Pages that the memory oracle compared.
    pub compared: u64,
    /// Offsets of those that differ.
    pub different: Vec<u64>,
}

impl Object {
    /// Of `size` bytes. `expected`: (offset, [`crate::oracle::hash`]) of what follows, for the memory oracle.
    pub fn open(fd: &impl AsRawFd, size: u64, expected: Option<Vec<(u64, u64)>>) -> io::Result<Object> {
        let memory = Region::map(fd, size as usize, 0)?;
        let start = memory.local(0, size as usize);
        Ok(Object {
            _refusing: Userfault::refusing(start, start + size)?,
            memory,
            expected: expected.map(|e| e.into_iter().collect()),
        })
    }

    /// Gives pages from an offset on their content. Those that are not there any more are left as they are.
    ///
    /// # Errors
    /// ENOMEM above all; then all of it can be tried again.
    pub fn put(&self, offset: u64, data: &[u8]) -> io::Result<Put> {
        let mut out = Put::default();
        if self.write(offset, data)? {
            out.pages = data.len() as u64 / PAGE;
        } else {
            for (page, at) in data.chunks(PAGE as usize).zip((offset..).step_by(PAGE as usize)) {
                out.pages += u64::from(self.write(at, page)?);
            }
        }
        if let Some(expected) = &self.expected {
            let mut page = [0; PAGE as usize];
            for at in (offset..offset + data.len() as u64).step_by(PAGE as usize) {
                if mem::read(me(), self.memory.local(at as usize, PAGE as usize), &mut page).is_err() {
                    continue;
                }
                out.compared += 1;
                if expected.get(&at).copied().unwrap_or(0) != audit::value(&page) {
                    out.different.push(at);
                }
            }
        }
        Ok(out)
    }

    /// False: not all of it is there.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        // By a system call: a page that is not there is an errno of it, and would be a signal here.
        match mem::write(me(), self.memory.local(offset as usize, data.len()), &[data]) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::WriteZero || e.raw_os_error() == Some(libc::EFAULT) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

fn me() -> i32 {
    std::process::id() as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle;
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
    use std::os::{fd::OwnedFd, unix::fs::FileExt};

    fn object(expected: Option<Vec<(u64, u64)>>) -> Option<(std::fs::File, Object)> {
        let fd: OwnedFd = memfd_create("object", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 16 * PAGE).unwrap();
        fallocate(&fd, FallocateFlags::empty(), 0, 8 * PAGE).unwrap();
        let object = Object::open(&fd, 16 * PAGE, expected).ok()?;
        Some((fd.into(), object))
    }

    #[test]
    fn a_page_that_is_not_there_any_more_is_not_made_anew() {
        let Some((file, object)) = object(None) else {
            return eprintln!("SKIP a_page_that_is_not_there_any_more_is_not_made_anew: no userfaultfd");
        };
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, punch, 2 * PAGE, PAGE).unwrap();
        let put = object.put(PAGE, &[7; 3 * PAGE as usize]).unwrap();
        assert_eq!(put.pages, 2, "one of three has been dropped");
        assert_eq!(
            object.put(9 * PAGE, &[7; PAGE as usize]).unwrap().pages,
            0,
            "one that was never made"
        );
        let mut all = vec![1; 16 * PAGE as usize];
        file.read_exact_at(&mut all, 0).unwrap();
        let seven: Vec<usize> = (0..16).filter(|p| all[p * PAGE as usize] == 7).collect();
        assert_eq!(seven, [1, 3]);
        assert!(all.iter().all(|b| [0, 7].contains(b)));
    }

    #[test]
    fn huge_pages_of_shared_memory_show_in_the_settings() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!makes_huge_pages(dir.path()), "a kernel without huge pages");
        let set = |text: &str| fs::write(dir.path().join("shmem_enabled"), text).unwrap();
        set("always within_size advise [never] deny force\n");
        assert!(!makes_huge_pages(dir.path()));
        set("always within_size [advise] never deny force\n");
        assert!(makes_huge_pages(dir.path()));
        set("always within_size advise never [deny] force\n");
        let size = dir.path().join("hugepages-2048kB");
        fs::create_dir(&size).unwrap();
        fs::write(size.join("shmem_enabled"), "always [inherit] within_size advise never\n").unwrap();
        assert!(!makes_huge_pages(dir.path()));
        fs::write(size.join("shmem_enabled"), "[always] inherit within_size advise never\n").unwrap();
        assert!(makes_huge_pages(dir.path()));
    }

    #[test]
    fn the_oracle_sees_what_differs() {
        let right = vec![(0, oracle::hash(&[1; PAGE as usize])), (PAGE, oracle::hash(&[2; PAGE as usize]))];
        let Some((_file, object)) = object(Some(right)) else {
            return eprintln!("SKIP the_oracle_sees_what_differs: no userfaultfd");
        };
        let mut data = vec![1; PAGE as usize];
        data.resize(2 * PAGE as usize, 3);
        data.resize(3 * PAGE as usize, 0);
        let put = object.put(0, &data).unwrap();
        assert_eq!((put.pages, put.compared, put.different), (3, 3, vec![PAGE]));
    }
}

//! Memory shared between the agent and the tasks it steers: a sparse memfd for new processes, or a page of the target seen through map_files.

use super::check;
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
};

/// A MAP_SHARED mapping in the agent. All access is by copy, bounds-checked.
#[derive(Debug)]
pub struct Region {
    local: *mut u8,
    len: usize,
    /// Address in the steered tasks.
    pub remote: u64,
}

// SAFETY: the mapping is plain shared memory without thread affinity.
unsafe impl Send for Region {}
// SAFETY: all access is by copy through raw pointers, or atomic; who may write where is a matter of what both ends agreed on.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `file` (at offset 0) anywhere; the tasks see it at `remote`.
    pub fn map(file: &impl AsRawFd, len: usize, remote: u64) -> io::Result<Region> {
        Self::map_with(file, len, remote, 0, libc::MAP_SHARED, libc::PROT_READ | libc::PROT_WRITE)
    }

    /// Maps one page or more of `file` at exactly `remote`, readable and writable, where forked children then have it too.
    pub fn map_fixed(file: &impl AsRawFd, len: usize, remote: u64) -> io::Result<Region> {
        Self::map_with(
            file,
            len,
            remote,
            remote,
            libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE,
            libc::PROT_READ | libc::PROT_WRITE,
        )
    }

    /// Makes a sparse memfd and maps it executable at exactly `remote`, where forked children then have it too.
    pub fn create(name: &std::ffi::CStr, len: usize, remote: u64) -> io::Result<Region> {
        // SAFETY: name is a C string; the flags are valid.
        let fd = check(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) } as i64)?;
        // SAFETY: a fresh descriptor that nobody else owns.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        file.set_len(len as u64)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        Self::map_with(&file, len, remote, remote, libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE, prot)
    }

    fn map_with(file: &impl AsRawFd, len: usize, remote: u64, hint: u64, flags: i32, prot: i32) -> io::Result<Region> {
        // SAFETY: never replaces a mapping of ours (no MAP_FIXED); the result is checked.
        let p = unsafe { libc::mmap(hint as *mut _, len, prot, flags, file.as_raw_fd(), 0) };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Region {
            local: p.cast(),
            len,
            remote,
        })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|e| e <= self.len),
            "region access at {offset}+{len} of {}",
            self.len
        );
        // SAFETY: inside the mapping, by the assertion.
        unsafe { self.local.add(offset) }
    }

    /// Address of some bytes in this process, for a call that reads them.
    pub fn local(&self, offset: usize, len: usize) -> u64 {
        self.at(offset, len) as u64
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let p = self.at(offset, data.len());
        // SAFETY: bounds were checked; the source is a distinct slice.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), p, data.len()) }
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        let p = self.at(offset, out.len());
        // SAFETY: bounds were checked; the destination is a distinct slice.
        unsafe { std::ptr::copy_nonoverlapping(p, out.as_mut_ptr(), out.len()) }
    }

    /// Copies a little-endian u64 out.
    pub fn read_u64(&self, offset: usize) -> u64 {
        let mut b = [0; 8];
        self.read(offset, &mut b);
        u64::from_le_bytes(b)
    }

    /// A word that tasks and agent share.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert_eq!(offset % 4, 0);
        // SAFETY: in bounds and aligned; the mapping lives as long as self.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }

    /// FUTEX_WAKE of every waiter on a word.
    pub fn wake(&self, offset: usize) {
        let w = self.word(offset).as_ptr();
        // SAFETY: a valid futex word; FUTEX_WAKE does not touch memory.
        unsafe { libc::syscall(libc::SYS_futex, w, libc::FUTEX_WAKE, i32::MAX, 0, 0, 0) };
    }

    /// FUTEX_WAIT on a word while it holds `value`, at most `ms` milliseconds.
    pub fn wait(&self, offset: usize, value: u32, ms: u32) {
        let w = self.word(offset);
        if w.load(Ordering::Acquire) != value {
            return;
        }
        let t = libc::timespec {
            tv_sec: (ms / 1000) as i64,
            tv_nsec: (ms % 1000) as i64 * 1_000_000,
        };
        // SAFETY: a valid futex word and timespec.
        unsafe { libc::syscall(libc::SYS_futex, w.as_ptr(), libc::FUTEX_WAIT, value, &raw const t, 0, 0) };
    }

    /// Address of an offset in the steered tasks.
    pub fn addr(&self, offset: usize) -> u64 {
        self.remote + offset as u64
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: our own mapping; no reference into it outlives self.
        unsafe { libc::munmap(self.local.cast(), self.len) };
    }
}

//! userfaultfd(2): what the kernel offers, and write-protect tracking of another process's memory through its descriptor.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// UFFD_FEATURE_WP_ASYNC.
pub const WP_ASYNC: u64 = 1 << 15;
/// UFFD_FEATURE_WP_HUGETLBFS_SHMEM.
const WP_SHMEM: u64 = 1 << 12;
/// UFFD_USER_MODE_ONLY: allowed without privileges; asynchronous write protection never asks anybody, so nothing is lost by it.
pub const USER_MODE_ONLY: u64 = 1;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<Api>() == 24);
// _IOWR(0xAA, 0x3F, struct uffdio_api)
const UFFDIO_API: u64 = 3 << 30 | 24 << 16 | 0xaa << 8 | 0x3f;

/// Features that UFFDIO_API offers to this process.
pub fn features() -> io::Result<u64> {
    // SAFETY: no pointers.
    let fd = super::check(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = Api {
        api: 0xaa,
        features: 0,
        ioctls: 0,
    };
    // SAFETY: `api` outlives the call.
    super::check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } as i64)?;
    Ok(api.features)
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<Register>() == 32);
// _IOWR(0xAA, 0x00, struct uffdio_register)
const UFFDIO_REGISTER: u64 = 3 << 30 | 32 << 16 | 0xaa << 8;
const MODE_WP: u64 = 2;

/// A userfaultfd of another process, taken from it with pidfd_getfd(2); it works on that process's addresses.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// Takes the descriptor numbered `fd` in process `pid` and agrees on asynchronous write protection.
    pub fn take(pid: i32, fd: i32) -> io::Result<Userfault> {
        // SAFETY: no pointers.
        let pidfd = super::check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // SAFETY: a fresh descriptor that nobody else owns.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
        // SAFETY: no pointers.
        let fd = super::check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
        // SAFETY: a fresh descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut api = Api {
            api: 0xaa,
            features: WP_ASYNC | WP_SHMEM,
            ioctls: 0,
        };
        // SAFETY: `api` outlives the call.
        super::check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } as i64)?;
        Ok(Userfault { fd })
    }

    /// Registers a range for write protection. EBUSY: another userfaultfd has it; EINVAL: not all of it is mapped, or cannot be tracked.
    pub fn register(&self, start: u64, end: u64) -> io::Result<()> {
        let mut r = Register {
            start,
            len: end - start,
            mode: MODE_WP,
            ioctls: 0,
        };
        // SAFETY: `r` outlives the call.
        super::check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut r) } as i64).map(drop)
    }
}

//! userfaultfd(2): what the kernel offers.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// UFFD_FEATURE_WP_ASYNC.
pub const WP_ASYNC: u64 = 1 << 15;

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

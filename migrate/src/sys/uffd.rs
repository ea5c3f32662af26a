//! userfaultfd(2): what the kernel offers; write-protect tracking of another process's memory, and filling its missing pages, through its descriptor.
//!
//! Constants and layouts are those of `linux/userfaultfd.h`; what the calls do is in userfaultfd(2), ioctl_userfaultfd(2) and the kernel's
//! admin-guide/mm/userfaultfd.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    sync::OnceLock,
};

/// UFFD_FEATURE_WP_ASYNC.
pub const WP_ASYNC: u64 = 1 << 15;
/// UFFD_FEATURE_WP_HUGETLBFS_SHMEM.
const WP_SHMEM: u64 = 1 << 12;
/// UFFD_FEATURE_SIGBUS: a fault on a missing page is an error, nobody is asked.
const SIGBUS: u64 = 1 << 7;
/// UFFD_FEATURE_MINOR_SHMEM: shared memory tells of pages that are there and not mapped yet (Linux 5.14).
const MINOR_SHMEM: u64 = 1 << 10;
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

/// A userfaultfd of this process, nothing agreed on yet.
pub(crate) fn create() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = super::check(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// UFFDIO_API: asks for features, and returns all there are.
fn agree(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = Api {
        api: 0xaa,
        features,
        ioctls: 0,
    };
    // SAFETY: `api` outlives the call.
    super::check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } as i64)?;
    Ok(api.features)
}

/// Features that UFFDIO_API offers to this process.
pub fn features() -> io::Result<u64> {
    agree(&create()?, 0)
}

/// Whether this process can fill missing pages of others and hear of their forks. Err: why not.
pub fn missing_works() -> io::Result<()> {
    let has = features().map_err(|e| io::Error::new(e.kind(), format!("userfaultfd(2): {e}")))?;
    if has & EVENTS != EVENTS {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel's userfaultfd lacks events (Linux 4.11)",
        ));
    }
    agree(&create()?, EVENTS).map(drop)
}

/// Whether tasks can be made to wait for the content of shared memory: see [`crate::lazy::object`].
pub fn minor_works() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| features().is_ok_and(|has| has & MINOR_SHMEM != 0))
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
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;
const MODE_MINOR: u64 = 4;

/// UFFD_FEATURE_EVENT_FORK.
const EVENT_FORK: u64 = 1 << 1;
/// UFFD_FEATURE_EVENT_REMOVE.
const EVENT_REMOVE: u64 = 1 << 3;
/// What a copy's userfaultfd needs: every event that moves memory about, and missing pages of shared memory.
const EVENTS: u64 = EVENT_FORK | 1 << 2 | EVENT_REMOVE | MISSING_SHMEM | 1 << 6;
/// UFFD_FEATURE_MISSING_SHMEM.
const MISSING_SHMEM: u64 = 1 << 5;

/// [`EVENTS`], and asynchronous write protection and minor faults where there are any: they do nothing to what is not registered for them.
fn missing_features() -> u64 {
    static ALSO: OnceLock<u64> = OnceLock::new();
    EVENTS | ALSO.get_or_init(|| features().unwrap_or(0) & (WP_ASYNC | WP_SHMEM | MINOR_SHMEM))
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}
/// UFFDIO_COPY_MODE_WP.
const COPY_MODE_WP: u64 = 2;
// _IOWR(0xAA, 0x03, struct uffdio_copy)
const UFFDIO_COPY: u64 = 3 << 30 | 40 << 16 | 0xaa << 8 | 0x03;

/// struct uffdio_zeropage and struct uffdio_continue.
#[repr(C)]
struct Fill {
    start: u64,
    len: u64,
    mode: u64,
    done: i64,
}
const _: () = assert!(size_of::<Fill>() == 32);
// _IOWR(0xAA, 0x04, struct uffdio_zeropage)
const UFFDIO_ZEROPAGE: u64 = 3 << 30 | 32 << 16 | 0xaa << 8 | 0x04;
// _IOWR(0xAA, 0x07, struct uffdio_continue)
const UFFDIO_CONTINUE: u64 = 3 << 30 | 32 << 16 | 0xaa << 8 | 0x07;

#[repr(C)]
struct Writeprotect {
    start: u64,
    len: u64,
    mode: u64,
}
// _IOWR(0xAA, 0x06, struct uffdio_writeprotect)
const UFFDIO_WRITEPROTECT: u64 = 3 << 30 | 24 << 16 | 0xaa << 8 | 0x06;

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}
// _IOR(0xAA, 0x02, struct uffdio_range)
const UFFDIO_WAKE: u64 = 2 << 30 | 16 << 16 | 0xaa << 8 | 0x02;

/// What a userfaultfd tells.
#[derive(Debug)]
pub enum Message {
    /// A task waits for the page at this address.
    Fault {
        /// Page aligned.
        address: u64,
        /// The page is there, and not mapped yet: [`Userfault::register_shared`].
        minor: bool,
    },
    /// The process has forked; the child's own userfaultfd.
    Fork(Userfault),
    /// mremap(2) has moved memory.
    Remap {
        /// From here
        from: u64,
        /// to here,
        to: u64,
        /// so many bytes.
        len: u64,
    },
    /// madvise(2) drops this range: what it held is not wanted any more.
    Remove {
        /// First byte.
        start: u64,
        /// Behind the last.
        end: u64,
    },
    /// munmap(2), or another mapping in its place.
    Unmap {
        /// First byte.
        start: u64,
        /// Behind the last.
        end: u64,
    },
}

/// Why pages could not be put in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FillError {
    /// EAGAIN: an event waits to be read, after which the memory may be somewhere else.
    Event,
    /// EEXIST: the page is there already.
    There,
    /// ENOENT: no registered mapping there, or more than one.
    NoMapping,
    /// ESRCH: the address space is no more.
    Gone,
    /// EFAULT: the page to be mapped is not there.
    Hole,
    /// Something else, by its errno: ENOMEM above all.
    Other(i32),
}

impl FillError {
    fn of(errno: i32) -> FillError {
        match errno {
            libc::EAGAIN => FillError::Event,
            libc::EEXIST => FillError::There,
            libc::ENOENT => FillError::NoMapping,
            libc::ESRCH => FillError::Gone,
            libc::EFAULT => FillError::Hole,
            e => FillError::Other(e),
        }
    }
}

/// A userfaultfd of another process, taken from it with pidfd_getfd(2); it works on that process's addresses.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// Takes the descriptor numbered `fd` in process `pid` and agrees on asynchronous write protection.
    pub fn take(pid: i32, fd: i32) -> io::Result<Userfault> {
        Self::take_with(pid, fd, WP_ASYNC | WP_SHMEM)
    }

    /// The same, and agrees on telling of forks and of ranges that madvise(2) drops: each waits until it was read. EPERM without CAP_SYS_PTRACE.
    pub fn take_with_events(pid: i32, fd: i32) -> io::Result<Userfault> {
        Self::take_with(pid, fd, WP_ASYNC | WP_SHMEM | EVENT_FORK | EVENT_REMOVE)
    }

    /// Takes the descriptor numbered `fd` in process `pid` and agrees on filling its missing pages, and on telling which of them are written then, where
    /// the kernel can. EPERM without CAP_SYS_PTRACE, which the events of forks need.
    pub fn take_missing(pid: i32, fd: i32) -> io::Result<Userfault> {
        Self::take_with(pid, fd, missing_features())
    }

    /// The same for this process.
    #[cfg(test)]
    pub fn own_missing() -> io::Result<Userfault> {
        let fd = create()?;
        agree(&fd, missing_features())?;
        Ok(Userfault { fd })
    }

    fn take_with(pid: i32, fd: i32, features: u64) -> io::Result<Userfault> {
        // SAFETY: no pointers.
        let pidfd = super::check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // SAFETY: a fresh descriptor that nobody else owns.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
        // SAFETY: no pointers.
        let fd = super::check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
        // SAFETY: a fresh descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        agree(&fd, features)?;
        Ok(Userfault { fd })
    }

    /// Registers a range for write protection. EBUSY: another userfaultfd has it; EINVAL: not all of it is mapped, or cannot be tracked.
    pub fn register(&self, start: u64, end: u64) -> io::Result<()> {
        self.register_with(start, end, MODE_WP)
    }

    /// Registers a range for missing pages, with the same errors; EPERM: shared memory that the process may not write to. `watch`: for write protection as
    /// well, which pages have that are put in place with it.
    pub fn register_missing(&self, start: u64, end: u64, watch: bool) -> io::Result<()> {
        self.register_with(start, end, MODE_MISSING | if watch { MODE_WP } else { 0 })
    }

    /// Registers a mapping of shared memory: for missing pages, and for those that are there and not mapped. EPERM as above.
    pub fn register_shared(&self, start: u64, end: u64) -> io::Result<()> {
        self.register_with(start, end, MODE_MISSING | MODE_MINOR)
    }

    /// A userfaultfd of this process for memory of its own, in which a missing page is an error to whoever touches it (EFAULT in system calls, SIGBUS
    /// else), and not made.
    pub fn refusing(start: u64, end: u64) -> io::Result<Userfault> {
        let fd = create()?;
        agree(&fd, SIGBUS | MISSING_SHMEM)?;
        let fd = Userfault { fd };
        fd.register_with(start, end, MODE_MISSING)?;
        Ok(fd)
    }

    fn register_with(&self, start: u64, end: u64, mode: u64) -> io::Result<()> {
        let mut r = Register {
            start,
            len: end - start,
            mode,
            ioctls: 0,
        };
        // SAFETY: `r` outlives the call.
        super::check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut r) } as i64).map(drop)
    }

    /// A userfaultfd that came from somewhere else, with its features agreed on.
    pub fn from_fd(fd: OwnedFd) -> Userfault {
        Userfault { fd }
    }

    /// Reads what there is, without waiting. Faults come first, then events, in order; an event lets the task that caused it go on.
    pub fn read(&self) -> io::Result<Vec<Message>> {
        let mut buf = [[0u64; 4]; 16];
        // SAFETY: `buf` is as long as said, and outlives the call.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), buf.as_mut_ptr().cast(), size_of_val(&buf)) };
        let n = match super::check(n as i64) {
            Ok(n) => n as usize / 32,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        buf[..n].iter().map(|m| message(*m)).collect()
    }

    /// Puts pages in place and wakes who waits for them. Returns how many bytes, and why no more. `src`: an address in this process,
    /// which only the kernel reads. `protect`: they are write-protected then.
    pub fn copy(&self, dst: u64, src: u64, len: u64, protect: bool) -> (u64, Option<FillError>) {
        let mut c = Copy {
            dst,
            src,
            len,
            mode: if protect { COPY_MODE_WP } else { 0 },
            copied: 0,
        };
        // SAFETY: `c` outlives the call; what it points to is only read, and by the kernel, which checks it.
        let r = super::check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &raw mut c) } as i64);
        outcome(r, c.copied, len)
    }

    /// The same with zeros.
    pub fn zero(&self, start: u64, len: u64) -> (u64, Option<FillError>) {
        self.fill(UFFDIO_ZEROPAGE, start, len)
    }

    /// Maps pages of shared memory that are there, and wakes who waits for them.
    pub fn proceed(&self, start: u64, len: u64) -> (u64, Option<FillError>) {
        self.fill(UFFDIO_CONTINUE, start, len)
    }

    fn fill(&self, request: u64, start: u64, len: u64) -> (u64, Option<FillError>) {
        let mut f = Fill {
            start,
            len,
            mode: 0,
            done: 0,
        };
        // SAFETY: `f` is what both requests take, and outlives the call.
        let r = super::check(unsafe { libc::ioctl(self.fd.as_raw_fd(), request, &raw mut f) } as i64);
        outcome(r, f.done, len)
    }

    /// Lets tasks that wait for pages of a range look again.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut r = Range { start, len };
        // SAFETY: `r` outlives the call.
        super::check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WAKE, &raw mut r) } as i64).map(drop)
    }

    /// Takes write protection away, with all marks of it. ENOENT: not all of the range is registered; EAGAIN: an event waits to be read.
    pub fn unprotect(&self, start: u64, end: u64) -> io::Result<()> {
        // The address space is locked against changes meanwhile: half a millisecond each.
        const PIECE: u64 = 64 << 20;
        let mut at = start;
        while at < end {
            let len = (end - at).min(PIECE);
            let mut w = Writeprotect { start: at, len, mode: 0 };
            // SAFETY: `w` outlives the call.
            super::check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut w) } as i64)?;
            at += len;
        }
        Ok(())
    }

    /// Whether the address space is still there.
    pub fn alive(&self) -> bool {
        // The last page a process can have. Nothing here waits for write protection to be taken away, so that ESRCH is all this can come to, but for
        // errors that say nothing; zeros would fill the page if it were missing.
        const LAST: u64 = 0x7fff_ffff_e000;
        let r = self.unprotect(LAST, LAST + crate::image::PAGE);
        !r.is_err_and(|e| e.raw_os_error() == Some(libc::ESRCH))
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A partial success says how far it came with EAGAIN and a positive count; a failure at the first page has its negative errno there.
fn outcome(r: io::Result<i64>, done: i64, len: u64) -> (u64, Option<FillError>) {
    match r {
        Ok(_) => (len, None),
        Err(_) if done > 0 => (done as u64, None),
        Err(_) if done < 0 => (0, Some(FillError::of(-done as i32))),
        Err(e) => (0, Some(FillError::of(e.raw_os_error().unwrap_or(libc::EIO)))),
    }
}

fn message(m: [u64; 4]) -> io::Result<Message> {
    Ok(match m[0] as u8 {
        // UFFD_PAGEFAULT_FLAG_MINOR.
        0x12 => Message::Fault {
            address: m[2] & !0xfff,
            minor: m[1] & 4 != 0,
        },
        // SAFETY: the kernel has just made this descriptor for us.
        0x13 => Message::Fork(Userfault::from_fd(unsafe { OwnedFd::from_raw_fd(m[1] as i32) })),
        0x14 => Message::Remap {
            from: m[1],
            to: m[2],
            len: m[3],
        },
        0x15 => Message::Remove { start: m[1], end: m[2] },
        0x16 => Message::Unmap { start: m[1], end: m[2] },
        other => return Err(io::Error::other(format!("userfaultfd says {other:#x}, which nobody asked for"))),
    })
}

//! System calls about descriptors that nix, rustix and socket2 do not wrap, or wrap too narrowly.
//!
//! Every function takes and returns plain values; none keeps a pointer after it returns.

use std::{
    cmp::Ordering,
    collections::{HashMap, hash_map::Entry},
    io,
    mem::ManuallyDrop,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// kcmp(2) types, from linux/kcmp.h.
const KCMP_FILE: libc::c_long = 0;
const KCMP_FILES: libc::c_long = 2;
const KCMP_EPOLL_TFD: libc::c_long = 7;

/// `struct kcmp_epoll_slot` of linux/kcmp.h.
#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}
const _: () = assert!(size_of::<EpollSlot>() == 12);

/// `struct f_owner_ex` of fcntl(2).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct OwnerEx {
    kind: i32,
    pid: i32,
}
const _: () = assert!(size_of::<OwnerEx>() == 8);

/// `TFD_IOC_SET_TICKS` is `_IOW('T', 0, u64)`: direction 1, 8 bytes, type 'T', number 0 (linux/timerfd.h).
const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
const _: () = assert!(TFD_IOC_SET_TICKS == (1 << 30) | (8 << 16) | ((b'T' as libc::c_ulong) << 8));

const F_SETSIG: libc::c_int = 10;
const F_GETSIG: libc::c_int = 11;
const F_SETOWN_EX: libc::c_int = 15;
const F_GETOWN_EX: libc::c_int = 16;

/// The most bytes of a file handle (`MAX_HANDLE_SZ`, open_by_handle_at(2)).
pub const MAX_HANDLE: usize = 128;

/// `struct file_handle` with room for the largest handle.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; MAX_HANDLE],
}
const _: () = assert!(size_of::<Handle>() == 8 + MAX_HANDLE);

fn check(value: libc::c_long) -> io::Result<libc::c_long> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

fn order(value: libc::c_long) -> io::Result<Ordering> {
    match check(value)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(io::Error::other("kcmp gives no order on this kernel")),
    }
}

/// Compares the open file descriptions behind descriptor `a.1` of process `a.0` and `b.1` of `b.0` (kcmp(2), KCMP_FILE).
///
/// The order is the kernel's own, total, and stable while both are open: descriptions can be sorted by it.
pub fn compare_files(a: (i32, i32), b: (i32, i32)) -> io::Result<Ordering> {
    // SAFETY: kcmp with KCMP_FILE takes five integers and touches no memory of ours.
    order(unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, KCMP_FILE, a.1 as libc::c_ulong, b.1 as libc::c_ulong) })
}

/// Compares the descriptor tables of two tasks (kcmp(2), KCMP_FILES): equal when they share one (CLONE_FILES).
pub fn compare_tables(a: i32, b: i32) -> io::Result<Ordering> {
    // SAFETY: kcmp with KCMP_FILES takes integers and touches no memory of ours.
    order(unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_FILES, 0 as libc::c_ulong, 0 as libc::c_ulong) })
}

/// Whether descriptor `fd` of process `pid` is the file that epoll instance `epoll` of the same process watches as the `nth` entry
/// registered under number `fd` (kcmp(2), KCMP_EPOLL_TFD).
pub fn is_epoll_target(pid: i32, fd: i32, epoll: i32, nth: u32) -> io::Result<bool> {
    let slot = EpollSlot {
        efd: epoll as u32,
        tfd: fd as u32,
        toff: nth,
    };
    // SAFETY: the kernel only reads `slot`, which lives until the call returns and has the layout asserted above.
    let value = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_EPOLL_TFD, fd as libc::c_ulong, &raw const slot) };
    Ok(check(value)? == 0)
}

/// getsockopt(2) of any option, raw. `capacity` is the most bytes to take.
pub fn get_option(socket: impl AsFd, level: i32, name: i32, capacity: usize) -> io::Result<Vec<u8>> {
    query_option(socket, level, name, vec![0u8; capacity])
}

/// getsockopt(2) of an option whose value is also a question, such as MCAST_MSFILTER.
pub fn query_option(socket: impl AsFd, level: i32, name: i32, mut value: Vec<u8>) -> io::Result<Vec<u8>> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `value` has `len` writable bytes; the kernel writes at most that many and then sets `len`.
    check(unsafe { libc::getsockopt(socket.as_fd().as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) as libc::c_long })?;
    value.truncate(len as usize);
    Ok(value)
}

/// The number of instructions of the classic BPF filter attached to a socket (SO_GET_FILTER, socket(7)).
///
/// # Errors
/// EACCES for an eBPF program, which cannot be read.
pub fn filter_length(socket: impl AsFd) -> io::Result<u32> {
    let mut len: libc::socklen_t = 0;
    // SAFETY: with a length of 0 the kernel writes no value, only the instruction count into `len`.
    check(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            std::ptr::null_mut(),
            &raw mut len,
        ) as libc::c_long
    })?;
    Ok(len)
}

/// setsockopt(2) of any option, raw.
pub fn set_option(socket: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel only reads `value.len()` bytes of `value`.
    check(unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        ) as libc::c_long
    })?;
    Ok(())
}

/// Who gets the signals of a description (F_GETOWN_EX, fcntl(2)): type (0 thread, 1 process, 2 group) and id in the caller's pid
/// namespace, 0 for nobody.
pub fn owner(fd: impl AsFd) -> io::Result<(i32, i32)> {
    let mut owner = OwnerEx::default();
    // SAFETY: the kernel writes one `struct f_owner_ex`, whose size is asserted above.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETOWN_EX, &raw mut owner) as libc::c_long })?;
    Ok((owner.kind, owner.pid))
}

/// Sets what [`owner`] reads (F_SETOWN_EX).
pub fn set_owner(fd: impl AsFd, kind: i32, pid: i32) -> io::Result<()> {
    let owner = OwnerEx { kind, pid };
    // SAFETY: the kernel only reads one `struct f_owner_ex`.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETOWN_EX, &raw const owner) as libc::c_long })?;
    Ok(())
}

/// The signal sent when input or output becomes possible, 0 for SIGIO (F_GETSIG).
pub fn signal(fd: impl AsFd) -> io::Result<i32> {
    // SAFETY: F_GETSIG takes no argument and touches no memory.
    Ok(check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETSIG) as libc::c_long })? as i32)
}

/// Sets what [`signal`] reads (F_SETSIG).
pub fn set_signal(fd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: F_SETSIG takes an integer and touches no memory.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETSIG, signal) as libc::c_long })?;
    Ok(())
}

/// Sets the count of expirations a timerfd has not reported yet (TFD_IOC_SET_TICKS, timerfd_create(2)). 0 is refused by the kernel.
pub fn set_timer_ticks(fd: impl AsFd, ticks: u64) -> io::Result<()> {
    // SAFETY: the kernel only reads eight bytes, the size the request number says (asserted above).
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) as libc::c_long })?;
    Ok(())
}

/// Opens an inode by its handle with O_PATH (open_by_handle_at(2)); `mount` is any descriptor on its file system.
pub fn open_by_handle(mount: impl AsFd, kind: i32, handle: &[u8]) -> io::Result<OwnedFd> {
    let mut h = Handle {
        bytes: handle.len() as u32,
        kind,
        data: [0; MAX_HANDLE],
    };
    h.data
        .get_mut(..handle.len())
        .ok_or_else(|| io::Error::other("file handle too long"))?
        .copy_from_slice(handle);
    // SAFETY: the kernel reads the header and `bytes` bytes of data, which is at most `MAX_HANDLE`, checked above.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_fd().as_raw_fd(),
            &raw const h,
            libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW,
        )
    })?;
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// A new unnamed shared memory object of `size` bytes, as mmap(MAP_SHARED | MAP_ANONYMOUS) makes it: its mappings read
/// "/dev/zero (deleted)" in /proc/PID/maps. Falls back on a memfd where /proc/self/map_files cannot be opened.
pub fn shared_anonymous(size: u64) -> io::Result<OwnedFd> {
    let len = usize::try_from(size.max(1)).ok().and_then(|n| n.checked_next_multiple_of(4096));
    let len = len.ok_or_else(|| io::Error::other("too large"))?;
    // SAFETY: a fresh mapping at an address of the kernel's choice; nothing else refers to it.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_NONE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let path = format!("/proc/self/map_files/{:x}-{:x}", at as usize, at as usize + len);
    let fd = std::fs::OpenOptions::new().read(true).write(true).open(path);
    // SAFETY: exactly the range mapped above, which holds no reference of ours.
    check(unsafe { libc::munmap(at, len) as libc::c_long })?;
    match fd {
        Ok(f) => Ok(f.into()),
        Err(_) => {
            let fd = rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC)?;
            rustix::fs::ftruncate(&fd, size)?;
            Ok(fd)
        }
    }
}

/// An entry for an epoll instance: `target` as if it had descriptor `number`.
#[derive(Debug, Clone, Copy)]
pub struct Registration<'a> {
    /// The instance.
    pub epoll: BorrowedFd<'a>,
    /// What it watches.
    pub target: BorrowedFd<'a>,
    /// The number the entry shows.
    pub number: RawFd,
    /// EPOLL* bits.
    pub events: u32,
    /// epoll_data.
    pub data: u64,
}

/// Adds entries to epoll instances under any numbers (epoll_ctl(2), EPOLL_CTL_ADD): the result of each, in order.
///
/// The kernel takes the file and the number from the calling thread's table. So a thread of its own unshares its table (unshare(2),
/// CLONE_FILES), and puts each target under its number there; the table goes away with the thread.
///
/// # Errors
/// unshare(2) failed, or duplicates do not fit under RLIMIT_NOFILE; nothing was added then.
pub fn register(entries: &[Registration<'_>]) -> io::Result<Vec<io::Result<()>>> {
    let run = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES)?;
        let highest = entries.iter().map(|e| e.number).max().unwrap_or(0).max(2);
        // Everything that is needed goes above the numbers that are about to be overwritten. Never dropped: in this table, numbers end
        // with the thread.
        let mut above: HashMap<RawFd, ManuallyDrop<OwnedFd>> = HashMap::new();
        for fd in entries.iter().flat_map(|e| [e.epoll, e.target]) {
            if let Entry::Vacant(slot) = above.entry(fd.as_raw_fd()) {
                slot.insert(ManuallyDrop::new(rustix::io::fcntl_dupfd_cloexec(fd, highest.saturating_add(1))?));
            }
        }
        let add = |e: &Registration<'_>| {
            let (Some(epoll), Some(target)) = (above.get(&e.epoll.as_raw_fd()), above.get(&e.target.as_raw_fd())) else {
                return Err(io::ErrorKind::NotFound.into());
            };
            // SAFETY: dup3 takes integers. In this thread's private table nothing owns `number`: all that is used later was duplicated
            // above it, and owners in other threads have tables of their own.
            check(unsafe { libc::dup3(target.as_raw_fd(), e.number, libc::O_CLOEXEC) as libc::c_long })?;
            let mut event = libc::epoll_event {
                events: e.events,
                u64: e.data,
            };
            // SAFETY: the kernel only reads one epoll_event.
            let added = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, e.number, &raw mut event) };
            check(added as libc::c_long).map(|_| ())
        };
        Ok(entries.iter().map(add).collect())
    };
    std::thread::scope(|scope| match scope.spawn(run).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// signalfd4(2) with the kernel's own 64-bit mask: bit n-1 for signal n, real-time ones too.
pub fn signalfd(mask: u64) -> io::Result<OwnedFd> {
    // SAFETY: the kernel only reads the eight bytes of the mask.
    let fd = check(unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, size_of::<u64>(), libc::SFD_CLOEXEC) })?;
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Watches a path with inotify, whatever bits the mask has (inotify_add_watch(2)); returns the watch descriptor.
pub fn inotify_add(fd: impl AsFd, path: &std::ffi::CStr, mask: u32) -> io::Result<i32> {
    // SAFETY: the path ends in a zero and lives until the call returns.
    Ok(check(unsafe { libc::inotify_add_watch(fd.as_fd().as_raw_fd(), path.as_ptr(), mask) as libc::c_long })? as i32)
}

/// Removes a watch (inotify_rm_watch(2)).
pub fn inotify_remove(fd: impl AsFd, wd: i32) -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::inotify_rm_watch(fd.as_fd().as_raw_fd(), wd) as libc::c_long })?;
    Ok(())
}

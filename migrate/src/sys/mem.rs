//! Another process's memory: process_vm_readv(2), process_vm_writev(2) and /proc/PID/mem.

use super::check;
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    sync::OnceLock,
};

/// Reads `buf.len()` bytes at `addr`; fails on pages the task itself may not read.
pub fn read(pid: i32, addr: u64, buf: &mut [u8]) -> io::Result<()> {
    let local = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    let remote = libc::iovec {
        iov_base: addr as *mut _,
        iov_len: buf.len(),
    };
    // SAFETY: `local` describes `buf`, which is exclusively ours; the remote range is checked by the kernel.
    let n = check(unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) } as i64)?;
    if n as usize != buf.len() {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("read {n} of {} bytes at {addr:#x}", buf.len()),
        ));
    }
    Ok(())
}

/// The eight bytes at `addr`, if the task itself may read them.
pub fn word(pid: i32, addr: u64) -> Option<u64> {
    let mut b = [0; 8];
    read(pid, addr, &mut b).ok()?;
    Some(u64::from_le_bytes(b))
}

/// Whether one mremap(2) moves several mappings here (Linux 6.17). It moves them one after the other, and refuses those registered with a userfaultfd:
/// at once if the first one is, else after it has moved those before.
pub fn moves_several() -> bool {
    static DOES: OnceLock<bool> = OnceLock::new();
    *DOES.get_or_init(|| {
        use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags, mmap_anonymous, mprotect, mremap_fixed, munmap};
        const PAGE: usize = crate::image::PAGE as usize;
        // SAFETY: four pages of this function's own, which nobody else knows of, and which have the same borders before and after.
        unsafe {
            let Ok(at) = mmap_anonymous(std::ptr::null_mut(), 4 * PAGE, ProtFlags::empty(), MapFlags::PRIVATE) else {
                return false;
            };
            let other = mprotect(at, PAGE, MprotectFlags::READ).is_ok();
            let moved = mremap_fixed(at, 2 * PAGE, 2 * PAGE, MremapFlags::MAYMOVE, at.byte_add(2 * PAGE));
            let _ = munmap(at, 4 * PAGE);
            other && moved.is_ok()
        }
    })
}

/// Ranges in one call (IOV_MAX).
pub const RANGES: usize = 1024;

/// Reads many ranges, (address, bytes), one after the other into `buf`, which is as long as they are together; at most [`RANGES`] of them.
pub fn read_many(pid: i32, ranges: &[(u64, u64)], buf: &mut [u8]) -> io::Result<()> {
    let remote: Vec<libc::iovec> = ranges
        .iter()
        .map(|r| libc::iovec {
            iov_base: r.0 as *mut _,
            iov_len: r.1 as usize,
        })
        .collect();
    let local = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: `local` describes `buf`, which is exclusively ours; the remote ranges are checked by the kernel.
    let n = check(unsafe { libc::process_vm_readv(pid, &local, 1, remote.as_ptr(), remote.len() as u64, 0) } as i64)?;
    if n as usize == buf.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Writes chunks to many ranges, (address, bytes), which are as long as the chunks together; at most [`RANGES`] of each.
pub fn write_many(pid: i32, ranges: &[(u64, u64)], chunks: &[&[u8]]) -> io::Result<()> {
    let vector = |base: *mut libc::c_void, len: usize| libc::iovec {
        iov_base: base,
        iov_len: len,
    };
    let remote: Vec<libc::iovec> = ranges.iter().map(|r| vector(r.0 as *mut _, r.1 as usize)).collect();
    let local: Vec<libc::iovec> = chunks.iter().map(|c| vector(c.as_ptr().cast_mut().cast(), c.len())).collect();
    let total: usize = chunks.iter().map(|c| c.len()).sum();
    // SAFETY: the kernel only reads from the local ranges, which the slices keep alive; the remote ranges are checked by the kernel.
    let n =
        check(unsafe { libc::process_vm_writev(pid, local.as_ptr(), local.len() as u64, remote.as_ptr(), remote.len() as u64, 0) } as i64)?;
    if n as usize == total {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Writes the chunks one after the other at `addr`; fails on pages the task itself may not write.
pub fn write(pid: i32, addr: u64, chunks: &[&[u8]]) -> io::Result<()> {
    let mut at = addr;
    for group in chunks.chunks(1024) {
        let local: Vec<libc::iovec> = group
            .iter()
            .map(|c| libc::iovec {
                iov_base: c.as_ptr().cast_mut().cast(),
                iov_len: c.len(),
            })
            .collect();
        let total: usize = group.iter().map(|c| c.len()).sum();
        let remote = libc::iovec {
            iov_base: at as *mut _,
            iov_len: total,
        };
        // SAFETY: the kernel only reads from the local ranges, which the slices keep alive; the remote range is checked by the kernel.
        let n = check(unsafe { libc::process_vm_writev(pid, local.as_ptr(), local.len() as u64, &remote, 1, 0) } as i64)?;
        if n as usize != total {
            return Err(io::Error::new(
                io::ErrorKind::WriteZero,
                format!("wrote {n} of {total} bytes at {at:#x}"),
            ));
        }
        at += total as u64;
    }
    Ok(())
}

/// /proc/PID/mem, which reaches read-only and PROT_NONE pages too (FOLL_FORCE).
#[derive(Debug)]
pub struct Mem {
    pid: i32,
    file: File,
}

impl Mem {
    /// Opens it for reading and writing.
    pub fn open(pid: i32) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        Ok(Mem { pid, file })
    }
    /// The process.
    pub fn pid(&self) -> i32 {
        self.pid
    }
    /// Reads, by the fast way if the task may read there, else by force.
    pub fn read(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        read(self.pid, addr, buf).or_else(|_| self.file.read_exact_at(buf, addr))
    }
    /// Writes by force.
    pub fn write(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, addr)
    }
}

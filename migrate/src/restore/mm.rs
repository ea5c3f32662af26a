//! Address spaces of the copy: emptied, mapped like the original, filled.

use super::fds::{FileUse, same_file};
use super::pilots::{Batch, PilotError, Pilots};
use super::vdso::{self, Foreign};
use crate::{
    image::{Backing, FileId, Layout, Mm, PAGE, Vma},
    procfs::maps,
    sys::misc,
};

const TASK_SIZE: u64 = 0x7fff_ffff_f000;
const MAP_DROPPABLE: u64 = 0x08;
const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;
const PR_SET_VMA: u64 = 0x5356_4d41;
/// PR_SET_THP_DISABLE.
pub(super) const PR_SET_THP_DISABLE: u64 = 41;
const MADV_GUARD_INSTALL: u64 = 102;

/// Where the kernel's own mappings wait while the rest of the address space is exchanged.
#[derive(Debug, Clone)]
pub struct Parking {
    /// First byte.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// (name, offset in the parking, bytes).
    pub special: Vec<(String, u64, u64)>,
}

/// Bytes the parking needs: the span of this process's own special mappings.
pub fn parking(at: u64) -> std::io::Result<(Parking, Vec<(u64, u64)>)> {
    let maps = maps::maps(std::process::id() as i32)?;
    let special: Vec<_> = maps
        .iter()
        .filter(|m| m.name.starts_with(b"[v") && m.name != b"[vsyscall]")
        .collect();
    let first = special.first().map_or(0, |m| m.start);
    let last = special.last().map_or(0, |m| m.end);
    let used = maps.iter().filter(|m| m.name != b"[vsyscall]").map(|m| (m.start, m.end)).collect();
    let list = special
        .iter()
        .map(|m| (String::from_utf8_lossy(&m.name).into_owned(), m.start - first, m.end - m.start))
        .collect();
    Ok((
        Parking {
            at,
            len: last - first,
            special: list,
        },
        used,
    ))
}

/// First batch of the root: gives up everything inherited from the agent but the pilots' range and the parked mappings.
pub fn empty(keep: (u64, u64), park: &Parking) -> std::io::Result<Batch> {
    let mut b = Batch::new();
    if let Some((addr, len)) = misc::own_rseq() {
        // RSEQ_FLAG_UNREGISTER with the signature glibc uses on x86.
        b.call_or(
            "unregister the agent's rseq area",
            libc::EINVAL,
            libc::SYS_rseq,
            &[addr, len as u64, 1, 0x5305_3053],
        );
    }
    let maps = maps::maps(std::process::id() as i32)?;
    let special = maps.iter().filter(|m| m.name.starts_with(b"[v") && m.name != b"[vsyscall]");
    let special: Vec<_> = special.map(|m| (String::from_utf8_lossy(&m.name).into_owned(), m.start)).collect();
    empty_again(&mut b, keep, park, &special);
    Ok(b)
}

/// Gives up everything but the pilots' range; the kernel's own mappings, which lie at these addresses, are parked.
pub fn empty_again(b: &mut Batch, keep: (u64, u64), park: &Parking, special: &[(String, u64)]) {
    for (name, start) in special {
        if let Some((_, off, len)) = park.special.iter().find(|s| s.0 == *name) {
            // MREMAP_MAYMOVE | MREMAP_FIXED
            b.call_eq(
                format!("park {name}"),
                (park.at + off) as i64,
                libc::SYS_mremap,
                &[*start, *len, *len, 3, park.at + off],
            );
        }
    }
    let munmap = |b: &mut Batch, from: u64, to: u64| b.call("empty the address space", libc::SYS_munmap, &[from, to - from]);
    munmap(b, 0x1000, keep.0);
    munmap(b, keep.1, park.at);
    munmap(b, park.at + park.len, TASK_SIZE);
}

/// Index of the descriptor a mapping maps, once all of a process's mapping descriptors were received as 0, 1, 2 ...
pub type FdOf<'a> = &'a dyn Fn(&Vma) -> Option<u64>;

/// Batches that are cut when they are full.
pub struct Batches {
    list: Vec<Batch>,
    cap: usize,
}

impl Batches {
    /// None yet; each of at most `cap` records.
    pub fn new(cap: usize) -> Self {
        Batches { list: Vec::new(), cap }
    }

    /// The one that has room for `n` more records.
    pub fn room(&mut self, n: usize) -> &mut Batch {
        if self.list.last().is_none_or(|b| b.len() + n > self.cap) {
            self.list.push(Batch::new());
        }
        let last = self.list.len() - 1;
        &mut self.list[last]
    }

    fn push(&mut self, what: &str, nr: i64, args: &[u64]) {
        self.room(1).call(what, nr, args);
    }

    fn guards(&mut self, guards: &[(u64, u64)]) {
        for (a, e) in guards {
            self.push("install a guard region", libc::SYS_madvise, &[*a, e - a, MADV_GUARD_INSTALL]);
        }
    }

    /// All of them.
    pub fn into_vec(self) -> Vec<Batch> {
        self.list
    }
}

/// Maps one mapping, with its advice and name.
pub fn map_one(out: &mut Batches, v: &Vma, fd_of: FdOf<'_>) {
    let what = format!("map {:x}-{:x}", v.start, v.end);
    let mut flags = libc::MAP_FIXED_NOREPLACE as u64;
    let droppable = v.flags.droppable && misc::droppable_works();
    flags |= if v.shared {
        libc::MAP_SHARED as u64
    } else if droppable {
        MAP_DROPPABLE
    } else {
        libc::MAP_PRIVATE as u64
    };
    if v.flags.grows_down {
        // Not MAP_STACK: it only forbids huge pages (VM_NOHUGEPAGE).
        flags |= libc::MAP_GROWSDOWN as u64;
    }
    if v.flags.no_reserve {
        flags |= libc::MAP_NORESERVE as u64;
    }
    let (fd, offset) = match &v.backing {
        Backing::File { offset, .. } | Backing::Object { offset, .. } => (fd_of(v).unwrap_or(u64::MAX), *offset),
        _ => {
            flags |= libc::MAP_ANONYMOUS as u64;
            (u64::MAX, 0)
        }
    };
    let prot = v.prot as u64;
    out.room(1).call_eq(
        what,
        v.start as i64,
        libc::SYS_mmap,
        &[v.start, v.end - v.start, prot, flags, fd, offset],
    );
    let f = &v.flags;
    for (on, advice) in [
        (f.dont_fork, libc::MADV_DONTFORK),
        (f.wipe_on_fork && !droppable, libc::MADV_WIPEONFORK),
        (f.dont_dump && !droppable, libc::MADV_DONTDUMP),
        (f.sequential, libc::MADV_SEQUENTIAL),
        (f.random, libc::MADV_RANDOM),
        (f.mergeable, libc::MADV_MERGEABLE),
        (f.huge, libc::MADV_HUGEPAGE),
        (f.no_huge, libc::MADV_NOHUGEPAGE),
    ] {
        if on {
            advise(out, v.start, v.end, advice);
        }
    }
    if v.name.is_some() {
        name(out, v.start, v.end, v.name.as_deref());
    }
}

/// madvise(2).
pub fn advise(out: &mut Batches, start: u64, end: u64, advice: i32) {
    out.room(1).call(
        format!("madvise {advice} on {start:#x}"),
        libc::SYS_madvise,
        &[start, end - start, advice as u64],
    );
}

/// Names anonymous memory, or takes the name away.
pub fn name(out: &mut Batches, start: u64, end: u64, name: Option<&str>) {
    let b = out.room(1);
    let at = name.map_or(0, |name| b.data(&[name.as_bytes(), b"\0"].concat()));
    b.try_call("name a mapping", libc::SYS_prctl, &[PR_SET_VMA, 0, start, end - start, at]);
}

/// mprotect(2), or pkey_mprotect(2) where a key is given: without the cpu's keys the latter fails even with key 0.
pub fn protect(out: &mut Batches, start: u64, end: u64, prot: u8, pkey: Option<u8>) {
    let Some(pkey) = pkey else {
        let args = [start, end - start, prot as u64];
        out.room(1).call(format!("mprotect {start:#x}"), libc::SYS_mprotect, &args);
        return;
    };
    let args = [start, end - start, prot as u64, pkey as u64];
    out.room(1)
        .call(format!("pkey_mprotect {start:#x}"), libc::SYS_pkey_mprotect, &args);
}

/// Maps everything into an emptied address space. What of the kernel's own mappings the original does not have stays parked until [`after_pages`]: one that
/// is seen in the middle of an execve(2) has none yet, and the skeleton needs them again once it has. Batches of at most `cap` records. `foreign`: what it gets in place of the kernel's own mappings.
pub fn map(mm: &Mm, park: &Parking, foreign: Option<&Foreign>, fd_of: FdOf<'_>, cap: usize) -> Batches {
    let mut out = Batches::new(cap);
    for (what, ret, nr, args) in foreign.iter().flat_map(|f| f.calls(park)) {
        out.room(1).call_eq(what, ret, nr, &args);
    }
    if let Some(f) = foreign {
        let b = out.room(1);
        let name = b.data(vdso::NAME);
        b.try_call("name the vdso of another kernel", libc::SYS_prctl, &f.name_args(name));
    }
    for v in &mm.vmas {
        let Backing::Special(name) = &v.backing else {
            map_one(&mut out, v, fd_of);
            continue;
        };
        if foreign.is_none()
            && let Some((_, off, len)) = park.special.iter().find(|s| s.0 == *name)
        {
            let args = [park.at + off, *len, *len, 3, v.start];
            out.room(1)
                .call_eq(format!("move {name} to {:#x}", v.start), v.start as i64, libc::SYS_mremap, &args);
        }
    }
    // Protection keys: the kernel hands out the lowest free one.
    let highest = (1..16).rev().find(|k| mm.pkeys >> k & 1 != 0).unwrap_or(0);
    for key in 1..=highest {
        out.room(1)
            .call_eq("allocate a protection key", key as i64, libc::SYS_pkey_alloc, &[0, 0]);
    }
    for v in mm.vmas.iter().filter(|v| v.pkey != 0) {
        protect(&mut out, v.start, v.end, v.prot, Some(v.pkey));
    }
    for key in (1..highest).filter(|k| mm.pkeys >> k & 1 == 0) {
        out.room(1).call("free a protection key", libc::SYS_pkey_free, &[key as u64]);
    }
    out
}

/// PR_SET_MM_MAP: the executable, with addresses that only have to be in order. What the running original had for them may be half of an execve(2)'s
/// work; the real ones come with [`layout`].
pub fn executable(fd: u64) -> Batch {
    // Above what vm.mmap_min_addr may be.
    const AT: u64 = 1 << 20;
    let l = Layout {
        start_code: AT,
        end_code: AT + PAGE,
        start_data: AT,
        end_data: AT + PAGE,
        start_brk: AT + PAGE,
        brk: AT + PAGE,
        start_stack: AT,
        arg_start: AT,
        arg_end: AT,
        env_start: AT,
        env_end: AT,
    };
    mm_map(&l, &[], fd)
}

/// PR_SET_MM_MAP: heap, arguments, environment, auxv. The structure holds an address of the data: use [`resolve_auxv`] on the batch before it runs;
/// nothing else may add data to it.
pub fn layout(mm: &Mm) -> Batch {
    mm_map(&mm.layout, &mm.auxv, u64::MAX)
}

fn mm_map(l: &Layout, auxv: &[u8], exe_fd: u64) -> Batch {
    let mut b = Batch::new();
    let at = b.data(auxv);
    let mut s = Vec::with_capacity(104);
    for v in [
        l.start_code,
        l.end_code,
        l.start_data,
        l.end_data,
        l.start_brk,
        l.brk,
        l.start_stack,
        l.arg_start,
        l.arg_end,
        l.env_start,
        l.env_end,
        if auxv.is_empty() { 0 } else { at },
    ] {
        s.extend_from_slice(&v.to_le_bytes());
    }
    s.extend_from_slice(&(auxv.len() as u32).to_le_bytes());
    s.extend_from_slice(&(exe_fd as u32).to_le_bytes());
    let m = b.data(&s);
    b.call("PR_SET_MM_MAP", libc::SYS_prctl, &[PR_SET_MM, PR_SET_MM_MAP, m, 104, 0]);
    b
}

/// PR_SET_MM_MAP's struct holds the address of the auxv: resolves the token in it for a slot.
pub fn resolve_auxv(b: &mut Batch, pilots: &Pilots, slot: usize, auxv_len: usize) {
    // The auxv is the last data but one, the struct the last: 104 bytes.
    let total = b.data_len();
    let at = total - 104;
    let auxv_at = (at - auxv_len) & !15;
    let addr = pilots.data_addr(slot, auxv_at);
    Pilots::patch(b, 0, at + 88, &addr.to_le_bytes());
}

/// Guard regions (MADV_GUARD_INSTALL).
pub fn guards(guards: &[(u64, u64)], cap: usize) -> Vec<Batch> {
    let mut out = Batches::new(cap);
    out.guards(guards);
    out.into_vec()
}

/// What has to wait until the pages are there: guards and locks. Nothing is parked from here on.
pub fn after_pages(mm: &Mm, park: &Parking, guards: &[(u64, u64)], cap: usize) -> Vec<Batch> {
    let mut out = Batches::new(cap);
    out.push("give up the parked mappings", libc::SYS_munmap, &[park.at, park.len]);
    if mm.thp_disable {
        out.push("PR_SET_THP_DISABLE", libc::SYS_prctl, &[PR_SET_THP_DISABLE, 1, 0, 0, 0]);
    }
    out.guards(guards);
    for v in mm.vmas.iter().filter(|v| v.flags.is_locked()) {
        out.push(
            "mlock2",
            libc::SYS_mlock2,
            &[v.start, v.end - v.start, u64::from(v.flags.lock_on_fault)],
        );
    }
    match mm.mlock_future {
        0 => {}
        // mlockall(MCL_FUTURE) alone leaves the present mappings as they are.
        1 => out.push("mlockall", libc::SYS_mlockall, &[libc::MCL_FUTURE as u64]),
        _ => out.push("mlockall", libc::SYS_mlockall, &[(libc::MCL_FUTURE | libc::MCL_ONFAULT) as u64]),
    }
    for bit in (0..32).filter(|b| mm.membarrier >> b & 1 != 0) {
        // Registration commands are the odd ones beside the private expedited ones: pass the bit as the command.
        out.push("membarrier", libc::SYS_membarrier, &[1 << bit, 0]);
    }
    out.into_vec()
}

/// Checks what a peer or an image claims of an address space.
pub fn validate(mm: &Mm) -> Result<(), PilotError> {
    let bad = |what: String| {
        Err(PilotError::Agent {
            what,
            source: std::io::Error::from(std::io::ErrorKind::InvalidData),
        })
    };
    let mut last = 0x1000;
    for v in &mm.vmas {
        if v.start % PAGE != 0 || v.end % PAGE != 0 || v.start < last || v.end <= v.start || v.end > TASK_SIZE || v.prot > 7 {
            return bad(format!("mapping {:x}-{:x} of the image is not valid", v.start, v.end));
        }
        last = v.end;
    }
    Ok(())
}

/// Opens a file that a mapping or an executable needs, and proves that it is the one the source had.
pub fn open_mapped(file: &FileId, write: bool, fresh: bool) -> std::io::Result<std::fs::File> {
    let path = crate::dump::files::as_path(&file.path);
    let fail = |m: String| std::io::Error::other(format!("{}: {m}", path.display()));
    let usage = if write { FileUse::Write { frozen: fresh } } else { FileUse::Read };
    same_file(file, usage).map_err(fail)?;
    std::fs::OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .map_err(|e| fail(e.to_string()))
}

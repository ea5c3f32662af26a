//! Address spaces, mappings and shared memory objects.

use serde::{Deserialize, Serialize};

/// An address space (the kernel's `mm_struct`), shared by the threads of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mm {
    /// Mappings in ascending, disjoint order.
    pub vmas: Vec<Vma>,
    /// The fields of `struct prctl_mm_map` (prctl(2), PR_SET_MM_MAP).
    pub layout: Layout,
    /// /proc/PID/auxv, raw.
    #[serde(with = "serde_bytes")]
    pub auxv: Vec<u8>,
    /// What /proc/PID/exe leads to.
    pub exe: FileId,
    /// Index into [`super::Tree::vdsos`]: what its [`Backing::Special`] mappings hold.
    pub vdso: u32,
    /// PR_GET_DUMPABLE.
    pub dumpable: u8,
    /// PR_GET_THP_DISABLE.
    pub thp_disable: bool,
    /// membarrier(2) registrations, as MEMBARRIER_CMD_GET_REGISTRATIONS returns them.
    pub membarrier: u32,
    /// Extended state components the process was granted (arch_prctl ARCH_GET_XCOMP_PERM), e.g. AMX tiles.
    pub xcomp_perm: u64,
    /// Protection keys in use (bit n: key n was allocated).
    pub pkeys: u16,
    /// mlockall(MCL_FUTURE) state: `VM_LOCKED` bits new mappings get (0 none, 1 MCL_FUTURE, 2 MCL_FUTURE|MCL_ONFAULT).
    pub mlock_future: u8,
    /// /proc/PID/coredump_filter.
    pub coredump_filter: u32,
    /// /proc/PID/oom_score_adj (kept per process by the kernel, shared with the mm).
    pub oom_score_adj: i16,
}

/// Addresses the kernel keeps of an address space, in `struct prctl_mm_map` order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Layout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vma {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// PROT_READ | PROT_WRITE | PROT_EXEC bits.
    pub prot: u8,
    /// MAP_SHARED rather than MAP_PRIVATE.
    pub shared: bool,
    /// What is behind it.
    pub backing: Backing,
    /// Properties set by mmap flags, madvise, mlock.
    pub flags: VmaFlags,
    /// Protection key, 0 for none.
    pub pkey: u8,
    /// Name set by PR_SET_VMA_ANON_NAME.
    pub name: Option<String>,
}

impl Vma {
    /// Bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }
    /// Never true for a valid mapping.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }
}

/// The vdso of a kernel: code that programs call, and the sizes of the mappings it comes in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vdso {
    /// An ELF image, whole pages.
    #[serde(with = "serde_bytes")]
    pub code: Vec<u8>,
    /// Bytes of the `[vvar]`, `[vvar_vclock]` (0 where there is none) and `[vdso]` mappings, which follow each other in this order.
    pub layout: [u64; 3],
}

impl Vdso {
    /// Longer ones are none.
    const MAX: u64 = 1 << 20;
    /// Names of the mappings, in the order of `layout`.
    pub const NAMES: [&str; 3] = ["[vvar]", "[vvar_vclock]", "[vdso]"];

    /// Whether the sizes make sense.
    pub fn is_valid(&self) -> bool {
        let fits = |n: u64| n.is_multiple_of(super::PAGE) && n <= Self::MAX;
        !self.code.is_empty() && self.layout.iter().all(|&n| fits(n)) && self.layout[2] == self.code.len() as u64
    }

    /// First bytes of the three mappings when the code is at `at`.
    pub fn starts(&self, at: u64) -> [u64; 3] {
        let clock = at.wrapping_sub(self.layout[1]);
        [clock.wrapping_sub(self.layout[0]), clock, at]
    }
}

/// What a mapping maps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A file with a name on both hosts; `offset` in bytes.
    File {
        /// Which file.
        file: FileId,
        /// Byte offset of `start` in the file.
        offset: u64,
        /// The file was opened for writing (VM_MAYWRITE on a shared mapping).
        writable: bool,
    },
    /// A shared memory object that moves with the tree; `offset` in bytes.
    Object {
        /// Index into [`super::Tree::objects`].
        object: u32,
        /// Byte offset of `start` in the object.
        offset: u64,
        /// A shared mapping may be made writable (VM_MAYWRITE).
        writable: bool,
    },
    /// The kernel's `[vvar]`, `[vvar_vclock]` or `[vdso]`, by name.
    Special(String),
}

/// Mapping properties, from smaps' VmFlags (proc_pid_smaps(5)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct VmaFlags {
    pub grows_down: bool,
    pub no_reserve: bool,
    pub locked: bool,
    pub lock_on_fault: bool,
    pub dont_fork: bool,
    pub wipe_on_fork: bool,
    pub dont_dump: bool,
    pub sequential: bool,
    pub random: bool,
    pub mergeable: bool,
    pub huge: bool,
    pub no_huge: bool,
    pub stack: bool,
    pub droppable: bool,
}

impl VmaFlags {
    /// Locked by mlock2(2), at once or each page when it is touched.
    pub fn is_locked(&self) -> bool {
        self.locked || self.lock_on_fault
    }
}

/// A file both hosts must have, and what proves that it is the same one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileId {
    /// Absolute path, bytes as the kernel gives them.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Bytes at the freeze.
    pub size: u64,
    /// Modification time, nanoseconds since the epoch.
    pub mtime_ns: i64,
    /// `st_mode`, type and permissions.
    pub mode: u32,
    /// `st_rdev` of a device file, else 0.
    pub rdev: u64,
    /// Device of the source's file system, for telling whether both hosts see one file.
    pub dev: u64,
    /// Inode number on the source.
    pub ino: u64,
    /// GNU build-id of an ELF file that is mapped executable, hex.
    pub build_id: Option<String>,
}

/// A memory object that moves with the tree: its pages are sent as a space of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// What kind it is.
    pub kind: ObjectKind,
    /// Bytes; not always a multiple of the page.
    pub size: u64,
    /// Owner and permissions, as `st_uid`, `st_gid`, `st_mode`.
    pub owner: (u32, u32, u32),
    /// Seals of a memfd (fcntl F_GET_SEALS).
    pub seals: u32,
}

/// Kinds of memory object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ObjectKind {
    /// mmap(MAP_SHARED | MAP_ANONYMOUS): the kernel's unnamed shmem.
    SharedAnonymous,
    /// memfd_create(2), with its name without the `memfd:` prefix.
    Memfd(#[serde(with = "serde_bytes")] Vec<u8>),
    /// A regular file that was unlinked while in use, with the directory it was in.
    Unlinked {
        /// Directory, absolute.
        #[serde(with = "serde_bytes")]
        dir: Vec<u8>,
    },
}

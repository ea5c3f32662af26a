//! The state of a frozen process tree as plain data.
//!
//! Everything but page contents: the source's `dump` modules fill these types, the wire and the image directory carry them as opaque
//! sections, and the destination's `restore` modules rebuild the tree from them. Nothing here holds an fd, a clock or a running task.
//!
//! Pids, tids, process groups and sessions are numbers *as the tree sees them* (its innermost pid namespace).

pub mod fd;
pub mod memory;
pub mod task;

pub use fd::*;
pub use memory::*;
pub use migrate_transport::codec;
pub use task::*;

use serde::{Deserialize, Serialize};

/// Bytes in a page. The only page size of x86-64's base pages; checked at preflight.
pub const PAGE: u64 = 4096;

/// A whole frozen tree.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tree {
    /// The machine and kernel it was frozen on.
    pub host: Host,
    /// The clocks the tree saw at the freeze.
    pub clocks: Clocks,
    /// Every process, parents before their children; the first is the root.
    pub processes: Vec<Process>,
    /// Address spaces, indexed by [`Process::mm`].
    pub mms: Vec<Mm>,
    /// The vdsos that the address spaces have: the host's own, and those that processes brought from other kernels; by [`Mm::vdso`].
    pub vdsos: Vec<Vdso>,
    /// Memory objects that several mappings or descriptors share (memfd, shared anonymous, unlinked files).
    pub objects: Vec<Object>,
    /// Open file descriptions, indexed by [`Fd::description`].
    pub descriptions: Vec<Description>,
    /// Pipe buffers, indexed by the pipe ends among the descriptions.
    pub pipes: Vec<Pipe>,
}

impl Tree {
    /// A tree of no processes.
    pub fn empty(host: Host) -> Tree {
        Tree {
            host,
            clocks: Clocks {
                monotonic_ns: 0,
                boottime_ns: 0,
                realtime_ns: 0,
            },
            processes: Vec::new(),
            mms: Vec::new(),
            vdsos: Vec::new(),
            objects: Vec::new(),
            descriptions: Vec::new(),
            pipes: Vec::new(),
        }
    }

    /// Whether every index in it refers to something and parents come before their children. Err: what does not.
    pub fn validate(&self) -> Result<(), String> {
        let descriptions = self.descriptions.len() as u32;
        let mut mms = std::collections::HashSet::new();
        for (i, p) in self.processes.iter().enumerate() {
            let bad = |what: &str| Err(format!("process {} refers to {what}", p.pid));
            if p.pid <= 0 || (i == 0) != p.parent.is_none() || p.parent.is_some_and(|x| x as usize >= i) {
                return bad("a parent that does not come before it");
            }
            if p.zombie.is_some() {
                continue;
            }
            if p.mm as usize >= self.mms.len() || !mms.insert(p.mm) {
                return bad("an address space that is missing or another's");
            }
            if p.threads.first().is_none_or(|t| t.tid != p.pid) || p.threads.iter().any(|t| t.tid <= 0) {
                return bad("threads without a leader");
            }
            if p.fds.iter().any(|f| f.fd < 0 || f.description >= descriptions) || !p.fds.is_sorted_by(|a, b| a.fd < b.fd) {
                return bad("descriptors that are not there");
            }
        }
        if self.mms.iter().any(|m| m.vdso as usize >= self.vdsos.len()) || !self.vdsos.iter().all(Vdso::is_valid) {
            return Err("an address space refers to a vdso that is not there, or is none".into());
        }
        let objects = self.objects.len() as u32;
        let mapped = self.mms.iter().flat_map(|m| &m.vmas);
        if mapped
            .into_iter()
            .any(|v| matches!(v.backing, Backing::Object { object, .. } if object >= objects))
        {
            return Err("a mapping refers to an object that is not there".into());
        }
        Ok(())
    }

    /// The root process.
    pub fn root(&self) -> Option<&Process> {
        self.processes.first()
    }
}

/// What the destination must match, or can be told about, of the machine a tree was frozen on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// `uname -n`.
    pub hostname: String,
    /// `uname -r`.
    pub kernel: String,
    /// /proc/sys/kernel/random/boot_id: equal ids share their monotonic clocks.
    pub boot_id: String,
    /// Bytes in a page.
    pub page_size: u64,
    /// XCR0, the extended state components the operating system enabled (Intel SDM vol. 1, ch. 13).
    pub xcr0: u64,
    /// Bytes of the uncompacted XSAVE area for `xcr0`.
    pub xsave_size: u32,
    /// The /proc/cpuinfo flags, sorted.
    pub cpu_flags: Vec<String>,
    /// blake3 of the vdso's code, hex.
    pub vdso_hash: String,
    /// Bytes of the `[vvar]`, `[vvar_vclock]` (0 where there is none) and `[vdso]` mappings.
    pub vdso_layout: [u64; 3],
}

/// Clocks as the tree saw them at the freeze, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// CLOCK_MONOTONIC, time namespace included.
    pub monotonic_ns: u64,
    /// CLOCK_BOOTTIME, time namespace included.
    pub boottime_ns: u64,
    /// CLOCK_REALTIME.
    pub realtime_ns: u64,
}

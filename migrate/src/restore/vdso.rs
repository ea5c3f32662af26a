//! The vdso of the copy: this kernel's own at its old place, or a proxy of another's. See [`crate::arch::vdso`].

use super::mm::Parking;
use crate::{
    arch::vdso::{self as code, HEAD, Proxy},
    blocker::Blocker,
    dump::vdso::own,
    image::{Backing, Mm, Tree, Vdso},
    sys::mem::Mem,
};
use std::io;

const PR_SET_VMA: u64 = 0x5356_4d41;

/// What an address space gets instead of the vdso it had.
#[derive(Debug)]
pub struct Foreign {
    /// The range of its former vdso and the data before it: ordinary memory now.
    zone: (u64, u64),
    at: u64,
    proxy: Proxy,
    /// Where this kernel's own mappings go.
    real: u64,
}

/// A system call: what it is for, what it must return, its number and arguments.
pub type Call = (String, i64, i64, [u64; 6]);

/// Whether an address space comes from a kernel with another vdso.
pub fn is_foreign(mm: &Mm, vdsos: &[Vdso]) -> io::Result<bool> {
    // For tests on one machine: docs/testing.md.
    let forced = std::env::var_os("MIGRATE_FOREIGN_VDSO").is_some_and(|v| v == "1");
    let has = mm.vmas.iter().any(|v| matches!(&v.backing, Backing::Special(n) if n == "[vdso]"));
    Ok(has && (forced || vdsos.get(mm.vdso as usize) != Some(&own()?.vdso)))
}

/// What an address space gets, if it comes from another kernel. This kernel's mappings wait in `park` and will go to `real`.
pub fn foreign(mm: &Mm, vdsos: &[Vdso], park: &Parking, real: u64) -> Result<Option<Foreign>, String> {
    if !is_foreign(mm, vdsos).map_err(|e| e.to_string())? {
        return Ok(None);
    }
    let offset = park.special.iter().find(|s| s.0 == "[vdso]").map(|s| s.1);
    let real_vdso = real + offset.ok_or("this kernel has no vdso")?;
    let vdso = vdsos.get(mm.vdso as usize).ok_or("its vdso is not in the image")?;
    let (zone, at) = zone(mm, vdso)?;
    let own = own().map_err(|e| e.to_string())?;
    Ok(Some(Foreign {
        zone,
        at,
        proxy: code::proxy(vdso, at, real_vdso, own.functions.as_ref().map_err(Clone::clone)?)?,
        real,
    }))
}

/// The range of the kernel's mappings, and where the vdso is in it.
fn zone(mm: &Mm, vdso: &Vdso) -> Result<((u64, u64), u64), String> {
    let special = |name: &str| {
        let mut found = mm.vmas.iter().filter(|v| matches!(&v.backing, Backing::Special(n) if n == name));
        (found.next().map(|v| (v.start, v.end)), found.count())
    };
    let at = special("[vdso]").0.map_or(0, |r| r.0);
    let starts = vdso.starts(at);
    for ((name, start), len) in Vdso::NAMES.into_iter().zip(starts).zip(vdso.layout) {
        let expected = (len > 0).then(|| (start, start.wrapping_add(len)));
        if special(name) != (expected, 0) {
            return Err(format!("its {name} is not where the kernel had put it"));
        }
    }
    Ok(((starts[0], at + vdso.layout[2]), at))
}

/// What of a tree's vdsos stands in the way.
pub fn preflight(tree: &Tree) -> Vec<Blocker> {
    let mut out = Vec::new();
    let park = own().map(|own| Parking {
        at: 0,
        len: 0,
        special: vec![("[vdso]".into(), own.vdso.starts(0)[2], own.vdso.layout[2])],
    });
    for p in tree.processes.iter().filter(|p| p.zombie.is_none()) {
        let Some(mm) = tree.mms.get(p.mm as usize) else { continue };
        let r = match &park {
            Ok(park) => foreign(mm, &tree.vdsos, park, 1 << 44).map(drop),
            Err(e) => Err(e.to_string()),
        };
        if let Err(reason) = r {
            let reason = format!("its vdso is another kernel's and cannot be replaced: {reason}");
            out.push(Blocker::new(
                format!("pid {} ({})", p.pid, p.comm),
                reason,
                "use the same kernel on both hosts",
            ));
        }
    }
    out
}

impl Foreign {
    /// Maps the proxy's memory and moves this kernel's own mappings out of the parking.
    pub fn calls(&self, park: &Parking) -> Vec<Call> {
        let (start, len) = (self.zone.0, self.zone.1 - self.zone.0);
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let prot = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let mut out = vec![(
            format!("map {:x}-{:x} in place of the vdso", self.zone.0, self.zone.1),
            start as i64,
            libc::SYS_mmap,
            [start, len, prot, flags, u64::MAX, 0],
        )];
        for (name, off, len) in &park.special {
            let to = self.real + off;
            out.push((
                format!("move {name} to {to:#x}"),
                to as i64,
                libc::SYS_mremap,
                // MREMAP_MAYMOVE | MREMAP_FIXED
                [park.at + off, *len, *len, 3, to, 0],
            ));
        }
        out
    }

    /// prctl(2) that names the memory, which also keeps the kernel from merging it with a neighbour; `name` is the address of [`NAME`].
    pub fn name_args(&self, name: u64) -> [u64; 5] {
        [PR_SET_VMA, 0, self.zone.0, self.zone.1 - self.zone.0, name]
    }

    /// Writes the proxy's code.
    pub fn write(&self, pid: i32) -> io::Result<()> {
        let mem = Mem::open(pid)?;
        mem.write(self.at - HEAD, &self.proxy.head)?;
        mem.write(self.at, &self.proxy.code)
    }
}

/// The name that maps shows for a proxy.
pub const NAME: &[u8] = b"vdso of another kernel\0";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_that_do_not_fit_are_refused() {
        let own = &own().unwrap().vdso;
        let vma = |name: &str, start, len: u64| crate::image::Vma {
            start,
            end: start + len,
            prot: 5,
            shared: false,
            backing: Backing::Special(name.into()),
            flags: Default::default(),
            pkey: 0,
            name: None,
        };
        let at = 0x7000_0000_0000;
        let mut mm = Mm {
            vmas: own
                .starts(at)
                .into_iter()
                .zip(own.layout)
                .zip(Vdso::NAMES)
                .filter(|((_, len), _)| *len > 0)
                .map(|((start, len), name)| vma(name, start, len))
                .collect(),
            layout: Default::default(),
            auxv: Vec::new(),
            exe: Default::default(),
            vdso: 0,
            dumpable: 1,
            thp_disable: false,
            membarrier: 0,
            xcomp_perm: 0,
            pkeys: 0,
            mlock_future: 0,
            coredump_filter: 0,
            oom_score_adj: 0,
        };
        assert_eq!(zone(&mm, own), Ok(((own.starts(at)[0], at + own.layout[2]), at)));
        let last = mm.vmas.len() - 1;
        let first = mm.vmas.remove(0);
        assert!(zone(&mm, own).is_err());
        mm.vmas.insert(0, first);
        mm.vmas[last].start += 4096;
        assert!(zone(&mm, own).is_err());
        mm.vmas.remove(last);
        assert!(zone(&mm, own).is_err());
    }
}

//! This kernel's vdso, and the vdsos that processes brought from others: see [`crate::arch::vdso`].

use crate::{
    arch::vdso::{self, Function, HEAD},
    image::Vdso,
    procfs::maps::{self, Mapping},
    sys::mem,
};
use std::{io, sync::OnceLock};

/// The vdso of the kernel this agent runs on.
#[derive(Debug)]
pub struct Own {
    /// It.
    pub vdso: Vdso,
    /// Bytes up to its last that is not zero.
    pub used: usize,
    /// Its functions; why there are none.
    pub functions: Result<Vec<Function>, String>,
}

/// Reads it from this process, where nobody has put a stub into its tail.
pub fn own() -> io::Result<&'static Own> {
    static OWN: OnceLock<Own> = OnceLock::new();
    if let Some(own) = OWN.get() {
        return Ok(own);
    }
    let pid = std::process::id() as i32;
    let maps = maps::maps(pid)?;
    let size = |n: &str| maps.iter().find(|m| m.name == n.as_bytes()).map_or(0, |m| m.end - m.start);
    let layout = Vdso::NAMES.map(size);
    let mut code = vec![0; layout[2] as usize];
    if let Some(m) = maps.iter().find(|m| m.name == b"[vdso]") {
        mem::read(pid, m.start, &mut code)?;
    }
    let own = Own {
        used: code.iter().rposition(|&b| b != 0).map_or(0, |p| p + 1),
        functions: vdso::functions(&code),
        vdso: Vdso { code, layout },
    };
    Ok(OWN.get_or_init(|| own))
}

/// AT_SYSINFO_EHDR: where the program knows its vdso to be.
pub fn known_at(auxv: &[u8]) -> Option<u64> {
    const AT_SYSINFO_EHDR: u64 = 33;
    let (pairs, _) = auxv.as_chunks::<16>();
    pairs
        .iter()
        .map(|p| {
            let (k, v) = p.split_at(8);
            (u64::from_le_bytes(k.try_into().unwrap()), u64::from_le_bytes(v.try_into().unwrap()))
        })
        .find(|(k, _)| *k == AT_SYSINFO_EHDR)
        .map(|(_, v)| v)
        .filter(|v| *v > HEAD && v.is_multiple_of(crate::image::PAGE))
}

/// The head of a process's proxy in front of `at`, if it has one there.
pub fn head(pid: i32, at: u64) -> Option<vdso::Head> {
    let mut b = vec![0; HEAD as usize];
    // A real vdso has the kernel's data there, which cannot be read from outside.
    mem::read(pid, at - HEAD, &mut b).ok()?;
    vdso::head(&b)
}

/// The mappings of a process as they would be on the kernel it was started on, and the index of that kernel's vdso in `known`.
///
/// A proxy becomes the three mappings that it stands for, and the real vdso beside it is left out. What a program has damaged or cut up is no
/// proxy any more but memory like any other, and the real vdso beside it moves as such.
pub fn original(pid: i32, auxv: &[u8], maps: Vec<Mapping>, known: &mut Vec<Vdso>) -> io::Result<(Vec<Mapping>, u32)> {
    let mut index = |v: Vdso| match known.iter().position(|k| *k == v) {
        Some(i) => i as u32,
        None => {
            known.push(v);
            known.len() as u32 - 1
        }
    };
    let Some((at, vdso)) = known_at(auxv).and_then(|at| Some((at, proxied(pid, at, &maps)?))) else {
        let own = own()?;
        return Ok((maps, index(own.vdso.clone())));
    };
    let zone = (vdso.starts(at)[0], at + vdso.layout[2]);
    let mut out: Vec<Mapping> = maps.into_iter().filter(|m| !special(m)).flat_map(|m| outside(m, zone)).collect();
    for ((start, len), name) in vdso
        .starts(at)
        .into_iter()
        .zip(vdso.layout)
        .zip(Vdso::NAMES)
        .filter(|((_, len), _)| *len > 0)
    {
        out.push(Mapping {
            start,
            end: start + len,
            prot: if name == "[vdso]" { 5 } else { 1 },
            name: name.into(),
            ..Default::default()
        });
    }
    out.sort_unstable_by_key(|m| m.start);
    Ok((out, index(vdso)))
}

fn special(m: &Mapping) -> bool {
    Vdso::NAMES.iter().any(|n| m.name == n.as_bytes())
}

fn proxied(pid: i32, at: u64, maps: &[Mapping]) -> Option<Vdso> {
    let head = head(pid, at)?;
    let mut code = vec![0; head.layout[2] as usize];
    mem::read(pid, at, &mut code).ok()?;
    let vdso = head.original(code)?;
    let (from, to) = (vdso.starts(at)[0], at + vdso.layout[2]);
    let plain = |m: &&Mapping| m.ino == 0 && !m.shared && !special(m) && m.start < to && m.end > from;
    let covered: u64 = maps.iter().filter(plain).map(|m| m.end.min(to) - m.start.max(from)).sum();
    (from < at && covered == to - from).then_some(vdso)
}

/// What of a mapping lies outside of a range: the kernel may have merged the proxy with a neighbour, or the program split it.
fn outside(m: Mapping, (from, to): (u64, u64)) -> Vec<Mapping> {
    if m.end <= from || m.start >= to {
        return vec![m];
    }
    let mut out = Vec::new();
    if m.start < from {
        out.push(Mapping { end: from, ..m.clone() });
    }
    if m.end > to {
        out.push(Mapping { start: to, ..m });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_vdso_is_whole_and_where_auxv_says() {
        let own = own().unwrap();
        assert!(own.vdso.is_valid() && own.used <= own.vdso.code.len());
        let names: Vec<&str> = own.functions.as_ref().unwrap().iter().map(|f| f.name.as_str()).collect();
        for f in ["clock_gettime", "gettimeofday", "time", "getcpu"] {
            assert!(names.contains(&f), "{names:?}");
        }
        let me = std::process::id() as i32;
        let at = known_at(&crate::procfs::read(me, "auxv").unwrap()).unwrap();
        let maps = maps::maps(me).unwrap();
        assert!(maps.iter().any(|m| m.name == b"[vdso]" && m.start == at));
        assert_eq!(head(me, at), None);
        let mut known = Vec::new();
        let (same, i) = original(me, &crate::procfs::read(me, "auxv").unwrap(), maps.clone(), &mut known).unwrap();
        assert_eq!((same, i, known.len()), (maps, 0, 1));
        assert_eq!(known_at(&[]), None);
        assert_eq!(known_at(&[33; 40]), None);
    }

    #[test]
    fn a_range_is_cut_out_of_mappings() {
        let m = |start, end| Mapping {
            start,
            end,
            ..Default::default()
        };
        assert_eq!(outside(m(10, 20), (20, 30)), vec![m(10, 20)]);
        assert_eq!(outside(m(10, 20), (12, 15)), vec![m(10, 12), m(15, 20)]);
        assert_eq!(outside(m(10, 20), (5, 25)), vec![]);
        assert_eq!(outside(m(10, 20), (5, 15)), vec![m(15, 20)]);
    }
}

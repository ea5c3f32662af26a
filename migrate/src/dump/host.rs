//! This machine, as the other side must know it.

use crate::{arch, image::Host, procfs::maps, sys::mem};
use std::{fs, io};

/// Reads this host.
pub fn host() -> io::Result<Host> {
    let uname = nix::sys::utsname::uname()?;
    let text = |p: &str| fs::read_to_string(p).map(|s| s.trim().to_owned());
    let cpuinfo = text("/proc/cpuinfo")?;
    let mut cpu_flags: Vec<String> = cpuinfo
        .lines()
        .find(|l| l.starts_with("flags"))
        .and_then(|l| l.split_once(':'))
        .map(|(_, f)| f.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default();
    cpu_flags.sort_unstable();
    let pid = std::process::id() as i32;
    let maps = maps::maps(pid)?;
    let size = |n: &[u8]| maps.iter().find(|m| m.name == n).map_or(0, |m| m.end - m.start);
    let mut vdso_hash = String::new();
    if let Some(m) = maps.iter().find(|m| m.name == b"[vdso]") {
        let mut b = vec![0; (m.end - m.start) as usize];
        mem::read(pid, m.start, &mut b)?;
        vdso_hash = blake3::hash(&b).to_hex()[..32].to_owned();
    }
    let xcr0 = arch::xcr0();
    Ok(Host {
        hostname: uname.nodename().to_string_lossy().into_owned(),
        kernel: uname.release().to_string_lossy().into_owned(),
        boot_id: text("/proc/sys/kernel/random/boot_id")?,
        page_size: rustix::param::page_size() as u64,
        xcr0,
        xsave_size: arch::xsave_size(xcr0),
        cpu_flags,
        vdso_hash,
        vdso_layout: [size(b"[vvar]"), size(b"[vvar_vclock]"), size(b"[vdso]")],
    })
}

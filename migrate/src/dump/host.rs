//! This machine, as the other side must know it.

use crate::{arch, image::Host};
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
    let vdso = &super::vdso::own()?.vdso;
    let xcr0 = arch::xcr0();
    Ok(Host {
        hostname: uname.nodename().to_string_lossy().into_owned(),
        kernel: uname.release().to_string_lossy().into_owned(),
        boot_id: text("/proc/sys/kernel/random/boot_id")?,
        page_size: rustix::param::page_size() as u64,
        xcr0,
        xsave_size: arch::xsave_size(xcr0),
        cpu_flags,
        vdso_hash: blake3::hash(&vdso.code).to_hex()[..32].to_owned(),
        vdso_layout: vdso.layout,
    })
}

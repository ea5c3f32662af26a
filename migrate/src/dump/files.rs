//! What identifies a file on both hosts.

use crate::image::FileId;
use object::{Object as _, read::elf::ElfFile64};
use rustix::fs::Stat;
use std::{ffi::OsStr, fmt::Write, os::unix::ffi::OsStrExt, path::Path};

/// Describes a file by its path and what stat(2) said; without a build-id, which only mappings need ([`build_id`]).
pub fn file_id(path: &[u8], stat: &Stat) -> FileId {
    FileId {
        path: path.to_vec(),
        size: stat.st_size as u64,
        mtime_ns: mtime_ns(stat),
        mode: stat.st_mode,
        rdev: stat.st_rdev,
        dev: stat.st_dev,
        ino: stat.st_ino,
        build_id: None,
    }
}

/// Modification time in nanoseconds since the epoch.
pub fn mtime_ns(stat: &Stat) -> i64 {
    stat.st_mtime
        .saturating_mul(1_000_000_000)
        .saturating_add(stat.st_mtime_nsec as i64)
}

/// The path as std wants it.
pub fn as_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// The GNU build-id of a 64-bit ELF file, hex; `None` when it has none, is not one, or cannot be read.
///
/// Reads the headers and the notes, not the whole file.
pub fn build_id(path: &Path) -> Option<String> {
    let file = std::fs::File::open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let cache = object::read::ReadCache::new(file);
    let elf = ElfFile64::<object::Endianness, _>::parse(&cache).ok()?;
    let id = elf.build_id().ok()??;
    // 20 bytes for SHA-1, 16 for MD5 or UUID; anything long is not a build-id.
    if id.is_empty() || id.len() > 64 {
        return None;
    }
    let mut hex = String::with_capacity(id.len() * 2);
    for byte in id {
        write!(hex, "{byte:02x}").ok()?;
    }
    Some(hex)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_build_id_is_stable_hex() {
        let exe = std::env::current_exe().unwrap();
        if let Some(id) = build_id(&exe) {
            assert!(id.len() >= 32 && id.bytes().all(|b| b.is_ascii_hexdigit()));
            assert_eq!(build_id(&exe), Some(id));
        }
        assert_eq!(build_id(Path::new("/dev/null")), None);
        assert_eq!(build_id(Path::new("/proc/self/status")), None);
    }

    #[test]
    fn libc_has_a_build_id() {
        // Some system library of this machine is mapped into this process and was built with one.
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let libc = maps
            .lines()
            .filter_map(|l| l.split_whitespace().nth(5))
            .find(|p| p.contains("libc.so"));
        if let Some(path) = libc {
            assert!(build_id(Path::new(path)).is_some());
        }
    }
}

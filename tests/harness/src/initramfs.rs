//! The first file system of a virtual machine: a cpio archive (`newc`, Documentation/driver-api/early-userspace/buffer-format.rst) with
//! busybox, the programs under test, the shared libraries they need, and the modules of its kernel.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

/// Every file's time of modification: the same in all machines, as it is for a package of the same version.
const MTIME: u32 = 1_700_000_000;

/// An archive under way.
#[derive(Clone)]
pub struct Initramfs {
    bytes: Vec<u8>,
    dirs: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
    inode: u32,
}

impl Initramfs {
    /// With nothing in it.
    pub fn new() -> Initramfs {
        Initramfs {
            bytes: Vec::new(),
            dirs: BTreeSet::new(),
            files: BTreeSet::new(),
            inode: 0,
        }
    }

    /// Adds a file with the directories that lead to it.
    pub fn file(&mut self, at: &str, mode: u32, content: &[u8]) {
        if self.files.insert(at.into()) {
            self.dirs_to(Path::new(at).parent().unwrap_or(Path::new("/")));
            self.entry(at, 0o100_000 | mode, content);
        }
    }

    /// Adds a program and, under the paths they have here, the shared libraries it needs.
    pub fn program(&mut self, at: &str, from: &Path) -> io::Result<()> {
        self.file(at, 0o755, &without_debug_info(from)?);
        let ldd = Command::new("ldd").arg(from).output()?;
        // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)", "/lib64/ld-linux-x86-64.so.2 (0x...)"; of a static one it complains.
        for line in String::from_utf8_lossy(&ldd.stdout).lines() {
            let path = line.split_whitespace().find(|word| word.starts_with('/'));
            if let Some(path) = path {
                self.file(path, 0o755, &fs::read(path)?);
            }
        }
        Ok(())
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, b"");
        self.bytes
    }

    fn dirs_to(&mut self, dir: &Path) {
        if dir.parent().is_some() && self.dirs.insert(dir.into()) {
            self.dirs_to(dir.parent().unwrap_or(Path::new("/")));
            self.entry(&dir.display().to_string(), 0o040_755, b"");
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        let name = name.trim_start_matches('/');
        self.inode += 1;
        let size = content.len() as u32;
        let links = if mode & 0o040_000 != 0 { 2 } else { 1 };
        let (uid, gid, device) = (0, 0, 0);
        let fields = [
            self.inode,
            mode,
            uid,
            gid,
            links,
            MTIME,
            size,
            device,
            device,
            device,
            device,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            let _ = write!(self.bytes, "{field:08X}");
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A program as it is delivered; a development build is ten times as large with what a debugger wants.
fn without_debug_info(program: &Path) -> io::Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let stripped = dir.path().join("stripped");
    let status = Command::new("strip").arg("-g").arg("-o").arg(&stripped).arg(program).status();
    let smaller = status.is_ok_and(|s| s.success()) && stripped.metadata().is_ok_and(|m| m.permissions().mode() & 0o111 != 0);
    fs::read(if smaller { &stripped } else { program })
}

//! Programs that tests start, and the record of what could not be tested.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, OnceLock},
    time::SystemTime,
};

/// How many times longer than usual everything may take: `MIGRATE_TEST_PATIENCE`.
pub fn patience() -> u32 {
    static PATIENCE: OnceLock<u32> = OnceLock::new();
    *PATIENCE.get_or_init(|| {
        std::env::var("MIGRATE_TEST_PATIENCE")
            .ok()
            .and_then(|p| p.parse().ok())
            .unwrap_or(1)
    })
}

/// Records that this test could not run: on stderr, and in the file `MIGRATE_SKIPS` for the summary.
pub fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_string();
    eprintln!("SKIP {test}: {reason}");
    if let Ok(path) = std::env::var("MIGRATE_SKIPS")
        && let Ok(mut file) = OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = writeln!(file, "{test}: {reason}");
    }
}

/// Absolute path of a program on PATH.
pub fn tool(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name));
    }
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"])
        .map(|dir| Path::new(dir).join(name))
        .find(|p| p.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

/// The CRIU that `tests/criu.sh` has got, since the installed one does not work with this kernel.
pub fn newer_criu() -> Option<PathBuf> {
    let path = built().parent()?.join("criu/criu");
    path.exists().then_some(path)
}

/// The interpreter itself: what is called python3 may be a script that looks for it.
pub fn python() -> Option<PathBuf> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    PYTHON
        .get_or_init(|| {
            let system = Path::new("/usr/bin/python3");
            let asked = if system.exists() { system.to_path_buf() } else { tool("python3")? };
            let out = Command::new(asked)
                .args(["-c", "import sys; print(sys.executable)"])
                .output()
                .ok()?;
            let path = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim());
            path.exists().then_some(path)
        })
        .clone()
}

/// Where cargo puts the binaries of this profile: the directory above the one with the tests.
pub(crate) fn built() -> PathBuf {
    let me = std::env::current_exe().expect("the test's own path");
    let dir = me.parent().expect("a directory");
    // Tests and benches are in deps, examples in examples, binaries in the directory itself.
    match dir.file_name().and_then(|n| n.to_str()) {
        Some("deps" | "examples") => dir.parent().expect("a directory").to_path_buf(),
        _ => dir.to_path_buf(),
    }
}

static CARRIED_BY: OnceLock<PathBuf> = OnceLock::new();

/// From now on this program is the one that is looked at, and its hidden command `guest` runs the guests: `migrate bench` has nothing else.
pub fn carried_by(program: PathBuf) {
    let _ = CARRIED_BY.set(program);
}

/// Whether that was said: then nobody reads the reports of a failed test.
pub(crate) fn is_carried() -> bool {
    CARRIED_BY.get().is_some()
}

/// What to type before a guest's name.
pub fn guest_command() -> Vec<String> {
    match CARRIED_BY.get() {
        Some(program) => vec![program.display().to_string(), "guest".into()],
        None => vec![guest_binary().display().to_string()],
    }
}

/// The program under test.
pub fn migrate_binary() -> PathBuf {
    if let Some(program) = CARRIED_BY.get() {
        return program.clone();
    }
    let path = std::env::var_os("MIGRATE_BIN").map_or_else(|| built().join("migrate"), PathBuf::from);
    assert!(
        path.exists(),
        "{} does not exist: build it, or name one in MIGRATE_BIN",
        path.display()
    );
    path
}

/// The guests; built when missing or older than their source.
pub fn guest_binary() -> PathBuf {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    if let Some(path) = std::env::var_os("MIGRATE_GUEST_BIN") {
        return PathBuf::from(path);
    }
    let mut done = BUILT.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(path) = &*done {
        return path.clone();
    }
    let path = built().join("migrate-guest");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guests/src");
    if changed(&path) < newest(&source) {
        let profile = if built().file_name().is_some_and(|n| n == "release") {
            "release"
        } else {
            "dev"
        };
        let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--quiet", "--package", "migrate-guests", "--profile", profile])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
            .env("CARGO_TARGET_DIR", built().parent().expect("a directory"))
            .status();
        assert!(status.is_ok_and(|s| s.success()), "cargo build --package migrate-guests failed");
    }
    *done = Some(path.clone());
    path
}

fn changed(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|m| m.modified()).ok()
}

fn newest(dir: &Path) -> Option<SystemTime> {
    fs::read_dir(dir).ok()?.flatten().filter_map(|e| changed(&e.path())).max()
}

//! The two hosts and the link between them.

use crate::{host::Host, tools::skip};
use std::{
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

/// Where a tree goes from and to.
pub struct Hosts {
    /// 10.77.0.1.
    pub a: Host,
    /// 10.77.0.2.
    pub b: Host,
    dir: TempDir,
    kept: Option<PathBuf>,
}

impl Hosts {
    /// Makes them; `None` after a recorded skip when this machine cannot.
    pub fn new() -> Option<Hosts> {
        Hosts::that_see(None)
    }

    /// The same; both see this directory too, which may be one of /dev/shm.
    pub fn that_see(kept: Option<&Path>) -> Option<Hosts> {
        if !nix::unistd::geteuid().is_root() {
            skip("namespaces and ptrace of another session need root");
            return None;
        }
        let Some(ip) = crate::tools::tool("ip") else {
            skip("iproute2 is not installed");
            return None;
        };
        let dir = tempfile::Builder::new()
            .prefix("migrate-test-")
            .tempdir()
            .expect("a directory for the test");
        let a = Host::start("a", "10.77.0.1", dir.path(), kept);
        let b = Host::start("b", "10.77.0.2", dir.path(), kept);
        let run = |args: &str| {
            let out = Command::new(&ip).args(args.split_whitespace()).output().expect("ip runs");
            assert!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
        };
        // Names that this machine has none of: kernels before 6.2 make the pair here first, beside an eth0 of its own.
        let end = |host: &Host| format!("migrate-{}", host.init());
        run(&format!(
            "link add {} netns {} type veth peer name {} netns {}",
            end(&a),
            a.init(),
            end(&b),
            b.init()
        ));
        for host in [&a, &b] {
            let set = [
                "link set lo up".to_string(),
                format!("link set {} name eth0", end(host)),
                format!("addr add {}/24 dev eth0", host.address()),
                "link set eth0 up".to_string(),
            ];
            for args in set {
                let out = host.inside(|| Command::new(&ip).args(args.split_whitespace()).output().expect("ip runs"));
                assert!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
            }
        }
        let kept = kept.map(Path::to_owned);
        Some(Hosts { a, b, dir, kept })
    }

    /// Cuts the link between them.
    pub fn cut(&self) {
        self.link("down");
    }

    /// Joins them again.
    pub fn join(&self) {
        self.link("up");
    }

    fn link(&self, state: &str) {
        let ip = crate::tools::tool("ip").expect("ip");
        let set = || Command::new(&ip).args(["link", "set", "eth0", state]).status().expect("ip runs");
        assert!(self.b.inside(set).success(), "eth0 {state}");
    }

    /// A directory that both see, gone after the test.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Another one that both see, if they were made with one.
    pub fn kept(&self) -> Option<&Path> {
        self.kept.as_deref()
    }

    /// The other one.
    pub fn other(&self, host: &Host) -> &Host {
        if host.name() == "a" { &self.b } else { &self.a }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if std::thread::panicking() && !crate::tools::is_carried() {
            self.a.dump();
            self.b.dump();
            // What a keeper had to say.
            for host in ["a", "b"] {
                for entry in std::fs::read_dir(self.dir().join(host).join("state/keeper"))
                    .into_iter()
                    .flatten()
                    .flatten()
                {
                    let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                    eprintln!("--- host {host}: keeper {}\n{text}", entry.file_name().to_string_lossy());
                }
            }
        }
    }
}

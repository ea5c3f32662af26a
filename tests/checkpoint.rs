//! `migrate checkpoint`, `restore`, `list`, `show`, `rm`: the same through a directory.

use migrate_harness::{Guest, Host, Hosts, Run, Stdio, eventually, programs, two_hosts, within};
use nix::sys::signal::Signal;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

struct Images<'a> {
    host: &'a Host,
    dir: PathBuf,
}

impl Images<'_> {
    fn of(hosts: &Hosts) -> Images<'_> {
        let dir = hosts.file("images");
        fs::create_dir_all(&dir).unwrap();
        Images { host: &hosts.a, dir }
    }
    fn run(&self, command: &str, more: &[&str]) -> Run {
        let dir = self.dir.display().to_string();
        let mut args = vec![command];
        args.extend(["--dir", &dir]);
        args.extend(more);
        self.host.run(&args)
    }
    fn checkpoint(&self, pid: i32, more: &[&str]) -> Run {
        let (pid, dir) = (pid.to_string(), self.dir.display().to_string());
        let mut args = vec!["checkpoint", pid.as_str(), "--dir", &dir, "--json"];
        args.extend(more);
        self.host.run(&args)
    }
    /// Restores in the background; the pid of the copy.
    fn restore(&self, more: &[&str]) -> i32 {
        let pid_file = self.dir.parent().unwrap().join("restored.pid");
        let _ = fs::remove_file(&pid_file);
        let name = pid_file.display().to_string();
        let mut args = vec!["--detach", "--pid-file", &name, "--json"];
        args.extend(more);
        let run = self.run("restore", &args);
        run.expect_code(0);
        let pid = fs::read_to_string(&pid_file).expect("the pid file");
        pid.trim().parse().unwrap_or_else(|_| panic!("pid file: {pid:?}"))
    }
    /// The files that make up an image, largest first.
    fn files(&self) -> Vec<PathBuf> {
        fn walk(dir: &Path, into: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    walk(&entry.path(), into)
                } else {
                    into.push(entry.path())
                }
            }
        }
        let mut files = Vec::new();
        walk(&self.dir, &mut files);
        files.sort_by_key(|f| std::cmp::Reverse(f.metadata().map_or(0, |m| m.len())));
        files
    }
}

fn gone(host: &Host, pid: i32) -> bool {
    eventually(Duration::from_secs(10), || host.process(pid).is_none_or(|p| p.state == 'Z'))
}

#[test]
fn a_guest_goes_through_a_directory() {
    let hosts = two_hosts!();
    let images = Images::of(&hosts);
    for name in ["memory", "threads", "fds", "tree", "counter"] {
        let guest = Guest::start(&hosts.a, name, &[]);
        images.checkpoint(guest.pid, &["--name", name]).expect_code(0);
        assert!(gone(&hosts.a, guest.pid), "the original of {name} still runs");
        let pid = images.restore(&["--name", name]);
        assert_eq!(hosts.a.process(pid).map(|p| p.inner), Some(guest.pid));
        guest.verify("restored from a checkpoint");
        hosts.a.signal(pid, Signal::SIGKILL);
        assert!(gone(&hosts.a, pid));
    }
}

#[test]
fn the_shell_counter_goes_on_from_its_checkpoint() {
    let hosts = two_hosts!();
    let images = Images::of(&hosts);
    let out = hosts.file("numbers");
    let counter = hosts.a.command(programs::counter("0.01")).stdio(Stdio::File(out.clone())).start();
    let count = || programs::numbers(&hosts.read(&out)).len();
    within("numbers", Duration::from_secs(20), || (count() > 30).then_some(()));
    images.checkpoint(counter.pid, &["--name", "one"]).expect_code(0);
    let so_far = count();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(count(), so_far, "it counts on after the checkpoint");
    images.restore(&["--name", "one"]);
    within("more numbers", Duration::from_secs(20), || (count() > so_far + 30).then_some(()));
    programs::expect_in_order(&programs::numbers(&hosts.read(&out)));
}

#[test]
fn leave_running_and_several_names() {
    let hosts = two_hosts!();
    let images = Images::of(&hosts);
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "8"), ("dirty", "5")]);
    for name in ["first", "second", "third"] {
        images.checkpoint(guest.pid, &["--name", name, "--leave-running"]).expect_code(0);
        assert!(guest.beats(), "it does not run on after checkpoint {name}");
    }
    let listed = images.run("list", &[]);
    listed.expect_code(0);
    for name in ["first", "second", "third"] {
        assert!(listed.stdout.contains(name), "list: {}", listed.stdout);
    }
    let pid = guest.pid.to_string();
    images.run("show", &["second"]).expect_code(0).expect_says(&[&pid]);
    images.run("rm", &["second"]).expect_code(0);
    assert!(!images.run("list", &[]).stdout.contains("second"), "a removed checkpoint is listed");
    images.run("show", &["second"]).expect_says(&["second"]);
    assert_ne!(images.run("show", &["second"]).code, 0);
    assert_ne!(images.run("rm", &["second"]).code, 0);

    hosts.a.signal(guest.pid, Signal::SIGKILL);
    assert!(gone(&hosts.a, guest.pid));
    // The same one as often as one likes, and any of them.
    for name in ["first", "third", "first"] {
        let pid = images.restore(&["--name", name]);
        guest.verify(&format!("restored from {name}"));
        hosts.a.signal(pid, Signal::SIGKILL);
        assert!(gone(&hosts.a, pid));
    }
}

#[test]
fn a_name_is_not_overwritten() {
    let hosts = two_hosts!();
    let images = Images::of(&hosts);
    let guest = Guest::start(&hosts.a, "counter", &[]);
    images.checkpoint(guest.pid, &["--name", "taken", "--leave-running"]).expect_code(0);
    let again = images.checkpoint(guest.pid, &["--name", "taken", "--leave-running"]);
    assert_ne!(again.code, 0);
    again.expect_says(&["taken"]);
    assert!(guest.beats());
}

fn nothing_started(images: &Images<'_>, guest: &Guest, run: &Run, says: &[&str]) {
    assert_ne!(run.code, 0, "a bad image was restored: {}", run.all());
    run.expect_says(says);
    assert!(images.host.process(guest.pid).is_none(), "something was started");
    assert!(guest.rests(Duration::from_millis(100)));
}

#[test]
fn a_damaged_truncated_or_newer_image_is_refused_and_nothing_starts() {
    let hosts = two_hosts!();
    let images = Images::of(&hosts);
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "4")]);
    images.checkpoint(guest.pid, &["--name", "good"]).expect_code(0);
    assert!(gone(&hosts.a, guest.pid));
    let restore = || images.run("restore", &["--name", "good", "--detach"]);
    for file in images.files() {
        let whole = fs::read(&file).unwrap();
        if whole.is_empty() {
            continue;
        }
        let mut at: Vec<usize> = vec![whole.len() / 3, whole.len() / 2, whole.len() - 1];
        at.dedup();
        for at in at {
            let mut bad = whole.clone();
            bad[at] ^= 0x10;
            fs::write(&file, &bad).unwrap();
            nothing_started(
                &images,
                &guest,
                &restore(),
                &["checksum", "damaged", "corrupt", "magic", "not an image", "truncated"],
            );
        }
        for len in [0, 1, 7, whole.len() / 2, whole.len() - 1] {
            fs::write(&file, &whole[..len.min(whole.len() - 1)]).unwrap();
            nothing_started(
                &images,
                &guest,
                &restore(),
                &[
                    "truncated",
                    "short",
                    "ends",
                    "damaged",
                    "magic",
                    "checksum",
                    "not an image",
                    "empty",
                ],
            );
        }
        fs::write(&file, &whole).unwrap();
    }
    let pid = images.restore(&["--name", "good"]);
    guest.verify("restored after the damage was undone");
    hosts.a.signal(pid, Signal::SIGKILL);
}

/// The version stands in fixed bytes behind the magic: whatever follows, a newer one is named.
#[test]
fn a_newer_image_is_refused_by_its_version() {
    let hosts = two_hosts!();
    let images = Images::of(&hosts);
    let guest = Guest::start(&hosts.a, "counter", &[]);
    images.checkpoint(guest.pid, &["--name", "good"]).expect_code(0);
    let with_magic: Vec<PathBuf> = images.files();
    let mut named = false;
    for file in with_magic {
        let whole = fs::read(&file).unwrap();
        for at in 4..16.min(whole.len()) {
            let mut newer = whole.clone();
            newer[at] = 0x7f;
            fs::write(&file, &newer).unwrap();
            let run = images.run("restore", &["--name", "good", "--detach"]);
            nothing_started(&images, &guest, &run, &[""]);
            named |= run.all().to_lowercase().contains("version");
        }
        fs::write(&file, &whole).unwrap();
    }
    assert!(named, "no byte behind the magic makes restore speak of a version");
}

#[test]
fn a_full_disk_leaves_the_program_running_and_no_image() {
    let hosts = two_hosts!();
    let guest = Guest::start(&hosts.a, "ballast", &[("mib", "32")]);
    let small = hosts.file("small");
    fs::create_dir(&small).unwrap();
    let name = small.display().to_string();
    // Mounted in A alone.
    let mount = hosts.a.command(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", &name]).start();
    mount.wait();
    let pid = guest.pid.to_string();
    let run = hosts.a.run(&["checkpoint", &pid, "--dir", &name, "--name", "big"]);
    run.expect_code(1).expect_says(&["no space", "full"]);
    assert!(guest.beats(), "the program does not run on");
    guest.verify("after a checkpoint that did not fit");
    let listed = hosts.a.run(&["list", "--dir", &name]);
    assert!(!listed.stdout.contains("big"), "half an image is listed: {}", listed.stdout);
    let rest = hosts.a.command(["du", "-sk", &name]).start();
    rest.wait();
    let left: u64 = within("du", Duration::from_secs(2), || {
        rest.stdout().split_whitespace().next()?.parse().ok()
    });
    assert!(left < 512, "{left} KiB of the failed image are left behind");
}

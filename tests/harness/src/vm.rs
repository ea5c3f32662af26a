//! Two hosts that are virtual machines, each with a kernel of Debian's, emulated by QEMU on any machine.
//!
//! Both see the test's directory under the path it has here (virtiofs, without a cache), as hosts that a tree with open files is moved
//! between share a file system; programs and libraries are their own, the same in both. A cable joins them and nothing else. Commands go
//! to the first process through a virtio port, and their outputs come back as files of the test's directory.

use crate::{
    Guest, Run,
    host::Ended,
    initramfs::Initramfs,
    tools::{built, guest_binary, migrate_binary, skip, tool},
    wait::{eventually, within},
};
use migrate_guests::wire::{Said, Spawn};
use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};
use tempfile::TempDir;

/// The kernel of Debian 12.
pub const OLD: &str = "6.1";
/// The kernel of Debian 13.
pub const NEW: &str = "6.12";

/// What the first process does before it hands over; `name`, `address`, `share` and `pids` come from the kernel's command line.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin
mkdir -p /proc /sys /dev /tmp /run /var/lib /root "$share"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for dir in /dev/shm /run /tmp; do mount -t tmpfs tmpfs $dir; done
for module in /modules/*.ko; do insmod $module || echo "$module does not load"; done
hostname $name
ip link set lo up
ip addr add $address/24 dev eth0
ip link set eth0 up
mkdir -p "$share"
mount -t virtiofs share "$share" || echo "no shared directory"
echo $pids > /proc/sys/kernel/ns_last_pid
# As systemd sets it.
ulimit -H -n 524288
cd /
exec /usr/bin/migrate-guest vm /dev/vport*p1
"#;

/// Emulated, everything takes several times as long.
const SLOW: Duration = Duration::from_secs(300);

/// What a virtual machine is made of.
struct Parts {
    qemu: PathBuf,
    busybox: PathBuf,
    virtiofsd: PathBuf,
    kernels: PathBuf,
}

impl Parts {
    fn find(kernels: &[&str]) -> Result<Parts, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("a directory is shared with a virtual machine by root".into());
        }
        let program = |name: &str| tool(name).ok_or_else(|| format!("{name} is not installed"));
        let dir = built().parent().expect("the target directory").join("vm");
        let there = |path: PathBuf| match path.exists() {
            true => Ok(path),
            false => Err(format!(
                "{} is not in target/vm (tests/vm/tools.sh)",
                path.strip_prefix(&dir).unwrap_or(&path).display()
            )),
        };
        let parts = Parts {
            qemu: program("qemu-system-x86_64")?,
            busybox: program("busybox")?,
            virtiofsd: there(dir.join("virtiofsd"))?,
            kernels: dir.clone(),
        };
        for kernel in kernels {
            there(dir.join(kernel).join("vmlinuz"))?;
        }
        Ok(parts)
    }

    /// What is the same with every kernel.
    fn programs(&self) -> Initramfs {
        let mut archive = Initramfs::new();
        archive.file("/init", 0o755, INIT.as_bytes());
        for (at, from) in [
            ("/bin/busybox", self.busybox.clone()),
            ("/usr/bin/migrate", migrate_binary()),
            ("/usr/bin/migrate-guest", guest_binary()),
        ] {
            archive.program(at, &from).expect("a program for the virtual machines");
        }
        // For hosts within a machine, and to compare with; who needs them says so.
        for (at, name) in [("/usr/sbin/ip", "ip"), ("/usr/sbin/criu", "criu")] {
            if let Some(from) = tool(name) {
                archive.program(at, &from).expect("a program for the virtual machines");
            }
        }
        archive
    }

    /// The first file system of machines with this kernel, as a file.
    fn initramfs(&self, kernel: &str, dir: &Path) -> PathBuf {
        let path = dir.join(format!("initramfs-{kernel}"));
        if !path.exists() {
            // Stripping a development build takes seconds, and one is enough.
            static PROGRAMS: OnceLock<Initramfs> = OnceLock::new();
            let mut archive = PROGRAMS.get_or_init(|| self.programs()).clone();
            for entry in fs::read_dir(self.kernels.join(kernel)).expect("the kernel").flatten() {
                if entry.path().extension().is_some_and(|e| e == "ko") {
                    let at = format!("/modules/{}", entry.file_name().to_string_lossy());
                    archive.file(&at, 0o644, &fs::read(entry.path()).expect("a module"));
                }
            }
            fs::write(&path, archive.finish()).expect("the initramfs");
        }
        path
    }
}

/// What a machine's first process has told so far.
#[derive(Default)]
struct Told {
    up: bool,
    answers: HashMap<u64, Result<i32, String>>,
    reaped: Vec<(i32, i32)>,
    over: bool,
}

#[derive(Default)]
struct Shared {
    told: Mutex<Told>,
    news: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A running virtual machine. It ends with this value.
pub struct Vm {
    name: &'static str,
    kernel: String,
    address: &'static str,
    dir: PathBuf,
    qemu: Child,
    virtiofsd: Child,
    port: UnixStream,
    shared: Arc<Shared>,
    next: AtomicU64,
    /// What was started, with the files of its outputs.
    commands: Mutex<Vec<(String, PathBuf)>>,
}

impl Vm {
    fn start(parts: &Parts, kernel: &str, [name, other]: [&'static str; 2], share: &Path) -> Vm {
        let dir = share.join(name);
        fs::create_dir_all(&dir).expect("a directory for the machine");
        let (cable, far_end) = (share.join(format!("cable-{name}")), share.join(format!("cable-{other}")));
        let (files, port) = (dir.join("virtiofsd"), dir.join("port"));
        let log = |what: &str| fs::File::create(dir.join(what)).expect("a log");
        for left in [&files, &port, &cable] {
            let _ = fs::remove_file(left);
        }
        let virtiofsd = Command::new(&parts.virtiofsd)
            .arg(format!("--socket-path={}", files.display()))
            .args(["-o", &format!("source={}", share.display()), "-o", "cache=none"])
            .stdin(Stdio::null())
            .stdout(log("virtiofsd-out"))
            .stderr(log("virtiofsd-err"))
            .spawn()
            .expect("virtiofsd starts");
        within("socket of virtiofsd", SLOW, || files.exists().then_some(()));
        let (address, mac, pids) = if name == "a" {
            ("10.78.0.1", "52:54:00:00:00:0a", 1000)
        } else {
            ("10.78.0.2", "52:54:00:00:00:0b", 15_000)
        };
        let qemu = Command::new(&parts.qemu)
            .args(["-accel", "tcg", "-machine", "q35", "-cpu", "max", "-smp", "1", "-m", "512"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            // virtiofsd reads and writes the machine's memory.
            .args([
                "-object",
                "memory-backend-memfd,id=memory,size=512M,share=on",
                "-numa",
                "node,memdev=memory",
            ])
            .args(["-chardev", &format!("socket,id=files,path={}", files.display())])
            .args(["-device", "vhost-user-fs-pci,chardev=files,tag=share"])
            .args(["-chardev", &format!("socket,id=port,path={},server=on,wait=on", port.display())])
            .args(["-device", "virtio-serial-pci", "-device", "virtserialport,nr=1,chardev=port"])
            .args([
                "-netdev",
                &format!(
                    "dgram,id=cable,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                    cable.display(),
                    far_end.display()
                ),
            ])
            .args(["-device", &format!("virtio-net-pci,netdev=cable,mac={mac}")])
            .args(["-serial", &format!("file:{}", dir.join("console").display())])
            .arg("-kernel")
            .arg(parts.kernels.join(kernel).join("vmlinuz"))
            .arg("-initrd")
            .arg(parts.initramfs(kernel, share))
            .arg("-append")
            // The emulated time stamp counter is steady; the kernel's doubts would keep programs from reading the clock without a system call.
            .arg(format!(
                "console=ttyS0 quiet panic=-1 tsc=reliable name=migrate-{name} address={address} share={} pids={pids}",
                share.display()
            ))
            .stdin(Stdio::null())
            .stdout(log("qemu-out"))
            .stderr(log("qemu-err"))
            .spawn()
            .expect("qemu starts");
        // QEMU waits for this connection, and the machine ends with it.
        let port = within("port of the machine", SLOW, || UnixStream::connect(&port).ok());
        let shared = Arc::new(Shared::default());
        let from = port.try_clone().expect("a second descriptor");
        let news = Arc::clone(&shared);
        thread::spawn(move || listen(from, &news));
        Vm {
            name,
            kernel: kernel.into(),
            address,
            dir,
            qemu,
            virtiofsd,
            port,
            shared,
            next: AtomicU64::new(1),
            commands: Mutex::default(),
        }
    }

    /// Itself when it has booted; else another one in its place. Very rarely an emulated machine stands still with its processor idle
    /// early in its boot, which is not what is tested here.
    fn up_or(self, again: impl Fn() -> Vm) -> Vm {
        let mut vm = self;
        for _ in 0..2 {
            if eventually(SLOW / 2, || vm.shared.lock().up) {
                return vm;
            }
            eprintln!("machine {} has not booted and is started anew", vm.name);
            vm.dump();
            drop(vm);
            vm = again();
        }
        vm.wait_until("boot", SLOW, |told| told.up.then_some(()));
        vm
    }

    /// "a" or "b".
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its kernel: [`OLD`] or [`NEW`].
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Its address on the cable.
    pub fn address(&self) -> &'static str {
        self.address
    }

    /// A directory of its own, in the one that both see.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory that both see.
    pub fn shared_dir(&self) -> &Path {
        self.dir.parent().expect("the test's directory")
    }

    /// Starts a program.
    #[track_caller]
    pub fn spawn<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> VmProcess<'_> {
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        let outputs = ["out", "err"].map(|o| self.dir.join(format!("{o}-{id}")));
        self.spawn_with(argv, id, outputs)
    }

    #[track_caller]
    fn spawn_with<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>, id: u64, outputs: [PathBuf; 2]) -> VmProcess<'_> {
        let argv: Vec<String> = argv.into_iter().map(Into::into).collect();
        let label: String = argv.join(" ").chars().take(100).collect();
        let spawn = Spawn {
            id,
            argv: if argv[0].starts_with('/') {
                argv
            } else {
                // The machine's own search path decides.
                [vec!["/bin/busybox".into(), "env".into()], argv].concat()
            },
            env: [
                ("PATH", "/usr/bin:/bin"),
                ("HOME", "/root"),
                ("LANG", "C.UTF-8"),
                ("RUST_BACKTRACE", "1"),
                // The memory oracle, in every migration.
                ("MIGRATE_VERIFY", "1"),
            ]
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .to_vec(),
            cwd: "/".into(),
            setsid: true,
            outputs: Some(outputs.clone().map(|o| o.display().to_string())),
            ..Spawn::default()
        };
        let mut line = serde_json::to_vec(&spawn).expect("JSON");
        line.push(b'\n');
        let mark = self.shared.lock().reaped.len();
        (&self.port).write_all(&line).expect("the machine takes commands");
        let mut commands = self.commands.lock().unwrap_or_else(|e| e.into_inner());
        commands.extend(outputs.iter().map(|o| (label.clone(), o.clone())));
        drop(commands);
        let answer = self.wait_until(&format!("start of {label}"), SLOW, |told| told.answers.remove(&id));
        let pid = answer.unwrap_or_else(|e| panic!("{label}: {e}"));
        VmProcess {
            vm: self,
            pid,
            mark,
            outputs,
            label,
        }
    }

    /// Runs a line of shell to the end.
    #[track_caller]
    pub fn run(&self, line: &str) -> Run {
        self.spawn(["/bin/sh", "-c", line]).wait()
    }

    /// Runs `migrate ARGS...` to the end.
    #[track_caller]
    pub fn migrate(&self, args: &[&str]) -> Run {
        self.spawn([&["/usr/bin/migrate"], args].concat()).wait()
    }

    /// Copies a file of this machine into it.
    #[track_caller]
    pub fn copy_in(&self, from: &Path, to: &str) {
        let via = self.dir.join("copied-in");
        fs::copy(from, &via).expect("a copy");
        self.run(&format!("cp -p '{}' '{to}'", via.display())).expect_code(0);
    }

    /// A file of its own.
    #[track_caller]
    pub fn copy_out(&self, from: &str) -> Vec<u8> {
        let via = self.dir.join("copied-out");
        self.run(&format!("cp '{from}' '{}'", via.display())).expect_code(0);
        fs::read(via).expect("a copy")
    }

    /// Is there a process with this pid that is not a zombie?
    #[track_caller]
    pub fn lives(&self, pid: i32) -> bool {
        let stat = self.run(&format!("cat /proc/{pid}/stat")).stdout;
        !stat.is_empty() && !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
    }

    /// `migrate receive --once` with a fresh ticket.
    #[track_caller]
    pub fn receive(&self) -> VmReceiver<'_> {
        let ticket_file = self.dir.join(format!("ticket-{}", self.next.fetch_add(1, Ordering::SeqCst)));
        let listen = format!("{}:7878", self.address);
        let name = ticket_file.display().to_string();
        let args = [
            "receive",
            "--listen",
            &listen,
            "--ticket-file",
            &name,
            "--once",
            "--stdio",
            "null",
            "--json",
        ];
        let process = self.spawn([&["/usr/bin/migrate"], &args[..]].concat());
        let ticket = within("ticket of the receiver", SLOW, || {
            if let Some(ended) = process.ended() {
                panic!("migrate receive ended: {ended:?}\n{}\n{}", process.stdout(), process.stderr());
            }
            let ticket = fs::read_to_string(&ticket_file).ok()?;
            (!ticket.trim().is_empty()).then(|| ticket.trim().to_string())
        });
        VmReceiver {
            process,
            ticket,
            target: listen,
        }
    }

    /// Starts a guest and waits until it is set up.
    #[track_caller]
    pub fn guest(&self, name: &str, options: &[(&str, &str)]) -> Guest {
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        let argv_of = |dir: &Path| Guest::argv(&["/usr/bin/migrate-guest".to_string()], name, dir, options);
        Guest::start_by(self.shared_dir(), name, SLOW, |dir, out| {
            let process = self.spawn_with(argv_of(dir), id, [out.to_path_buf(), out.to_path_buf()]);
            (process.pid, Box::new(move || process.ended()))
        })
    }

    fn ended_since(&self, mark: usize, pid: i32) -> Option<Ended> {
        let told = self.shared.lock();
        let found = told.reaped.iter().skip(mark).find(|(p, _)| *p == pid);
        found.map(|(_, status)| Ended::from_status(*status))
    }

    #[track_caller]
    fn wait_until<T>(&self, what: &str, limit: Duration, mut look: impl FnMut(&mut Told) -> Option<T>) -> T {
        within(what, limit, || {
            let mut told = self.shared.lock();
            if let Some(found) = look(&mut told) {
                return Some(found);
            }
            assert!(!told.over, "{what}: machine {} is gone", self.name);
            drop(self.shared.news.wait_timeout(told, Duration::from_millis(50)));
            None
        })
    }

    /// What its console and its commands said, for a person who looks at a failure.
    fn dump(&self) {
        let mut texts = vec![("console".to_string(), self.dir.join("console"))];
        texts.extend(["qemu-err", "virtiofsd-err"].map(|f| (f.to_string(), self.dir.join(f))));
        texts.extend(self.commands.lock().unwrap_or_else(|e| e.into_inner()).iter().cloned());
        for (label, path) in texts {
            let bytes = fs::read(path).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            let tail: Vec<&str> = text.lines().rev().take(60).collect();
            if !tail.is_empty() {
                eprintln!("--- machine {}: {label}", self.name);
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if thread::panicking() {
            self.dump();
        }
        for child in [&mut self.qemu, &mut self.virtiofsd] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn listen(from: UnixStream, shared: &Shared) {
    for line in BufReader::new(from).lines() {
        let Ok(said) = line.map_err(drop).and_then(|l| serde_json::from_str(&l).map_err(drop)) else {
            break;
        };
        let mut told = shared.lock();
        match said {
            Said::Up { .. } => told.up = true,
            Said::Spawned { id, pid } => drop(told.answers.insert(id, Ok(pid))),
            Said::Failed { id, error } => drop(told.answers.insert(id, Err(error))),
            Said::Reaped { pid, status } => told.reaped.push((pid, status)),
        }
        shared.news.notify_all();
    }
    shared.lock().over = true;
    shared.news.notify_all();
}

/// A program that was started in a virtual machine.
pub struct VmProcess<'a> {
    vm: &'a Vm,
    /// Its pid there.
    pub pid: i32,
    mark: usize,
    outputs: [PathBuf; 2],
    label: String,
}

impl VmProcess<'_> {
    /// Standard output so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.outputs[0]).unwrap_or_default()).into_owned()
    }
    /// Standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.outputs[1]).unwrap_or_default()).into_owned()
    }
    /// How it ended, if it did.
    pub fn ended(&self) -> Option<Ended> {
        self.vm.ended_since(self.mark, self.pid)
    }
    /// Waits for its end.
    #[track_caller]
    pub fn wait(&self) -> Run {
        let (mark, pid) = (self.mark, self.pid);
        let ended = self.vm.wait_until(&format!("end of {}", self.label), SLOW, |told| {
            let found = told.reaped.iter().skip(mark).find(|(p, _)| *p == pid);
            found.map(|(_, status)| Ended::from_status(*status))
        });
        Run {
            code: match ended {
                Ended::Code(code) => code,
                Ended::Signal(signal) => 128 + signal,
            },
            stdout: self.stdout(),
            stderr: self.stderr(),
        }
    }
}

/// A waiting `migrate receive` in a virtual machine.
pub struct VmReceiver<'a> {
    /// The agent.
    pub process: VmProcess<'a>,
    /// Its one-time ticket.
    pub ticket: String,
    /// What to type after the pid.
    pub target: String,
}

/// Where a tree goes from and to.
pub struct Vms {
    /// 10.78.0.1, started first: its clocks are ahead.
    pub a: Vm,
    /// 10.78.0.2.
    pub b: Vm,
    dir: TempDir,
}

impl Vms {
    /// Boots two machines with these kernels ([`OLD`], [`NEW`]); `None` after a recorded skip when this machine cannot.
    pub fn boot(kernel_a: &str, kernel_b: &str) -> Option<Vms> {
        let parts = match Parts::find(&[kernel_a, kernel_b]) {
            Ok(parts) => parts,
            Err(missing) => {
                skip(&missing);
                return None;
            }
        };
        let dir = tempfile::Builder::new()
            .prefix("migrate-vm-")
            .tempdir()
            .expect("a directory for the test");
        // Their clocks differ by this much.
        let head_start = Duration::from_secs(3);
        let start = |kernel: &str, names| Vm::start(&parts, kernel, names, dir.path());
        let a = start(kernel_a, ["a", "b"]);
        thread::sleep(head_start);
        let b = start(kernel_b, ["b", "a"]);
        let a = a.up_or(|| start(kernel_a, ["a", "b"]));
        let b = b.up_or(|| start(kernel_b, ["b", "a"]));
        Some(Vms { a, b, dir })
    }

    /// The directory that both see, gone after the test.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The other one.
    pub fn other(&self, vm: &Vm) -> &Vm {
        if vm.name == "a" { &self.b } else { &self.a }
    }

    /// Moves a tree from a machine to the other, and fails the test unless both agents are content and only the copy is left.
    #[track_caller]
    pub fn move_tree(&self, from: &Vm, pid: i32, mode: &str) -> crate::Moved {
        self.move_with(from, pid, &["--mode", mode])
    }

    /// The same with these options for `send`.
    #[track_caller]
    pub fn move_with(&self, from: &Vm, pid: i32, options: &[&str]) -> crate::Moved {
        let to = self.other(from);
        let receiver = to.receive();
        let number = pid.to_string();
        let args = ["send", &number, &receiver.target, "--ticket", &receiver.ticket, "--json"];
        let sent = from.migrate(&[&args, options].concat());
        sent.expect_code(0);
        let report = sent.json();
        assert_eq!(report["outcome"], "migrated", "report: {report}\nstderr: {}", sent.stderr);
        let restored = report["restored_pid"].as_i64().unwrap_or(0) as i32;
        assert!(restored > 0, "report: {report}");
        receiver.process.wait().expect_code(0);
        assert!(to.lives(restored), "no process {restored} in machine {}", to.name);
        assert!(
            eventually(Duration::from_secs(30), || !from.lives(pid)),
            "the original is still there"
        );
        crate::Moved { pid: restored, report }
    }
}

/// Two virtual machines with these kernels, or the end of the test with a named skip.
#[macro_export]
macro_rules! two_machines {
    ($a:expr, $b:expr) => {
        match $crate::vm::Vms::boot($a, $b) {
            Some(machines) => machines,
            None => return,
        }
    };
}

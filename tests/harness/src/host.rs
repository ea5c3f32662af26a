//! One host: its first process, the commands in it, and a view of its processes from outside.

use crate::{
    tools::{guest_command, tool},
    wait::within,
};
use migrate_guests::wire::{Said, Spawn};
use nix::{
    pty::openpty,
    sched::{CloneFlags, setns},
    sys::{
        signal::{Signal, kill},
        socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair},
    },
    unistd::Pid,
};
use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{IoSlice, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Stdio as ChildStdio},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

/// What the first process has told so far.
#[derive(Default)]
struct Told {
    answers: HashMap<u64, Result<i32, String>>,
    /// In the order they went; a pid may come several times.
    reaped: Vec<(i32, i32)>,
    over: bool,
}

struct Shared {
    told: Mutex<Told>,
    news: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A running host.
pub struct Host {
    name: &'static str,
    address: &'static str,
    dir: PathBuf,
    control: OwnedFd,
    shared: Arc<Shared>,
    child: Child,
    init: i32,
    next: AtomicU64,
    /// Its agents take every vdso for another kernel's.
    foreign: AtomicBool,
    /// What the commands said, for the report of a failed test.
    heard: Mutex<Vec<(String, Output)>>,
}

type Output = Arc<Mutex<Vec<u8>>>;

/// Standard streams of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stdio {
    /// /dev/null.
    Null,
    /// A pseudo-terminal, its controlling one.
    Terminal,
    /// Pipes: input closed, output and errors collected.
    Pipe,
    /// Both outputs into a file, as the shell's `> file 2>&1`.
    File(PathBuf),
}

/// A process of a host, as `/proc` shows it from outside.
#[derive(Debug, Clone)]
pub struct Proc {
    /// Pid in the host.
    pub pid: i32,
    /// Pid in the test's namespace.
    pub outer: i32,
    /// Pid in the innermost namespace, the one it sees itself.
    pub inner: i32,
    /// One letter: R, S, D, T, t, Z.
    pub state: char,
    /// Short name.
    pub name: String,
    /// Command line, blanks between the arguments.
    pub command: String,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Ended {
    pub(crate) fn from_status(status: i32) -> Ended {
        if status & 0x7f == 0 {
            Ended::Code((status >> 8) & 0xff)
        } else {
            Ended::Signal(status & 0x7f)
        }
    }
}

impl Host {
    /// Starts one; `dir` is the test's directory, `kept` another that both see.
    pub(crate) fn start(name: &'static str, address: &'static str, dir: &Path, kept: Option<&Path>) -> Host {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("a socket pair");
        let guest = guest_command();
        let child = std::process::Command::new(&guest[0])
            .args(&guest[1..])
            .args(["host", &format!("migrate-{name}")])
            .args(kept)
            .stdin(ChildStdio::from(theirs))
            .stdout(ChildStdio::null())
            .spawn()
            .expect("start of a host");
        let shared = Arc::new(Shared {
            told: Mutex::default(),
            news: Condvar::new(),
        });
        let init = match next_word(ours.as_raw_fd()) {
            Some(Said::Up { init }) => init,
            other => panic!("host {name} did not come up (root and CONFIG_PID_NS are needed): {other:?}"),
        };
        let listener = (ours.try_clone().expect("a second descriptor"), Arc::clone(&shared));
        thread::spawn(move || listen(&listener.0, &listener.1));
        let host = Host {
            name,
            address,
            dir: dir.join(name),
            control: ours,
            shared,
            child,
            init,
            next: AtomicU64::new(1),
            foreign: AtomicBool::new(std::env::var_os("MIGRATE_FOREIGN_VDSO").is_some()),
            heard: Mutex::default(),
        };
        fs::create_dir_all(host.dir.join("state")).expect("a directory for the host");
        // Up means mounted: the first process answers only then. Pids begin far apart, so that those of a tree are free on the other host
        // unless a test takes them.
        host.command(["true"]).pid(if name == "a" { 1000 } else { 15_000 }).start().wait();
        host
    }

    /// "a" or "b".
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its address on the link between the two.
    pub fn address(&self) -> &'static str {
        self.address
    }

    /// From now on its agents take every vdso for another kernel's, or not.
    pub fn foreign_vdsos(&self, on: bool) {
        self.foreign.store(on, Ordering::SeqCst);
    }

    pub(crate) fn takes_vdsos_for_foreign(&self) -> bool {
        self.foreign.load(Ordering::SeqCst)
    }

    /// A directory of its own.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Pid of its first process, from outside.
    pub fn init(&self) -> i32 {
        self.init
    }

    /// A command to start in it.
    pub fn command<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> Command<'_> {
        Command {
            host: self,
            argv: argv.into_iter().map(Into::into).collect(),
            stdio: Stdio::Pipe,
            label: String::new(),
            spawn: Spawn {
                cwd: self.dir.display().to_string(),
                setsid: true,
                env: [
                    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
                    ("HOME", "/root"),
                    ("LANG", "C.UTF-8"),
                    ("TERM", "xterm"),
                ]
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .to_vec(),
                ..Spawn::default()
            },
        }
    }

    /// Runs a closure on a thread that is in this host's network.
    pub fn inside<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let net = File::open(format!("/proc/{}/ns/net", self.init)).expect("the host's network");
        thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(net, CloneFlags::CLONE_NEWNET).expect("setns");
                act()
            });
            thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e))
        })
    }

    /// The same for a future.
    pub fn inside_async<T: Send>(&self, act: impl AsyncFnOnce() -> T + Send) -> T {
        self.inside(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(act())
        })
    }

    /// All its processes but the first one.
    pub fn processes(&self) -> Vec<Proc> {
        let net = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let mine = net(self.init);
        let mut list = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(outer) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
                continue;
            };
            let Ok(status) = fs::read_to_string(format!("/proc/{outer}/status")) else {
                continue;
            };
            let field = |name: &str| {
                let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("");
                line.trim_start_matches(':').trim().to_string()
            };
            let pids: Vec<i32> = field("NSpid").split_whitespace().filter_map(|p| p.parse().ok()).collect();
            let (Some(pid), Some(inner)) = (pids.get(1), pids.last()) else {
                continue;
            };
            if outer == self.init || !self.owns(outer, mine.as_deref(), net(outer).as_deref()) {
                continue;
            }
            let command = fs::read(format!("/proc/{outer}/cmdline")).unwrap_or_default();
            list.push(Proc {
                pid: *pid,
                outer,
                inner: *inner,
                state: field("State").chars().next().unwrap_or('?'),
                name: field("Name"),
                command: String::from_utf8_lossy(&command).replace('\0', " ").trim().to_string(),
            });
        }
        list
    }

    fn owns(&self, outer: i32, mine: Option<&Path>, its: Option<&Path>) -> bool {
        if its.is_some() && its == mine {
            return true;
        }
        // A zombie has no namespaces to look at, a child may have its own: the line of parents tells.
        let mut at = outer;
        for _ in 0..64 {
            let status = fs::read_to_string(format!("/proc/{at}/status")).unwrap_or_default();
            let parent = status
                .lines()
                .find_map(|l| l.strip_prefix("PPid:"))
                .and_then(|p| p.trim().parse().ok());
            match parent {
                Some(p) if p == self.init => return true,
                Some(p) if p > 1 => at = p,
                _ => return false,
            }
        }
        false
    }

    /// The process with this pid in the host.
    pub fn process(&self, pid: i32) -> Option<Proc> {
        self.processes().into_iter().find(|p| p.pid == pid)
    }

    /// Pid outside of a pid in the host.
    pub fn outer(&self, pid: i32) -> Option<i32> {
        self.process(pid).map(|p| p.outer)
    }

    /// Processes whose command line contains a text, zombies left out.
    pub fn running(&self, text: &str) -> Vec<Proc> {
        let mut list = self.processes();
        list.retain(|p| p.state != 'Z' && p.command.contains(text));
        list
    }

    /// Sends a signal to a pid of the host.
    pub fn signal(&self, pid: i32, signal: Signal) -> bool {
        self.outer(pid).is_some_and(|outer| kill(Pid::from_raw(outer), signal).is_ok())
    }

    /// How many deaths the host has seen; a mark for [`Host::ended_since`].
    pub fn deaths(&self) -> usize {
        self.shared.lock().reaped.len()
    }

    /// Has a process end, by `how`, and fails the test unless it is gone soon, with exit code 0 where the host's init saw it.
    #[track_caller]
    pub fn expect_end(&self, pid: i32, how: impl FnOnce()) {
        let mark = self.deaths();
        how();
        let ended = crate::within("its end", Duration::from_secs(20), || match self.ended_since(mark, pid) {
            Some(ended) => Some(Some(ended)),
            None => self.process(pid).is_none().then_some(None),
        });
        assert!(matches!(ended, None | Some(Ended::Code(0))), "process {pid}: {ended:?}");
    }

    /// How a child of the first process ended, if it did after the mark.
    pub fn ended_since(&self, mark: usize, pid: i32) -> Option<Ended> {
        let told = self.shared.lock();
        told.reaped
            .iter()
            .skip(mark)
            .find(|(p, _)| *p == pid)
            .map(|(_, status)| Ended::from_status(*status))
    }

    fn wait_until<T>(&self, what: &str, limit: Duration, mut look: impl FnMut(&mut Told) -> Option<T>) -> T {
        within(what, limit, || {
            let mut told = self.shared.lock();
            if let Some(found) = look(&mut told) {
                return Some(found);
            }
            assert!(!told.over, "{what}: host {} is gone", self.name);
            let woken = self.shared.news.wait_timeout(told, Duration::from_millis(50));
            look(&mut woken.unwrap_or_else(|e| e.into_inner()).0)
        })
    }

    /// What its commands said, for a person who looks at a failure.
    pub(crate) fn dump(&self) {
        for (label, output) in self.heard.lock().unwrap_or_else(|e| e.into_inner()).iter() {
            let bytes = output.lock().unwrap_or_else(|e| e.into_inner());
            let text = String::from_utf8_lossy(&bytes);
            let tail: Vec<&str> = text.lines().rev().take(60).collect();
            if !tail.is_empty() {
                eprintln!("--- host {}: {label}", self.name);
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
        eprintln!("--- host {}: processes", self.name);
        for p in self.processes() {
            eprintln!(
                "{:>6} {:>6} {} {}",
                p.pid,
                p.outer,
                p.state,
                p.command.chars().take(100).collect::<String>()
            );
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.init), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

fn next_word(fd: i32) -> Option<Said> {
    let mut bytes = [0; 4096];
    loop {
        return match recv(fd, &mut bytes, MsgFlags::empty()) {
            Ok(0) => None,
            Ok(n) => serde_json::from_slice(&bytes[..n]).ok(),
            Err(nix::errno::Errno::EINTR) => continue,
            Err(_) => None,
        };
    }
}

fn listen(fd: &OwnedFd, shared: &Shared) {
    while let Some(said) = next_word(fd.as_raw_fd()) {
        let mut told = shared.lock();
        match said {
            Said::Up { .. } => {}
            Said::Spawned { id, pid } => drop(told.answers.insert(id, Ok(pid))),
            Said::Failed { id, error } => drop(told.answers.insert(id, Err(error))),
            Said::Reaped { pid, status } => told.reaped.push((pid, status)),
        }
        shared.news.notify_all();
    }
    shared.lock().over = true;
    shared.news.notify_all();
}

/// A command that is about to be started.
pub struct Command<'a> {
    host: &'a Host,
    argv: Vec<String>,
    stdio: Stdio,
    label: String,
    spawn: Spawn,
}

impl<'a> Command<'a> {
    /// Its streams.
    pub fn stdio(mut self, stdio: Stdio) -> Self {
        self.spawn.terminal = stdio == Stdio::Terminal;
        self.stdio = stdio;
        self
    }
    /// Streams that a shell in the host opens: /dev/null, and both outputs into a file. CRIU dumps none of another mount namespace.
    pub fn says_to(mut self, file: &Path) -> Self {
        if let Some(program) = tool(&self.argv[0]) {
            self.argv[0] = program.display().to_string();
        }
        let file = file.display().to_string();
        self.stdio(Stdio::Null)
            .under(["sh", "-c", "exec \"$@\" </dev/null >\"$0\" 2>&1", &file])
    }
    /// Ignores SIGHUP, as under nohup.
    pub fn nohup(mut self) -> Self {
        self.spawn.nohup = true;
        self
    }
    /// A variable of its environment.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.spawn.env.retain(|(k, _)| k != key);
        self.spawn.env.push((key.into(), value.into()));
        self
    }
    /// Working directory.
    pub fn cwd(mut self, dir: &Path) -> Self {
        self.spawn.cwd = dir.display().to_string();
        self
    }
    /// Another user.
    pub fn uid(mut self, uid: u32) -> Self {
        self.spawn.uid = Some(uid);
        self
    }
    /// The pid it shall have in the host.
    pub fn pid(mut self, pid: i32) -> Self {
        self.spawn.want_pid = Some(pid);
        self
    }
    /// Limit of open files.
    pub fn open_files(mut self, n: u64) -> Self {
        self.spawn.nofile = Some(n);
        self
    }
    /// A group of its own instead of a session.
    pub fn same_session(mut self) -> Self {
        self.spawn.setsid = false;
        self
    }
    /// By another program, whose arguments end with the command.
    pub fn under<S: Into<String>>(mut self, prefix: impl IntoIterator<Item = S>) -> Self {
        self.argv.splice(0..0, prefix.into_iter().map(Into::into));
        self
    }
    /// Name in the report of a failure.
    pub fn label(mut self, label: &str) -> Self {
        self.label = label.into();
        self
    }

    /// Starts it.
    pub fn start(mut self) -> Process<'a> {
        let host = self.host;
        let program = tool(&self.argv[0]).unwrap_or_else(|| panic!("{} is not installed", self.argv[0]));
        self.argv[0] = program.display().to_string();
        if self.label.is_empty() {
            self.label = self.argv.join(" ").chars().take(100).collect();
        }
        let null = || OwnedFd::from(OpenOptions::new().read(true).write(true).open("/dev/null").expect("/dev/null"));
        let (stdout, stderr) = (Output::default(), Output::default());
        let mut terminal = None;
        let mut collect = Vec::new();
        let fds: [OwnedFd; 3] = match &self.stdio {
            Stdio::Null => [null(), null(), null()],
            Stdio::File(path) => {
                let file = OpenOptions::new().append(true).create(true).open(path).expect("the output file");
                // Opened once for both, and not only for appending, as a shell's > does.
                drop(file);
                let out = OwnedFd::from(OpenOptions::new().write(true).open(path).expect("the output file"));
                let err = out.try_clone().expect("a second descriptor");
                [null(), out, err]
            }
            Stdio::Pipe => {
                let (out, out_child) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("a pipe");
                let (err, err_child) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("a pipe");
                collect.push((File::from(out), Arc::clone(&stdout)));
                collect.push((File::from(err), Arc::clone(&stderr)));
                [null(), out_child, err_child]
            }
            Stdio::Terminal => {
                let pty = openpty(None, None).expect("a pseudo-terminal");
                for fd in [&pty.master, &pty.slave] {
                    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).expect("close-on-exec");
                }
                let master = File::from(pty.master);
                collect.push((master.try_clone().expect("a second descriptor"), Arc::clone(&stdout)));
                terminal = Some(master);
                let [one, two] = [(); 2].map(|()| pty.slave.try_clone().expect("a second descriptor"));
                [pty.slave, one, two]
            }
        };
        let id = host.next.fetch_add(1, Ordering::SeqCst);
        self.spawn.id = id;
        self.spawn.argv = self.argv.clone();
        let bytes = serde_json::to_vec(&self.spawn).expect("JSON");
        let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mark = host.deaths();
        sendmsg::<()>(
            host.control.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &[ControlMessage::ScmRights(&raw)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .expect("the host takes commands");
        drop(fds);
        let unread = Arc::new(AtomicU64::new(collect.len() as u64));
        for (from, into) in collect {
            let unread = Arc::clone(&unread);
            thread::spawn(move || {
                drain(from, &into);
                unread.fetch_sub(1, Ordering::SeqCst);
            });
        }
        let mut heard = host.heard.lock().unwrap_or_else(|e| e.into_inner());
        heard.push((self.label.clone(), Arc::clone(&stdout)));
        heard.push((format!("{} (stderr)", self.label), Arc::clone(&stderr)));
        drop(heard);
        let answer = host.wait_until("start of a command", Duration::from_secs(20), |told| told.answers.remove(&id));
        let pid = answer.unwrap_or_else(|e| panic!("{}: {e}", self.label));
        Process {
            host,
            pid,
            mark,
            stdout,
            stderr,
            unread,
            terminal,
            label: self.label,
        }
    }
}

fn drain(mut from: File, into: &Output) {
    let mut bytes = [0; 8192];
    loop {
        match from.read(&mut bytes) {
            Ok(0) => return,
            Ok(n) => into.lock().unwrap_or_else(|e| e.into_inner()).extend_from_slice(&bytes[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            // A terminal whose last user is gone.
            Err(_) => return,
        }
    }
}

/// A command that was started.
pub struct Process<'a> {
    host: &'a Host,
    /// Pid in the host.
    pub pid: i32,
    mark: usize,
    stdout: Output,
    stderr: Output,
    /// Streams whose end was not read yet.
    unread: Arc<AtomicU64>,
    terminal: Option<File>,
    label: String,
}

impl Process<'_> {
    /// Standard output so far (everything, on a terminal).
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.lock().unwrap_or_else(|e| e.into_inner())).into_owned()
    }
    /// Standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.lock().unwrap_or_else(|e| e.into_inner())).into_owned()
    }
    /// After its end: whether all it said was read, to the end of every stream, which somebody else may keep open.
    pub(crate) fn all_read(&self) -> bool {
        self.unread.load(Ordering::SeqCst) == 0
    }
    /// How it ended, if it did.
    pub fn ended(&self) -> Option<Ended> {
        self.host.ended_since(self.mark, self.pid)
    }
    /// Waits for its end.
    pub fn wait(&self) -> Ended {
        self.wait_for(Duration::from_secs(120))
    }
    /// Waits for its end, this long.
    pub fn wait_for(&self, limit: Duration) -> Ended {
        let (mark, pid) = (self.mark, self.pid);
        self.host.wait_until(&format!("end of {}", self.label), limit, |told| {
            told.reaped
                .iter()
                .skip(mark)
                .find(|(p, _)| *p == pid)
                .map(|(_, s)| Ended::from_status(*s))
        })
    }
    /// Types into its terminal.
    pub fn type_in(&self, text: &str) {
        let mut terminal = self.terminal.as_ref().expect("a terminal");
        terminal.write_all(text.as_bytes()).expect("the terminal takes input");
    }
    /// Sends it a signal; false when it is gone.
    pub fn signal(&self, signal: Signal) -> bool {
        self.ended().is_none() && self.host.signal(self.pid, signal)
    }
    /// Its state, one letter; none when it is gone.
    pub fn state(&self) -> Option<char> {
        self.host.process(self.pid).map(|p| p.state)
    }
    /// The most memory that it has had, in MiB.
    pub fn peak(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.outer())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) >> 10
    }
    /// Its pid outside.
    pub fn outer(&self) -> i32 {
        self.host.outer(self.pid).unwrap_or_else(|| panic!("{} is gone", self.label))
    }
}

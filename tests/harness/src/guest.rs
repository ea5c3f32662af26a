//! A guest as its test sees it.

use crate::{
    host::{Ended, Host, Stdio},
    tools::guest_command,
    wait::{eventually, within},
};
use migrate_guests::control::{Control, Pulse, Request, State};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// A guest, wherever it runs.
pub struct Guest {
    name: String,
    /// Its root's pid, in the host it was started in.
    pub pid: i32,
    dir: PathBuf,
    control: Control,
}

impl Guest {
    /// Starts `name` in a host, with its options, and waits until it is set up.
    pub fn start(host: &Host, name: &str, options: &[(&str, &str)]) -> Guest {
        Guest::start_with(host, name, options, |c| c)
    }

    /// The same, with more to say about the command.
    pub fn start_with<'a>(
        host: &'a Host,
        name: &str,
        options: &[(&str, &str)],
        more: impl FnOnce(crate::Command<'a>) -> crate::Command<'a>,
    ) -> Guest {
        let shared = host.dir().parent().expect("the test's directory");
        Guest::start_by(shared, name, Duration::from_secs(60), |dir, out| {
            let argv = Guest::argv(&guest_command(), name, dir, options);
            // The terminal and the pipe are tried with real programs; a guest's own words go to a file.
            let process = more(host.command(argv).stdio(Stdio::File(out.into())).label(&format!("guest {name}"))).start();
            (process.pid, Box::new(move || process.ended()))
        })
    }

    /// What to type to start one.
    pub(crate) fn argv(program: &[String], name: &str, dir: &Path, options: &[(&str, &str)]) -> Vec<String> {
        let mut argv = program.to_vec();
        argv.extend([name.to_string(), "--dir".into(), dir.display().to_string()]);
        for (key, value) in options {
            argv.push(format!("--{key}"));
            argv.push((*value).to_string());
        }
        argv
    }

    /// Starts one with a directory of its own in `shared`: `start` gets that and the file for its words, and gives the pid and a look at
    /// whether it ended.
    pub(crate) fn start_by<'a>(
        shared: &Path,
        name: &str,
        limit: Duration,
        start: impl FnOnce(&Path, &Path) -> (i32, Box<dyn Fn() -> Option<Ended> + 'a>),
    ) -> Guest {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let dir = shared.join(format!("guest-{}-{}", name, NUMBER.fetch_add(1, Ordering::SeqCst)));
        fs::create_dir_all(&dir).expect("a directory for the guest");
        // Guests that give up root still find their way.
        let _ = std::os::unix::fs::chown(shared, Some(0), Some(0));
        let _ = fs::set_permissions(shared, std::os::unix::fs::PermissionsExt::from_mode(0o755));
        let control = Control::open(&dir.join("control")).expect("the control file");
        let out = dir.join("out");
        fs::write(&out, "").expect("the guest's output");
        let (pid, ended) = start(&dir, &out);
        let words = || fs::read_to_string(&out).unwrap_or_default();
        within(&format!("set-up of guest {name}"), limit, || {
            if let Some(ended) = ended() {
                panic!("guest {name} ended during set-up: {ended:?}\n{}", words());
            }
            (control.pulse().ok()?.state == State::Ready).then_some(())
        });
        Guest {
            name: name.into(),
            pid,
            dir,
            control,
        }
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it said.
    pub fn output(&self) -> String {
        fs::read_to_string(self.dir.join("out")).unwrap_or_default()
    }

    /// Its side of the control file.
    pub fn pulse(&self) -> Pulse {
        self.control.pulse().expect("the control file")
    }

    /// Does it beat?
    pub fn beats(&self) -> bool {
        let before = self.pulse().beats;
        eventually(Duration::from_secs(10), || self.pulse().beats > before)
    }

    /// Does it stand still for this long?
    pub fn rests(&self, time: Duration) -> bool {
        let before = self.pulse().beats;
        std::thread::sleep(time);
        self.pulse().beats == before
    }

    fn ask(&self, request: Request) {
        let number = self.control.ask(request).expect("the control file");
        within(
            &format!("answer of guest {} to {request:?}", self.name),
            Duration::from_secs(60),
            || (self.pulse().done >= number).then_some(()),
        );
    }

    /// Lets it compare everything with what was; the differences, one a line.
    pub fn differences(&self) -> Vec<String> {
        self.ask(Request::Verify);
        let verdict = fs::read_to_string(self.dir.join("verdict")).expect("a verdict");
        verdict.lines().filter(|l| *l != "ok").map(str::to_string).collect()
    }

    /// Lets it compare, and fails the test with what differs.
    #[track_caller]
    pub fn verify(&self, when: &str) {
        self.expect_none(&self.differences(), when);
    }

    /// The same after an agent was killed, which may leave the table of a batch of system calls mapped: unused, and harmless.
    #[track_caller]
    pub fn verify_after_kill(&self, when: &str) {
        // Or the mapping of the pilots and the page with the decision word, when the receiver was killed right after the release.
        let ours = ["/dev/zero (deleted)", "/memfd:migrate-pilot", "/state/journal/"];
        let residue = |line: &String| line.contains("mapping ") && line.contains(": new: ") && ours.iter().any(|name| line.contains(name));
        let (left, wrong): (Vec<String>, Vec<String>) = self.differences().into_iter().partition(residue);
        left.iter().for_each(|line| println!("{when}: left behind: {line}"));
        self.expect_none(&wrong, when);
    }

    #[track_caller]
    fn expect_none(&self, wrong: &[String], when: &str) {
        assert!(
            wrong.is_empty(),
            "guest {} {when}: {} things differ\n{}",
            self.name,
            wrong.len(),
            wrong
                .iter()
                .take(40)
                .map(|w| w.chars().take(400).collect::<String>() + "\n")
                .collect::<String>()
        );
    }

    /// Forgets the longest gap between beats.
    pub fn reset_gap(&self) {
        self.ask(Request::ResetGap);
    }

    /// The longest gap between two beats since it was reset: a freeze as the program sees it.
    pub fn gap(&self) -> Duration {
        Duration::from_nanos(self.pulse().longest_gap_ns)
    }

    /// The gap between its last beat on one host and its first on the other: the freeze alone, as the program sees it.
    pub fn gap_at_move(&self) -> Duration {
        Duration::from_nanos(self.pulse().gap_at_move_ns)
    }

    /// Asks it to end, wherever it is, and waits until it says it does.
    pub fn quit(&self) {
        self.ask(Request::Quit);
    }
}

impl Drop for Guest {
    /// What it said last belongs to the failure of its test.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let output = self.output();
            let lines: Vec<&str> = output.lines().collect();
            println!("--- guest {}\n{}", self.name, lines[lines.len().saturating_sub(40)..].join("\n"));
        }
    }
}

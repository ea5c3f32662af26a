//! What can be said about a pid before the engine is asked. The engine checks again: a pid may change hands at any time.

use migrate_engine::report::Failure;
use std::fs;

/// Refuses pids that are gone, threads, this command itself and what it runs under.
pub fn preflight(pid: i32) -> Result<(), Failure> {
    let refuse = |message: String| Failure::refused("preflight", pid, message, Vec::new());
    if !fs::exists("/proc/self/status").unwrap_or(false) {
        return Ok(()); // No /proc: the engine says so better.
    }
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
        return Err(refuse("there is no such process".into()).with_fix("see ps or pgrep for the pids there are"));
    };
    if let Some(leader) = field(&status, "Tgid:").filter(|leader| *leader != pid) {
        return Err(refuse(format!("is a thread of process {leader}")).with_fix(format!("give the process: {leader}")));
    }
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    if pid == own {
        return Err(refuse("is this command itself".into()));
    }
    if ancestors(own).contains(&pid) {
        return Err(refuse("is an ancestor of this command, which would have to move itself".into())
            .with_fix("run migrate from another terminal, or with setsid"));
    }
    Ok(())
}

/// What a failed migration left of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It runs, or sleeps as programs do.
    Running,
    /// It is stopped, by whoever.
    Stopped,
    /// There is none, or only its remains.
    Gone,
}

/// Looks.
pub fn state(pid: i32) -> State {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    match stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()) {
        None | Some('Z' | 'X') => State::Gone,
        Some('T' | 't') => State::Stopped,
        Some(_) => State::Running,
    }
}

fn ancestors(mut pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    while let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) {
        match field(&status, "PPid:") {
            Some(parent) if parent > 0 && !found.contains(&parent) => found.push(parent),
            _ => break,
        }
        pid = found.last().copied().unwrap_or(0);
    }
    found
}

fn field(status: &str, name: &str) -> Option<i32> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|value| value.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate_engine::report::Class;

    #[test]
    fn refused() {
        let own = i32::try_from(std::process::id()).unwrap();
        let parent = i32::try_from(std::os::unix::process::parent_id()).unwrap();
        for (pid, says) in [(own, "itself"), (parent, "ancestor"), (i32::MAX, "no such process")] {
            let failure = preflight(pid).unwrap_err();
            assert_eq!(failure.class, Class::Refused);
            assert!(failure.message.contains(says), "{failure}");
        }
        assert_eq!(state(own), State::Running);
        assert_eq!(state(i32::MAX), State::Gone);
    }

    #[test]
    fn threads() {
        let (tid, got) = std::sync::mpsc::channel();
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let link = fs::read_link("/proc/thread-self").unwrap();
            tid.send(link.file_name().unwrap().to_str().unwrap().parse::<i32>().unwrap())
                .unwrap();
            let _ = wait.recv();
        });
        let failure = preflight(got.recv().unwrap()).unwrap_err();
        assert!(failure.message.contains("is a thread of process"), "{failure}");
        drop(end);
        thread.join().unwrap();
    }
}

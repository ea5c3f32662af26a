//! Tasks that come and go.

use super::{Call, PRIVATE, Patch, SHARED, Trap, below, pointer};
use crate::{
    kit::{Kit, Numbers, sys, sys0},
    memory::PAGE,
    soak::{
        lane::Lane,
        model::{Page, fill, holds},
    },
};
use std::{ffi::CString, io, os::unix::ffi::OsStrExt, thread::JoinHandle, time::Duration};

/// The kinds of this file.
pub fn kind(name: &str, kit: &mut Kit) -> Option<io::Result<Trap>> {
    Some(match name {
        "forks" => forks(),
        "execs" => execs(kit),
        "executes-when-told" => executes_when_told(kit),
        "threads" => threads(kit),
        "grandchildren" => grandchildren(),
        _ => return None,
    })
}

/// Waits for those that have ended; each must have ended well.
pub(super) fn reap(kit: &mut Kit, children: &mut Vec<i32>, what: &str) -> io::Result<()> {
    let mut wrong = Vec::new();
    let mut left = Vec::new();
    for pid in children.drain(..) {
        let mut status = 0;
        match sys!(waitpid(pid, &mut status, libc::WNOHANG))? {
            0 => left.push(pid),
            _ if status != 0 => wrong.push((pid, status)),
            _ => {}
        }
    }
    *children = left;
    for (pid, status) in wrong {
        kit.differs(format!("{what} {pid} ended with status {status:#x}"));
    }
    Ok(())
}

/// A child's life: its copy of its parent's memory is looked at, written, and looked at again.
fn child(patch: &mut Patch, rest: Duration) -> ! {
    let right = |patch: &Patch| {
        patch.pages.iter().enumerate().all(|(p, page)| match page {
            Page::Seed(seed) => holds(patch.address(p), *seed),
            _ => true,
        })
    };
    let mut well = right(patch);
    for p in (0..patch.len()).step_by(2) {
        fill(patch.address(p), 1 << 60 | p as u64);
        patch.pages[p] = Page::Seed(1 << 60 | p as u64);
    }
    std::thread::sleep(rest);
    well &= right(patch);
    sys0!(_exit(i32::from(!well)))
}

/// Children are born, write to their copies, and end; up to four at a time.
fn forks() -> io::Result<Trap> {
    let mut patch = Patch::filled(64, PRIVATE)?;
    let mut children = Vec::new();
    let mut numbers = Numbers::new(41);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            let page = below(&mut numbers, 64);
            patch.write(page);
            reap(kit, &mut children, "child")?;
            if children.len() < 4 {
                let rest = Duration::from_millis(1 + below(&mut numbers, 40) as u64);
                match sys!(fork())? {
                    0 => child(&mut patch, rest),
                    pid => children.push(pid),
                }
            }
        }
        patch.look(kit, "memory of a parent", call, &mut numbers);
        Ok(())
    }))
}

/// A child that has children; it ends before them or after them.
fn grandchildren() -> io::Result<Trap> {
    let mut patch = Patch::filled(32, PRIVATE)?;
    let shared = Lane::new(5, 32, SHARED, -1)?;
    let mut children = Vec::new();
    let mut numbers = Numbers::new(42);
    Ok(Box::new(move |kit, call| {
        if call == Call::Step {
            reap(kit, &mut children, "child with children")?;
            if children.len() < 2 {
                let rest = Duration::from_millis(1 + below(&mut numbers, 20) as u64);
                match sys!(fork())? {
                    0 => {
                        let grandchild = sys!(fork())?;
                        if grandchild == 0 {
                            child(&mut patch, rest);
                        }
                        let mut status = 0;
                        sys0!(waitpid(grandchild, &mut status, 0));
                        if status != 0 {
                            sys0!(_exit(3));
                        }
                        child(&mut patch, rest / 2);
                    }
                    pid => children.push(pid),
                }
            }
            shared.write(below(&mut numbers, 32));
        }
        let wrong = shared.check_all();
        wrong.into_iter().for_each(|w| kit.differs(w));
        patch.look(kit, "memory of a grandparent", call, &mut numbers);
        Ok(())
    }))
}

/// This program, to be executed again: some operations on memory of its own.
struct Itself {
    exe: CString,
    arguments: Vec<CString>,
}

impl Itself {
    fn new(dir: &str, seed: u64, operations: u64) -> io::Result<Itself> {
        let (seed, operations) = (seed.to_string(), operations.to_string());
        let words = [
            "migrate-guest",
            "soak-child",
            "--dir",
            dir,
            "--seed",
            &seed,
            "--ops",
            &operations,
            "--rest-us",
            "300",
        ];
        Ok(Itself {
            exe: CString::new(std::env::current_exe()?.as_os_str().as_bytes())?,
            arguments: words.into_iter().map(CString::new).collect::<Result<_, _>>()?,
        })
    }

    fn execute(&self) -> ! {
        let mut pointers: Vec<*const libc::c_char> = self.arguments.iter().map(|a| a.as_ptr()).collect();
        pointers.push(std::ptr::null());
        sys0!(execv(self.exe.as_ptr(), pointers.as_ptr()));
        sys0!(_exit(2))
    }
}

/// Children that execute this program again, which does some operations on memory of its own.
fn execs(kit: &Kit) -> io::Result<Trap> {
    let mut children = Vec::new();
    let mut seed = 0_u64;
    let dir = kit.dir().display().to_string();
    Ok(Box::new(move |kit, _| {
        reap(kit, &mut children, "child that executed itself")?;
        if children.len() >= 3 {
            return Ok(());
        }
        seed += 1;
        let program = Itself::new(&dir, seed, 60)?;
        match sys!(fork())? {
            0 => program.execute(),
            pid => children.push(pid),
        }
        Ok(())
    }))
}

/// The mappings that the kernel put into this process: vvar and vdso.
fn kernels_own() -> io::Result<Vec<(usize, usize)>> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let own = maps.lines().filter(|l| l.contains("[v") && !l.contains("[vsyscall]"));
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
    };
    Ok(own.filter_map(range).collect())
}

/// A child that has no vdso between the files `lose` and `go`, as any has none for an instant in the middle of its execve(2): then it executes this program
/// again. `lost`: it has none now.
fn executes_when_told(kit: &Kit) -> io::Result<Trap> {
    let dir = kit.dir().to_owned();
    let program = Itself::new(&dir.display().to_string(), 1, 20_000)?;
    let own = kernels_own()?;
    let mut children = Vec::new();
    match sys!(fork())? {
        0 => {
            let wait_for = |name: &str| {
                while !dir.join(name).exists() {
                    std::thread::sleep(Duration::from_millis(1));
                }
            };
            wait_for("lose");
            for (start, end) in own {
                sys0!(munmap(pointer(start), end - start));
            }
            std::fs::write(dir.join("lost"), "")?;
            wait_for("go");
            program.execute()
        }
        pid => children.push(pid),
    }
    Ok(Box::new(move |kit, _| reap(kit, &mut children, "child that executed itself")))
}

/// Threads are born, write to memory of their own, and end.
fn threads(_: &Kit) -> io::Result<Trap> {
    let lanes: Vec<Lane> = (0..4).map(|n| Lane::new(n, 32, PRIVATE, -1)).collect::<io::Result<_>>()?;
    let mut running: Vec<Option<JoinHandle<Result<(), String>>>> = lanes.iter().map(|_| None).collect();
    let mut seed = 0;
    Ok(Box::new(move |kit, call| {
        for (lane, thread) in lanes.iter().zip(&mut running) {
            if let Some(ended) = thread.take_if(|t| t.is_finished()) {
                let result = ended.join().unwrap_or_else(|_| Err("a thread panicked".into()));
                let wrong = result.err().into_iter().chain(lane.check_all());
                wrong.for_each(|w| kit.differs(w));
            }
            if call == Call::Verify {
                lane.check_all().into_iter().for_each(|w| kit.differs(w));
            }
        }
        if let Some(free) = running.iter().position(Option::is_none) {
            seed += 1;
            let (lane, writes) = (lanes[free], 5 + seed % 60);
            let start = std::thread::Builder::new().stack_size(32 * PAGE);
            running[free] = Some(start.spawn(move || lane.work(seed, writes, 256, || true))?);
        }
        Ok(())
    }))
}

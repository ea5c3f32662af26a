//! Tasks that come and go.

use super::{Call, PRIVATE, Patch, SHARED, Trap, below};
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
        "threads" => threads(kit),
        "grandchildren" => grandchildren(),
        _ => return None,
    })
}

/// Waits for those that have ended; each must have ended well.
fn reap(kit: &mut Kit, children: &mut Vec<i32>, what: &str) -> io::Result<()> {
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

/// Children that execute this program again, which does some operations on memory of its own.
fn execs(kit: &Kit) -> io::Result<Trap> {
    let exe = CString::new(std::env::current_exe()?.as_os_str().as_bytes())?;
    let dir = kit.dir().display().to_string();
    let mut children = Vec::new();
    let mut seed = 0_u64;
    Ok(Box::new(move |kit, _| {
        reap(kit, &mut children, "child that executed itself")?;
        if children.len() >= 3 {
            return Ok(());
        }
        seed += 1;
        let number = seed.to_string();
        let arguments: Vec<CString> = [
            "migrate-guest",
            "soak-child",
            "--dir",
            &dir,
            "--seed",
            &number,
            "--ops",
            "60",
            "--rest-us",
            "300",
        ]
        .into_iter()
        .map(CString::new)
        .collect::<Result<_, _>>()?;
        let mut pointers: Vec<*const libc::c_char> = arguments.iter().map(|a| a.as_ptr()).collect();
        pointers.push(std::ptr::null());
        match sys!(fork())? {
            0 => {
                sys0!(execv(exe.as_ptr(), pointers.as_ptr()));
                sys0!(_exit(2))
            }
            pid => children.push(pid),
        }
        Ok(())
    }))
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

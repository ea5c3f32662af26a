//! Those who come to the originals once the copy runs: turned away at once.
//!
//! The originals stand still until the copy has everything, seconds for gigabytes, and the kernel goes on accepting connections for their listening sockets. A
//! client that came to the old address would be left waiting in a backlog that nobody will ever look at, until the originals end and it is reset. So their
//! TCP listeners are shut down as soon as the copy is known to run: who waits there is reset, who comes later is refused, and looks at the other host.
//!
//! Originals that end at once are no different: the kernel takes a process's memory apart before it closes its descriptors, 40 ms for each GiB. A client that asks every
//! millisecond waited that long where the program had stood still for 3.
//!
//! Which of their descriptors are listeners the freeze has found out already: to look through 10,000 of them again took 45 ms, in which nobody was turned away.

use crate::{
    dump::outsiders,
    image::{Kind, Tree},
    procfs,
};
use rustix::{
    io::Errno,
    net::{AddressFamily, Shutdown, SocketType, sockopt},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};
use std::{fs, io, os::fd::OwnedFd};

/// The way to stopped processes that never run again.
#[derive(Debug, Clone, Default)]
pub struct Door {
    pids: Vec<i32>,
    /// Of each process the descriptors that may be listeners; unknown: all that are sockets.
    candidates: Option<Vec<Vec<i32>>>,
}

impl Door {
    /// Of a tree that was read when it stopped. `pids`: of its processes, as the agent sees them.
    pub fn of(tree: &Tree, pids: &[i32]) -> Door {
        let listens = |d: u32| matches!(tree.descriptions[d as usize].kind, Kind::Tcp { backlog: Some(_), .. });
        let of = |p: &crate::image::Process| p.fds.iter().filter(|f| listens(f.description)).map(|f| f.fd).collect();
        Door {
            pids: pids.to_vec(),
            candidates: Some(tree.processes.iter().map(of).collect()),
        }
    }

    /// Of processes of which no more is known.
    pub fn unknown(pids: Vec<i32>) -> Door {
        Door { pids, candidates: None }
    }

    /// Shuts their TCP listeners. How many there were. What cannot be looked at is left, and what somebody else listens on as well (a server that has passed its
    /// socket on, a service manager): that is open to clients still.
    pub fn shut(&self) -> usize {
        let of = |(i, &pid): (usize, &i32)| {
            let numbers = match &self.candidates {
                Some(c) => c.get(i).cloned().unwrap_or_default(),
                None => sockets(pid).unwrap_or_default(),
            };
            listeners(pid, &numbers).inspect_err(|e| tracing::debug!(pid, error = %e, "its listeners are left open"))
        };
        let all = self.pids.iter().enumerate().filter_map(|p| of(p).ok()).flatten().collect();
        let own = outsiders::only_here(&self.pids, all);
        own.iter().filter(|s| rustix::net::shutdown(s, Shutdown::Both).is_ok()).count()
    }
}

fn sockets(pid: i32) -> io::Result<Vec<i32>> {
    let entries = fs::read_dir(procfs::path(pid, "fd"))?.flatten();
    let is_socket = |e: &fs::DirEntry| fs::read_link(e.path()).is_ok_and(|to| to.as_os_str().as_encoded_bytes().starts_with(b"socket:"));
    Ok(entries
        .filter(is_socket)
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect())
}

fn listeners(pid: i32, numbers: &[i32]) -> io::Result<Vec<OwnedFd>> {
    if numbers.is_empty() {
        return Ok(Vec::new());
    }
    let process = pidfd_open(Pid::from_raw(pid).ok_or(Errno::SRCH)?, PidfdFlags::empty())?;
    let mut out = Vec::new();
    for &number in numbers {
        let socket = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
        let inet = matches!(sockopt::socket_domain(&socket), Ok(AddressFamily::INET | AddressFamily::INET6));
        let stream = sockopt::socket_type(&socket) == Ok(SocketType::STREAM);
        if inet && stream && sockopt::socket_acceptconn(&socket) == Ok(true) {
            out.push(socket);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        net::{SocketAddr, TcpListener, TcpStream},
        process::Command,
    };

    fn refused(address: SocketAddr) -> bool {
        TcpStream::connect(address).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
    }

    #[test]
    fn only_its_own_listeners_are_shut() {
        let (own, passed_on) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let (to_own, to_passed_on) = (own.local_addr().unwrap(), passed_on.local_addr().unwrap());
        let waits = TcpStream::connect(to_own).unwrap();
        let there = TcpStream::connect(to_passed_on).unwrap();
        let (here, _) = passed_on.accept().unwrap();
        let sleep = |stdin: OwnedFd| {
            let mut c = Command::new("sleep");
            c.arg("60").stdin(stdin);
            c
        };
        // Another of the tree's that has the same one.
        let twin = sleep(passed_on.try_clone().unwrap().into()).spawn().unwrap();
        let mut outside = sleep(passed_on.try_clone().unwrap().into()).spawn().unwrap();
        let inside = sleep(own.into())
            .stdout(OwnedFd::from(here.try_clone().unwrap()))
            .stderr(OwnedFd::from(passed_on))
            .spawn()
            .unwrap();
        let pids = [inside.id() as i32, twin.id() as i32, i32::MAX];
        let door = Door::unknown(pids.to_vec());
        let with_outside = (door.shut(), refused(to_own), refused(to_passed_on));
        outside.kill().unwrap();
        outside.wait().unwrap();
        let alone = (door.shut(), refused(to_own), refused(to_passed_on));
        for mut child in [inside, twin] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(with_outside, (1, true, false));
        assert_eq!(alone, (1, true, true));
        let mut byte = [0];
        let reset = (&waits).read(&mut byte);
        assert!(reset.is_err() || reset.is_ok_and(|n| n == 0));
        // A connection is none of its business.
        (&there).write_all(b"x").unwrap();
        (&here).read_exact(&mut byte).unwrap();
    }
}

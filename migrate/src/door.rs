//! Those who come to the originals once the copy runs: turned away at once.
//!
//! The originals stand still until the copy has everything, seconds for gigabytes, and the kernel goes on accepting connections for their listening sockets. A
//! client that came to the old address would be left waiting in a backlog that nobody will ever look at, until the originals end and it is reset. So their
//! TCP listeners are shut down as soon as the copy is known to run: who waits there is reset, who comes later is refused, and looks at the other host.
//!
//! Originals that end at once are no different: the kernel takes a process's memory apart before it closes its descriptors, 40 ms for each GiB. A client that asks every
//! millisecond waited that long where the program had stood still for 3.

use crate::{dump::outsiders, procfs};
use rustix::{
    io::Errno,
    net::{AddressFamily, Shutdown, SocketType, sockopt},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};
use std::{fs, io, os::fd::OwnedFd};

/// Shuts the TCP listeners of these stopped processes, which never run again. How many there were. What cannot be looked at is left, and what somebody else
/// listens on as well (a server that has passed its socket on, a service manager): that is open to clients still.
pub fn shut(pids: &[i32]) -> usize {
    let of = |pid: &i32| listeners(*pid).inspect_err(|e| tracing::debug!(pid, error = %e, "its listeners are left open"));
    let all = pids.iter().filter_map(|pid| of(pid).ok()).flatten().collect();
    let own = outsiders::only_here(pids, all);
    own.iter().filter(|s| rustix::net::shutdown(s, Shutdown::Both).is_ok()).count()
}

fn listeners(pid: i32) -> io::Result<Vec<OwnedFd>> {
    let process = pidfd_open(Pid::from_raw(pid).ok_or(Errno::SRCH)?, PidfdFlags::empty())?;
    let mut out = Vec::new();
    for entry in fs::read_dir(procfs::path(pid, "fd"))?.flatten() {
        let is_socket = fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str().as_encoded_bytes().starts_with(b"socket:"));
        let number = entry.file_name().to_str().and_then(|n| n.parse().ok()).filter(|_| is_socket);
        let Some(number) = number else { continue };
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
        let with_outside = (shut(&pids), refused(to_own), refused(to_passed_on));
        outside.kill().unwrap();
        outside.wait().unwrap();
        let alone = (shut(&pids), refused(to_own), refused(to_passed_on));
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

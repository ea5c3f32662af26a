//! udp(7).

use super::{
    DumpError, Mode,
    context::{Context, Shape},
    sharing::Open,
    socket, tcp,
};
use crate::{
    image::{Kind, Socket},
    sys::fdcalls,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
};

/// MCAST_MSFILTER, and the bytes of `struct group_filter` (linux/in.h): interface, padding, sockaddr_storage, mode, number of sources,
/// room for none beyond the one the struct has.
const MCAST_MSFILTER: i32 = 48;
const GROUP_FILTER: usize = 8 + 128 + 8 + 128;

/// Reads a UDP socket.
pub(super) fn shape(context: &mut Context<'_>, open: &Open, fd: &OwnedFd, mut socket: Socket) -> Result<Shape, DumpError> {
    if context.mode == Mode::Frozen {
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map_err(|e| context.error(open, "poll", e))?;
        if fds[0].revents().intersects(PollFlags::IN | PollFlags::ERR) {
            let reason = "UDP datagrams or errors wait to be received";
            return Ok(context.refuse_for_now(open, reason, "it passes once the process receives them"));
        }
    }
    let (local, peer) = (tcp::local(fd), tcp::peer(fd));
    for addr in [local, peer] {
        if let Some(refused) = tcp::refuse_scoped(context, open, addr) {
            return Ok(refused);
        }
    }
    let groups = multicast_groups();
    if let Some((index, group)) = groups.into_iter().find(|&(index, group)| is_member(fd, index, group)) {
        let reason = format!("its UDP socket is a member of the multicast group {group} on interface {index}");
        return Ok(context.refuse(open, reason, "leave the group before the migration"));
    }
    Ok(match socket::common(context, open, fd, &mut socket)? {
        Err(blocked) => blocked,
        Ok(owner) => Shape::Ready(Kind::Udp { socket, local, peer }, owner),
    })
}

/// The multicast groups of this network namespace with their interface numbers. The kernel lists them by interface, not by socket.
fn multicast_groups() -> Vec<(u32, IpAddr)> {
    let mut groups = parse_igmp(&std::fs::read_to_string("/proc/net/igmp").unwrap_or_default());
    groups.extend(parse_igmp6(&std::fs::read_to_string("/proc/net/igmp6").unwrap_or_default()));
    groups
}

/// /proc/net/igmp: a line for each interface, and indented below it one for each group, in hexadecimal.
fn parse_igmp(text: &str) -> Vec<(u32, IpAddr)> {
    let mut index = 0;
    let mut out = Vec::new();
    for line in text.lines() {
        let Some(first) = line.split_ascii_whitespace().next() else {
            continue;
        };
        if !line.starts_with(['\t', ' ']) {
            index = first.parse().unwrap_or(0);
        } else if let Ok(group) = u32::from_str_radix(first, 16) {
            out.push((index, IpAddr::V4(Ipv4Addr::from(group.to_ne_bytes()))));
        }
    }
    out
}

/// /proc/net/igmp6: number, name, group and more on each line.
fn parse_igmp6(text: &str) -> Vec<(u32, IpAddr)> {
    let line = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let index = fields.next()?.parse().ok()?;
        let group = u128::from_str_radix(fields.nth(1)?, 16).ok()?;
        Some((index, IpAddr::V6(Ipv6Addr::from_bits(group))))
    };
    text.lines().filter_map(line).collect()
}

/// Whether a socket is a member: only then can its source filter be read.
fn is_member(fd: &OwnedFd, index: u32, group: IpAddr) -> bool {
    let level = if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 };
    let mut question = vec![0; GROUP_FILTER];
    question[..4].copy_from_slice(&index.to_ne_bytes());
    match group {
        IpAddr::V4(a) => {
            question[8..10].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            question[12..16].copy_from_slice(&a.octets());
        }
        IpAddr::V6(a) => {
            question[8..10].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            question[16..32].copy_from_slice(&a.octets());
        }
    }
    fdcalls::query_option(fd, level, MCAST_MSFILTER, question).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                    1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";
        assert_eq!(parse_igmp(text), [(1, "224.0.0.1".parse().unwrap())]);
        let text = "1    lo              ff020000000000000000000000000001     1 0000000C 0\nbroken\n";
        assert_eq!(parse_igmp6(text), [(1, "ff02::1".parse().unwrap())]);
    }

    #[test]
    fn membership_is_seen() {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let group: Ipv4Addr = "239.7.8.9".parse().unwrap();
        let fd = OwnedFd::from(socket.try_clone().unwrap());
        let seen = |fd: &OwnedFd| multicast_groups().into_iter().any(|(i, g)| is_member(fd, i, g));
        assert!(!seen(&fd));
        socket.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST).unwrap();
        assert!(seen(&fd));
        socket.leave_multicast_v4(&group, &Ipv4Addr::LOCALHOST).unwrap();
        let socket = std::net::UdpSocket::bind("[::]:0").unwrap();
        let fd = OwnedFd::from(socket.try_clone().unwrap());
        assert!(!seen(&fd));
        if socket.join_multicast_v6(&"ff05::7:8".parse().unwrap(), 1).is_ok() {
            assert!(seen(&fd));
        }
    }
}

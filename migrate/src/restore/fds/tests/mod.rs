//! Round trips: a descriptor of this process is dumped, built again, and both must behave alike; the original must not notice.

mod events;
mod files;
mod pipes;
mod sockets;

use super::*;
use crate::{
    dump::{
        fds::{
            Known, Mode, Source, Tables, dump_selected,
            tests::{hung_up, settle},
        },
        objects::ObjectTable,
    },
    report::Stdio,
};
use std::{
    fs::File,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::FileExt,
    },
};

const CLOCKS: Clocks = Clocks {
    monotonic_ns: 0,
    boottime_ns: 0,
    realtime_ns: 0,
};

fn dumped(fds: &[RawFd]) -> (Tables, ObjectTable) {
    let pid = std::process::id() as i32;
    let (mut objects, mut blockers) = (ObjectTable::new(), Vec::new());
    let source = Source { pid, inner_pid: pid };
    let tables = dump_selected(&[source], &mut objects, Mode::Frozen, &mut Known::default(), &mut blockers, &|fd| {
        fds.contains(&fd)
    })
    .unwrap();
    assert!(blockers.is_empty(), "{blockers:?}");
    (tables, objects)
}

fn input<'a>(tables: &'a Tables, objects: &'a [Object]) -> Input<'a> {
    Input {
        processes: &[],
        descriptions: &tables.descriptions,
        pipes: &tables.pipes,
        objects,
        mms: &[],
        clocks: CLOCKS,
        fresh: true,
    }
}

fn built(tables: &Tables, objects: ObjectTable) -> Built {
    let (objects, sources, _) = objects.into_parts();
    let fds = create_objects(&objects).unwrap();
    for ((o, from), to) in objects.iter().zip(sources).zip(&fds) {
        let mut content = vec![0; o.size as usize];
        File::from(from).read_exact_at(&mut content, 0).unwrap();
        File::from(to.try_clone().unwrap()).write_all_at(&content, 0).unwrap();
    }
    let mut built = build(
        input(tables, &objects),
        &fds,
        &StdioFds::open(&Stdio::Null).unwrap(),
        &mut Early::default(),
    )
    .unwrap();
    open_pidfds(&tables.descriptions, &mut built, Some).unwrap();
    set_owners(&tables.descriptions, &built, Some).unwrap();
    fill_epoll(&tables.descriptions, &built).unwrap();
    seal_objects(&objects, &fds).unwrap();
    built
}

/// Copies of descriptors, in the order given.
fn copies(fds: &[RawFd]) -> (Tables, Vec<OwnedFd>) {
    let (tables, objects) = dumped(fds);
    let mut made = built(&tables, objects);
    // The copies must look like the originals to a second dump, but for what names the host's own numbers.
    // (An epoll instance is not asked again: it has the original's numbers.)
    let is_epoll = |i: usize| matches!(tables.descriptions[i].kind, Kind::Epoll { .. });
    let numbers = made.fds.iter().enumerate().filter(|(i, _)| !is_epoll(*i));
    let own: Vec<RawFd> = numbers.filter_map(|(_, f)| f.as_ref()).map(|f| f.as_raw_fd()).collect();
    let (again, _) = dumped(&own);
    for (i, d) in tables.descriptions.iter().enumerate().filter(|(i, _)| !is_epoll(*i)) {
        let number = made.fds[i].as_ref().unwrap().as_raw_fd();
        let there = again.fds[0].iter().find(|f| f.fd == number).unwrap();
        assert_eq!(again.descriptions[there.description as usize].flags, d.flags, "flags of {d:?}");
    }
    let of = |fd: &RawFd| tables.fds[0].iter().find(|f| f.fd == *fd).unwrap().description as usize;
    let out = fds.iter().map(|fd| made.fds[of(fd)].take().unwrap()).collect();
    (tables, out)
}

fn copy(fd: RawFd) -> (Tables, OwnedFd) {
    let (t, mut fds) = copies(&[fd]);
    (t, fds.remove(0))
}

#[test]
fn room_is_made_ahead() {
    let size = || -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("FDSize:")).unwrap();
        line.trim().parse().unwrap()
    };
    let more = (size() + 100).min(super::raise_limit() - 1);
    super::make_room(more);
    assert!(size() > more, "{} and {more}", size());
}

//! A copy of a tree, from nothing to running: processes, mappings, pages, descriptors, threads, state, release.
//!
//! Everything runs on one thread, the tracer's: it is the parent of the root, and the only one to ptrace anything at the end. Pages may be
//! written by other threads through a [`Sink`] between [`Rebuild::skeleton`] and [`Rebuild::complete`].

use super::{
    fds, mm,
    pilots::{Batch, PilotError, Pilots},
    plan::{self, Step},
    room::Room,
    shape,
    sink::Sink,
    task, vdso,
};
use crate::{
    arch::{self, pilot},
    dump::pages::OBJECT_SPACE,
    image::{Backing, FileId, Kind, Mm, Process, Tree, Vdso, Vma},
    inject,
    laps::Laps,
    pages::PageSet,
    procfs::{
        self, maps, stat, status,
        timens::{self, Offsets},
    },
    rseq,
    sys::{misc, ptrace, uffd::Userfault},
    tracer::wait_stop_once,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::OnceLock,
    time::{Duration, Instant},
};

const CLONE_THREAD_FLAGS: u64 =
    (libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD | libc::CLONE_SYSVSEM) as u64;
/// Descriptors in one SCM_RIGHTS message (SCM_MAX_FD).
const SCM_MAX: usize = 253;

/// How the copy gets its pids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pids {
    /// The agent's own pid namespace: every pid is free there.
    Here,
    /// A fresh pid namespace with a /proc of its own.
    Fresh,
}

/// What a skeleton's tree does not tell.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// How it gets its pids.
    pub pids: Pids,
    /// The freeze was just now, so written files must be exactly as it left them.
    pub fresh_files: bool,
    /// Numbers below this are open descriptors, as far as is known: a tree that runs is sent without its descriptors, and in the freeze their table
    /// would have to grow ([`fds::make_room`]).
    pub descriptors: u64,
}

/// Whether the tree's pids are free in this pid namespace.
pub fn pids_free(tree: &Tree) -> bool {
    let free = |id: i32| !std::path::Path::new(&format!("/proc/{id}")).exists();
    tree.processes.iter().all(|p| free(p.pid) && p.threads.iter().all(|t| free(t.tid)))
}

/// A copy being built. Dropping it before the release ends all of it.
#[derive(Debug)]
pub struct Rebuild {
    pub(super) tree: Tree,
    /// Names of the tree's address spaces and of its objects in page runs.
    pub(super) names: Names,
    pub(super) pilots: Pilots,
    /// Theirs, with what they park.
    _room: Room,
    /// Slots of each process's threads, leader first.
    pub(super) slots: Vec<Vec<usize>>,
    /// Agent-side pid of each process.
    pub(super) pids: Vec<i32>,
    socket: OwnedFd,
    /// The socket's number inside the tree.
    pub(super) socket_number: u64,
    /// One per object of the tree.
    pub(super) objects: Vec<OwnedFd>,
    /// Address spaces and objects that pages were written to, by name: what else is there is fresh, and zero.
    pub(super) written: HashSet<u32>,
    pub(super) park: mm::Parking,
    /// Where this kernel's own mappings go in a process that comes with another kernel's vdso.
    vdso_at: u64,
    released: bool,
    init: Option<i32>,
    /// The copy's clocks, against the host's.
    clock_offsets: Offsets,
    /// The fresh mount namespace, for the root to enter.
    mount_namespace: Option<File>,
    pub(super) fresh: bool,
    /// The freeze was just now, so written files are exactly as it left them.
    fresh_files: bool,
    /// oom_score_adj and coredump_filter, as set, by the agent's pids.
    procfs_set: HashMap<i32, (i16, u32)>,
    /// By the agent's pids, when pages may follow.
    pub(super) userfaults: HashMap<i32, Userfault>,
    /// Pages of shared memory that were made because they are going to follow, by the object's name.
    pub(super) expected: HashMap<u32, PageSet>,
    /// Huge pages are switched off until the release.
    pub(super) huge_pages_off: bool,
}

/// What the address spaces and objects of a tree are called in page runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// Name of each address space.
    pub spaces: Vec<u32>,
    /// Name of each object, from [`OBJECT_SPACE`] up.
    pub objects: Vec<u32>,
}

impl Names {
    /// Called by their indices: when a tree is sent only once.
    pub fn plain(tree: &Tree) -> Names {
        Names {
            spaces: (0..tree.mms.len() as u32).collect(),
            objects: (0..tree.objects.len() as u32).map(|o| OBJECT_SPACE + o).collect(),
        }
    }

    /// Whether they fit a tree, each different.
    pub fn fit(&self, tree: &Tree) -> bool {
        let distinct = |v: &[u32]| v.iter().collect::<HashSet<_>>().len() == v.len();
        let counts = self.spaces.len() == tree.mms.len() && self.objects.len() == tree.objects.len();
        let kinds = self.spaces.iter().all(|s| *s < OBJECT_SPACE) && self.objects.iter().all(|o| *o >= OBJECT_SPACE);
        counts && kinds && distinct(&self.spaces) && distinct(&self.objects)
    }

    /// The tree with its names.
    pub fn of<'a>(&'a self, tree: &'a Tree) -> shape::Named<'a> {
        shape::Named {
            tree,
            spaces: &self.spaces,
            objects: &self.objects,
        }
    }
}

impl Rebuild {
    /// Processes and mappings, empty and waiting. `word` holds the decision page.
    pub fn skeleton(tree: Tree, names: Names, word: &File, setting: Setting) -> Result<Rebuild, PilotError> {
        let Setting {
            pids,
            fresh_files,
            descriptors,
        } = setting;
        if !names.fit(&tree) {
            return Err(PilotError::agent("name the address spaces")(io::ErrorKind::InvalidData.into()));
        }
        for m in &tree.mms {
            mm::validate(m)?;
        }
        let steps = plan::sessions(&tree.processes).map_err(|e| PilotError::agent("plan the sessions")(io::Error::other(e)))?;
        let objects = fds::create_objects(&tree.objects).map_err(|e| PilotError::agent("create shared memory")(io::Error::other(e)))?;
        // Room for processes and threads to come while the original runs on; memory is taken only when a slot is used.
        let count = tree.processes.len();
        let threads = tree.processes.iter().map(|p| p.threads.len().saturating_sub(1)).sum::<usize>();
        let (leaders, others) = (count * 2 + 64, threads * 2 + 256);
        let space = Pilots::space(leaders, others) as u64;
        let (mut park, mut used) = mm::parking(0).map_err(PilotError::agent("read own mappings"))?;
        used.extend(tree.mms.iter().flat_map(|m| m.vmas.iter().map(|v| (v.start, v.end))));
        const GAP: u64 = 2 << 20;
        let behind = space.next_multiple_of(GAP) + GAP;
        let total = behind + 2 * park.len.next_multiple_of(GAP);
        let room = Room::find(used, total)
            .ok_or_else(|| PilotError::agent("find free addresses for the pilots")(io::ErrorKind::OutOfMemory.into()))?;
        let base = room.start;
        park.at = base + behind;
        let mut pilots = Pilots::create(base, word, leaders, others).map_err(PilotError::agent("map the pilots' region"))?;
        let mut slots = Vec::with_capacity(count);
        for p in &tree.processes {
            slots.push(Self::slots_for(&mut pilots, p)?);
        }
        let (ours, theirs) = nix::sys::socket::socketpair(
            nix::sys::socket::AddressFamily::Unix,
            nix::sys::socket::SockType::Datagram,
            None,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        )
        .map_err(|e| PilotError::agent("make a socket pair")(e.into()))?;
        // Above every number the tree uses, so that what it receives takes the lowest numbers in order.
        let highest = tree
            .processes
            .iter()
            .flat_map(|p| p.fds.iter().map(|f| f.fd as u64))
            .max()
            .unwrap_or(0);
        let most = tree.processes.iter().map(|p| p.fds.len() as u64).max().unwrap_or(0);
        let mapped = tree.mms.iter().map(|m| m.vmas.len() as u64).max().unwrap_or(0).min(4096);
        // A process may not open more than this agent; that a tree needs more is said where it does.
        let descriptors = descriptors.min(fds::raise_limit().saturating_sub(64));
        let socket_number = highest.max(most).max(mapped).max(descriptors) + 16;
        let mut r = Rebuild {
            pids: vec![0; tree.processes.len()],
            tree,
            names,
            written: HashSet::new(),
            pilots,
            _room: room,
            slots,
            socket: ours,
            socket_number,
            objects,
            vdso_at: park.at + park.len.next_multiple_of(GAP),
            park,
            released: false,
            init: None,
            clock_offsets: Offsets::default(),
            mount_namespace: None,
            fresh_files,
            fresh: pids == Pids::Fresh,
            procfs_set: HashMap::new(),
            userfaults: HashMap::new(),
            expected: HashMap::new(),
            huge_pages_off: false,
        };
        r.root(theirs)?;
        r.descend(0, &steps)?;
        r.locate()?;
        r.groups(&[])?;
        for i in 0..r.tree.processes.len() {
            if r.tree.processes[i].zombie.is_none() {
                r.map(i)?;
            }
        }
        Ok(r)
    }

    /// A slot for each task of a process, leader first.
    pub(super) fn slots_for(pilots: &mut Pilots, p: &Process) -> Result<Vec<usize>, PilotError> {
        let mut slot = |id, leader| pilots.take(id, leader).map_err(PilotError::agent("find room for one more task"));
        let mut list = vec![slot(p.pid, true)?];
        for t in p.threads.iter().skip(1) {
            list.push(slot(t.tid, false)?);
        }
        Ok(list)
    }

    fn root(&mut self, socket: OwnedFd) -> Result<(), PilotError> {
        let pid = self.tree.processes[0].pid;
        self.time_namespace()?;
        let ppid = if self.fresh {
            self.pid_namespace()?;
            0
        } else {
            std::process::id() as i32
        };
        let control = self.pilots.control(self.slots[0][0], ppid);
        let set_tid = [pid];
        let exit_signal = libc::SIGCHLD as u64;
        let mut args = [0, 0, 0, 0, exit_signal, 0, 0, 0, set_tid.as_ptr() as u64, 1, 0];
        let root = pilot::spawn(&mut args, self.pilots.entry(), control)
            .map_err(PilotError::agent(format!("create process {pid} with its own pid (clone3 set_tid)")))?;
        self.pids[0] = root;
        let mut b = mm::empty(self.pilots.range(), &self.park).map_err(PilotError::agent("read own mappings"))?;
        if let Some(ns) = &self.mount_namespace {
            b.call(
                "enter the fresh mount namespace",
                libc::SYS_setns,
                &[ns.as_raw_fd() as u64, libc::CLONE_NEWNS as u64],
            );
        }
        let k = self.socket_number;
        if socket.as_raw_fd() as u64 != k {
            b.call_eq(
                "move the descriptor socket",
                k as i64,
                libc::SYS_dup3,
                &[socket.as_raw_fd() as u64, k, 0],
            );
        }
        b.call("close the agent's descriptors", libc::SYS_close_range, &[0, k - 1, 0]);
        b.call("close the agent's descriptors", libc::SYS_close_range, &[k + 1, u32::MAX as u64, 0]);
        self.pilots.run(self.slots[0][0], &b).map(drop)
    }

    /// Keeps CLOCK_MONOTONIC and CLOCK_BOOTTIME from going back on a host that booted later (time_namespaces(7)).
    ///
    /// The first process of a namespace fixes its offsets, so they come from the clocks that a skeleton's tree was seen with; what has passed
    /// since is known only as well as both hosts' times of day agree. [`Rebuild::catch_up`] mends the rest.
    fn time_namespace(&mut self) -> Result<(), PilotError> {
        let c = &self.tree.clocks;
        if c.monotonic_ns == 0 {
            return Ok(());
        }
        let ours = timens::offsets(std::process::id() as i32).map_err(PilotError::agent("read this agent's time namespace"))?;
        let passed = misc::clock_ns(libc::CLOCK_REALTIME).saturating_sub(c.realtime_ns);
        let off = |then: u64, clock| i128::from(then) + i128::from(passed) - i128::from(misc::clock_ns(clock));
        let monotonic = off(c.monotonic_ns, libc::CLOCK_MONOTONIC);
        let boottime = off(c.boottime_ns, libc::CLOCK_BOOTTIME);
        // Clocks that go on by less than a second, or go back by less than is soon caught up, are left alone.
        let near = |off: i128| (-1_000_000_000..=1_000_000).contains(&off);
        // A skeleton before this one may have given this thread's children clocks of their own.
        let untouched = timens::offsets(misc::gettid()).is_ok_and(|o| o == ours);
        if untouched && near(monotonic) && near(boottime) {
            self.clock_offsets = ours;
            return Ok(());
        }
        let offsets = Offsets {
            monotonic: ours.monotonic + monotonic,
            boottime: ours.boottime + boottime,
        };
        const CLONE_NEWTIME: i32 = 0x80;
        misc::unshare(CLONE_NEWTIME).map_err(PilotError::agent("make a time namespace for another host's clocks"))?;
        let line = |name: &str, off: i128| format!("{name} {} {}\n", off.div_euclid(1_000_000_000), off.rem_euclid(1_000_000_000));
        let text = line("monotonic", offsets.monotonic) + &line("boottime", offsets.boottime);
        self.clock_offsets = offsets;
        File::options()
            .write(true)
            .open(format!("/proc/{}/timens_offsets", misc::gettid()))
            .and_then(|mut f| f.write_all(text.as_bytes()))
            .map_err(PilotError::agent("set the time namespace's offsets"))
    }

    /// Waits until the copy's clocks are where the freeze found the original's: a skeleton's may be behind by as much as the hosts' times of
    /// day differ, and by no more than the time between the look at the tree and the skeleton.
    fn catch_up(&self, tree: &Tree) -> Result<(), PilotError> {
        if tree.clocks.monotonic_ns == 0 {
            return Ok(());
        }
        let ours = timens::offsets(std::process::id() as i32).map_err(PilotError::agent("read this agent's time namespace"))?;
        let behind = |then: u64, clock, ours: i128, its: i128| i128::from(then) - (i128::from(misc::clock_ns(clock)) - ours + its);
        let monotonic = behind(
            tree.clocks.monotonic_ns,
            libc::CLOCK_MONOTONIC,
            ours.monotonic,
            self.clock_offsets.monotonic,
        );
        let boottime = behind(
            tree.clocks.boottime_ns,
            libc::CLOCK_BOOTTIME,
            ours.boottime,
            self.clock_offsets.boottime,
        );
        let wait = monotonic.max(boottime);
        if wait > 2_000_000_000 {
            let text = format!("its clocks would go back by {} ms", wait / 1_000_000);
            return Err(PilotError::agent("keep the clocks from going back")(io::Error::other(text)));
        }
        if let Ok(wait @ 1..) = u64::try_from(wait) {
            tracing::info!(wait_us = wait / 1000, "the copy waits for its clocks");
            std::thread::sleep(Duration::from_nanos(wait));
        }
        Ok(())
    }

    /// A fresh pid namespace with an init that reaps, and a /proc of its own. Later children of this thread are born into it.
    fn pid_namespace(&mut self) -> Result<(), PilotError> {
        let word = self.pilots.range().0 + super::pilots::WORD as u64;
        let init = super::init::spawn(word).map_err(PilotError::agent("make a fresh pid namespace"))?;
        self.init = Some(init);
        let ns = File::open(format!("/proc/{init}/ns/pid")).map_err(PilotError::agent("open the fresh pid namespace"))?;
        nix::sched::setns(&ns, nix::sched::CloneFlags::CLONE_NEWPID)
            .map_err(|e| PilotError::agent("enter the fresh pid namespace")(e.into()))?;
        self.mount_namespace =
            Some(File::open(format!("/proc/{init}/ns/mnt")).map_err(PilotError::agent("open the fresh mount namespace"))?);
        Ok(())
    }

    /// Makes the threads of process `i`, its children, each from the thread that is its parent, and theirs.
    fn descend(&mut self, i: usize, steps: &[Vec<Step>]) -> Result<(), PilotError> {
        self.threads(i)?;
        for step in &steps[i] {
            let mut b = Batch::new();
            match *step {
                Step::Setsid => {
                    b.call_eq("setsid", self.tree.processes[i].pid as i64, libc::SYS_setsid, &[]);
                    self.pilots.run(self.slots[i][0], &b)?;
                }
                Step::Clone(c) => {
                    let child = &self.tree.processes[c];
                    let pid = child.pid;
                    let exit_signal = child.exit_signal.max(0) as u64;
                    let at = self.tree.processes[i]
                        .threads
                        .iter()
                        .position(|t| t.tid == child.parent_tid)
                        .unwrap_or(0);
                    let slot = self.slots[i][at];
                    let control = self.pilots.control(self.slots[c][0], self.tree.processes[i].pid);
                    self.clone_call(&mut b, slot, format!("create process {pid}"), pid, [0, exit_signal], control);
                    self.pilots.run(slot, &b)?;
                    self.descend(c, steps)?;
                }
            }
        }
        Ok(())
    }

    /// Adds a clone3 with a chosen id to a batch of `slot`; the child goes on as a pilot with this control block.
    pub(super) fn clone_call(&self, b: &mut Batch, slot: usize, what: String, id: i32, [flags, exit_signal]: [u64; 2], control: u64) {
        let set_tid = b.data(&id.to_le_bytes());
        let set_tid = self.pilots.address_of(slot, set_tid);
        let args: Vec<u8> = [flags, 0, 0, 0, exit_signal, 0, 0, 0, set_tid, 1, 0]
            .iter()
            .flat_map(|v: &u64| v.to_le_bytes())
            .collect();
        let args = b.data(&args);
        b.call_eq(what, id as i64, libc::SYS_clone3, &[args, 88, 0, 0, 0, control]);
    }

    /// Finds the agent-side pid of every process.
    pub(super) fn locate(&mut self) -> Result<(), PilotError> {
        if !self.fresh {
            for (pid, p) in self.pids.iter_mut().zip(&self.tree.processes) {
                *pid = p.pid;
            }
            return Ok(());
        }
        let find = || -> io::Result<HashMap<i32, i32>> {
            let mut map = HashMap::new();
            for crate::tracer::Discovered { pid, .. } in crate::tracer::discover(self.pids[0])? {
                map.insert(status::read(pid)?.inner_pid(), pid);
            }
            Ok(map)
        };
        let map = find().map_err(PilotError::agent("find the copy's processes"))?;
        for ((pid, p), slots) in self.pids.iter_mut().zip(&self.tree.processes).zip(&self.slots) {
            if slots.is_empty() {
                continue; // not made yet
            }
            *pid = *map
                .get(&p.pid)
                .ok_or_else(|| PilotError::agent(format!("find process {}", p.pid))(io::ErrorKind::NotFound.into()))?;
        }
        Ok(())
    }

    /// Process groups: leaders first. A group whose leader is outside the tree becomes the root's own. `former`: the group that each process
    /// is in already.
    pub(super) fn groups(&mut self, former: &[Option<i32>]) -> Result<(), PilotError> {
        let pids: HashSet<i32> = self.tree.processes.iter().map(|p| p.pid).collect();
        let root = self.tree.processes[0].pid;
        let target = |pgid: i32| if pids.contains(&pgid) { pgid } else { root };
        for leaders in [true, false] {
            for i in 0..self.tree.processes.len() {
                let p = &self.tree.processes[i];
                let group = target(p.pgid);
                let there = former.get(i).copied().flatten().is_some_and(|f| target(f) == group);
                if (group == p.pid) != leaders || p.sid == p.pid || there {
                    continue;
                }
                let mut b = Batch::new();
                b.call(format!("setpgid {group}"), libc::SYS_setpgid, &[0, group as u64]);
                self.pilots.run(self.slots[i][0], &b)?;
            }
        }
        Ok(())
    }

    /// Sends descriptors to a process, where they become 0, 1, 2 ...; nothing but the socket may be open there.
    pub(super) fn give(&mut self, i: usize, fds: &[RawFd]) -> Result<(), PilotError> {
        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        let slot = self.slots[i][0];
        let k = self.socket_number;
        for group in fds.chunks(SCM_MAX) {
            sendmsg::<()>(
                self.socket.as_raw_fd(),
                &[io::IoSlice::new(b"f")],
                &[ControlMessage::ScmRights(group)],
                MsgFlags::empty(),
                None,
            )
            .map_err(|e| PilotError::agent("send descriptors to a process")(e.into()))?;
            let mut b = Batch::new();
            let byte = b.data(&[0; 16]);
            let byte = self.pilots.address_of(slot, byte);
            let iov = b.data(&[byte.to_le_bytes(), 1u64.to_le_bytes()].concat());
            let control = b.data(&[0; 1040]);
            let (iov, control) = (self.pilots.address_of(slot, iov), self.pilots.address_of(slot, control));
            let mut h = Vec::new();
            for v in [0, 0, iov, 1, control, 1040, 0u64] {
                h.extend_from_slice(&v.to_le_bytes());
            }
            let h = b.data(&h);
            b.call_eq("receive descriptors", 1, libc::SYS_recvmsg, &[k, h, 0]);
            self.pilots.run(slot, &b)?;
            // MSG_CTRUNC in msg_flags: the process may not open that many.
            let mut flags = [0u8; 4];
            self.pilots.read_data(slot, h + 48, &mut flags);
            if u32::from_le_bytes(flags) & libc::MSG_CTRUNC as u32 != 0 {
                return Err(PilotError::agent("pass descriptors")(io::Error::other(
                    "the limit on open files is too low",
                )));
            }
        }
        Ok(())
    }

    /// Makes room for so many descriptors below the socket: what a process receives takes the lowest numbers in order, and one that is taken in between
    /// would shift all that follow. A skeleton that was built from a running tree has not seen its descriptors, and mappings come and go.
    fn below_socket(&mut self, count: u64) -> Result<(), PilotError> {
        if count < self.socket_number {
            return Ok(());
        }
        let number = count + 64;
        let leaders: Vec<usize> = self.slots.iter().filter_map(|s| s.first().copied()).collect();
        for slot in leaders {
            let mut b = Batch::new();
            b.call_eq(
                "move the descriptor socket",
                number as i64,
                libc::SYS_dup3,
                &[self.socket_number, number, 0],
            );
            b.call("move the descriptor socket", libc::SYS_close, &[self.socket_number]);
            self.pilots.run(slot, &b)?;
        }
        self.socket_number = number;
        Ok(())
    }

    /// Maps everything into an emptied process.
    pub(super) fn map(&mut self, i: usize) -> Result<(), PilotError> {
        let mm = self.tree.mms[self.tree.processes[i].mm as usize].clone();
        let needed: Vec<&Vma> = mm.vmas.iter().collect();
        let mut given = self.give_mapped(i, &needed, Some(&mm.exe))?;
        let slot = self.slots[i][0];
        let (records, _) = self.pilots.capacity(slot);
        // First the executable: with anything of the former one mapped it cannot be exchanged, and both may be the same file.
        if let Some(exe) = given.exe.take() {
            self.pilots.run(slot, &mm::executable(exe))?;
        }
        let foreign = vdso::foreign(&mm, &self.tree.vdsos, &self.park, self.vdso_at)
            .map_err(|e| PilotError::agent("replace the vdso of another kernel")(io::Error::other(e)))?;
        for b in &mm::map(&mm, &self.park, foreign.as_ref(), &|v| given.number(v), records - 8).into_vec() {
            self.pilots.run(slot, b)?;
        }
        if let Some(f) = foreign {
            f.write(self.pids[i])
                .map_err(PilotError::agent("write the vdso of another kernel"))?;
        }
        let mut b = Batch::new();
        b.call("close mapping descriptors", libc::SYS_close_range, &[0, self.socket_number - 1, 0]);
        self.pilots.run(slot, &b)?;
        // The pid may have been another process's before.
        self.procfs_set.remove(&self.pids[i]);
        self.procfs_state(i, &mm)
    }

    /// What is set through files of /proc, by the pid that the agent sees; a skeleton has it already, in general.
    fn procfs_state(&mut self, i: usize, mm: &Mm) -> Result<(), PilotError> {
        let agent = self.pids[i];
        let wanted = (mm.oom_score_adj, mm.coredump_filter);
        if self.procfs_set.insert(agent, wanted) == Some(wanted) {
            return Ok(());
        }
        let write = |name: &str, v: String| std::fs::write(procfs::path(agent, name), v);
        let set = || {
            write("oom_score_adj", mm.oom_score_adj.to_string())?;
            write("coredump_filter", format!("{:#x}", mm.coredump_filter))
        };
        set().map_err(PilotError::agent("set oom_score_adj"))
    }

    /// Where the kernel's own mappings are in a process that was mapped like this.
    pub(super) fn special(&self, mm: &Mm, vdsos: &[Vdso]) -> Result<Vec<(String, u64)>, PilotError> {
        if vdso::is_foreign(mm, vdsos).map_err(PilotError::agent("read own mappings"))? {
            let all = self.park.special.iter();
            return Ok(all.map(|(name, off, _)| (name.clone(), self.vdso_at + off)).collect());
        }
        let each = mm.vmas.iter().filter_map(|v| match &v.backing {
            Backing::Special(name) => Some((name.clone(), v.start)),
            _ => None,
        });
        Ok(each.collect())
    }

    /// Gives a process the descriptors that these mappings need, and its executable, as 0, 1, 2 ...
    pub(super) fn give_mapped(&mut self, i: usize, vmas: &[&Vma], exe: Option<&FileId>) -> Result<Given, PilotError> {
        let mut files: Vec<File> = Vec::new();
        let mut raw: Vec<RawFd> = Vec::new();
        let mut given = Given::default();
        for v in vmas {
            match &v.backing {
                Backing::File { file, writable, .. } => {
                    let write = *writable && v.shared;
                    if let Entry::Vacant(slot) = given.files.entry((file.path.clone(), write)) {
                        let f = mm::open_mapped(file, write, self.fresh_files)
                            .map_err(|e| PilotError::agent("open a mapped file")(io::Error::other(e)))?;
                        slot.insert(raw.len() as u64);
                        raw.push(f.as_raw_fd());
                        files.push(f);
                    }
                }
                Backing::Object { object, .. } => {
                    let fd = self
                        .objects
                        .get(*object as usize)
                        .ok_or_else(|| PilotError::agent("map an object")(io::ErrorKind::InvalidData.into()))?;
                    given.objects.entry(*object).or_insert_with(|| {
                        raw.push(fd.as_raw_fd());
                        raw.len() as u64 - 1
                    });
                }
                _ => {}
            }
        }
        if let Some(exe) = exe {
            let f = mm::open_mapped(exe, false, true).map_err(|e| PilotError::agent("open the executable")(io::Error::other(e)))?;
            given.exe = Some(raw.len() as u64);
            raw.push(f.as_raw_fd());
            files.push(f);
        }
        self.below_socket(raw.len() as u64)?;
        self.give(i, &raw)?;
        Ok(given)
    }

    /// Where pages go. Usable from other threads until [`Rebuild::complete`].
    pub fn sink(&mut self) -> io::Result<Sink> {
        let mut sink = Sink::default();
        for (p, pid) in self.tree.processes.iter().zip(&self.pids).filter(|(p, _)| p.zombie.is_none()) {
            let space = self.names.spaces[p.mm as usize];
            let fresh = self.written.insert(space);
            sink.add_process(space, *pid, &self.tree.mms[p.mm as usize], fresh)?;
        }
        for ((o, fd), name) in self.tree.objects.iter().zip(&self.objects).zip(&self.names.objects) {
            let fresh = self.written.insert(*name);
            sink.add_object(*name, fd.try_clone()?, o.size, fresh);
        }
        Ok(sink)
    }

    /// Everything but the pages and the release: descriptors, threads, state. `guards` by address space.
    pub fn complete(&mut self, stdio: &fds::StdioFds, guards: &[Vec<(u64, u64)>]) -> Result<(), PilotError> {
        self.prepare(stdio, guards)?;
        self.contexts(&[])
    }

    /// [`Rebuild::complete`] up to where memory can still be dropped and guard regions made, with those that are known. Pages may be written meanwhile: nothing
    /// here touches memory of the program, unless some of it is locked, which fills it. Relative timers begin to run, so what is still to come should be a
    /// matter of milliseconds.
    pub fn prepare(&mut self, stdio: &fds::StdioFds, guards: &[Vec<(u64, u64)>]) -> Result<(), PilotError> {
        self.lent(|me, tree| me.complete_with(tree, stdio, guards))
    }

    /// The rest of it, with more guard regions: every task waits for the release then.
    pub fn contexts(&mut self, guards: &[Vec<(u64, u64)>]) -> Result<(), PilotError> {
        self.guard(guards)?;
        self.lent(|me, tree| {
            me.hold(tree)?;
            me.catch_up(tree)
        })
    }

    /// Makes guard regions, by address space.
    pub fn guard(&mut self, guards: &[Vec<(u64, u64)>]) -> Result<(), PilotError> {
        for (i, p) in self.tree.processes.iter().enumerate().filter(|(_, p)| p.zombie.is_none()) {
            let slot = self.slots[i][0];
            let (records, _) = self.pilots.capacity(slot);
            let guards = guards.get(p.mm as usize).map_or(&[][..], Vec::as_slice);
            for b in mm::guards(guards, records - 8) {
                self.pilots.run(slot, &b)?;
            }
        }
        Ok(())
    }

    /// Lends the tree out, rather than copying it.
    fn lent(&mut self, f: impl FnOnce(&mut Self, &Tree) -> Result<(), PilotError>) -> Result<(), PilotError> {
        let nothing = Tree::empty(self.tree.host.clone());
        let tree = std::mem::replace(&mut self.tree, nothing);
        let r = f(self, &tree);
        self.tree = tree;
        r
    }

    fn complete_with(&mut self, tree: &Tree, stdio: &fds::StdioFds, guards: &[Vec<(u64, u64)>]) -> Result<(), PilotError> {
        let mut laps = Laps::start();
        let numbers = tree.processes.iter().flat_map(|p| p.fds.iter().map(|f| f.fd as u64 + 1));
        let counts = tree.processes.iter().map(|p| p.fds.len() as u64);
        self.below_socket(numbers.chain(counts).max().unwrap_or(0))?;
        let failed = |e: fds::RestoreError| PilotError::agent("rebuild descriptors")(io::Error::other(e));
        let mut built = fds::build(
            fds::Input {
                fresh: self.fresh_files,
                ..tree.into()
            },
            &self.objects,
            stdio,
            &mut fds::Early::default(),
        )
        .map_err(failed)?;
        let agent_pid = |id: i32| {
            let process = tree.processes.iter().position(|p| p.pid == id).map(|i| self.pids[i]);
            // Threads have the same numbers on both sides, except in a fresh namespace.
            process.or_else(|| (!self.fresh).then_some(id))
        };
        fds::open_pidfds(&tree.descriptions, &mut built, agent_pid).map_err(failed)?;
        fds::set_owners(&tree.descriptions, &built, agent_pid).map_err(failed)?;
        laps.lap("open descriptors");
        let live: Vec<usize> = (0..tree.processes.len()).filter(|&i| tree.processes[i].zombie.is_none()).collect();
        for &i in &live {
            self.descriptors(i, tree, &built.fds)?;
        }
        self.epolls(tree, &live, &built)?;
        drop(built);
        laps.lap("give descriptors");
        for &i in &live {
            let p = &tree.processes[i];
            let slot = self.slots[i][0];
            let (records, _) = self.pilots.capacity(slot);
            let mm = &tree.mms[p.mm as usize];
            let mut b = mm::layout(mm);
            mm::resolve_auxv(&mut b, &self.pilots, slot, mm.auxv.len());
            self.pilots.run(slot, &b)?;
            let none = Vec::new();
            for b in mm::after_pages(mm, &self.park, guards.get(p.mm as usize).unwrap_or(&none), records - 8) {
                self.pilots.run(slot, &b)?;
            }
        }
        laps.lap("layout");
        // Zombies end now, while their parents still take no notice.
        for (i, p) in tree.processes.iter().enumerate().filter(|(_, p)| p.zombie.is_some()) {
            self.end_zombie(i, p.pid, p.zombie.unwrap_or(0), &p.comm)?;
        }
        let (bounding, last_cap) = capabilities();
        for &i in &live {
            let p = &tree.processes[i];
            let mm = &tree.mms[p.mm as usize];
            let zombies = tree
                .processes
                .iter()
                .filter(|c| c.zombie.is_some() && c.parent == Some(i as u32))
                .count();
            self.pilots.run(self.slots[i][0], &task::process(p, tree, zombies))?;
            self.procfs_state(i, mm)?;
        }
        laps.lap("processes");
        for &i in &live {
            let p = &tree.processes[i];
            let dumpable = tree.mms[p.mm as usize].dumpable;
            let batches: Vec<Batch> = p
                .threads
                .iter()
                .enumerate()
                .map(|(k, t)| task::thread(t, p, last_cap, bounding, k == 0, dumpable))
                .collect();
            // All at once; the few that are too long for that one after the other.
            let short: Vec<bool> = batches
                .iter()
                .enumerate()
                .map(|(k, b)| self.pilots.fits(self.slots[i][k], b))
                .collect();
            for (k, b) in batches.iter().enumerate().filter(|(k, _)| short[*k]) {
                self.pilots.post(self.slots[i][k], b);
            }
            for (k, b) in batches.iter().enumerate().filter(|(k, _)| short[*k]) {
                self.pilots.wait(self.slots[i][k], b)?;
            }
            for (k, b) in batches.iter().enumerate().filter(|(k, _)| !short[*k]) {
                self.pilots.run(self.slots[i][k], b)?;
            }
        }
        laps.lap("threads");
        laps.log("complete");
        Ok(())
    }

    /// The last batch of every task: wait for the release, then load the final context.
    fn hold(&mut self, tree: &Tree) -> Result<(), PilotError> {
        let live = (0..tree.processes.len()).filter(|&i| tree.processes[i].zombie.is_none());
        for i in live {
            for (k, t) in tree.processes[i].threads.iter().enumerate() {
                let slot = self.slots[i][k];
                let regs = arch::restart_anew(&t.regs);
                let sp = self
                    .pilots
                    .frame(slot, |base| arch::sigframe(base, &regs, &t.xstate, t.sigmask, &t.altstack));
                let mut b = Batch::new();
                if k == 0 {
                    b.call("close the descriptor socket", libc::SYS_close, &[self.socket_number]);
                }
                b.pseudo("wait for the release", pilot::HOLD, 0);
                if k == 0 {
                    self.huge_pages_again(&mut b, tree.mms[tree.processes[i].mm as usize].thp_disable);
                }
                // Not before: the kernel writes to it, and the page it lies in may be on its way.
                if let Some(r) = &t.rseq {
                    b.call("register rseq", libc::SYS_rseq, &[r.address, r.len as u64, 0, r.signature as u64]);
                }
                b.pseudo("load the context", pilot::LEAVE, sp);
                self.pilots.post(slot, &b);
            }
        }
        Ok(())
    }

    /// The process's descriptor table: received in order, moved to their numbers from the highest down.
    fn descriptors(&mut self, i: usize, tree: &Tree, built: &[Option<OwnedFd>]) -> Result<(), PilotError> {
        let p = &tree.processes[i];
        let raw: Vec<RawFd> = p
            .fds
            .iter()
            .map(|f| built.get(f.description as usize)?.as_ref().map(AsRawFd::as_raw_fd))
            .collect::<Option<_>>()
            .ok_or_else(|| PilotError::agent("rebuild descriptors")(io::ErrorKind::InvalidData.into()))?;
        self.give(i, &raw)?;
        let slot = self.slots[i][0];
        let (records, _) = self.pilots.capacity(slot);
        let mut batches = vec![Batch::new()];
        let mut push = |what: &str, nr: i64, args: &[u64]| {
            if batches.last().is_some_and(|b| b.len() + 1 > records) {
                batches.push(Batch::new());
            }
            batches.last_mut().unwrap().call(what, nr, args);
        };
        for (k, f) in p.fds.iter().enumerate().rev() {
            let flags = if f.cloexec { libc::O_CLOEXEC as u64 } else { 0 };
            if k as i32 != f.fd {
                push("dup3", libc::SYS_dup3, &[k as u64, f.fd as u64, flags]);
            } else if f.cloexec {
                push(
                    "FD_CLOEXEC",
                    libc::SYS_fcntl,
                    &[k as u64, libc::F_SETFD as u64, libc::FD_CLOEXEC as u64],
                );
            }
        }
        let wanted: HashSet<i32> = p.fds.iter().map(|f| f.fd).collect();
        for k in (0..p.fds.len() as i32).filter(|k| !wanted.contains(k)) {
            push("close", libc::SYS_close, &[k as u64]);
        }
        for b in &batches {
            self.pilots.run(slot, b)?;
        }
        Ok(())
    }

    /// Registers what each epoll instance watched.
    ///
    /// From inside a process that has all of it open, because a signalfd tells only the process that registered it; where none has, the
    /// agent does it.
    fn epolls(&mut self, tree: &Tree, live: &[usize], built: &fds::Built) -> Result<(), PilotError> {
        let mut rest = tree.descriptions.clone();
        for (d, desc) in tree.descriptions.iter().enumerate() {
            let Kind::Epoll { entries } = &desc.kind else { continue };
            // The numbers in the entries are those of the process whose table matches all of them.
            let holder = live.iter().copied().find_map(|i| {
                let fds = &tree.processes[i].fds;
                let ep = fds.iter().find(|f| f.description as usize == d)?;
                entries
                    .iter()
                    .all(|e| fds.iter().any(|f| f.fd == e.fd && f.description == e.description))
                    .then_some((i, ep.fd))
            });
            let Some((i, ep)) = holder else { continue };
            rest[d].kind = Kind::Epoll { entries: Vec::new() };
            let slot = self.slots[i][0];
            let (records, _) = self.pilots.capacity(slot);
            for group in entries.chunks(records - 8) {
                let mut b = Batch::new();
                for e in group {
                    // struct epoll_event is packed: u32 events, u64 data.
                    let at = b.data(&[&e.events.to_le_bytes()[..], &e.data.to_le_bytes()].concat());
                    let args = [ep as u64, libc::EPOLL_CTL_ADD as u64, e.fd as u64, at];
                    let what = format!("epoll_ctl add {}", e.fd);
                    // The receiver's stream may be a file, which cannot be polled.
                    if matches!(
                        tree.descriptions.get(e.description as usize).map(|d| &d.kind),
                        Some(Kind::Stdio { .. })
                    ) {
                        b.call_or(what, libc::EPERM, libc::SYS_epoll_ctl, &args);
                    } else {
                        b.call(what, libc::SYS_epoll_ctl, &args);
                    }
                }
                self.pilots.run(slot, &b)?;
            }
        }
        fds::fill_epoll(&rest, built).map_err(|e| PilotError::agent("rebuild an epoll instance")(io::Error::other(e)))
    }

    /// Makes all threads of process `i` but its leader.
    pub(super) fn threads(&mut self, i: usize) -> Result<(), PilotError> {
        let p = &self.tree.processes[i];
        let others = self.slots[i]
            .iter()
            .copied()
            .zip(&p.threads)
            .skip(1)
            .map(|(s, t)| (s, t.tid))
            .collect();
        self.make_threads(i, others)
    }

    /// Makes these threads of process `i`: (slot, id).
    pub(super) fn make_threads(&mut self, i: usize, others: Vec<(usize, i32)>) -> Result<(), PilotError> {
        let leader = self.slots[i][0];
        let ppid = self.tree.processes[i].parent.map_or_else(
            || if self.fresh { 0 } else { std::process::id() as i32 },
            |parent| self.tree.processes[parent as usize].pid,
        );
        for group in others.chunks(500) {
            let mut b = Batch::new();
            for &(slot, tid) in group {
                let control = self.pilots.control(slot, ppid);
                self.clone_call(
                    &mut b,
                    leader,
                    format!("create thread {tid}"),
                    tid,
                    [CLONE_THREAD_FLAGS, 0],
                    control,
                );
            }
            self.pilots.run(leader, &b)?;
        }
        Ok(())
    }

    fn end_zombie(&mut self, i: usize, pid: i32, code: i32, comm: &str) -> Result<(), PilotError> {
        let mut b = Batch::new();
        let mut name = comm.as_bytes().to_vec();
        name.resize(16, 0);
        name[15] = 0;
        let name = b.data(&name);
        b.call("PR_SET_NAME", libc::SYS_prctl, &[15, name]);
        let signal = code & 0x7f;
        if signal == 0 {
            b.call("exit", libc::SYS_exit_group, &[(code >> 8) as u64 & 0xff]);
        } else {
            let limit = b.data(&[0; 16]);
            b.call("no core file", libc::SYS_prlimit64, &[0, libc::RLIMIT_CORE as u64, limit, 0]);
            let none = b.data(&[0; 8]);
            // The pilots inherit the agent's handlers.
            let default = b.data(&[0; 32]);
            b.call_or(
                "default action",
                libc::EINVAL,
                libc::SYS_rt_sigaction,
                &[signal as u64, default, 0, 8],
            );
            b.call("kill itself", libc::SYS_tgkill, &[pid as u64, pid as u64, signal as u64]);
            b.call("take the signal", libc::SYS_rt_sigprocmask, &[libc::SIG_SETMASK as u64, none, 0, 8]);
        }
        self.pilots.post(self.slots[i][0], &b);
        let agent = self.pids[i];
        let end = Instant::now() + Duration::from_secs(5);
        let dead = || stat::read(agent).map(|s| s.state == b'Z');
        while !dead().unwrap_or(true) {
            if Instant::now() > end {
                return Err(PilotError::Silent {
                    pid,
                    ms: 5000,
                    what: "end as the zombie it was".into(),
                });
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }

    /// The last step before the release, when all pages are in place.
    pub fn finish(&mut self) -> Result<(), PilotError> {
        fds::seal_objects(&self.tree.objects, &self.objects).map_err(|e| PilotError::agent("seal memfds")(io::Error::other(e)))
    }

    /// Where the kernel's lists of mappings differ from what the tree says, in words. For `--verify`, once the copy is complete.
    pub fn check_mappings(&self) -> io::Result<Vec<String>> {
        let mut wrong = Vec::new();
        for (p, agent) in self.tree.processes.iter().zip(&self.pids).filter(|(p, _)| p.zombie.is_none()) {
            let mm = &self.tree.mms[p.mm as usize];
            let mut ours = vec![self.pilots.range()];
            // Another kernel's vdso is memory like any other here, and this kernel's is somewhere else.
            if vdso::is_foreign(mm, &self.tree.vdsos)? {
                ours.push((self.vdso_at, self.vdso_at + self.park.len));
                ours.extend(
                    mm.vmas
                        .iter()
                        .filter(|v| matches!(v.backing, Backing::Special(_)))
                        .map(|v| (v.start, v.end)),
                );
            }
            let found = crate::oracle::mappings(&mm.vmas, &maps::smaps(*agent)?, &ours);
            wrong.extend(found.into_iter().map(|w| format!("process {}: {w}", p.pid)));
        }
        Ok(wrong)
    }

    /// Root pid in the agent's namespace.
    pub fn root_pid(&self) -> i32 {
        self.pids[0]
    }

    /// The tree being rebuilt.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Agent-side pids of the processes.
    pub fn pids(&self) -> &[i32] {
        &self.pids
    }

    /// Descriptors of the objects.
    pub fn objects(&self) -> &[OwnedFd] {
        &self.objects
    }

    /// Lets all tasks go at once. False: the copy had died before.
    pub fn release(&mut self) -> bool {
        self.released = self.pilots.release();
        self.released
    }

    /// Takes the pilots' mapping out of every released process: each task is stopped for some microseconds to see that it has left.
    ///
    /// A failure leaves an unused mapping behind, nothing else; the count of such processes is returned.
    pub fn clean_up(&mut self) -> usize {
        let range = self.pilots.range();
        let mut left = 0;
        for (i, p) in self.tree.processes.iter().enumerate().filter(|(_, p)| p.zombie.is_none()) {
            let agent = self.pids[i];
            if let Err(e) = unmap(agent, range) {
                tracing::warn!(pid = p.pid, error = %e, "the pilots' mapping stays in the process");
                left += 1;
            }
        }
        left
    }
}

/// This agent's bounding set, and the last capability there is. Neither changes.
fn capabilities() -> (u64, u32) {
    static KNOWN: OnceLock<(u64, u32)> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let me = std::process::id() as i32;
        let last = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap");
        (
            status::read_task(me, me).map_or(u64::MAX, |s| s.caps[3]),
            last.ok().and_then(|s| s.trim().parse().ok()).unwrap_or(40),
        )
    })
}

/// Descriptors that a process was given to map.
#[derive(Debug, Default)]
pub(super) struct Given {
    files: HashMap<(Vec<u8>, bool), u64>,
    objects: HashMap<u32, u64>,
    exe: Option<u64>,
}

impl Given {
    /// The number of the descriptor behind a mapping.
    pub fn number(&self, v: &Vma) -> Option<u64> {
        match &v.backing {
            Backing::File { file, writable, .. } => self.files.get(&(file.path.clone(), *writable && v.shared)).copied(),
            Backing::Object { object, .. } => self.objects.get(object).copied(),
            _ => None,
        }
    }
}

impl Drop for Rebuild {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        self.pilots.abort();
        // The root is a child of this thread; the others end by themselves and go to their reaper.
        let root = self.pids[0];
        if root != 0 {
            let end = Instant::now() + Duration::from_secs(2);
            for &p in self.pids.iter().rev().filter(|p| **p != 0) {
                let _ = misc::kill(p, libc::SIGKILL);
            }
            while Instant::now() < end && matches!(misc::reap(root), Ok(None)) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        if let Some(init) = self.init {
            let _ = misc::kill(init, libc::SIGKILL);
            let end = Instant::now() + Duration::from_secs(2);
            while Instant::now() < end && matches!(misc::reap(init), Ok(None)) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }
}

/// Unmaps `range` in a running process once none of its threads is inside.
fn unmap(pid: i32, range: (u64, u64)) -> io::Result<()> {
    let maps = match maps::maps(pid) {
        // It ended meanwhile, or runs another program: nothing is left to do.
        Err(e) if procfs::vanished(&e) => return Ok(()),
        m => m?,
    };
    if !maps.iter().any(|m| m.start < range.1 && m.end > range.0) {
        return Ok(());
    }
    let mut tids = procfs::tasks(pid)?;
    tids.retain(|&t| t != pid);
    for tid in tids {
        match visit(tid, range, |_| Ok(0)) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
            r => r?,
        }
    }
    for _ in 0..100 {
        let mut done = false;
        visit(pid, range, |regs| {
            let unmapped = inject::unmap(pid, regs, &arch::restart_anew(regs), range).map_err(io::Error::other)?;
            done = unmapped.done;
            Ok(unmapped.signal.unwrap_or(0))
        })?;
        if done {
            return Ok(());
        }
    }
    Err(io::Error::other("signals kept coming"))
}

/// Stops one thread outside `range`, gives its registers to `f`, and lets it go on with the signal that it returns, or 0.
fn visit(tid: i32, range: (u64, u64), mut f: impl FnMut(&crate::image::Regs) -> io::Result<i32>) -> io::Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        ptrace::seize(tid)?;
        ptrace::interrupt(tid)?;
        loop {
            match wait_stop_once(tid)? {
                Some(Some(_)) => break,
                Some(None) => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
                None if Instant::now() > end => return Err(io::ErrorKind::TimedOut.into()),
                None => std::thread::yield_now(),
            }
        }
        let mut regs = ptrace::regs(tid)?;
        rseq::abort(tid, &mut regs);
        let inside = (range.0..range.1).contains(&regs.rip) || (range.0..range.1).contains(&regs.rsp);
        if !inside {
            let r = f(&regs);
            let signal = *r.as_ref().unwrap_or(&0);
            // The call has only just begun: anew, so that no restart block is left that a next migration could not carry. A signal interrupts it.
            let back = if signal == 0 { arch::restart_anew(&regs) } else { regs };
            let _ = ptrace::set_regs(tid, &back);
            ptrace::detach(tid, signal)?;
            return r.map(drop);
        }
        ptrace::detach(tid, 0)?;
        if Instant::now() > end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

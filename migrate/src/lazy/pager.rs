//! The keeper: a process of its own that holds the userfaultfds of a running copy, reads what they say, and puts pages in place.
//!
//! Why a process: when the last descriptor of a userfaultfd is closed, the kernel lets every waiting task go on with zeros. Whoever holds them must
//! not be the agent, which does the network, parses what comes from outside and may be restarted or killed. The keeper opens nothing, speaks to
//! nobody but an agent of the same user, and waits as long as it takes for one: a task that needs a page sleeps until then. Events are read here
//! too, since the descriptor of a forked child exists nowhere else at first.
//!
//! Why one thread: pages, faults and events have to be seen in one order. After an event was read the memory it speaks of may be somewhere else; as
//! long as it was not, the kernel refuses to fill pages (EAGAIN). With a single thread the table is never behind what was read.
//!
//! Pages come through a ring of memory shared with the agent, one copy from the network's buffers, which the agent would have to make anyway.

use super::{
    audit::{Audit, Watched},
    ipc::{Channel, FrameRun, FromKeeper, RING, SLOT, SLOTS, Stats, ToKeeper},
    object::Object,
    table::{Place, Region as Mapped, Table},
};
use crate::{
    dump::pages::OBJECT_SPACE,
    image::PAGE,
    journal,
    report::FaultLatency,
    sys::{
        priority,
        region::Region,
        uffd::{FillError, Message, Userfault},
    },
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    collections::{HashMap, VecDeque},
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    time::{Duration, Instant},
};

/// Pages put in place before the next look at what the program does: 64 KiB to 256 KiB are where UFFDIO_COPY is fastest, and a page that a task waits for
/// waits for what is being put in place.
const UNIT: u64 = 16;
/// Pages of shared memory that are mapped along with one that is touched, as the kernel does it where nobody is asked (fault_around_bytes).
const AROUND: u64 = 16;
/// Children after which those that have ended are looked for: each holds a descriptor until then, if no page arrives meanwhile that it missed.
const LITTER: usize = 64;
/// How often a keeper that nothing happens to looks whether its program is still there.
const IDLE: Duration = Duration::from_secs(5);
/// A page that has no content.
static ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
/// Latencies that are kept; the rest only counts.
const SAMPLES: usize = 1 << 20;

#[derive(Debug)]
struct Frame {
    slot: u32,
    urgent: bool,
    runs: Vec<FrameRun>,
    /// Where it goes on: run, pages done of it, bytes of data before it.
    run: usize,
    done: u32,
    data: usize,
}

impl Frame {
    fn bytes(&self) -> u64 {
        self.runs.iter().map(|r| u64::from(r.2) * PAGE).sum()
    }
}

/// A task waits for a page.
#[derive(Debug, Clone, Copy)]
struct Fault {
    space: usize,
    at: u64,
    /// The page is there, and not mapped.
    minor: bool,
}

struct Keeper {
    table: Table,
    /// By the table's indices.
    fds: Vec<Option<Userfault>>,
    ring: Region,
    ring_fd: OwnedFd,
    agent: Option<Channel>,
    listener: Option<UnixListener>,
    socket: PathBuf,
    urgent: VecDeque<Frame>,
    bulk: VecDeque<Frame>,
    /// Pages that tasks wait for, and since when each of them does.
    waiting: HashMap<(u32, u64), Vec<Instant>>,
    /// Where tasks wait for pages of shared memory: such a page is mapped where it is touched, and nowhere else.
    touched: HashMap<(u32, u64), Vec<(usize, u64)>>,
    /// Shared memory, by name.
    objects: HashMap<u32, Object>,
    /// Faults to be looked at again, because an event was under way.
    again: Vec<Fault>,
    /// Children since those that have ended were looked for.
    born: usize,
    /// Nanoseconds.
    latencies: Vec<u64>,
    stats: Stats,
    audit: Audit,
    /// The agent asks what is missing.
    list: bool,
    told: bool,
    bye: bool,
}

/// The process that is the keeper, with the agent's socket as its standard input: see [`run`]. Signals that are for the agent's terminal or service
/// do not end it, and the kernel looks for others first when memory runs out.
pub fn main() -> io::Result<()> {
    use nix::sys::signal::{SigSet, Signal};
    let mut set = SigSet::empty();
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGPIPE]
        .into_iter()
        .for_each(|s| set.add(s));
    set.thread_block()?;
    let _ = rustix::process::setsid();
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    priority::ahead();
    // A child that is forked while pages are missing costs a descriptor.
    crate::restore::fds::raise_limit();
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    let ended = run(UnixStream::from(stdin));
    if let Err(e) = &ended {
        let _ = writeln!(io::stderr(), "the keeper gives up: {e}");
    }
    ended
}

/// What goes wrong is written to standard error, a file without a name at first ([`super::keeper::Keeper::spawn`]).
struct Log(PathBuf);

impl Log {
    /// From now on somebody may want to read it. Where the file system has no files without a name it is there already.
    fn keep(&self) {
        let nameless = rustix::fs::fstat(io::stderr()).is_ok_and(|s| s.st_nlink == 0);
        if nameless {
            let _ = journal::give_name(io::stderr(), &self.0);
        }
    }

    fn remove(&self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The agent has ended.
fn gone(e: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(e.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// Runs until the program has all its pages and an agent knows, or the program is gone. `socket`: the agent that started this process.
pub fn run(socket: UnixStream) -> io::Result<()> {
    let mut agent = Channel::new(socket);
    let socket = match agent.recv() {
        Ok(ToKeeper::Setup { socket }) => PathBuf::from(socket),
        Ok(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "something else came before the setup")),
        Err(e) if gone(&e) => return Ok(()),
        Err(e) => return Err(e),
    };
    let log = Log(socket.with_extension("log"));
    let mut keeper = match Keeper::set_up(agent, socket) {
        Ok(keeper) => keeper,
        // The copy ends with its agent, and so does this process then.
        Err(e) if gone(&e) => {
            log.remove();
            return Ok(());
        }
        Err(e) => {
            log.keep();
            return Err(e);
        }
    };
    log.keep();
    let r = keeper.work();
    let _ = std::fs::remove_file(&keeper.socket);
    if r.is_ok() && keeper.stats.anomalies == 0 && keeper.stats.different == 0 {
        log.remove();
    }
    r
}

impl Keeper {
    /// Everything up to the start, and the answer to that.
    fn set_up(mut agent: Channel, socket: PathBuf) -> io::Result<Keeper> {
        let ring_fd = agent.descriptor()?;
        let ring = Region::map(&ring_fd, RING, 0)?;
        let mut keeper = Keeper {
            table: Table::default(),
            fds: Vec::new(),
            ring,
            ring_fd,
            agent: None,
            listener: None,
            socket,
            urgent: VecDeque::new(),
            bulk: VecDeque::new(),
            waiting: HashMap::new(),
            touched: HashMap::new(),
            objects: HashMap::new(),
            again: Vec::new(),
            born: 0,
            latencies: Vec::new(),
            stats: Stats::default(),
            audit: Audit::default(),
            list: false,
            told: false,
            bye: false,
        };
        loop {
            match agent.recv()? {
                ToKeeper::Space {
                    regions,
                    missing,
                    expected,
                } => {
                    let fd = Userfault::from_fd(agent.descriptor()?);
                    // At the beginning every region is where it was at the source.
                    if let (Some(hashes), Some(first)) = (expected, regions.first()) {
                        let watched = Watched::from_fds(agent.descriptor()?, agent.descriptor()?);
                        keeper.audit.watch(keeper.fds.len(), watched, first.2, &missing, hashes);
                    }
                    let regions = regions
                        .into_iter()
                        .map(|(start, end, name, origin)| Mapped { start, end, name, origin });
                    keeper.table.add(regions, missing);
                    keeper.fds.push(Some(fd));
                }
                ToKeeper::Object {
                    name,
                    size,
                    missing,
                    expected,
                } => {
                    let object = Object::open(&agent.descriptor()?, size, expected)?;
                    keeper.objects.insert(name, object);
                    keeper.table.add_object(name, missing);
                }
                ToKeeper::Start => break,
                other => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("{other:?} came before the start"),
                    ));
                }
            }
        }
        let _ = std::fs::remove_file(&keeper.socket);
        let (_dir, short) = super::keeper::short(&keeper.socket)?;
        keeper.listener = Some(UnixListener::bind(short)?);
        if let Err(e) = agent.send(&FromKeeper::Ready, &[]) {
            let _ = std::fs::remove_file(&keeper.socket);
            return Err(e);
        }
        keeper.agent = Some(agent);
        Ok(keeper)
    }

    fn work(&mut self) -> io::Result<()> {
        // What was read along with the start is in no socket any more, and nothing may follow it.
        self.hear();
        loop {
            let busy = !self.urgent.is_empty() || !self.bulk.is_empty();
            let wait = if busy {
                Duration::ZERO
            } else if !self.again.is_empty() {
                Duration::from_millis(1)
            } else {
                IDLE
            };
            let ready = self.poll(wait)?;
            if ready.idle {
                self.bury();
            }
            for space in ready.spaces {
                self.listen(space);
            }
            if ready.agent {
                self.hear();
            }
            if ready.visitor {
                self.welcome();
            }
            for fault in std::mem::take(&mut self.again) {
                self.fault(fault);
            }
            self.unit();
            if self.list && self.urgent.is_empty() && self.bulk.is_empty() {
                self.list = false;
                let missing = self.table.owed();
                self.say(&FromKeeper::Missing { missing });
            }
            if self.table.missing() == 0 && !self.told {
                self.drained();
            }
            // Whoever asks later hears from the journal that the copy runs and misses nothing.
            if self.bye || (self.told && self.agent.is_none()) {
                return Ok(());
            }
        }
    }

    fn poll(&mut self, wait: Duration) -> io::Result<Ready> {
        enum Who {
            Visitor,
            Agent,
            Space(usize),
        }
        let mut list = Vec::new();
        let mut who = Vec::new();
        if let Some(l) = &self.listener {
            list.push(PollFd::new(l.as_fd(), PollFlags::POLLIN));
            who.push(Who::Visitor);
        }
        if let Some(a) = &self.agent {
            let out = if a.pending() { PollFlags::POLLOUT } else { PollFlags::empty() };
            list.push(PollFd::new(a.stream.as_fd(), PollFlags::POLLIN | out));
            who.push(Who::Agent);
        }
        for (i, fd) in self.fds.iter().enumerate() {
            if let Some(fd) = fd {
                list.push(PollFd::new(fd.as_fd(), PollFlags::POLLIN));
                who.push(Who::Space(i));
            }
        }
        let mut ready = Ready::default();
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        match poll(&mut list, timeout) {
            Ok(n) => ready.idle = n == 0 && wait == IDLE,
            Err(nix::Error::EINTR) => return Ok(ready),
            Err(e) => return Err(e.into()),
        }
        let fired = |p: &PollFd<'_>| p.revents().is_some_and(|r| !r.is_empty());
        for who in list.iter().zip(who).filter(|(p, _)| fired(p)).map(|(_, w)| w) {
            match who {
                Who::Visitor => ready.visitor = true,
                Who::Agent => ready.agent = true,
                Who::Space(i) => ready.spaces.push(i),
            }
        }
        Ok(ready)
    }

    /// Reads what a userfaultfd says.
    fn listen(&mut self, space: usize) {
        let Some(Some(fd)) = self.fds.get(space) else { return };
        let messages = match fd.read() {
            Ok(m) => m,
            Err(e) => {
                // Too many children, at the worst: a fork waits until some have ended. Anything is better than to let go of the descriptor.
                let _ = writeln!(io::stderr(), "a userfaultfd cannot be read: {e}");
                self.bury();
                std::thread::sleep(Duration::from_millis(10));
                return;
            }
        };
        for m in messages {
            match m {
                Message::Fault { address, minor } => self.fault(Fault { space, at: address, minor }),
                Message::Fork(fd) => {
                    let child = self.table.fork(space);
                    match self.fds.get_mut(child) {
                        Some(free) => *free = Some(fd),
                        None => self.fds.push(Some(fd)),
                    }
                    self.born += 1;
                    if self.born == LITTER {
                        self.bury();
                    }
                }
                Message::Remap { from, to, len } => {
                    self.table.moved(space, from, to, len);
                    self.stir(space, from, from + len);
                }
                Message::Remove { start, end } => {
                    self.table.dropped(space, start, end);
                    self.stir(space, start, end);
                }
                Message::Unmap { start, end } => {
                    self.table.unmapped(space, start, end);
                    self.stir(space, start, end);
                }
            }
        }
    }

    /// Whoever waits in a range looks again, and waits no more for what is not coming.
    fn stir(&mut self, space: usize, start: u64, end: u64) {
        if let Some(Some(fd)) = self.fds.get(space) {
            let _ = fd.wake(start, (end - start).next_multiple_of(PAGE));
        }
        self.forget_waiting();
    }

    /// Nobody waits for what is missing nowhere.
    fn forget_waiting(&mut self) {
        let table = &self.table;
        self.waiting.retain(|&(name, at), _| table.lacks(name, at));
        self.touched.retain(|key, _| self.waiting.contains_key(key));
    }

    fn fault(&mut self, fault: Fault) {
        let Fault { space, at, minor } = fault;
        let mut wants = self.table.wants(space, at);
        if let Some((name, origin)) = wants
            && name >= OBJECT_SPACE
            && !minor
        {
            // It was dropped for everybody: others may have begun to wait for it before.
            self.table.arrived(name, origin, origin + PAGE);
            self.come(name, origin, origin + PAGE);
            wants = None;
        }
        let Some(Some(fd)) = self.fds.get(space) else { return };
        if let Some((name, origin)) = wants {
            if minor {
                self.touched.entry((name, origin)).or_default().push((space, at));
            }
            let list = self.waiting.entry((name, origin)).or_default();
            list.push(Instant::now());
            if list.len() == 1 {
                self.say(&FromKeeper::Fault { name, at: origin });
            }
            return;
        }
        if minor {
            return self.map(fault);
        }
        // Never had content, or has lost it.
        let failed = fd.zero(at, PAGE).1;
        self.stats.zero_faults += u64::from(failed.is_none());
        self.settle(fault, failed);
    }

    /// Maps a page of shared memory that is there.
    fn map(&mut self, fault: Fault) {
        let Fault { space, at, .. } = fault;
        // A mapping that the kernel has not told of (mremap(2) of no bytes doubles one): the task goes on once everything has come.
        let Some(&region) = self.table.region(space, at).filter(|r| r.shared()) else {
            return;
        };
        let Some(Some(fd)) = self.fds.get(space) else { return };
        let failed = fd.proceed(at, PAGE).1;
        if failed.is_none() {
            self.around(space, at, region);
        }
        self.settle(fault, failed);
    }

    /// What answering a fault has come to.
    fn settle(&mut self, fault: Fault, failed: Option<FillError>) {
        match failed {
            None => {}
            Some(FillError::Event) => self.again.push(fault),
            Some(FillError::Gone) => self.end(fault.space),
            Some(FillError::There | FillError::NoMapping | FillError::Hole) => {
                if let Some(Some(fd)) = self.fds.get(fault.space) {
                    let _ = fd.wake(fault.at, PAGE);
                }
            }
            Some(FillError::Other(errno)) => {
                let _ = writeln!(io::stderr(), "a page cannot be put in place or mapped: errno {errno}");
                self.again.push(fault);
            }
        }
    }

    /// Maps what is there behind a page that was touched: best effort, each of them can be asked for.
    fn around(&self, space: usize, at: u64, r: Mapped) {
        let (start, most) = (at + PAGE, r.end.min(at + AROUND * PAGE));
        let offset = |at: u64| at - r.start + r.origin;
        if let Some(Some(fd)) = self.fds.get(space)
            && start < most
        {
            let missing = self.table.missing_of(r.name, offset(start), offset(most));
            let end = missing.first().map_or(most, |m| m.0 - r.origin + r.start);
            if start < end {
                let _ = fd.proceed(start, end - start);
            }
        }
    }

    /// Pages of the source are missing no more: tasks that wait for them are counted, and those that touched shared memory look again.
    fn come(&mut self, name: u32, start: u64, end: u64) {
        if self.waiting.is_empty() {
            return;
        }
        for at in (start..end).step_by(PAGE as usize) {
            for since in self.waiting.remove(&(name, at)).unwrap_or_default() {
                if self.latencies.len() < SAMPLES {
                    self.latencies.push(since.elapsed().as_nanos() as u64);
                }
            }
            for (space, at) in self.touched.remove(&(name, at)).unwrap_or_default() {
                self.fault(Fault { space, at, minor: true });
            }
        }
    }

    fn end(&mut self, space: usize) {
        self.table.end(space);
        if let Some(fd) = self.fds.get_mut(space) {
            *fd = None;
        }
        // Its index may be a child's next.
        self.again.retain(|f| f.space != space);
        self.audit.forget(space);
        self.forget_waiting();
    }

    /// Forgets address spaces that are no more.
    fn bury(&mut self) {
        self.born = 0;
        let dead: Vec<usize> = (0..self.fds.len())
            .filter(|i| self.fds[*i].as_ref().is_some_and(|fd| !fd.alive()))
            .collect();
        for space in dead {
            self.end(space);
        }
    }

    fn say(&mut self, m: &FromKeeper) {
        if let Some(a) = &mut self.agent
            && a.queue(m).is_err()
        {
            self.leave();
        }
    }

    /// The agent is gone: what it had brought and is not in place yet counts as not arrived.
    fn leave(&mut self) {
        self.agent = None;
        self.list = false;
        self.urgent.clear();
        self.bulk.clear();
    }

    /// Hears what the agent says.
    fn hear(&mut self) {
        let Some(a) = &mut self.agent else { return };
        let open = a.flush().and_then(|()| a.fill(false)).unwrap_or(false);
        loop {
            let Some(a) = &mut self.agent else { return };
            match a.message::<ToKeeper>() {
                Ok(Some(ToKeeper::Frame { slot, urgent, runs })) => {
                    let frame = Frame {
                        slot,
                        urgent,
                        runs,
                        run: 0,
                        done: 0,
                        data: 0,
                    };
                    if slot < SLOTS {
                        if urgent { &mut self.urgent } else { &mut self.bulk }.push_back(frame);
                    }
                }
                Ok(Some(ToKeeper::List)) => self.list = true,
                Ok(Some(ToKeeper::Again)) => self.again_all(),
                Ok(Some(ToKeeper::Bye)) => self.bye = self.told,
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return self.leave(),
            }
        }
        if !open && !self.bye {
            self.leave();
        }
    }

    /// Another agent takes over.
    fn welcome(&mut self) {
        let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) else {
            return;
        };
        self.leave();
        let mut agent = Channel::new(stream);
        if agent.send(&FromKeeper::Hello, &[&self.ring_fd]).is_err() {
            return;
        }
        self.agent = Some(agent);
        if self.told {
            let stats = self.stats.clone();
            self.say(&FromKeeper::Drained(Box::new(stats)));
        }
        self.again_all();
    }

    fn again_all(&mut self) {
        let waiting: Vec<(u32, u64)> = self.waiting.keys().copied().collect();
        for (name, at) in waiting {
            self.say(&FromKeeper::Fault { name, at });
        }
    }

    /// Everything has arrived: the kernel may let go of the memory.
    fn drained(&mut self) {
        self.told = true;
        if self.audit.on() {
            let compared = self.audit.compare(&self.table);
            for words in &compared.words {
                let _ = writeln!(io::stderr(), "after the drain: {words}");
            }
            self.stats.compared += compared.pages;
            self.stats.different += compared.different;
        }
        self.fds.iter_mut().for_each(|fd| *fd = None);
        self.stats.latency = latency(&mut self.latencies);
        let stats = self.stats.clone();
        self.say(&FromKeeper::Drained(Box::new(stats)));
        // Unmapping takes 75 ms a GiB, for which nobody waits any more.
        self.objects.clear();
    }

    /// Puts some pages in place.
    fn unit(&mut self) {
        let Some(mut frame) = self.urgent.pop_front().or_else(|| self.bulk.pop_front()) else {
            return;
        };
        let mut budget = UNIT;
        while budget > 0
            && let Some(&(name, start, pages, zero)) = frame.runs.get(frame.run)
        {
            let some = u64::from(pages - frame.done).min(budget);
            let at = start + u64::from(frame.done) * PAGE;
            let data = (!zero).then_some(frame.slot as usize * SLOT + frame.data);
            if !self.put(name, at, some, data, frame.urgent) {
                break;
            }
            budget -= some;
            frame.done += some as u32;
            if !zero {
                frame.data += (some * PAGE) as usize;
            }
            if frame.done == pages {
                frame.run += 1;
                frame.done = 0;
            }
        }
        if frame.run < frame.runs.len() {
            if frame.urgent { &mut self.urgent } else { &mut self.bulk }.push_front(frame);
            return;
        }
        let free = FromKeeper::Free {
            slot: frame.slot,
            urgent: frame.urgent,
            bytes: frame.bytes(),
            left: self.table.missing(),
        };
        self.say(&free);
    }

    /// Puts pages of the source wherever they are missing. False: an event has to be read first, after which they may be missing elsewhere.
    fn put(&mut self, name: u32, start: u64, pages: u64, data: Option<usize>, urgent: bool) -> bool {
        let end = start + pages * PAGE;
        if name >= OBJECT_SPACE {
            return self.put_object(name, start, end, data, urgent);
        }
        let places = self.table.places(name, start, end);
        let wanted: u64 = places.iter().map(|p| (p.end - p.start) / PAGE).sum();
        if wanted < pages {
            self.stats.unwanted += pages - wanted;
        }
        for p in places {
            let from = data.map(|d| d + (p.origin - start) as usize);
            let (settled, put) = self.fill(p, from);
            *(if urgent { &mut self.stats.pulled } else { &mut self.stats.pushed }) += put;
            if !settled {
                return false;
            }
        }
        self.come(name, start, end);
        true
    }

    /// The same for shared memory.
    fn put_object(&mut self, name: u32, start: u64, end: u64, data: Option<usize>, urgent: bool) -> bool {
        let missing = self.table.missing_of(name, start, end);
        self.stats.unwanted += (end - start - missing.iter().map(|m| m.1 - m.0).sum::<u64>()) / PAGE;
        let Some(object) = self.objects.get(&name) else { return true };
        for (a, b) in missing {
            let mut bytes = vec![0; (b - a) as usize];
            if let Some(d) = data {
                self.ring.read(d + (a - start) as usize, &mut bytes);
            }
            let put = match object.put(a, &bytes) {
                Ok(put) => put,
                Err(e) => {
                    let _ = writeln!(io::stderr(), "shared memory cannot be written: {e}");
                    std::thread::sleep(Duration::from_millis(5));
                    return false;
                }
            };
            *(if urgent { &mut self.stats.pulled } else { &mut self.stats.pushed }) += put.pages;
            self.stats.unwanted += (b - a) / PAGE - put.pages;
            self.stats.compared += put.compared;
            self.stats.different += put.different.len() as u64;
            for at in put.different {
                let _ = writeln!(io::stderr(), "page {at:#x} of shared memory {name:#x} differs");
            }
            self.table.arrived(name, a, b);
        }
        self.come(name, start, end);
        true
    }

    /// Whether all of it is settled, and how many pages were put in place.
    fn fill(&mut self, p: Place, data: Option<usize>) -> (bool, u64) {
        let mut at = p.start;
        let mut put = 0;
        let mut single = false;
        while at < p.end {
            let Some(Some(fd)) = self.fds.get(p.space) else {
                return (true, put);
            };
            let len = if single { PAGE } else { p.end - at };
            let watched = self.audit.on();
            let (n, error) = match data {
                Some(d) => fd.copy(at, self.ring.local(d + (at - p.start) as usize, len as usize), len, watched),
                // The kernel has no protected zero page.
                None if watched => fd.copy(at, ZEROS.as_ptr() as u64, len.min(PAGE), true),
                None => fd.zero(at, len),
            };
            if n > 0 {
                self.table.filled(p.space, at, at + n);
                at += n;
                put += n / PAGE;
            }
            match error {
                None => {}
                Some(FillError::Event) => {
                    self.listen(p.space);
                    std::thread::yield_now();
                    return (false, put);
                }
                Some(FillError::There) => {
                    // Nobody else fills missing pages.
                    self.stats.anomalies += 1;
                    let _ = writeln!(io::stderr(), "a page at {at:#x} was there before it arrived");
                    let _ = fd.wake(at, PAGE);
                    self.table.filled(p.space, at, at + PAGE);
                    at += PAGE;
                }
                // The program has split the mapping: page by page from here.
                Some(FillError::NoMapping) if len > PAGE => single = true,
                Some(FillError::NoMapping) => {
                    let _ = fd.wake(at, PAGE);
                    self.table.unmapped(p.space, at, at + PAGE);
                    at += PAGE;
                }
                Some(FillError::Gone) => {
                    self.end(p.space);
                    return (true, put);
                }
                // Of the ring, which is all there. In no case is it tried again and again ahead of everybody else.
                Some(FillError::Hole) => {
                    std::thread::sleep(Duration::from_millis(5));
                    return (false, put);
                }
                Some(FillError::Other(errno)) => {
                    // Out of memory, most likely: the task waits, which is what it would do for the page anyway.
                    let _ = writeln!(io::stderr(), "a page cannot be put in place: errno {errno}");
                    std::thread::sleep(Duration::from_millis(5));
                    return (false, put);
                }
            }
        }
        (true, put)
    }
}

/// What there is to do.
#[derive(Default)]
struct Ready {
    spaces: Vec<usize>,
    agent: bool,
    visitor: bool,
    /// Nothing, for a while.
    idle: bool,
}

/// Percentiles, and a histogram by powers of two.
fn latency(ns: &mut [u64]) -> FaultLatency {
    ns.sort_unstable();
    let at = |share: f64| {
        let last = ns.len().saturating_sub(1);
        ns.get((last as f64 * share).round() as usize).map_or(0, |n| n / 1000)
    };
    let mut histogram: Vec<u64> = Vec::new();
    for n in ns.iter() {
        let bucket = (n / 1000).checked_ilog2().map_or(0, |b| b as usize + 1);
        if histogram.len() <= bucket {
            histogram.resize(bucket + 1, 0);
        }
        histogram[bucket] += 1;
    }
    FaultLatency {
        p50: at(0.5),
        p99: at(0.99),
        max: at(1.0),
        count: ns.len() as u64,
        histogram,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pagemap::Untouched;

    /// A keeper that comes late finds the start and all the pages in one read.
    #[test]
    fn pages_that_come_along_with_the_start_are_put_in_place() {
        let Ok(uffd) = Userfault::own_missing() else {
            return eprintln!("SKIP pages_that_come_along_with_the_start_are_put_in_place: no userfaultfd");
        };
        let ring_fd = tempfile::tempfile().unwrap();
        ring_fd.set_len(RING as u64).unwrap();
        let ring = Region::map(&ring_fd, RING, 0).unwrap();
        ring.write(0, &[7; PAGE as usize]);
        let memory = Untouched::map(PAGE as usize).unwrap();
        let (start, end) = (memory.start(), memory.start() + PAGE);
        uffd.register_missing(start, end, false).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut agent = Channel::new(ours);
        let socket = dir.path().join("keeper").to_string_lossy().into_owned();
        agent.send(&ToKeeper::Setup { socket }, &[&ring_fd]).unwrap();
        let space = ToKeeper::Space {
            regions: vec![(start, end, 0, start)],
            missing: vec![(start, end)],
            expected: None,
        };
        agent.send(&space, &[&uffd]).unwrap();
        agent.send(&ToKeeper::Start, &[]).unwrap();
        let frame = ToKeeper::Frame {
            slot: 0,
            urgent: false,
            runs: vec![(0, start, 1, false)],
        };
        agent.send(&frame, &[]).unwrap();
        drop(uffd);
        let keeper = std::thread::spawn(move || run(theirs));
        let end = Instant::now() + Duration::from_secs(10);
        let mut free = 0;
        loop {
            assert!(Instant::now() < end, "it goes on by itself");
            assert!(agent.fill(false).unwrap());
            match agent.message::<FromKeeper>().unwrap() {
                None => std::thread::sleep(Duration::from_millis(1)),
                Some(FromKeeper::Ready) => {}
                Some(FromKeeper::Free { .. }) => free += 1,
                Some(FromKeeper::Drained(stats)) => break assert_eq!((free, stats.pushed), (1, 1)),
                Some(other) => panic!("{other:?}"),
            }
        }
        agent.send(&ToKeeper::Bye, &[]).unwrap();
        keeper.join().unwrap().unwrap();
        assert_eq!(memory.read(0), 7);
    }

    #[test]
    fn latencies_are_summed_up() {
        let mut ns: Vec<u64> = (1..=1000).map(|us| us * 1000).rev().collect();
        let l = latency(&mut ns);
        assert_eq!((l.p50, l.p99, l.max, l.count), (501, 990, 1000, 1000));
        // Below 1 µs, 1, 2 to 3, 4 to 7 ...
        assert_eq!(l.histogram[..4], [0, 1, 2, 4]);
        assert_eq!(l.histogram.iter().sum::<u64>(), 1000);
        assert_eq!(latency(&mut []), FaultLatency::default());
    }
}

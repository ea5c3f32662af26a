//! The agent's end of the keeper: starting it, handing it the copy's userfaultfds, and finding one that an earlier agent left.

use super::{
    audit::Watched,
    ipc::{Channel, FromKeeper, RING, ToKeeper},
};
use crate::{
    journal,
    sys::{region::Region, uffd::Userfault},
};
use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt},
            net::UnixStream,
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The command of this binary that is the keeper: [`super::pager::run`] with its standard input.
pub const COMMAND: &str = "keeper";

/// A keeper and the ring it shares with this agent.
#[derive(Debug)]
pub struct Keeper {
    /// Messages.
    pub channel: Channel,
    /// Pages.
    pub ring: Region,
}

/// A process of the copy whose pages follow.
#[derive(Debug)]
pub struct Armed {
    /// Its userfaultfd, registered.
    pub fd: Userfault,
    /// (start, end, name, address at the source).
    pub regions: Vec<(u64, u64, u32, u64)>,
    /// Ranges that are missing.
    pub missing: Vec<(u64, u64)>,
    /// Its address space's name at the source.
    pub name: u32,
    /// For the memory oracle, with hashes of what is missing.
    pub watched: Option<(Watched, Vec<(u64, u64)>)>,
}

/// Shared memory whose content follows.
#[derive(Debug)]
pub struct Pending {
    /// A descriptor of it.
    pub fd: OwnedFd,
    /// Its name at the source.
    pub name: u32,
    /// Bytes.
    pub size: u64,
    /// Ranges that are missing, by offset.
    pub missing: Vec<(u64, u64)>,
    /// For the memory oracle: (offset, hash) of what is missing.
    pub expected: Option<Vec<(u64, u64)>>,
}

fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("keeper")
}

fn socket(state_dir: &Path, id: &str) -> PathBuf {
    directory(state_dir).join(id)
}

/// Where a keeper writes what goes wrong. It has no name ([`super::pager`] gives it one) until the keeper is on its own: an agent that is killed before leaves nothing.
fn log(dir: &Path, socket: &Path) -> io::Result<File> {
    match journal::nameless(dir)? {
        Some(file) => Ok(file),
        None => std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(socket.with_extension("log")),
    }
}

/// A path that fits into a socket's address, however deep the directory is.
pub fn short(path: &Path) -> io::Result<(File, PathBuf)> {
    let bad = || io::Error::new(io::ErrorKind::InvalidInput, "not a path of a socket");
    let dir = File::open(path.parent().ok_or_else(bad)?)?;
    let name = path.file_name().ok_or_else(bad)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((dir, short))
}

impl Keeper {
    /// Starts one. Until [`Keeper::start`] it ends with this agent.
    pub fn spawn(state_dir: &Path, id: &str) -> io::Result<Keeper> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory(state_dir))?;
        let ring = File::from(rustix::fs::memfd_create("migrate pages", rustix::fs::MemfdFlags::CLOEXEC)?);
        ring.set_len(RING as u64)?;
        let (ours, theirs) = UnixStream::pair()?;
        let log = log(&directory(state_dir), &socket(state_dir, id))?;
        crate::steps::reached("keeper's log");
        let mut child = Command::new("/proc/self/exe")
            .arg0("migrate")
            .arg(COMMAND)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(log)
            .current_dir("/")
            .spawn()?;
        crate::steps::reached("keeper spawned");
        // It ends by itself; waited for only so that no zombie is left while this agent goes on.
        std::thread::Builder::new().name("keeper".into()).spawn(move || child.wait())?;
        let mut channel = Channel::new(ours);
        let socket = socket(state_dir, id).to_string_lossy().into_owned();
        channel.send(&ToKeeper::Setup { socket }, &[&ring])?;
        Ok(Keeper {
            channel,
            ring: Region::map(&ring, RING, 0)?,
        })
    }

    /// Hands over a process.
    pub fn take(&mut self, armed: Armed) -> io::Result<()> {
        let (watched, expected) = armed.watched.unzip();
        let (regions, missing) = (armed.regions, armed.missing);
        let space = ToKeeper::Space {
            regions,
            missing,
            expected,
        };
        let mut fds: Vec<&dyn AsFd> = vec![&armed.fd];
        fds.extend(watched.iter().flat_map(Watched::descriptors));
        self.channel.send(&space, &fds)
    }

    /// Hands over shared memory.
    pub fn take_object(&mut self, pending: Pending) -> io::Result<()> {
        let Pending {
            fd,
            name,
            size,
            missing,
            expected,
        } = pending;
        let object = ToKeeper::Object {
            name,
            size,
            missing,
            expected,
        };
        self.channel.send(&object, &[&fd])
    }

    /// From now on it serves, and outlives this agent. Returns once it has said that it does: were it gone, every missing page would read as zeros.
    pub fn start(&mut self) -> io::Result<()> {
        self.channel.send(&ToKeeper::Start, &[])?;
        match self.channel.recv()? {
            FromKeeper::Ready => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it says something else")),
        }
    }

    /// Finds the keeper that an earlier agent left. NotFound: there is none.
    pub fn adopt(state_dir: &Path, id: &str) -> io::Result<Keeper> {
        if !journal::valid_id(id) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let path = socket(state_dir, id);
        let (_dir, short) = short(&path)?;
        let stream = match UnixStream::connect(short) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                // The keeper is dead, and its socket a file like any other.
                let _ = std::fs::remove_file(&path);
                return Err(io::ErrorKind::NotFound.into());
            }
            r => r?,
        };
        let mut channel = Channel::new(stream);
        let FromKeeper::Hello = channel.recv()? else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the keeper did not say hello"));
        };
        let ring = File::from(channel.descriptor()?);
        let ring = Region::map(&ring, RING, 0)?;
        Ok(Keeper { channel, ring })
    }

    /// Whether an earlier agent left one for this migration.
    pub fn exists(state_dir: &Path, id: &str) -> bool {
        journal::valid_id(id) && socket(state_dir, id).exists()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As with a full disk under the state directory: no socket can be made.
    #[test]
    fn a_keeper_that_cannot_set_itself_up_is_noticed() {
        let start = |socket: &Path| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let ring = tempfile::tempfile().unwrap();
            ring.set_len(RING as u64).unwrap();
            let mut keeper = Keeper {
                channel: Channel::new(ours),
                ring: Region::map(&ring, RING, 0).unwrap(),
            };
            let socket = socket.to_string_lossy().into_owned();
            keeper.channel.send(&ToKeeper::Setup { socket }, &[&ring]).unwrap();
            let serving = std::thread::spawn(move || crate::lazy::pager::run(theirs));
            let started = keeper.start();
            drop(keeper);
            (started, serving.join().unwrap())
        };
        let dir = tempfile::tempdir().unwrap();
        let (started, ended) = start(&dir.path().join("none/socket"));
        assert!(started.is_err() && ended.is_err(), "{started:?} {ended:?}");
        let (started, ended) = start(&dir.path().join("socket"));
        assert!(started.is_ok() && ended.is_ok(), "{started:?} {ended:?}");
    }
}

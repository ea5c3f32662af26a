//! Where it is measured: two hosts on this machine, or this machine and another.

use crate::{cli::Bench, parse};
use migrate_engine::report::Failure;
use std::{
    net::{SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
};

/// Where programs are moved from and to.
pub enum Bed {
    /// Between two hosts made on this machine, new ones for each migration.
    Here {
        /// What the link between them is like.
        link: String,
    },
    /// To a waiting receiver.
    There(There),
}

/// Another machine.
pub struct There {
    /// HOST:PORT of its receiver.
    pub to: String,
    /// Its address, for the client.
    pub address: SocketAddr,
    /// For the first contact.
    pub ticket: Option<String>,
    /// This host's.
    pub state_dir: PathBuf,
}

impl Bed {
    /// As asked for. Err: what is missing.
    pub fn new(arguments: &Bench, state_dir: &Path) -> Result<Bed, Failure> {
        let fail = |why: String| Failure::failed("bench", 0, why);
        let Some(to) = &arguments.to else {
            if !nix::unistd::geteuid().is_root() {
                return Err(fail("two hosts on this machine take network, mount and pid namespaces".into()).with_fix("run it as root"));
            }
            if migrate_harness::tool("ip").is_none() {
                return Err(fail("two hosts on this machine are joined by ip(8), which is not installed".into())
                    .with_fix("apt-get install iproute2"));
            }
            let link = super::plan::Link {
                round_trip: arguments.round_trip,
                rate: arguments.link,
            };
            return Ok(Bed::Here { link: link.to_string() });
        };
        let to = parse::peer(to).map_err(fail)?;
        let found = to.to_socket_addrs().map(|mut all| all.next());
        let mut address = match found {
            Ok(Some(address)) => address,
            Ok(None) => return Err(fail(format!("{to} has no address"))),
            Err(error) => return Err(fail(format!("{to}: {error}"))),
        };
        address.set_port(arguments.port);
        Ok(Bed::There(There {
            to,
            address,
            ticket: arguments.ticket.clone(),
            state_dir: state_dir.to_owned(),
        }))
    }

    /// The link between the two, in words.
    pub fn link(&self) -> String {
        match self {
            Bed::Here { link } => link.clone(),
            Bed::There(there) => format!("to {}", there.to),
        }
    }
}

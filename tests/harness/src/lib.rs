//! Two hosts on one machine, and what tests do with them.
//!
//! A [`Host`] is a set of network, mount, pid, uts and ipc namespaces whose first process reaps everything and starts what a test asks
//! for. [`Hosts`] joins two of them, A at 10.77.0.1 and B at 10.77.0.2, by a veth pair that exists in no other namespace, so that tests
//! run side by side. Both see this machine's files, with a private `/run` and `/dev/shm` each. Everything ends with the value that a test
//! holds.
//!
//! [`vm`] has hosts with kernels of their own: two virtual machines.
//!
//! `migrate bench` measures in the same hosts and with the same guests, all of them [`carried_by`] the one program.
//!
//! The agents are the real binary: `MIGRATE_BIN`, or the one that cargo built beside the tests. What a missing tool or missing
//! rights make impossible is a named skip ([`skip`]), never a silent pass.

mod agent;
mod client;
mod dice;
mod guest;
mod host;
mod hosts;
mod initramfs;
mod pauses;
pub mod programs;
mod relay;
mod soak;
mod tools;
pub mod vm;
mod wait;

pub use agent::{Moved, Receiver, Run, Tree, mode, without_oracle};
pub use client::{Answer, Client, Redis};
pub use dice::Dice;
pub use guest::Guest;
pub use host::{Command, Ended, Host, Proc, Process, Stdio};
pub use hosts::Hosts;
pub use pauses::Pauses;
pub use relay::{Relay, Weather};
pub use soak::soak;
pub use tools::{carried_by, guest_binary, guest_command, migrate_binary, newer_criu, patience, python, skip, tool};
pub use wait::{Standstill, abandon, eventually, soon, within};

/// Two hosts, or the end of the test with a named skip.
#[macro_export]
macro_rules! two_hosts {
    () => {
        match $crate::Hosts::new() {
            Some(hosts) => hosts,
            None => return,
        }
    };
}

/// A tool's path, or the end of the test with a named skip.
#[macro_export]
macro_rules! need {
    ($tool:expr) => {
        match $crate::tool($tool) {
            Some(path) => path,
            None => {
                $crate::skip(&format!("{} is not installed", $tool));
                return;
            }
        }
    };
}

//! Requests to the first process of a test host, and what it answers: one JSON object a SOCK_SEQPACKET message, or one a line where the
//! host is a virtual machine.

use serde::{Deserialize, Serialize};

/// Starts a command in the host. Descriptors 0, 1 and 2 come along with the message, unless the host is a virtual machine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Spawn {
    /// Chosen by the caller, comes back in the answer.
    pub id: u64,
    /// Program and arguments; the program is an absolute path.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// Leads a session of its own.
    pub setsid: bool,
    /// Descriptor 0 becomes its controlling terminal.
    pub terminal: bool,
    /// Ignores SIGHUP, as under nohup.
    pub nohup: bool,
    /// User and group, when not root.
    pub uid: Option<u32>,
    /// The pid it shall have, when that is free.
    pub want_pid: Option<i32>,
    /// Soft and hard limit of open files.
    pub nofile: Option<u64>,
    /// In a virtual machine, where no descriptors come along: files that its standard output and standard error are appended to.
    #[serde(default)]
    pub outputs: Option<[String; 2]>,
}

/// What the first process tells.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// The host is up; its first process has this pid outside.
    Up {
        /// Pid in the caller's pid namespace.
        init: i32,
    },
    /// A command was started.
    Spawned {
        /// From the request.
        id: u64,
        /// Pid in the host.
        pid: i32,
    },
    /// A command could not be started.
    Failed {
        /// From the request.
        id: u64,
        /// Why.
        error: String,
    },
    /// A child, started or adopted, is gone.
    Reaped {
        /// Pid in the host.
        pid: i32,
        /// Status as wait(2) gives it.
        status: i32,
    },
}

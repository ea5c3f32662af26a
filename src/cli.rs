//! What can be typed: clap's types and nothing else. Meanings are in `parse`, long texts in `help`.

use crate::{help, parse};
use clap::{Args, Parser, Subcommand, ValueEnum};
use migrate_engine::{
    report::{Mode, Stdio},
    track::Kind,
};
use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// Move a running process tree to another host while it keeps running.
#[derive(Debug, Parser)]
#[command(name = "migrate", version, long_about = help::MIGRATE, after_help = help::EXIT_CODES)]
#[command(propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// Where this host keeps its identity, trusted peers and journals
    #[arg(long, global = true, value_name = "DIR", default_value = "/var/lib/migrate")]
    #[arg(env = "MIGRATE_STATE_DIR", hide_env_values = true, help_heading = help::EVERYWHERE)]
    pub state_dir: PathBuf,
    /// Say what happens, on stderr; twice or three times for more
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = help::EVERYWHERE)]
    pub verbose: u8,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Wait for process trees from other hosts
    #[command(long_about = help::RECEIVE, after_help = help::EXIT_CODES)]
    Receive(Receive),
    /// Move a running process tree to a waiting host
    #[command(long_about = help::SEND, after_help = help::EXIT_CODES)]
    Send(Send),
    /// Save a process tree to a directory
    #[command(long_about = help::CHECKPOINT, after_help = help::EXIT_CODES)]
    Checkpoint(Checkpoint),
    /// Start a saved process tree again, where it was
    #[command(long_about = help::RESTORE, after_help = help::RESTORE_EXIT_CODES)]
    Restore(Restore),
    /// List the checkpoints in a directory
    #[command(long_about = help::LIST)]
    List(List),
    /// Remove a checkpoint
    #[command(long_about = help::RM)]
    Rm(Rm),
    /// Show what a checkpoint holds
    #[command(long_about = help::SHOW)]
    Show(Show),
    /// Say what this host, a process or a pair of hosts can and cannot do
    #[command(long_about = help::CHECK, after_help = help::CHECK_EXIT_CODES)]
    Check(Check),
    /// List and resolve hand-overs that a crash left open
    #[command(long_about = help::RECOVER, after_help = help::EXIT_CODES)]
    Recover(Recover),
    /// Say which hosts may send to and receive from this one
    #[command(long_about = help::TRUST, subcommand_required = true, arg_required_else_help = true)]
    Trust {
        #[command(subcommand)]
        command: Trust,
    },
    /// Measure the freeze, as programs and their clients see it
    #[command(long_about = help::BENCH)]
    Bench(Box<Bench>),
    /// A program to be measured or tested with
    #[command(hide = true)]
    Guest(Rest),
    /// Move a small program between two network namespaces of this host
    #[command(hide = true)]
    Demo(Rest),
    /// What plain QUIC carries between two hosts, for comparison
    #[command(hide = true)]
    Ceiling {
        #[command(subcommand)]
        command: Ceiling,
    },
    /// Hold the memory of a program whose pages follow (started by `receive`)
    #[command(hide = true)]
    Keeper,
    /// Print completions for a shell
    #[command(long_about = help::COMPLETIONS)]
    Completions(Completions),
    /// Print the manual page, or write all of them
    #[command(long_about = help::MAN)]
    Man(Man),
}

#[derive(Debug, Subcommand)]
pub enum Ceiling {
    /// Take what comes and drop it, until interrupted
    Serve { addr: std::net::SocketAddr },
    /// Send this many random bytes and print the rate
    Measure { addr: std::net::SocketAddr, bytes: u64 },
}

#[derive(Debug, Args)]
pub struct Json {
    /// Print one JSON object at the end on stdout, and events as JSON lines on stderr
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Receive {
    /// Address to listen on (UDP); port 0 takes a free one
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:7878", value_parser = parse::listen)]
    pub listen: SocketAddr,
    /// Write the ticket, and nothing else, to this file (mode 0600) once the address is bound, instead of printing it
    #[arg(long, value_name = "FILE")]
    pub ticket_file: Option<PathBuf>,
    /// How long a ticket is good for a host that is not known yet
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse::duration)]
    pub ticket_lifetime: Duration,
    /// Stop after one migration, with its exit code
    #[arg(long)]
    pub once: bool,
    /// What replaces a terminal or pipe that led out of the tree: our own streams, /dev/null, or a file to append to
    #[arg(long, value_name = "inherit|null|FILE", default_value = "inherit", value_parser = parse::stdio)]
    pub stdio: Stdio,
    /// Most migrations at the same time; more are refused
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub at_once: u32,
    /// Longest wait, up to the resume, for another host that is there and does not go on
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = parse::duration)]
    pub peer_timeout: Duration,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Send {
    /// Root of the tree: it and all its descendants move
    #[arg(value_parser = parse::pid, allow_negative_numbers = true)]
    pub pid: i32,
    /// The receiver, as `migrate receive` prints it
    #[arg(value_name = "HOST:PORT", value_parser = parse::peer)]
    pub to: String,
    /// First contact: the one-time ticket of `migrate receive`; the variable keeps it out of ps
    #[arg(long, env = "MIGRATE_TICKET", hide_env_values = true, value_parser = parse::ticket)]
    pub ticket: Option<String>,
    /// How memory is moved
    #[arg(long, value_enum, default_value = "hybrid")]
    pub mode: ModeArg,
    /// How memory that was written between rounds is found
    #[arg(long, value_enum, default_value = "auto")]
    pub tracker: TrackerArg,
    /// Longest freeze to aim for
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = parse::duration)]
    pub downtime_limit: Duration,
    /// Most rounds before the freeze
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rounds: u32,
    /// Longest time before the freeze
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse::duration)]
    pub max_time: Duration,
    /// Most that is sent, as in 100MB/s or 1Gbit/s [default: no limit]
    #[arg(long, value_name = "LIMIT", value_parser = parse::rate)]
    pub bandwidth: Option<u64>,
    /// Longest wait, up to the resume, for another host that is there and does not go on
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = parse::duration)]
    pub peer_timeout: Duration,
    /// Leave the original running too: two copies, from then on apart
    #[arg(long)]
    pub leave_running: bool,
    /// Preflight and predicted downtime; nothing is moved
    #[arg(long, conflicts_with = "leave_running")]
    pub dry_run: bool,
    /// Write a page with charts of this migration to a file, for a browser
    #[arg(long, value_name = "FILE.html", conflicts_with = "dry_run")]
    pub report: Option<PathBuf>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Bench {
    /// Between this machine and the one where `migrate receive` waits; without it, between two hosts made on this machine
    #[arg(long, value_name = "HOST:PORT", value_parser = parse::peer)]
    pub to: Option<String>,
    /// First contact: the one-time ticket of `migrate receive`
    #[arg(long, env = "MIGRATE_TICKET", hide_env_values = true, value_parser = parse::ticket, requires = "to")]
    pub ticket: Option<String>,
    /// memory, shell, http, redis, or a command of your own; several: again
    #[arg(long, value_name = "NAME|COMMAND")]
    pub workload: Vec<String>,
    /// Everything: sizes to 8 GiB, all rates, modes, counts and links; hours
    #[arg(long, conflicts_with_all = ["workload", "to"])]
    pub full: bool,
    #[command(flatten)]
    pub memory: BenchMemory,
    /// How memory is moved [default: hybrid, and each once in the short matrix]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub mode: Vec<ModeArg>,
    /// How memory that was written between rounds is found
    #[arg(long, value_enum, default_value = "auto")]
    pub tracker: TrackerArg,
    /// Migrations of each
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeat: u32,
    /// A link that delays: the round trip takes this much longer
    #[arg(long, value_name = "TIME", value_parser = parse::duration, conflicts_with = "to")]
    pub round_trip: Option<Duration>,
    /// A link that carries no more than this, as in 100Mbit/s
    #[arg(long, value_name = "LIMIT", value_parser = parse::rate, conflicts_with = "to")]
    pub link: Option<u64>,
    /// The CRIU to compare with [default: criu in PATH]
    #[arg(long, env = "MIGRATE_CRIU", hide_env_values = true, value_name = "PROGRAM")]
    pub criu: Option<PathBuf>,
    /// TCP port that the measured program listens on
    #[arg(long, value_name = "PORT", default_value_t = 7979, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// Write a page with charts to a file, for a browser
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
    #[command(flatten)]
    pub json: Json,
}

/// The built-in workload. Each list is combined with every other.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "The workload `memory`")]
pub struct BenchMemory {
    /// Memory, as in 16MiB,1GiB
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = parse::size)]
    pub size: Vec<u64>,
    /// Written a second, as in 0,50MB/s,max (as fast as a core can)
    #[arg(long, value_name = "RATE", value_delimiter = ',', value_parser = parse::dirty_rate)]
    pub rate: Vec<parse::DirtyRate>,
    /// Which pages are written
    #[arg(long, value_enum, value_delimiter = ',', default_value = "uniform")]
    pub pattern: Vec<PatternArg>,
    /// The memory is shared memory
    #[arg(long)]
    pub shared: bool,
    /// Children that write copies of their own at the same rate each, or with --shared their part of it
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1000))]
    pub forked: u32,
    /// More threads
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(..=20_000))]
    pub threads: Vec<u32>,
    /// More processes
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub processes: Vec<u32>,
    /// More mappings
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(..=60_000))]
    pub vmas: Vec<u32>,
    /// More open files
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(..=500_000))]
    pub fds: Vec<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PatternArg {
    /// Each as likely as any other
    Uniform,
    /// Few of them often, most seldom
    Zipf,
    /// One after the other
    Sequential,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// Copy in rounds while it runs; what will not settle follows after the resume
    Hybrid,
    /// Copy in rounds while it runs, freeze for the rest
    PreCopy,
    /// Freeze at once, pages follow on demand
    PostCopy,
    /// Freeze, copy everything, resume there
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TrackerArg {
    /// wp-async where the kernel has it, else soft-dirty
    Auto,
    /// Soft-dirty bits (CONFIG_MEM_SOFT_DIRTY); stops the tree for a moment at every round
    SoftDirty,
    /// userfaultfd with asynchronous write protection (Linux 6.7)
    WpAsync,
}

impl From<TrackerArg> for Kind {
    fn from(tracker: TrackerArg) -> Kind {
        match tracker {
            TrackerArg::Auto => Kind::Auto,
            TrackerArg::SoftDirty => Kind::SoftDirty,
            TrackerArg::WpAsync => Kind::WpAsync,
        }
    }
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Mode {
        match mode {
            ModeArg::Hybrid => Mode::Hybrid,
            ModeArg::PreCopy => Mode::PreCopy,
            ModeArg::PostCopy => Mode::PostCopy,
            ModeArg::Stop => Mode::Stop,
        }
    }
}

#[derive(Debug, Args)]
pub struct Dir {
    /// Directory of the checkpoints
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
}

#[derive(Debug, Args)]
pub struct Checkpoint {
    /// Root of the tree: it and all its descendants are saved
    #[arg(value_parser = parse::pid, allow_negative_numbers = true)]
    pub pid: i32,
    #[command(flatten)]
    pub dir: Dir,
    /// Name of the checkpoint [default: the next number]
    #[arg(long, value_parser = parse::name)]
    pub name: Option<String>,
    /// Let the program go on afterwards; without it, it ends here
    #[arg(long)]
    pub leave_running: bool,
    /// Save only what changed since this checkpoint
    #[arg(long, value_name = "NAME", value_parser = parse::name)]
    pub parent: Option<String>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Restore {
    #[command(flatten)]
    pub dir: Dir,
    /// Which checkpoint [default: the newest]
    #[arg(long, value_parser = parse::name)]
    pub name: Option<String>,
    /// Do not wait for the program
    #[arg(long)]
    pub detach: bool,
    /// Write the pid of the tree's root to this file
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// What replaces a terminal or pipe that led out of the tree: our own streams, /dev/null, or a file to append to
    #[arg(long, value_name = "inherit|null|FILE", default_value = "inherit", value_parser = parse::stdio)]
    pub stdio: Stdio,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    pub dir: Dir,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Rm {
    #[command(flatten)]
    pub dir: Dir,
    /// Which checkpoint
    #[arg(value_parser = parse::name)]
    pub name: String,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Show {
    #[command(flatten)]
    pub dir: Dir,
    /// Which checkpoint
    #[arg(value_parser = parse::name)]
    pub name: String,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Check {
    /// A process of this host; a receiver may stand in its place
    #[arg(value_name = "PID", value_parser = parse::target, allow_negative_numbers = true)]
    pub target: Option<parse::Target>,
    /// A receiver
    #[arg(value_name = "HOST:PORT", value_parser = parse::peer)]
    pub to: Option<String>,
    /// First contact: the one-time ticket of `migrate receive`
    #[arg(long, env = "MIGRATE_TICKET", hide_env_values = true, value_parser = parse::ticket)]
    pub ticket: Option<String>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Recover {
    /// Which one; without it they are listed
    pub id: Option<String>,
    /// Undo it instead of finishing it, where that is still possible
    #[arg(long, requires = "id")]
    pub abort: bool,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Subcommand)]
pub enum Trust {
    /// List the trusted hosts, and this host's own fingerprint
    List {
        #[command(flatten)]
        json: Json,
    },
    /// Trust a host by its fingerprint
    Add {
        /// As `migrate trust list` prints it on that host
        fingerprint: String,
        /// What to call it
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        json: Json,
    },
    /// Trust a host no longer
    Remove {
        /// Its fingerprint or name
        #[arg(value_name = "FINGERPRINT|NAME")]
        peer: String,
        #[command(flatten)]
        json: Json,
    },
}

#[derive(Debug, Args)]
pub struct Rest {
    /// Arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Completions {
    /// Which shell
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub struct Man {
    /// Write a page for every command to this directory, made if missing
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

impl Command {
    /// Whether a page with the events is written in the end.
    pub fn draws(&self) -> bool {
        matches!(self, Command::Send(a) if a.report.is_some())
    }

    /// Whether the caller is a program.
    pub fn json(&self) -> bool {
        match self {
            Command::Receive(a) => a.json.json,
            Command::Send(a) => a.json.json,
            Command::Checkpoint(a) => a.json.json,
            Command::Restore(a) => a.json.json,
            Command::List(a) => a.json.json,
            Command::Rm(a) => a.json.json,
            Command::Show(a) => a.json.json,
            Command::Check(a) => a.json.json,
            Command::Recover(a) => a.json.json,
            Command::Trust {
                command: Trust::List { json } | Trust::Add { json, .. } | Trust::Remove { json, .. },
            } => json.json,
            Command::Bench(a) => a.json.json,
            Command::Guest(_)
            | Command::Demo(_)
            | Command::Ceiling { .. }
            | Command::Keeper
            | Command::Completions(_)
            | Command::Man(_) => false,
        }
    }
}

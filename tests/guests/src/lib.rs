//! Guests: small programs that set something up, are moved, and find out for themselves whether anything is not as it was.
//!
//! `migrate-guest NAME --dir DIR [--option value]...` sets up, prints "ready", then beats into `DIR/control` and takes requests from there.
//! Asked to verify, it writes "ok" or what differs to `DIR/verdict`. `migrate-guest host NAME [DIR]` is the first process of a test host,
//! `migrate-guest vm PORT` that of a virtual machine, `migrate-guest trace PID` a debugger that does nothing.
//!
//! The program `migrate` carries them too, for its `bench`: `migrate guest NAME ...` is the same.
//!
//! What they and the test harness say to each other: the control file of a guest ([`control`]) and the requests that the first process of a
//! test host takes ([`wire`]).

pub mod control;
pub mod wire;

mod clock;
mod clocks;
mod counter;
mod creds;
mod fds;
mod hold;
mod host;
mod kit;
mod load;
mod masked;
mod memory;
mod portrait;
mod restart;
mod rseq;
mod signals;
mod soak;
mod sockets;
mod threads;
mod timers;
mod trap;
mod tree;
mod vm;
mod vmas;
mod xstate;

use kit::{Kit, Options};
use std::{io, process::ExitCode};

/// Runs one, by its arguments without the program's name, to its end.
pub fn main(args: &[String]) -> ExitCode {
    let Some((name, rest)) = args.split_first() else {
        eprintln!("usage: migrate-guest NAME --dir DIR [--option value]...");
        return ExitCode::from(2);
    };
    if name == "host" {
        return host::main(rest.first().map_or("host", |n| n), rest.get(1).map(String::as_str));
    }
    if name == "vm" {
        return vm::main(rest.first().map_or("", |p| p));
    }
    if name == "trace" {
        return hold::trace(rest.first().map_or("", |p| p));
    }
    let options = Options::parse(rest);
    if name == "soak-child" {
        return soak::again(&options);
    }
    match Kit::new(&options).and_then(|kit| guest(name, kit, &options)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("guest {name}: {error}");
            ExitCode::from(3)
        }
    }
}

fn guest(name: &str, kit: Kit, options: &Options) -> io::Result<ExitCode> {
    match name {
        "clocks" => clocks::clocks(kit, options),
        "clock" => clock::clock(kit, options),
        "counter" => counter::counter(kit, options),
        "ballast" => memory::ballast(kit, options),
        "memory" => memory::memory(kit),
        "vmas" => vmas::vmas(kit, options),
        "threads" => threads::threads(kit, options),
        "xstate" => xstate::xstate(kit),
        "signals" => signals::signals(kit),
        "timers" => timers::timers(kit),
        "restart" => restart::restart(kit, options),
        "rseq" => rseq::rseq(kit),
        "masked" => masked::masked(kit, options.text("thread").is_some()),
        "tree" => tree::tree(kit, options),
        "fds" => fds::fds(kit),
        "files" => fds::many(kit, options),
        "sockets" => sockets::sockets(kit),
        "creds" => creds::creds(kit, options),
        "soak" => soak::soak(kit, options),
        "trap" => trap::trap(kit, options),
        "load" => load::load(kit, options),
        "hold" => hold::hold(kit, options),
        _ => Err(io::Error::other("no such guest")),
    }
}

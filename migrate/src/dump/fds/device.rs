//! Character and block devices, and kernel objects that have no way to move.

use super::{
    DumpError,
    context::{Context, Shape, text},
    owner::Owner,
    sharing::Open,
};
use crate::{dump::files::file_id, image::Kind};
use rustix::fs::{FileType, Stat, major, minor};
use std::io::IsTerminal;

/// Tells what to do with a device.
pub(super) fn shape(context: &mut Context<'_>, open: &Open, stat: &Stat) -> Result<Shape, DumpError> {
    let path = context.link(open).to_vec();
    let name = text(&path);
    if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
        return Ok(context.refuse(open, format!("the block device {name} is open"), "close it before the migration"));
    }
    match (major(stat.st_rdev), minor(stat.st_rdev)) {
        // null, zero, full, random, urandom (devices.txt of the kernel)
        (1, 3 | 5 | 7 | 8 | 9) => {
            let file = file_id(path.strip_suffix(b" (deleted)").unwrap_or(&path), stat);
            return Ok(Shape::Ready(Kind::Device { file }, Owner::default()));
        }
        (5, 2) => {
            return Ok(context.refuse(
                open,
                format!("the master side of a pseudo-terminal ({name}) is open"),
                "migrate the program that runs in the terminal rather than the one that provides it",
            ));
        }
        _ => {}
    }
    if context.duplicate(open)?.is_terminal() {
        return Ok(Shape::Terminal {
            rdev: stat.st_rdev,
            was: name,
        });
    }
    let fix = match path.as_slice() {
        b"/dev/fuse" => "FUSE servers cannot move: start the server on the other host",
        b"/dev/kvm" => "virtual machines have a migration of their own (QEMU, cloud-hypervisor)",
        _ => "close it before the migration",
    };
    Ok(context.refuse(open, format!("the device {name} is open, and its state belongs to this host"), fix))
}

/// Refuses an anonymous inode of the kernel by its name, e.g. "io_uring".
pub(super) fn refuse_kernel_object(context: &mut Context<'_>, open: &Open, name: &str) -> Shape {
    let (what, fix) = match name {
        "io_uring" => (
            "an io_uring instance is open",
            "start the program with io_uring off (node: UV_USE_IO_URING=0)",
        ),
        "userfaultfd" => (
            "a userfaultfd is open: the program serves its own page faults",
            "close it before the migration",
        ),
        "perf_event" => ("a perf event is open", "stop profiling before the migration"),
        "fanotify" => ("a fanotify group is open", "use inotify, or stop watching before the migration"),
        "landlock-ruleset" => ("a landlock ruleset is open", "close it once it is enforced"),
        "seccomp notify" => ("a seccomp listener is open", "stop supervising before the migration"),
        n if n.starts_with("bpf") => ("a BPF program, map or link is open", "close it before the migration"),
        n if n.starts_with("kvm") => ("a KVM virtual machine is open", "virtual machines have a migration of their own"),
        _ => (
            "a kernel object is open that cannot be rebuilt on another host",
            "close it before the migration",
        ),
    };
    context.refuse(open, format!("{what} ({name})"), fix)
}

//! Whether a tree can live on this host: looked at before anything is created, every obstacle named.

use crate::{
    blocker::Blocker,
    dump,
    image::{Backing, Host, Process, Tree},
    procfs::status,
    restore::{fds, plan, rebuild, task, vdso},
};
use std::collections::BTreeSet;

/// Instruction sets and features that programs use directly, as /proc/cpuinfo names them.
const USER_FLAGS: &[&str] = &[
    "fpu",
    "cx8",
    "cmov",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "pni",
    "pclmulqdq",
    "ssse3",
    "fma",
    "cx16",
    "sse4_1",
    "sse4_2",
    "movbe",
    "popcnt",
    "aes",
    "xsave",
    "avx",
    "f16c",
    "rdrand",
    "lahf_lm",
    "abm",
    "sse4a",
    "3dnowprefetch",
    "xop",
    "fma4",
    "tbm",
    "fsgsbase",
    "bmi1",
    "hle",
    "avx2",
    "bmi2",
    "erms",
    "rtm",
    "avx512f",
    "avx512dq",
    "rdseed",
    "adx",
    "avx512ifma",
    "clflushopt",
    "clwb",
    "avx512pf",
    "avx512er",
    "avx512cd",
    "sha_ni",
    "avx512bw",
    "avx512vl",
    "xsaveopt",
    "xsavec",
    "xgetbv1",
    "avx_vnni",
    "avx512_bf16",
    "avx512vbmi",
    "pku",
    "ospke",
    "avx512_vbmi2",
    "gfni",
    "vaes",
    "vpclmulqdq",
    "avx512_vnni",
    "avx512_bitalg",
    "avx512_vpopcntdq",
    "rdpid",
    "cldemote",
    "movdiri",
    "movdir64b",
    "fsrm",
    "serialize",
    "tsxldtrk",
    "amx_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "rdtscp",
    "clzero",
    "waitpkg",
];

/// What of the host a tree comes from this host lacks.
pub fn host(theirs: &Host, ours: &Host) -> Vec<Blocker> {
    let mut out = Vec::new();
    let place = format!("host {}", ours.hostname);
    let mut block = |reason: String, fix: &str| out.push(Blocker::new(&place, reason, fix));
    if theirs.page_size != ours.page_size {
        block(
            format!("pages are {} bytes here and {} there", ours.page_size, theirs.page_size),
            "choose a host with the same page size",
        );
    }
    let missing = theirs.xcr0 & !ours.xcr0;
    if missing != 0 {
        block(
            format!(
                "this cpu or kernel lacks extended state components {missing:#x} (XCR0 {:#x}, the source has {:#x})",
                ours.xcr0, theirs.xcr0
            ),
            "choose a host with the same or a newer cpu",
        );
    }
    let have: BTreeSet<&str> = ours.cpu_flags.iter().map(String::as_str).collect();
    let lack: Vec<&str> = theirs
        .cpu_flags
        .iter()
        .map(String::as_str)
        .filter(|f| USER_FLAGS.contains(f) && !have.contains(f))
        .collect();
    if !lack.is_empty() {
        block(
            format!("this cpu lacks {}", lack.join(", ")),
            "choose a host with the same or a newer cpu",
        );
    }
    out
}

/// Everything this host can tell about a tree that wants to come, and whether it would need a fresh pid namespace.
pub fn tree(tree: &Tree) -> (Vec<Blocker>, bool) {
    let mut out = match dump::host::host() {
        Ok(ours) => host(&tree.host, &ours),
        Err(e) => vec![Blocker::new(
            "this host",
            format!("cannot be examined: {e}"),
            "see whether /proc is mounted",
        )],
    };
    if let Err(reason) = plan::sessions(&tree.processes) {
        out.push(Blocker::new("the tree", reason, "wait until the processes concerned have ended"));
    }
    out.extend(vdso::preflight(tree));
    files(tree, &mut out);
    fds::preflight(tree.into(), &mut out);
    rights(tree, &mut out);
    let free = rebuild::pids_free(tree);
    (out, !free)
}

fn files(tree: &Tree, out: &mut Vec<Blocker>) {
    let mut seen = BTreeSet::new();
    for (p, mm) in tree
        .processes
        .iter()
        .filter(|p| p.zombie.is_none())
        .filter_map(|p| Some((p, tree.mms.get(p.mm as usize)?)))
    {
        let mut check = |what: &str, file: &crate::image::FileId, use_: fds::FileUse| {
            if seen.insert((file.path.clone(), file.ino))
                && let Err(reason) = fds::same_file(file, use_)
            {
                let path = String::from_utf8_lossy(&file.path);
                let fix = format!("put the same file at {path} on this host (package version, or rsync -a)");
                out.push(Blocker::new(format!("pid {} ({}) {what} {path}", p.pid, p.comm), reason, fix));
            }
        };
        check("executable", &mm.exe, fds::FileUse::Read);
        check("working directory", &p.cwd, fds::FileUse::Read);
        for v in &mm.vmas {
            if let Backing::File { file, writable, .. } = &v.backing {
                check(
                    "mapped file",
                    file,
                    if *writable && v.shared {
                        fds::FileUse::Write { frozen: false }
                    } else {
                        fds::FileUse::Read
                    },
                );
            }
        }
    }
}

/// Limits and capabilities that only a more privileged agent could give.
fn rights(tree: &Tree, out: &mut Vec<Blocker>) {
    let me = std::process::id() as i32;
    let Ok(own) = status::read(me) else { return };
    let limits = crate::dump::task::rlimits(me).unwrap_or_default();
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    const NAMES: [&str; 16] = [
        "CPU",
        "FSIZE",
        "DATA",
        "STACK",
        "CORE",
        "RSS",
        "NPROC",
        "NOFILE",
        "MEMLOCK",
        "AS",
        "LOCKS",
        "SIGPENDING",
        "MSGQUEUE",
        "NICE",
        "RTPRIO",
        "RTTIME",
    ];
    for p in tree.processes.iter().filter(|p| p.zombie.is_none()) {
        let place = place(p);
        let timer = p.timers.iter().map(|t| t.id).max().unwrap_or(0);
        if timer > task::MAX_COUNTED_TIMER && !task::timer_ids_can_be_chosen() {
            out.push(Blocker::new(
                &place,
                format!("its POSIX timer {timer} cannot be made under that id here"),
                "use Linux 6.16 or later",
            ));
        }
        if own.caps[2] & CAP_SYS_RESOURCE == 0 {
            for (i, ((_, hard), (_, ours))) in p.rlimits.iter().zip(&limits).enumerate() {
                if hard > ours {
                    out.push(Blocker::new(
                        &place,
                        format!(
                            "its hard limit RLIMIT_{} is above what this receiver may set ({ours})",
                            NAMES.get(i).unwrap_or(&"?")
                        ),
                        "start `migrate receive` with CAP_SYS_RESOURCE or a higher limit",
                    ));
                }
            }
        }
        for t in &p.threads {
            let missing = (t.creds.caps[1] & !own.caps[1]) | (t.creds.caps[3] & !own.caps[3]);
            if missing != 0 {
                out.push(Blocker::new(
                    &place,
                    format!("it holds capabilities that this receiver lacks (mask {missing:#x})"),
                    "start `migrate receive` as root with all capabilities",
                ));
                break;
            }
        }
    }
}

fn place(p: &Process) -> String {
    format!("pid {} ({})", p.pid, p.comm)
}

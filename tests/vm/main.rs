//! Between two virtual machines with kernels of Debian's: clocks that differ, soft-dirty, another kernel's vdso.

use migrate_harness::{
    Guest, need, programs, two_machines,
    vm::{NEW, OLD, Vm, Vms},
};
use std::{fs, time::Duration};

#[test]
fn machines_reach_each_other_share_files_and_have_soft_dirty() {
    let vms = two_machines!(OLD, NEW);
    for (vm, kernel) in [(&vms.a, OLD), (&vms.b, NEW)] {
        let uname = vm.run("uname -r; hostname");
        uname.expect_code(0);
        assert!(uname.stdout.starts_with(&format!("{kernel}.")), "{}", uname.stdout);
        assert!(uname.stdout.ends_with(&format!("migrate-{}\n", vm.name())), "{}", uname.stdout);
        vm.run(&format!("ping -c 1 -W 10 {}", vms.other(vm).address())).expect_code(0);
        let said = vm.run("echo one; echo two >&2; exit 3");
        assert_eq!((said.code, said.stdout.as_str(), said.stderr.as_str()), (3, "one\n", "two\n"));
    }
    let own = "/usr/bin/migrate /usr/bin/migrate-guest /bin/busybox";
    let same = format!("stat -c '%n %s %Y' {own} && sha256sum {own}");
    assert_eq!(vms.a.run(&same).expect_code(0).stdout, vms.b.run(&same).stdout);
    let file = vms.dir().join("file");
    fs::write(&file, "of the test").unwrap();
    vms.b.copy_in(&file, "/root/file");
    assert_eq!(vms.b.copy_out("/root/file"), b"of the test");
    vms.a.run("test -e /root/file").expect_code(1);

    for vm in [&vms.a, &vms.b] {
        let check = vm.migrate(&["check", "--json"]);
        check.expect_code(0);
        let host = &check.json()["host"];
        let items = host["items"].as_array().unwrap_or_else(|| panic!("{}", check.stdout));
        let item = items.iter().find(|i| i["name"] == "soft-dirty");
        let item = item.unwrap_or_else(|| panic!("no soft-dirty in {}", check.stdout));
        assert_eq!(item["ok"], "yes", "machine {}: {host}", vm.name());
    }
}

/// Starts a guest, takes it to the other machine, and lets it compare there.
#[track_caller]
fn there(vms: &Vms, from: &Vm, mode: &str, name: &str) -> (Guest, i32) {
    let guest = from.guest(name, &[]);
    assert!(guest.beats(), "the guest stands still before it is moved");
    let copy = go(vms, from, &guest, guest.pid, mode);
    (guest, copy)
}

/// Takes a guest from a machine to the other; the copy's pid.
#[track_caller]
fn go(vms: &Vms, from: &Vm, guest: &Guest, pid: i32, mode: &str) -> i32 {
    guest.reset_gap();
    let moved = vms.move_tree(from, pid, mode);
    let to = vms.other(from);
    println!("{} to {}: {} in {} ms", from.name(), to.name(), mode, moved.number("total_ms"));
    assert!(guest.beats(), "the guest stands still on machine {}", to.name());
    // As the guest's own clock tells it: a clock that had jumped as far as the machines' clocks differ would show. They are set to within a
    // second of each other when the machines boot.
    let most = Duration::from_secs_f64(moved.number("downtime_ms") / 1000.0) + Duration::from_secs(3);
    assert!(guest.gap() < most, "a gap of {:?}, with {}", guest.gap(), moved.report);
    let mut differences = guest.differences();
    if from.kernel() != to.kernel() {
        differences.retain(|line| !of_the_kernel(line));
    }
    assert!(differences.is_empty(), "on machine {}: {differences:#?}", to.name());
    moved.pid
}

/// What a program sees of another kernel: where its vdso lies, with jumps to it where the old one was, and fields of /proc that one kernel has
/// and the other has not.
fn of_the_kernel(line: &str) -> bool {
    let jumps = line.contains(": mapping ") && line.contains("r-xp offset 0  (");
    jumps || ["[vdso]", "[vvar", "x86_Thread_features"].iter().any(|word| line.contains(word))
}

/// Counts there and back, each number once.
fn counter(vms: &Vms, mode: &str) {
    let (guest, copy) = there(vms, &vms.a, mode, "counter");
    go(vms, &vms.b, &guest, copy, mode);
    guest.quit();
    let numbers = programs::numbers(&fs::read_to_string(guest.dir().join("count")).unwrap());
    assert_eq!(numbers.first(), Some(&1));
    programs::expect_in_order(&numbers);
}

/// Looks at clocks that never go back: to the machine that was started later, back, and the other way round.
fn clock(vms: &Vms, mode: &str) {
    let (guest, copy) = there(vms, &vms.a, mode, "clock");
    expect_own_clocks(&vms.b, copy);
    go(vms, &vms.b, &guest, copy, mode);
    guest.quit();
    let (guest, copy) = there(vms, &vms.b, mode, "clock");
    expect_own_clocks(&vms.a, copy);
    guest.quit();
}

/// The machines' clocks differ by seconds: the copy must have some of its own.
#[track_caller]
fn expect_own_clocks(vm: &Vm, pid: i32) {
    let look = format!("readlink /proc/1/ns/time && readlink /proc/{pid}/ns/time && cat /proc/{pid}/timens_offsets");
    let namespaces = vm.run(&look);
    namespaces.expect_code(0);
    let lines: Vec<&str> = namespaces.stdout.lines().collect();
    assert_ne!(lines[0], lines[1], "the copy has the clocks of machine {}", vm.name());
    println!("clocks on {}: {}", vm.name(), lines[2..].join(", "));
}

#[test]
fn between_two_of_the_new_kernel() {
    let vms = two_machines!(NEW, NEW);
    counter(&vms, "stop");
}

/// The old kernel has no PAGEMAP_SCAN.
#[test]
fn between_two_of_the_old_kernel() {
    let vms = two_machines!(OLD, OLD);
    counter(&vms, "pre-copy");
}

/// Looks at every clock through the vdso of the kernel it was started on, without pause: to the machine with another, and back to where the real
/// one is.
fn clocks(vms: &Vms, mode: &str) {
    for from in [&vms.a, &vms.b] {
        let (guest, copy) = there(vms, from, mode, "clocks");
        let home = go(vms, vms.other(from), &guest, copy, mode);
        let maps = from.run(&format!("grep -E 'vdso|vvar' /proc/{home}/maps"));
        println!("home on {}:\n{}", from.name(), maps.stdout);
        guest.quit();
    }
}

#[test]
fn between_kernels() {
    let vms = two_machines!(OLD, NEW);
    counter(&vms, "stop");
    clock(&vms, "stop");
    clocks(&vms, "stop");
}

#[test]
fn between_kernels_pre_copied() {
    let vms = two_machines!(OLD, NEW);
    // The guest `clocks` goes with stop only: its threads never rest, which on one emulated cpu keeps the agents apart for longer than they wait.
    counter(&vms, "pre-copy");
    clock(&vms, "pre-copy");
}

/// It runs, and sees what it saw on the machine with the other kernel.
#[track_caller]
fn well_on(vm: &Vm, guest: &Guest, kind: &str) {
    assert!(guest.beats(), "{kind} stands still on {}", vm.name());
    let mut differences = guest.differences();
    differences.retain(|line| !of_the_kernel(line));
    assert!(differences.is_empty(), "{kind}, on {}: {differences:#?}", vm.name());
}

/// Shared memory follows the resume, by minor faults of either kernel.
#[test]
fn shared_memory_follows_between_kernels() {
    let vms = two_machines!(OLD, NEW);
    let options = [("kind", "shared-in-every-way"), ("period-us", "20000"), ("ground-mib", "1")];
    let guest = vms.a.guest("trap", &options);
    assert!(guest.beats(), "it stands still before it is moved");
    let (mut vm, mut pid) = (&vms.a, guest.pid);
    for _ in 0..2 {
        let moved = vms.move_with(vm, pid, &["--mode", "post-copy"]);
        let pages = moved.number("pages_lazy");
        println!("from {}: {pages} pages followed, {}", vm.name(), moved.report["drain"]);
        assert!(pages > 6000.0, "{}", moved.report);
        (vm, pid) = (vms.other(vm), moved.pid);
        well_on(vm, &guest, "shared memory");
    }
    guest.quit();
}

/// Operations of `tests/precopy.rs` that the two trackers see in different ways, and those that they see alike.
const TRAPS: [&str; 4] = ["dropped", "huge", "moved", "forks"];
const MORE_TRAPS: [&str; 17] = [
    "fork-advice",
    "file",
    "punched",
    "written-by-descriptor",
    "other-backing",
    "execs",
    "threads",
    "new",
    "swapped",
    "left-behind",
    "replaced",
    "mapped-over",
    "grown",
    "brk",
    "stack",
    "protected",
    "freed",
];

/// What `tests/precopy.rs` does with the other tracker: an operation over and over while the program is moved, there and back. All of them when
/// a soak is asked for (`make soak`): a move takes ten seconds on emulated cpus.
#[test]
fn what_a_copy_in_rounds_could_miss_with_soft_dirty() {
    let vms = two_machines!(OLD, NEW);
    let how = ["--mode", "pre-copy", "--tracker", "soft-dirty", "--max-rounds", "3"];
    let more: &[&str] = if soaked() { &MORE_TRAPS } else { &[] };
    for kind in TRAPS.iter().chain(more) {
        let guest = vms.a.guest("trap", &[("kind", kind), ("period-us", "20000"), ("ground-mib", "4")]);
        assert!(guest.beats(), "{kind} stands still before it is moved");
        let (mut vm, mut pid) = (&vms.a, guest.pid);
        for _ in 0..2 {
            let moved = vms.move_with(vm, pid, &how);
            let rounds = moved.report["rounds"].as_array().map_or(0, Vec::len);
            println!("{kind} from {}: {rounds} rounds in {} ms", vm.name(), moved.number("total_ms"));
            assert!(rounds >= 2, "{}", moved.report);
            (vm, pid) = (vms.other(vm), moved.pid);
            well_on(vm, &guest, kind);
        }
        guest.quit();
    }
}

fn soaked() -> bool {
    std::env::var_os("MIGRATE_SOAK").is_some()
}

/// The random workload, there and back, whatever else the kernels could track with. One emulated cpu carries an agent and the workload, which
/// is paced so that both get on.
#[test]
fn a_random_workload_with_soft_dirty() {
    if !soaked() {
        migrate_harness::skip("a soak on emulated cpus runs with make soak only");
        return;
    }
    let vms = two_machines!(OLD, NEW);
    let how = ["--mode", "pre-copy", "--tracker", "soft-dirty", "--max-rounds", "2"];
    let mut on = None;
    // An emulated cpu: the agent has to get its share of it.
    let options = [
        ("mib", "2"),
        ("regions", "16"),
        ("ops-per-second", "100"),
        ("others-rest-us", "40000"),
    ];
    let start = |options: &[(&str, &str)]| vms.a.guest("soak", options);
    migrate_harness::soak(&how, 2, Duration::from_secs(60), &options, start, |guest| {
        let (vm, pid) = on.unwrap_or((&vms.a, guest.pid));
        let moved = vms.move_with(vm, pid, &how);
        on = Some((vms.other(vm), moved.pid));
        moved
    });
}

/// CRIU does not work with every kernel; it does with its own release's. Both move the same program, and the bench says what each took.
#[test]
fn criu_beside_migrate_in_one_bench() {
    need!("criu");
    let vms = two_machines!(OLD, NEW);
    let bench = "migrate bench --size 2MiB --rate 1MB/s --mode stop --repeat 1 --json";
    // Busybox has an ip as well, which knows no network namespaces.
    let said = vms.a.run(&format!(
        "PATH=/usr/sbin:$PATH; {bench} 2>/root/err; code=$?; cat /root/err >&2; exit $code"
    ));
    said.expect_code(0);
    let results = said.json();
    assert_eq!(results["without_criu"], serde_json::Value::Null, "{results}");
    let cases = results["cases"].as_array().unwrap();
    let modes: Vec<_> = cases.iter().map(|c| c["mode"].as_str().unwrap()).collect();
    assert_eq!(modes, ["stop", "criu", "criu pre-dump", "criu lazy-pages"]);
    for case in cases {
        let run = &case["runs"][0];
        let (gap, client) = (run["program_ms"].as_f64().unwrap(), run["client_ms"].as_f64().unwrap());
        println!(
            "{}: program {gap:.1} ms, client {client:.1} ms, {} ms in all",
            case["mode"], run["report"]["total_ms"]
        );
        assert!(gap > 1.0 && client > 1.0, "{case}");
    }
}

//! Between two virtual machines with kernels of Debian's: clocks that differ, soft-dirty, another kernel's vdso.

use migrate_harness::{
    Guest, programs, two_machines,
    vm::{NEW, OLD, Vm, Vms},
};
use std::fs;

#[test]
fn machines_reach_each_other_and_share_files() {
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
    let own = "/usr/bin/migrate /usr/bin/migrate-guest /lib/x86_64-linux-gnu/libc.so.6";
    let same = format!("stat -c '%n %s %Y' {own} && sha256sum {own}");
    assert_eq!(vms.a.run(&same).expect_code(0).stdout, vms.b.run(&same).stdout);
    let file = vms.dir().join("file");
    fs::write(&file, "of the test").unwrap();
    vms.b.copy_in(&file, "/root/file");
    assert_eq!(vms.b.copy_out("/root/file"), b"of the test");
    vms.a.run("test -e /root/file").expect_code(1);
}

#[test]
fn soft_dirty_is_found_on_both_kernels() {
    let vms = two_machines!(OLD, NEW);
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

/// It beats, where it is and as it should.
#[track_caller]
fn expect_well(guest: &Guest, when: &str) {
    assert!(guest.beats(), "guest stands still {when}");
    guest.verify(when);
}

/// The numbers that the counter wrote, wherever it was.
#[track_caller]
fn expect_counted_once(guest: &Guest) {
    let text = fs::read_to_string(guest.dir().join("count")).unwrap();
    let numbers = programs::numbers(&text);
    assert_eq!(numbers.first(), Some(&1));
    programs::expect_in_order(&numbers);
}

/// A guest goes from a machine to the other and comes back.
#[track_caller]
fn there_and_back(vms: &Vms, from: &Vm, mode: &str, name: &str, options: &[(&str, &str)]) -> Guest {
    let to = vms.other(from);
    let guest = from.guest(name, options);
    expect_well(&guest, "where it was started");
    let moved = vms.move_tree(from, guest.pid, mode);
    println!("{} to {}: {}", from.name(), to.name(), moved.report);
    expect_well(&guest, "on the other machine");
    let moved = vms.move_tree(to, moved.pid, mode);
    println!("{} to {}: {}", to.name(), from.name(), moved.report);
    expect_well(&guest, "back again");
    guest.quit();
    guest
}

fn counter(kernel_a: &str, kernel_b: &str, mode: &str) {
    let vms = two_machines!(kernel_a, kernel_b);
    let guest = there_and_back(&vms, &vms.a, mode, "counter", &[]);
    expect_counted_once(&guest);
}

/// From the machine whose clocks are ahead, and from the one whose clocks are behind.
fn clock(kernel_a: &str, kernel_b: &str, mode: &str) {
    let vms = two_machines!(kernel_a, kernel_b);
    for from in [&vms.a, &vms.b] {
        there_and_back(&vms, from, mode, "clock", &[]);
    }
}

#[test]
fn counter_between_two_of_the_same_kernel() {
    counter(NEW, NEW, "stop");
}

#[test]
fn clock_between_two_of_the_same_kernel() {
    clock(NEW, NEW, "stop");
}

#[test]
fn counter_between_two_of_the_old_kernel() {
    counter(OLD, OLD, "stop");
}

#[test]
#[ignore = "needs another kernel's vdso"]
fn counter_between_kernels() {
    counter(OLD, NEW, "stop");
}

#[test]
#[ignore = "needs another kernel's vdso"]
fn clock_between_kernels() {
    clock(OLD, NEW, "stop");
}

#[test]
#[ignore = "needs --mode pre-copy"]
fn counter_pre_copied_between_two_of_the_same_kernel() {
    counter(NEW, NEW, "pre-copy");
}

#[test]
#[ignore = "needs another kernel's vdso and --mode pre-copy"]
fn counter_pre_copied_between_kernels() {
    counter(OLD, NEW, "pre-copy");
}

#[test]
#[ignore = "needs another kernel's vdso and --mode pre-copy"]
fn clock_pre_copied_between_kernels() {
    clock(OLD, NEW, "pre-copy");
}

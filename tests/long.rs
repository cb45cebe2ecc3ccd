//! What takes long. `ignore` has `cargo xtask test` leave it out and name it, and `cargo xtask test --all` run it.

mod support;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::guest::Guest;
use support::tiny::Code;

#[test]
#[ignore = "long: waits 10 s"]
fn a_guest_that_does_not_hear_its_power_button_is_ended_after_10_seconds() {
    let mut vmm = Code::default().print(5).halt().kernel(b"here\n").start(&[], "");
    vmm.stdout().wait_for("here\n", 0);
    let pressed = Instant::now();
    vmm.signal(Signal::TERM);
    assert!(!vmm.ends_within(Duration::from_secs(9)), "it ended {:?} after the signal", pressed.elapsed());
    assert!(vmm.is_running());
    vmm.wait().assert(143, "ended by signal 15 before the guest powered off");
}

#[test]
#[ignore = "long: boots a guest"]
fn debian_6_12_unpacks_itself() {
    let mut guest = Guest::boot("debian-6.12-vmlinuz,entry=unpack", &["--cpus", "2"], "");
    assert_eq!(guest.number("nproc"), 2);
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

#[test]
#[ignore = "long: boots a guest"]
fn debians_kernel_for_any_machine_boots_from_a_bzimage() {
    let mut guest = Guest::boot("debian-6.1-generic-vmlinuz", &["--no-kernel-cache"], "");
    assert_eq!(guest.number("nproc"), 1);
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

#[test]
#[ignore = "long: boots a guest"]
fn memory_of_every_kind_boots() {
    for memory in ["256M,shared", "256M,prefault", "256M,hugepages=off"] {
        let guest = Guest::boot("small-bzImage", &["--mem", memory], "");
        guest.end("poweroff -f").assert(0, "the guest powered off");
    }
}

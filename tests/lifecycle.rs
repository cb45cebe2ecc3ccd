//! How guests with real kernels end, or begin again. That of a panic with and without pvpanic, of a power off and of a
//! reboot are shown by `boots` as well, whose guests all end; what needs no kernel by `tiny`.

mod support;

use rustix::process::Signal;
use support::guest::Guest;

#[test]
fn the_power_button_has_debian_6_12_power_off_when_it_listens() {
    let mut guest = Guest::boot("debian-6.12-vmlinuz", &[], "");
    guest.ask("power-button");
    guest.vmm.signal(Signal::TERM);
    guest.vmm.wait().assert(0, "the guest powered off");
}

#[test]
fn the_power_button_has_debian_6_1_power_off_when_it_listens() {
    let mut guest = Guest::boot("debian-6.1-vmlinux", &[], "");
    guest.ask("power-button");
    guest.vmm.signal(Signal::INT);
    guest.vmm.wait().assert(0, "the guest powered off");
}

#[test]
fn a_stock_guest_without_the_drivers_is_ended_by_the_second_signal() {
    let mut guest = Guest::boot("debian-6.1-vmlinux", &[], "");
    guest.vmm.signal(Signal::TERM);
    // It has not heard of it, and goes on.
    guest.ask("true");
    guest.vmm.signal(Signal::TERM);
    let ended = guest.vmm.wait();
    ended.assert(143, "ended by signal 15 before the guest powered off");
}

#[test]
fn an_early_panic_of_a_stock_kernel_is_exit_code_4() {
    // Neither an init nor a root: the kernel panics before any module could be loaded.
    for (kernel, words) in [
        ("debian-6.12-vmlinuz", "rdinit=/nonexistent"),
        ("debian-6.1-vmlinuz", "init=/nonexistent rdinit=/nonexistent"),
    ] {
        let ended = support::guest::vmm(kernel, &[], words).run();
        ended.assert(4, "the guest's kernel panicked");
        assert!(ended.stdout.contains("Kernel panic - not syncing"), "{}", ended.stdout);
    }
}

#[test]
fn a_reboot_gives_a_fresh_machine_to_the_same_console() {
    let mut guest = Guest::boot("small-bzImage", &["--mem", "64M"], "");
    guest.ask("echo left > /tmp/mark");
    guest.tell("reboot -f");
    guest.wait_until_it_listens();
    guest.ask("test ! -e /tmp/mark");
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

#[test]
fn a_panic_gives_a_fresh_machine_where_that_is_asked_for() {
    let mut guest = Guest::boot("small-bzImage", &["--mem", "64M", "--on-panic", "restart"], "");
    guest.tell("echo c > /proc/sysrq-trigger");
    guest.wait_until_it_listens();
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

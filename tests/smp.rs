//! Stock kernels boot with several processors.
//!
//! These are the tests that need a host with more than one processor: on one, a guest's processor that waits for another
//! spins until the host's scheduler takes it away.

mod support;

use support::guest::Guest;
use support::machine::{MIB, STOCK, assert_machine};

#[test]
fn debian_6_12_boots_with_4_processors_6_gib_and_without_masked_features() {
    let arguments = ["--cpus", "4,features=-avx2-rdrand", "--mem", "6G"];
    let mut guest = Guest::boot("debian-6.12-vmlinuz", &arguments, "");
    assert_machine(&mut guest, 4, 6144 * MIB, STOCK);
    for feature in ["avx2", "rdrand"] {
        assert_eq!(guest.ask(&format!("grep -cw {feature} /proc/cpuinfo || true")), "0", "{feature} is masked");
    }
    // KVM's own clock, and none that had to be calibrated.
    assert_eq!(guest.ask("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"), "kvm-clock");
    guest.ask("cd /modules/$(uname -r); insmod pvpanic.ko; insmod pvpanic-mmio.ko");
    let ended = guest.end("echo c > /proc/sysrq-trigger");
    ended.assert(4, "the guest's kernel panicked");
}

#[test]
fn debian_6_1_boots_with_2_processors_by_its_pvh_entry() {
    let mut guest = Guest::boot("debian-6.1-vmlinux,entry=pvh", &["--cpus", "2"], "");
    assert_machine(&mut guest, 2, 512 * MIB, STOCK);
    guest.end("poweroff -f").assert(0, "the guest powered off");
}

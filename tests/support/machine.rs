//! What a guest's kernel must see of its machine.

use super::guest::Guest;

pub(crate) const MIB: u64 = 1 << 20;
/// A stock kernel's image and what it sets aside before it counts: its own 40 MiB, per-CPU areas, I/O buffers.
pub(crate) const STOCK: u64 = 64 * MIB;
/// The same of the small kernel.
pub(crate) const SMALL: u64 = 24 * MIB;

/// Checks that the guest's processors and memory are those of its machine. `kernel` is what the kernel itself takes.
pub(crate) fn assert_machine(guest: &mut Guest, cpus: u64, memory: u64, kernel: u64) {
    assert_eq!(guest.number("nproc"), cpus);
    assert_eq!(guest.number("grep -c ^processor /proc/cpuinfo"), cpus);
    assert_eq!(guest.number("grep -c 'cpu cores.*: '$(nproc)$ /proc/cpuinfo"), cpus, "all are cores of one package");
    let total = 1024 * guest.number("sed -n 's/MemTotal: *//;s/ kB//p;q' /proc/meminfo");
    // For its own tables a kernel takes a 64th (64 bytes for each page), and less than that again for hashes.
    let least = memory - memory / 32 - kernel;
    assert!((least..memory).contains(&total), "MemTotal is {} MiB of {} MiB", total / MIB, memory / MIB);
}

//! Topology in CPUID: one socket of N cores, one thread each, a last-level cache that all share.
//!
//! One thread a core, since virtual processors move between the host's threads: a guest that believed in siblings would
//! schedule for them. One last-level cache, so that the guest's scheduler has one domain and wakes a task anywhere.
//! What KVM reports here is the host core on which the call ran (leaves 1, 4, 0x80000008, 0x8000001D) or nothing
//! (0xB, 0x1F, 0x8000001E), so every one of these leaves is written, and they all tell the same: Linux 6.12
//! (arch/x86/kernel/cpu/topology_{ext,amd,common}.c) complains where two disagree.

use std::num::NonZeroU8;

use kvm_bindings::kvm_cpuid_entry2;

use super::Leaves;

/// Leaf 1, EDX: the package may hold more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001, ECX, AMD: HTT stands for cores, not for threads.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x80000001, ECX, AMD: leaves 0x8000001D and 0x8000001E exist.
const TOPOEXT: u32 = 1 << 22;

/// Leaf 4 of Intel and leaf 0x8000001D of AMD, in EAX: who shares this cache, less one.
const SHARERS: u32 = 0xfff << 14;
/// Leaf 4, EAX: the highest number of a core in the package.
const CORES: u32 = 0x3f << 26;
/// The first level of cache that is not a core's own.
const SHARED_LEVEL: u32 = 3;

/// Kinds of level in leaves 0xB and 0x1F, as they stand in ECX.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

const EXTENDED_BASE: u32 = 0x8000_0000;
const CACHES_INTEL: u32 = 4;
const CACHES_AMD: u32 = 0x8000_001d;
const IDENTITY_AMD: u32 = 0x8000_001e;

/// Writes all that the processors have in common.
pub(super) fn describe(leaves: &mut Leaves, vcpus: NonZeroU8) {
    let count = u32::from(vcpus.get());
    // How many low bits of an APIC ID number the cores.
    let core_bits = count.next_power_of_two().trailing_zeros();
    if let Some(leaf) = leaves.find_mut(1, 0) {
        // Bits 8 to 15 are the size of CLFLUSH: the one thing here that is the host's to say.
        leaf.ebx = leaf.ebx & 0xffff | count << 16;
        leaf.edx = if count > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
    }
    for entry in leaves.0.iter_mut().filter(|entry| [CACHES_INTEL, CACHES_AMD].contains(&entry.function)) {
        share_cache(entry, count);
    }
    describe_levels(leaves, count, core_bits);
    let amd = is_amd(leaves);
    if let Some(leaf) = leaves.find_mut(0x8000_0008, 0) {
        leaf.ecx = if amd { (count - 1) | (core_bits << 12) } else { 0 };
    }
    let Some(leaf) = leaves.find_mut(0x8000_0001, 0).filter(|_| amd) else { return };
    leaf.ecx = if count > 1 { leaf.ecx | CMP_LEGACY } else { leaf.ecx & !CMP_LEGACY };
    let topoext = leaf.ecx & TOPOEXT != 0;
    if topoext && leaves.highest(EXTENDED_BASE) >= IDENTITY_AMD {
        leaves.remove(IDENTITY_AMD);
        leaves.0.push(kvm_cpuid_entry2 { function: IDENTITY_AMD, ..Default::default() });
    }
}

/// Writes what tells the processor with this index from the others.
pub(super) fn identify(entries: &mut [kvm_cpuid_entry2], index: u8) {
    let id = u32::from(index);
    for entry in entries {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => entry.edx = id,
            // EBX: number of the core, and no second thread in it. ECX stays zero: one node.
            IDENTITY_AMD => (entry.eax, entry.ebx) = (id, id),
            _ => {}
        }
    }
}

/// One subleaf of leaf 4 or 0x8000001D. A subleaf of no type ends the list and stays as it is.
fn share_cache(entry: &mut kvm_cpuid_entry2, count: u32) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let level = entry.eax >> 5 & 7;
    let sharers = if level >= SHARED_LEVEL { count - 1 } else { 0 };
    entry.eax = entry.eax & !SHARERS | sharers << 14;
    if entry.function == CACHES_INTEL {
        // Six bits only; Linux reads them where leaf 0xB is missing, which here it never is.
        entry.eax = entry.eax & !CORES | (count - 1).min(0x3f) << 26;
    }
}

/// Leaves 0xB and 0x1F: the levels thread and core. For any further subleaf KVM itself answers that there is no level.
fn describe_levels(leaves: &mut Leaves, count: u32, core_bits: u32) {
    if let Some(leaf) = leaves.find_mut(0, 0) {
        leaf.eax = leaf.eax.max(0xb);
    }
    let highest = leaves.highest(0);
    // AMD's own list of levels (complexes, dies) goes before leaf 0xB in Linux: the guest has none.
    leaves.remove(0x8000_0026);
    for leaf in [0xb, 0x1f] {
        leaves.remove(leaf);
        if leaf <= highest {
            leaves.add_subleaf(leaf, 0, [0, 1, LEVEL_THREAD, 0]);
            leaves.add_subleaf(leaf, 1, [core_bits, count, LEVEL_CORE | 1, 0]);
        }
    }
}

/// Whether the vendor is AMD, or Hygon, whose processors are AMD's.
fn is_amd(leaves: &Leaves) -> bool {
    let vendor = leaves.find(0, 0).map_or([0; 12], |leaf| {
        let mut name = [0; 12];
        for (part, register) in name.chunks_exact_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
            part.copy_from_slice(&register.to_le_bytes());
        }
        name
    });
    [b"AuthenticAMD", b"HygonGenuine"].contains(&&vendor)
}

//! CPUID: what the guest sees of its processors, made from what KVM says that it can give.
//!
//! KVM_GET_SUPPORTED_CPUID answers with the features of the host narrowed to what KVM can virtualise, and with the
//! topology of whichever host core ran the call. [`Template::new`] keeps the former, replaces the latter
//! (`topology.rs`), narrows the features by name (`features.rs`) and makes the XSAVE leaf agree (`xsave.rs`). All of it
//! is computation on entries, so it is tested without KVM. Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E;
//! Linux, Documentation/virt/kvm/x86/cpuid.rst.
//!
//! Kept as KVM gives it, on purpose:
//!
//! - Nested virtualisation (svm, vmx and their leaves): runners of tests want it, and the host's module parameter decides.
//! - All of leaf 0x40000001: kvm-clock, steal time, asynchronous page faults, paravirtual end-of-interrupt, spin locks,
//!   TLB flush and IPIs are KVM's own work. The three that need a VMM (MSI_EXT_DEST_ID for APIC IDs above 255,
//!   HC_MAP_GPA_RANGE, MIGRATION_CONTROL) are not in its answer and are not added. KVM_HINTS_REALTIME (EDX) is not
//!   set: it promises that a vCPU is never preempted, and makes the guest burn the host's time in spin locks and idle.
//! - Sizes of caches and TLBs, the brand string, address widths, ARAT (always reported), the invariant TSC.
//!
//! Left out on purpose: leaves 0x15 and 0x16 (crystal clock and base frequency). Under KVM, Linux takes the frequency
//! of the TSC from kvm-clock, and with the TSC deadline timer it calibrates no APIC timer. They would not be right
//! either: Linux multiplies them in 32 bits, which forces a rounded frequency, and takes the crystal for the APIC bus.

mod features;
mod table;
#[cfg(test)]
mod tests;
mod topology;
mod xsave;

use std::num::NonZeroU8;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

pub use features::FeatureMask;

/// Leaf 1, ECX: x2APIC, which KVM emulates everywhere.
const X2APIC: u32 = 1 << 21;
/// Leaf 1, ECX: the TSC deadline mode of the APIC timer.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: leaves from 0x40000000 describe a hypervisor.
const HYPERVISOR: u32 = 1 << 31;

/// Frequency of the bus that clocks the APIC timer, in kHz: KVM's, unless KVM_CAP_X86_APIC_BUS_CYCLES_NS changes it.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What is asked of the guest's processors.
#[derive(Debug, Clone)]
pub struct CpuidSpec {
    /// Virtual processors, in one socket, one thread a core. KVM's ID of each, and its APIC ID, is its index from 0.
    pub vcpus: NonZeroU8,
    /// Features to take away and features to insist on.
    pub features: FeatureMask,
    /// KVM_CAP_TSC_DEADLINE_TIMER: older kernels never show the timer in KVM_GET_SUPPORTED_CPUID.
    pub tsc_deadline: bool,
    /// The guest's TSC frequency in kHz (KVM_GET_TSC_KHZ), if it is known and constant.
    pub tsc_khz: Option<u32>,
}

/// Why there is no CPUID as asked. Each names the feature and the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuidError {
    /// The mask is not a row of signs and names.
    #[error("CPU features {text:?} are not written as -NAME or +NAME, one after the other, such as -avx2+aes")]
    Malformed {
        /// The mask as given.
        text: String,
    },
    /// No feature has this name.
    #[error("There is no CPU feature {name:?}{hint}; the names are those of the flags in /proc/cpuinfo")]
    Unknown {
        /// The name as given.
        name: String,
        /// Empty, or the question whether another was meant.
        hint: String,
    },
    /// The mask demands what this host cannot give.
    #[error("This host's KVM cannot give a guest the CPU feature {name} (+{name}): leave it out, or use another host")]
    NotOffered {
        /// The demanded feature.
        name: &'static str,
    },
    /// The mask demands what it takes away.
    #[error(
        "The CPU feature {name} is demanded (+{name}), but it, or one that it needs, is taken away: drop one of the two"
    )]
    Contradiction {
        /// The demanded feature.
        name: &'static str,
    },
    /// KVM_SET_CPUID2 takes no more than 256 entries.
    #[error("This host's KVM describes its processors in {count} CPUID entries, more than it takes back")]
    TooManyEntries {
        /// How many there are.
        count: usize,
    },
}

/// The CPUID of one machine, complete but for what tells its processors apart.
#[derive(Debug, Clone)]
pub struct Template(CpuId);

impl Template {
    /// Makes what the guest shall see from what KVM offers (`supported`, the answer of KVM_GET_SUPPORTED_CPUID).
    ///
    /// # Errors
    ///
    /// A demanded feature that this host lacks or that the mask itself takes away; too many entries.
    pub fn new(supported: &[kvm_cpuid_entry2], spec: &CpuidSpec) -> Result<Self, CpuidError> {
        let mut leaves = Leaves::offered(supported);
        if let Some(leaf) = leaves.find_mut(1, 0) {
            leaf.ecx |= HYPERVISOR | X2APIC;
            leaf.ecx = if spec.tsc_deadline { leaf.ecx | TSC_DEADLINE } else { leaf.ecx & !TSC_DEADLINE };
        }
        if let Some(khz) = spec.tsc_khz {
            leaves.add_timing(khz);
        }
        topology::describe(&mut leaves, spec.vcpus);
        features::apply(&mut leaves, &spec.features)?;
        let count = leaves.0.len();
        CpuId::from_entries(&leaves.0).map(Self).map_err(|_| CpuidError::TooManyEntries { count })
    }

    /// The CPUID of the processor with this index (from 0), for KVM_SET_CPUID2.
    #[must_use]
    pub fn for_vcpu(&self, index: u8) -> CpuId {
        let mut cpuid = self.0.clone();
        topology::identify(cpuid.as_mut_slice(), index);
        cpuid
    }
}

/// CPUID entries by leaf and subleaf. A leaf that is missing reads as zeros in the guest.
#[derive(Debug, Clone)]
struct Leaves(Vec<kvm_cpuid_entry2>);

impl Leaves {
    /// What KVM offers, without the entries that are all zeros: a missing entry reads the same, and KVM searches its
    /// list from the front at every CPUID exit.
    fn offered(supported: &[kvm_cpuid_entry2]) -> Self {
        let says_something = |entry: &&kvm_cpuid_entry2| entry.eax | entry.ebx | entry.ecx | entry.edx != 0;
        Self(supported.iter().filter(says_something).copied().collect())
    }

    fn find(&self, leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
        self.0.iter().find(|entry| entry.function == leaf && entry.index == subleaf)
    }

    fn find_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.0.iter_mut().find(|entry| entry.function == leaf && entry.index == subleaf)
    }

    /// Adds one subleaf with `[eax, ebx, ecx, edx]`, to a leaf that has been removed before.
    fn add_subleaf(&mut self, leaf: u32, subleaf: u32, [eax, ebx, ecx, edx]: [u32; 4]) {
        let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        let (function, index) = (leaf, subleaf);
        self.0.push(kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() });
    }

    /// Removes a leaf with all its subleaves.
    fn remove(&mut self, leaf: u32) {
        self.0.retain(|entry| entry.function != leaf);
    }

    /// The highest leaf of the range that `base` begins (0, 0x40000000 or 0x80000000).
    fn highest(&self, base: u32) -> u32 {
        self.find(base, 0).map_or(base, |entry| entry.eax)
    }

    /// Leaf 0x40000010: the frequencies of TSC and APIC bus, a convention of hypervisors that KVM's documentation has
    /// taken up. Linux up to 6.12 takes the former from kvm-clock, to the same effect; BSDs and later kernels look here.
    fn add_timing(&mut self, tsc_khz: u32) {
        const BASE: u32 = 0x4000_0000;
        const TIMING: u32 = 0x4000_0010;
        let Some(base) = self.find_mut(BASE, 0) else { return };
        base.eax = base.eax.max(TIMING);
        self.remove(TIMING);
        let (eax, ebx) = (tsc_khz, APIC_BUS_KHZ);
        self.0.push(kvm_cpuid_entry2 { function: TIMING, eax, ebx, ..Default::default() });
    }
}

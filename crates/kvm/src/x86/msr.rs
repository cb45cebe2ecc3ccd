//! MSRs that a kernel wants set at its entry, on every processor.
//!
//! Linux's 64-bit boot protocol asks for none; these two are what firmware would have set and the kernel believes.
//! Everything else is left as KVM resets it, which is as the Intel SDM (volume 3, table 11-1) has it: SYSENTER and
//! STAR at zero, the usual PAT, time-stamp counters in step with each other.

use kvm_bindings::{Msrs, kvm_msr_entry};

/// IA32_MISC_ENABLE.
const MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations are on. Without it Linux on Intel (`early_init_intel`) takes `rep movs` for slow.
const FAST_STRINGS: u64 = 1;

/// IA32_MTRR_DEF_TYPE.
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// The MTRRs count. KVM resets the variable ranges to none, and the fixed ones have a switch of their own.
const MTRR_ENABLED: u64 = 1 << 11;
/// What lies in no range is cached for writing back. With the MTRRs off, as at reset, all memory is uncached by the
/// letter of the manual, and Linux 6.1 gives up the PAT as well (`mtrr_bp_init`). The guest's page tables make the
/// registers of devices uncached.
const WRITE_BACK: u64 = 6;

/// What to give KVM_SET_MSRS after KVM_SET_CPUID2, for the boot processor and the others alike: an INIT keeps them.
#[must_use]
pub fn boot_msrs() -> Msrs {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[entry(MISC_ENABLE, FAST_STRINGS), entry(MTRR_DEF_TYPE, MTRR_ENABLED | WRITE_BACK)])
        .expect("two entries are fewer than 256")
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;

    #[test]
    fn this_hosts_kvm_takes_them_all() {
        let kvm = Kvm::new().unwrap_or_else(|error| {
            panic!("Cannot open /dev/kvm ({error}): load kvm_amd or kvm_intel, and join the group that owns it (kvm)")
        });
        let vm = kvm.create_vm().expect("KVM_CREATE_VM");
        let vcpu = vm.create_vcpu(0).expect("KVM_CREATE_VCPU");
        let msrs = boot_msrs();
        assert_eq!(vcpu.set_msrs(&msrs).expect("KVM_SET_MSRS"), 2);
        let mut seen = msrs.clone();
        seen.as_mut_slice().iter_mut().for_each(|entry| entry.data = 0);
        assert_eq!(vcpu.get_msrs(&mut seen).expect("KVM_GET_MSRS"), 2);
        assert_eq!(seen, msrs);
        assert_eq!(msrs.as_slice()[1].data, 0x806);
    }
}

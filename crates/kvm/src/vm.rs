//! A virtual machine: memory slots, interrupt controllers, interrupt lines, processors.
#![allow(unsafe_code, reason = "KVM takes guest memory as an address")]

use anyhow::Context;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use memory::{Ram, layout};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::host::Host;
use crate::vcpu::Vcpu;

/// A virtual machine with in-kernel interrupt controllers.
pub struct Vm {
    fd: VmFd,
    /// Keeps the memory mapped for as long as KVM uses it.
    ram: Ram,
}

impl Vm {
    /// Makes a machine with `ram` in its memory slots, two 8259As, an I/O APIC, and room for local
    /// APICs. There is no 8254: a guest takes its time from the TSC and kvmclock.
    pub fn new(host: &Host, ram: &Ram) -> anyhow::Result<Self> {
        let fd = host.kvm().create_vm().context("KVM makes no virtual machine")?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP).context("KVM_SET_IDENTITY_MAP_ADDR")?;
        let tss = usize::try_from(layout::KVM_TSS).expect("an address of this processor");
        fd.set_tss_address(tss).context("KVM_SET_TSS_ADDR")?;
        fd.create_irq_chip().context("KVM makes no interrupt controllers (KVM_CREATE_IRQCHIP)")?;
        for (slot, region) in (0..).zip(ram.iter()) {
            let host_address = region.get_host_address(MemoryRegionAddress(0))?;
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: host_address as u64,
            };
            // SAFETY: the range is the region's mapping, which `ram` keeps for as long as `fd`.
            unsafe { fd.set_user_memory_region(slot) }
                .with_context(|| format!("KVM refuses guest memory at {:#x}", region.start_addr().0))?;
        }
        Ok(Self { fd, ram: ram.clone() })
    }

    /// Connects an interrupt line to the I/O APIC's pin `gsi`: each write to it is an edge.
    pub fn connect_irq_line(&self, gsi: u32, line: &EventFd) -> anyhow::Result<()> {
        self.fd.register_irqfd(line, gsi).with_context(|| format!("KVM_IRQFD for line {gsi}"))
    }

    /// The processor with the given index, which is its APIC id as well.
    pub fn vcpu(&self, index: u8) -> anyhow::Result<Vcpu> {
        let fd = self.fd.create_vcpu(index.into()).with_context(|| format!("KVM makes no vcpu-{index}"))?;
        Vcpu::new(fd, index, self.fd.run_size(), self.ram.clone())
    }
}

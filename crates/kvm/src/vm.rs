//! A virtual machine: memory slots, interrupt controllers, interrupt lines, doorbells, processors.
#![allow(unsafe_code, reason = "KVM takes guest memory as an address")]

use std::sync::Arc;

use anyhow::Context;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use memory::{FileRegion, Ram, layout};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::host::Host;
use crate::irq::MsiRoutes;
use crate::vcpu::Vcpu;

/// Writes of the guest that are nothing but a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Where they go.
    pub at: Place,
    /// What they say.
    pub value: Value,
}

/// An address that the guest writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A port.
    Port(u16),
    /// A guest-physical address.
    Memory(u64),
}

/// What a write must say to ring a doorbell. One of another width or value exits as any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Anything, at any width. The fastest in memory: KVM need not decode the instruction where the processor says the
    /// address.
    Any,
    /// This byte.
    U8(u8),
    /// These two bytes.
    U16(u16),
    /// These four bytes.
    U32(u32),
    /// These eight bytes.
    U64(u64),
}

/// A virtual machine with in-kernel interrupt controllers.
pub struct Vm {
    fd: Arc<VmFd>,
    /// Keeps the memory mapped for as long as KVM uses it.
    ram: Ram,
    /// As well, by their memory slots behind those of RAM.
    files: Vec<Arc<FileRegion>>,
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
        Ok(Self { fd: Arc::new(fd), ram: ram.clone(), files: Vec::new() })
    }

    /// Puts a file into guest-physical space at `address`. What the guest writes where it may only read is dropped.
    /// Processors that are made later know of it.
    pub fn add_file(&mut self, address: u64, file: Arc<FileRegion>) -> anyhow::Result<()> {
        let slot = self.ram.num_regions() + self.files.len();
        let slot = kvm_userspace_memory_region {
            slot: u32::try_from(slot).context("KVM has no memory slot left")?,
            flags: if file.is_readonly() { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: address,
            memory_size: file.length(),
            userspace_addr: file.host_address(),
        };
        // SAFETY: the range is the region's mapping, which `files` keeps for as long as `fd`.
        unsafe { self.fd.set_user_memory_region(slot) }
            .with_context(|| format!("KVM refuses a file as guest memory at {address:#x}"))?;
        self.files.push(file);
        Ok(())
    }

    /// Connects an interrupt line to the I/O APIC's pin `gsi`: each write to it is an edge.
    pub fn connect_irq_line(&self, gsi: u32, line: &EventFd) -> anyhow::Result<()> {
        self.fd.register_irqfd(line, gsi).with_context(|| format!("KVM_IRQFD for line {gsi}"))
    }

    /// Has the messages of `routes` lead to this machine's processors.
    ///
    /// # Panics
    ///
    /// When they lead to another machine's.
    pub fn connect_messages(&self, routes: &MsiRoutes) {
        routes.bind(self.fd.clone());
    }

    /// Has KVM write to `bell` where the guest rings it, in place of an exit.
    pub fn connect_doorbell(&self, doorbell: Doorbell, bell: &EventFd) -> anyhow::Result<()> {
        let Doorbell { at, value } = doorbell;
        let address = match at {
            Place::Port(port) => IoEventAddress::Pio(port.into()),
            Place::Memory(address) => IoEventAddress::Mmio(address),
        };
        match value {
            Value::Any => self.fd.register_ioevent(bell, &address, NoDatamatch),
            Value::U8(value) => self.fd.register_ioevent(bell, &address, value),
            Value::U16(value) => self.fd.register_ioevent(bell, &address, value),
            Value::U32(value) => self.fd.register_ioevent(bell, &address, value),
            Value::U64(value) => self.fd.register_ioevent(bell, &address, value),
        }
        .with_context(|| format!("KVM_IOEVENTFD for {doorbell:x?}"))
    }

    /// The machine itself, for what only this crate does.
    #[cfg(test)]
    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The processor with the given index, which is its APIC id as well.
    pub fn vcpu(&self, index: u8) -> anyhow::Result<Vcpu> {
        let fd = self.fd.create_vcpu(index.into()).with_context(|| format!("KVM makes no vcpu-{index}"))?;
        Vcpu::new(fd, index, self.fd.run_size(), self.ram.clone(), self.files.clone())
    }
}

#[cfg(test)]
#[path = "vm/tests.rs"]
mod tests;

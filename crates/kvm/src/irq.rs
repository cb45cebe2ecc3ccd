//! Where interrupts lead: the I/O APIC's pins, and messages (MSI) behind numbers of their own.
//!
//! KVM API: `KVM_SET_GSI_ROUTING`, `KVM_IRQFD`. KVM takes all routes at once and forgets the others, so the ones that
//! it makes together with the interrupt controllers are said again each time. Left out on purpose: giving a number back
//! (functions stay for as long as their machine), and processors above 255 in a message.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

/// Pins of the I/O APIC, each with the GSI of its number.
const IO_APIC_PINS: u32 = 24;
/// Pins of one 8259A. Two of them share their GSIs with the I/O APIC's first pins.
const PIC_PINS: u32 = 8;
/// Routes that KVM makes together with the interrupt controllers.
const PINS: usize = (IO_APIC_PINS + 2 * PIC_PINS) as usize;

/// The routes of messages in one machine. Devices can be given theirs before there is a machine.
#[derive(Debug, Default)]
pub struct MsiRoutes {
    vm: OnceLock<Arc<VmFd>>,
    /// The address and the data of each message, from the first GSI behind the I/O APIC's pins upward. Two processors
    /// can write two functions' tables at once, hence the lock.
    messages: Mutex<Vec<Option<(u64, u32)>>>,
}

impl MsiRoutes {
    /// Binds the routes to their machine.
    pub(crate) fn bind(&self, vm: Arc<VmFd>) {
        self.vm.set(vm).expect("routes belong to one machine");
    }

    /// Sets a GSI apart for one message, which leads nowhere yet.
    pub fn allocate(&self) -> io::Result<u32> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if PINS + messages.len() == KVM_MAX_IRQ_ROUTES {
            return Err(io::Error::other(
                "the machine has no interrupt route left: give it fewer PCI devices or queues",
            ));
        }
        let gsi = (IO_APIC_PINS..).nth(messages.len()).expect("fewer than KVM's routes");
        messages.push(None);
        Ok(gsi)
    }

    /// Has whatever is connected to `gsi` lead to the message `data`, written at `address`, from now on.
    ///
    /// # Panics
    ///
    /// When the GSI was not allocated here: it is ours, not the guest's.
    pub fn route(&self, gsi: u32, address: u64, data: u32) -> io::Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = usize::try_from(gsi - IO_APIC_PINS).expect("an allocated GSI");
        let before = messages[slot].replace((address, data));
        let result = self.vm().and_then(|vm| set_routes(vm, &messages));
        if result.is_err() {
            messages[slot] = before;
        }
        result
    }

    /// Connects `line` to `gsi`: each write to it is one interrupt. What it holds already is delivered once, and taken
    /// out of it.
    pub fn connect(&self, gsi: u32, line: &EventFd) -> io::Result<()> {
        self.vm()?.register_irqfd(line, gsi)?;
        // KVM has looked at the line while it connected it, and raises the interrupt of what was there without taking
        // it. What comes later it takes in the write itself. Nothing to read is the usual case.
        match line.read() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Takes `line` away from `gsi`, after all that was written to it has been delivered.
    pub fn disconnect(&self, gsi: u32, line: &EventFd) -> io::Result<()> {
        Ok(self.vm()?.unregister_irqfd(line, gsi)?)
    }

    fn vm(&self) -> io::Result<&VmFd> {
        let vm = self.vm.get().ok_or_else(|| io::Error::other("the machine has not been made yet"))?;
        Ok(vm)
    }
}

/// Tells KVM the routes of the pins and of `messages`.
fn set_routes(vm: &VmFd, messages: &[Option<(u64, u32)>]) -> io::Result<()> {
    let pins = (0..IO_APIC_PINS).map(|gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    let master = (0..PIC_PINS).map(|gsi| pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
    let slave = (0..PIC_PINS).map(|gsi| pin(PIC_PINS + gsi, KVM_IRQCHIP_PIC_SLAVE, gsi));
    let messages = (IO_APIC_PINS..).zip(messages).filter_map(|(gsi, message)| Some(msi(gsi, (*message)?)));
    let routes: Vec<_> = pins.chain(master).chain(slave).chain(messages).collect();
    let routes = KvmIrqRouting::from_entries(&routes).map_err(|_| io::Error::other("too many interrupt routes"))?;
    Ok(vm.set_gsi_routing(&routes)?)
}

fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi(gsi: u32, (address, data): (u64, u32)) -> kvm_irq_routing_entry {
    let [low, high] = [address & u64::from(u32::MAX), address >> 32].map(|half| u32::try_from(half).expect("a half"));
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = low;
    entry.u.msi.address_hi = high;
    entry.u.msi.data = data;
    entry
}

#[cfg(test)]
#[path = "irq/tests.rs"]
mod tests;

//! Routes on the machine's own KVM.

#![allow(unsafe_code, reason = "the state of an interrupt controller is one of a union")]

use std::path::Path;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip, kvm_lapic_state};
use kvm_ioctls::VcpuFd;
use memory::MemorySpec;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::{Host, Vm};

/// Registers of the local APIC: the one that turns it on, and the first of those that hold what it has been asked for.
const SPURIOUS: usize = 0xf0;
const REQUESTS: usize = 0x200;
/// The message's address for the processor with the APIC id 0.
const TO_FIRST: u64 = 0xfee0_0000;

/// A machine with one processor, which does not run but whose APIC is on.
struct Machine {
    vm: Vm,
    vcpu: VcpuFd,
    routes: MsiRoutes,
}

impl Machine {
    fn new() -> Self {
        let host = Host::open(Path::new(Host::DEVICE)).expect("KVM's device");
        let vm = Vm::new(&host, &MemorySpec::default().map().unwrap()).unwrap();
        let vcpu = vm.fd().create_vcpu(0).unwrap();
        let machine = Self { vm, vcpu, routes: MsiRoutes::default() };
        machine.vm.connect_messages(&machine.routes);
        machine.clear();
        machine
    }

    /// Turns the APIC on, with nothing asked of it.
    fn clear(&self) {
        let mut state = self.vcpu.get_lapic().unwrap();
        set(&mut state, SPURIOUS, 0x1ff);
        for register in 0..8 {
            set(&mut state, REQUESTS + 16 * register, 0);
        }
        self.vcpu.set_lapic(&state).unwrap();
    }

    fn is_asked_for(&self, vector: usize) -> bool {
        let state = self.vcpu.get_lapic().unwrap();
        get(&state, REQUESTS + 16 * (vector / 32)) & 1 << (vector % 32) != 0
    }

    /// KVM delivers some interrupts from a thread of its own.
    fn wait_for(&self, vector: usize) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.is_asked_for(vector) {
            assert!(Instant::now() < deadline, "vector {vector:#x} does not arrive");
            std::thread::yield_now();
        }
    }
}

fn get(state: &kvm_lapic_state, register: usize) -> u32 {
    let bytes: [i8; 4] = state.regs[register..register + 4].try_into().unwrap();
    u32::from_le_bytes(bytes.map(i8::cast_unsigned))
}

fn set(state: &mut kvm_lapic_state, register: usize, value: u32) {
    state.regs[register..register + 4].copy_from_slice(&value.to_le_bytes().map(u8::cast_signed));
}

fn line() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

#[test]
fn a_line_leads_to_its_message_and_to_the_next_one_after_that() {
    let machine = Machine::new();
    let (gsi, line) = (machine.routes.allocate().unwrap(), line());
    machine.routes.route(gsi, TO_FIRST, 0x41).unwrap();
    machine.routes.connect(gsi, &line).unwrap();
    line.write(1).unwrap();
    machine.wait_for(0x41);
    machine.routes.route(gsi, TO_FIRST, 0x52).unwrap();
    machine.clear();
    line.write(1).unwrap();
    machine.wait_for(0x52);
    assert!(!machine.is_asked_for(0x41));
}

#[test]
fn what_is_written_to_a_line_that_was_taken_away_is_delivered_when_it_comes_back() {
    let machine = Machine::new();
    let (gsi, line) = (machine.routes.allocate().unwrap(), line());
    machine.routes.route(gsi, TO_FIRST, 0x41).unwrap();
    for _ in 0..3 {
        machine.routes.connect(gsi, &line).unwrap();
        line.write(1).unwrap();
        machine.wait_for(0x41);
        machine.routes.disconnect(gsi, &line).unwrap();
        machine.clear();
        line.write(1).unwrap();
        line.write(1).unwrap();
        assert_eq!(line.read().unwrap(), 2, "KVM took nothing");
        line.write(2).unwrap();
        machine.routes.connect(gsi, &line).unwrap();
        machine.wait_for(0x41);
        machine.routes.disconnect(gsi, &line).unwrap();
        assert!(line.read().is_err(), "it was taken out of the line");
    }
}

#[test]
fn the_io_apics_pins_lead_where_they_did_after_messages_have_been_routed() {
    let machine = Machine::new();
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    machine.vm.fd().get_irqchip(&mut chip).unwrap();
    for (pin, vector) in [(4, 0x34), (23, 0x37)] {
        // SAFETY: KVM has filled in the I/O APIC's state, as the chip's id asks.
        let ioapic = unsafe { &mut chip.chip.ioapic };
        // Edge-triggered, unmasked, to the processor with the APIC id 0.
        ioapic.redirtbl[pin].bits = vector;
    }
    machine.vm.fd().set_irqchip(&chip).unwrap();
    for data in 0x41..0x45 {
        machine.routes.route(machine.routes.allocate().unwrap(), TO_FIRST, data).unwrap();
    }
    for (gsi, vector) in [(4, 0x34), (23, 0x37)] {
        let line = line();
        machine.vm.connect_irq_line(gsi, &line).unwrap();
        line.write(1).unwrap();
        machine.wait_for(usize::try_from(vector).unwrap());
    }
}

#[test]
fn routes_are_given_until_kvm_takes_no_more() {
    let machine = Machine::new();
    let gsis: Vec<_> = std::iter::from_fn(|| machine.routes.allocate().ok()).collect();
    assert_eq!(gsis[..3], [24, 25, 26]);
    assert_eq!(gsis.len(), 4096 - PINS);
    for gsi in &gsis[gsis.len() - 2..] {
        machine.routes.route(*gsi, TO_FIRST, 0x41).unwrap();
    }
    assert!(machine.routes.allocate().unwrap_err().to_string().contains("fewer"));
}

#[test]
fn before_there_is_a_machine_routes_are_given_and_lead_nowhere() {
    let routes = MsiRoutes::default();
    let gsi = routes.allocate().unwrap();
    assert!(routes.route(gsi, TO_FIRST, 0x41).is_err() && routes.connect(gsi, &line()).is_err());
}

//! Devices of the PC that kernels expect without asking, and the few registers of our own.
//!
//! [`Platform`] is the list of them. A machine puts their windows on its port bus, their AML into
//! its DSDT and their registers into its FADT, and knows none by name.

pub mod boot_mark;
pub mod power;
pub mod pvpanic;
pub mod serial;

use std::sync::{Arc, Mutex};

use acpi_tables::Aml;
use bus::{Bus, BusDevice, EndLatch, Irq, Shared};
use vmm_sys_util::eventfd::EventFd;

use crate::console::Console;
use boot_mark::BootMark;
use power::{KeyboardReset, PowerButton, PowerRegisters};
use pvpanic::Pvpanic;

/// What the platform's devices are connected to.
pub struct Wiring<'a> {
    /// Where an end that the guest brings about is reported.
    pub ends: Arc<EndLatch>,
    /// Called when the guest marks the end of its boot, on the thread of its processor.
    pub marked: Box<dyn FnOnce() + Send>,
    /// The host's side of the serial port.
    pub console: &'a Console,
    /// Gives the interrupt line with a number, as ACPI counts them.
    pub line: &'a dyn Fn(u32) -> anyhow::Result<EventFd>,
}

/// The devices that every machine has.
pub struct Platform {
    /// Their windows on the port bus: base, length, device.
    windows: Vec<(u16, u16, Shared)>,
    /// The power button.
    pub button: PowerButton,
    /// What they say of themselves in the DSDT.
    pub aml: Vec<u8>,
    /// What a kernel is to be told of them on its command line.
    pub kernel_parameters: &'static str,
}

impl Platform {
    /// Makes the devices.
    pub fn build(wiring: Wiring<'_>) -> anyhow::Result<Self> {
        let Wiring { ends, marked, console, line } = wiring;
        let mut aml = Vec::new();
        let button = PowerButton::new(Irq::new(line(power::BUTTON_GSI)?));
        power::aml(&mut aml);
        pvpanic::aml(&mut aml);
        let mut windows = vec![
            (power::SLEEP_CONTROL, power::LENGTH, shared(PowerRegisters::new(ends.clone()))),
            (power::KEYBOARD_COMMAND, 1, shared(KeyboardReset::new(ends.clone()))),
            (pvpanic::PORT, 1, shared(Pvpanic::new(ends))),
            (boot_mark::PORT, 1, shared(BootMark::new(marked))),
        ];
        // Without a count a kernel probes for ports that are not there, each with some thirty exits.
        let mut kernel_parameters = "8250.nr_uarts=0";
        if !console.is_off() {
            kernel_parameters = "console=ttyS0 8250.nr_uarts=1";
            let serial = console.attach(Irq::new(line(serial::GSI)?));
            serial.to_aml_bytes(&mut aml);
            windows.push((serial::BASE, serial::LENGTH.into(), shared(serial)));
        }
        Ok(Self { windows, button, aml, kernel_parameters })
    }

    /// Puts the devices on the port bus.
    pub fn insert_into(&mut self, ports: &mut Bus) {
        for (base, length, device) in self.windows.drain(..) {
            ports.insert(base.into(), length.into(), device);
        }
    }
}

fn shared(device: impl BusDevice + 'static) -> Shared {
    Arc::new(Mutex::new(device))
}

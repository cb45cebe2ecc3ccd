//! Power: the registers with which a guest sleeps and resets, and the power button.
//!
//! ACPI 6.5, 4.8.3.6 (reset), 4.8.3.7 (sleep control and status of a hardware-reduced machine),
//! 4.8.2.2.1.2 (control method power button), 5.6.9 (interrupt-signalled events); the reset
//! command of the PC's keyboard controller, which kernels try without asking. Sleep states other
//! than off are left out: a machine is paused from outside.

use std::sync::Arc;

use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, Interrupt, Method, Name, Notify, Package, Path, ResourceTemplate};
use bus::{BusDevice, EndLatch, GuestEnd, Irq};

/// The port of the sleep control register.
pub const SLEEP_CONTROL: u16 = 0x600;
/// The port of the sleep status register.
pub const SLEEP_STATUS: u16 = 0x601;
/// The port of the reset register, and the value that resets.
pub const RESET: (u16, u8) = (0x602, 1);
/// The number of registers, which follow one another.
pub const LENGTH: u16 = 3;
/// The command port of the keyboard controller.
pub const KEYBOARD_COMMAND: u16 = 0x64;
/// The interrupt line of the power button.
pub const BUTTON_GSI: u32 = 5;

/// `\_S5`'s sleep type, and the bits of the sleep control register that ask for it.
const SOFT_OFF: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;
/// The keyboard controller's command that pulses the reset line.
const PULSE_RESET: u8 = 0xfe;

/// The sleep and reset registers.
pub struct PowerRegisters(Arc<EndLatch>);

impl PowerRegisters {
    /// Registers that report to `ends`.
    pub fn new(ends: Arc<EndLatch>) -> Self {
        Self(ends)
    }
}

impl BusDevice for PowerRegisters {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [value]) if *value == SLEEP_ENABLE | SOFT_OFF << 2 => self.0.set(GuestEnd::PowerOff),
            (2, [value]) if *value == RESET.1 => self.0.set(GuestEnd::Reset),
            _ => {}
        }
    }
}

/// What is left of the PC's keyboard controller: its reset command.
pub struct KeyboardReset(Arc<EndLatch>);

impl KeyboardReset {
    /// A command port that reports to `ends`.
    pub fn new(ends: Arc<EndLatch>) -> Self {
        Self(ends)
    }
}

impl BusDevice for KeyboardReset {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Empty buffers: nobody has to wait before the command.
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data == [PULSE_RESET] {
            self.0.set(GuestEnd::Reset);
        }
    }
}

/// The power button, which the user presses and a guest may or may not listen to.
pub struct PowerButton(Irq);

impl PowerButton {
    /// A button on its interrupt line.
    pub fn new(irq: Irq) -> Self {
        Self(irq)
    }

    /// Presses it.
    pub fn press(&self) {
        self.0.raise();
    }
}

/// The DSDT's part: soft off, the button, and the device whose interrupt says that it was pressed.
pub fn aml(sink: &mut Vec<u8>) {
    let s5 = Package::new(vec![&SOFT_OFF]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(sink);
    let id = Name::new("_HID".into(), &EISAName::new("PNP0C0C"));
    Device::new("_SB_.PWRB".into(), vec![&id]).to_aml_bytes(sink);
    let id = Name::new("_HID".into(), &"ACPI0013");
    let line = Interrupt::new(true, true, false, false, BUTTON_GSI);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&line]));
    let button = Path::new("\\_SB_.PWRB");
    // 0x80: the button was pressed (ACPI 6.5, table 5.160).
    let pressed = Notify::new(&button, &0x80u8);
    let event = Method::new("_EVT".into(), 1, true, vec![&pressed]);
    Device::new("_SB_.GED_".into(), vec![&id, &resources, &event]).to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[test]
    fn soft_off_powers_off_and_no_other_sleep_does() {
        let ends = Arc::new(EndLatch::default());
        let mut registers = PowerRegisters::new(ends.clone());
        registers.write(0, &[SLEEP_ENABLE | 3 << 2]);
        registers.write(1, &[0x80]);
        registers.write(0, &[SOFT_OFF << 2]);
        registers.write(0, &[SLEEP_ENABLE | SOFT_OFF << 2, 0]);
        assert_eq!(ends.get(), None);
        registers.write(0, &[SLEEP_ENABLE | SOFT_OFF << 2]);
        assert_eq!(ends.get(), Some(GuestEnd::PowerOff));
    }

    #[test]
    fn the_reset_register_takes_only_its_value() {
        let ends = Arc::new(EndLatch::default());
        let mut registers = PowerRegisters::new(ends.clone());
        registers.write(2, &[0]);
        assert_eq!(ends.get(), None);
        registers.write(2, &[RESET.1]);
        assert_eq!(ends.get(), Some(GuestEnd::Reset));
    }

    #[test]
    fn the_keyboard_controllers_reset_command_resets() {
        let ends = Arc::new(EndLatch::default());
        let mut controller = KeyboardReset::new(ends.clone());
        let mut status = [0xff];
        controller.read(0, &mut status);
        assert_eq!(status, [0]);
        controller.write(0, &[0xd1]);
        assert_eq!(ends.get(), None);
        controller.write(0, &[PULSE_RESET]);
        assert_eq!(ends.get(), Some(GuestEnd::Reset));
    }

    #[test]
    fn pressing_the_button_raises_its_interrupt() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        PowerButton::new(Irq::new(line.try_clone().unwrap())).press();
        assert_eq!(line.read().unwrap(), 1);
    }
}

//! pvpanic: one port through which a guest says that its kernel panicked.
//!
//! QEMU's `docs/specs/pvpanic`; Linux's driver finds it through ACPI.

use std::sync::Arc;

use acpi_tables::Aml;
use acpi_tables::aml::{Device, IO, Name, ResourceTemplate};
use bus::{BusDevice, EndLatch, GuestEnd};

/// The port.
pub const PORT: u16 = 0x505;

/// The event that is known: the kernel panicked and runs no crash kernel.
const PANICKED: u8 = 1;

/// The device.
pub struct Pvpanic(Arc<EndLatch>);

impl Pvpanic {
    /// A device that reports to `ends`.
    pub fn new(ends: Arc<EndLatch>) -> Self {
        Self(ends)
    }
}

impl BusDevice for Pvpanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|events| events & PANICKED != 0) {
            self.0.set(GuestEnd::Panic);
        }
    }
}

/// The DSDT's part.
pub fn aml(sink: &mut Vec<u8>) {
    let id = Name::new("_HID".into(), &"QEMU0001");
    let port = IO::new(PORT, PORT, 1, 1);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port]));
    Device::new("_SB_.PEVT".into(), vec![&id, &resources]).to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_panic_event_is_offered_and_taken() {
        let ends = Arc::new(EndLatch::default());
        let mut device = Pvpanic::new(ends.clone());
        let mut events = [0];
        device.read(0, &mut events);
        assert_eq!(events, [PANICKED]);
        device.write(0, &[2]);
        assert_eq!(ends.get(), None);
        device.write(0, &[PANICKED]);
        assert_eq!(ends.get(), Some(GuestEnd::Panic));
    }
}

//! Port and memory-mapped I/O dispatch, interrupt lines, and PCI.
//!
//! A [`Bus`] is filled while the machine is built and never changes while it runs, so the lookup
//! takes no lock; only the device that is found is locked, because several virtual processors may
//! reach the same one. An [`Irq`] is an irqfd: a device raises it without knowing KVM.

mod event;
mod irq;
pub mod pci;

pub use event::{EndLatch, GuestEnd};
pub use irq::Irq;

use std::sync::{Arc, Mutex, PoisonError};

/// A device as the processor sees it: a window of registers.
///
/// `offset` counts from the start of the window; `data` is 1, 2, 4 or 8 bytes, little-endian, and
/// may reach past the window's end by less than its own length. Neither call can fail: hardware
/// has no way to say so, and an access that means nothing reads as all ones or is dropped.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device that several virtual processors can reach.
pub type Shared = Arc<Mutex<dyn BusDevice>>;

/// One address space, ports or memory, and the devices in it.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, without overlaps.
    windows: Vec<Window>,
}

struct Window {
    base: u64,
    last: u64,
    device: Shared,
}

impl Bus {
    /// Puts a device at `base..base + length`.
    ///
    /// # Panics
    ///
    /// When the window is empty, wraps, or overlaps another: addresses are ours, not the guest's.
    pub fn insert(&mut self, base: u64, length: u64, device: Shared) {
        let last = length
            .checked_sub(1)
            .and_then(|length| base.checked_add(length))
            .expect("a bus window is not empty and does not wrap");
        let at = self.windows.partition_point(|window| window.base < base);
        let fits_below = at == 0 || self.windows[at - 1].last < base;
        let fits_above = at == self.windows.len() || last < self.windows[at].base;
        assert!(fits_below && fits_above, "bus windows overlap at {base:#x}");
        self.windows.insert(at, Window { base, last, device });
    }

    /// Reads from the device at `address`; where none is, `data` reads as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => lock(device).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address`; where none is, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            lock(device).write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(&Shared, u64)> {
        let at = self.windows.partition_point(|window| window.base <= address);
        let window = &self.windows[at.checked_sub(1)?];
        (address <= window.last).then(|| (&window.device, address - window.base))
    }
}

/// A device whose thread panicked has already ended the process in a release build.
fn lock(device: &Shared) -> std::sync::MutexGuard<'_, dyn BusDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers each read with its tag and remembers the last write.
    struct Probe(u8, Vec<u8>);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + u8::try_from(offset).unwrap());
        }
        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.1 = data.to_vec();
        }
    }

    fn probe(tag: u8) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe(tag, Vec::new())))
    }

    fn read(bus: &Bus, address: u64) -> u8 {
        let mut data = [0];
        bus.read(address, &mut data);
        data[0]
    }

    #[test]
    fn an_access_reaches_the_device_whose_window_holds_it() {
        let mut bus = Bus::default();
        let high = probe(0x40);
        bus.insert(0x20, 8, high.clone());
        bus.insert(0x10, 8, probe(0x10));
        assert_eq!(read(&bus, 0x10), 0x10);
        assert_eq!(read(&bus, 0x17), 0x17);
        assert_eq!(read(&bus, 0x27), 0x47);
        bus.write(0x20, &[1, 2]);
        assert_eq!(high.lock().unwrap().1, [1, 2]);
    }

    #[test]
    fn an_access_outside_every_window_reads_as_all_ones() {
        let mut bus = Bus::default();
        assert_eq!(read(&bus, 0), 0xff);
        bus.insert(0x10, 8, probe(0));
        assert_eq!(read(&bus, 0xf), 0xff);
        assert_eq!(read(&bus, 0x18), 0xff);
        assert_eq!(read(&bus, u64::MAX), 0xff);
        bus.write(0x18, &[1]);
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn two_windows_may_not_overlap() {
        let mut bus = Bus::default();
        bus.insert(0x10, 8, probe(0));
        bus.insert(0x17, 1, probe(0));
    }
}

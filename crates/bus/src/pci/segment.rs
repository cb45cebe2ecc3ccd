//! A PCI segment of one bus: the window to its configuration space, and the places of its functions.
//!
//! PCI Express 6.0, 7.2.2 (the enhanced configuration access mechanism, ECAM). A device has one function, number 0;
//! device 0 is the host bridge. Left out on purpose: bridges and other buses, devices of several functions, hot plug,
//! and the ports 0xcf8 and 0xcfc: Linux goes to the window where they do not answer, with one exit an access in place
//! of two. (Linux 6.1 looks for the ports before it trusts the window, and until then says "No config space access
//! function found".)

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::layout;

use super::config::{Bar, BarKind, Config, Identity, SPACE};
use crate::{BusDevice, Shared};

/// Devices on a bus, the host bridge among them.
const DEVICES: usize = 32;
/// Functions of a device.
const FUNCTIONS: usize = 8;

/// QEMU's generic PCI Express host bridge, which no kernel has a quirk for.
const HOST_BRIDGE: Identity =
    Identity { vendor: 0x1b36, device: 0x0008, revision: 0, class: 0x06_00_00, subsystem_vendor: 0, subsystem: 0 };

/// A function as its segment sees it: configuration space, and the regions behind its BARs.
pub trait Function: Send {
    /// The configuration space.
    fn config(&mut self) -> &mut Config;

    /// The guest reads configuration space at `register`.
    fn read_config(&mut self, register: usize, data: &mut [u8]) {
        self.config().read(register, data);
    }

    /// The guest writes configuration space at `register`.
    fn write_config(&mut self, register: usize, data: &[u8]) {
        self.config().write(register, data);
    }

    /// The guest reads at `offset` of the region of the BAR number `bar`, which the function decodes.
    fn read_bar(&mut self, bar: usize, offset: u64, data: &mut [u8]);

    /// The guest writes there.
    fn write_bar(&mut self, bar: usize, offset: u64, data: &[u8]);
}

/// A function that several virtual processors can reach.
pub type SharedFunction = Arc<Mutex<dyn Function>>;

/// A segment without room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// Every device's place is taken.
    #[error("a machine has places for {} PCI devices: give the others transport=mmio", DEVICES - 1)]
    Devices,
    /// A region does not fit between its bounds.
    #[error(
        "a region of {size:#x} bytes finds no place between {from:#x} and {to:#x}: ask for less, or for less memory"
    )]
    Region {
        /// Bytes of the region.
        size: u64,
        /// What is left of the addresses that it could have.
        from: u64,
        /// See `from`.
        to: u64,
    },
}

/// A region where it was placed, for the bus of memory addresses.
pub struct Window {
    /// The first address.
    pub base: u64,
    /// Its bytes.
    pub length: u64,
    /// What answers there.
    pub device: Shared,
}

/// The segment, as the device behind [`layout::PCI_ECAM`].
pub struct Segment {
    functions: Vec<SharedFunction>,
    /// The addresses that are left for regions.
    free32: Range<u64>,
    free64: Range<u64>,
}

impl Segment {
    /// Bytes of the window.
    pub const LENGTH: u64 = (DEVICES * FUNCTIONS * SPACE) as u64;

    /// A segment with a host bridge, and with `bars64` for the regions that need not be below 4 GiB.
    pub fn new(bars64: Range<u64>) -> Self {
        let bridge: SharedFunction = Arc::new(Mutex::new(HostBridge(Config::new(HOST_BRIDGE))));
        Self { functions: vec![bridge], free32: layout::PCI_BARS32, free64: bars64 }
    }

    /// Gives a function the next free device number and places its regions. Returns these for the bus of memory
    /// addresses, in the order of the function's BARs.
    pub fn add(&mut self, function: SharedFunction) -> Result<Vec<Window>, NoRoom> {
        if self.functions.len() == DEVICES {
            return Err(NoRoom::Devices);
        }
        let bars = lock(&function).config().bars().to_vec();
        let mut windows = Vec::with_capacity(bars.len());
        for Bar { index, kind, size, .. } in bars {
            let free = match kind {
                BarKind::Memory32 => &mut self.free32,
                BarKind::Prefetchable64 => &mut self.free64,
            };
            let base = take(free, size)?;
            lock(&function).config().place(index, base);
            let device = Arc::new(Mutex::new(Region { function: function.clone(), bar: index }));
            windows.push(Window { base, length: size, device });
        }
        self.functions.push(function);
        Ok(windows)
    }

    /// The function whose configuration space holds `offset` of the window, and the register there.
    fn find(&self, offset: u64) -> Option<(&SharedFunction, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let (number, register) = (offset / SPACE, offset % SPACE);
        let function = number.is_multiple_of(FUNCTIONS).then(|| self.functions.get(number / FUNCTIONS))??;
        Some((function, register))
    }
}

impl BusDevice for Segment {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self.find(offset) {
            Some((function, register)) => lock(function).read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.find(offset) {
            lock(function).write_config(register, data);
        }
    }
}

/// Takes an aligned region of `size` bytes, a power of two, from the front of what is free.
fn take(free: &mut Range<u64>, size: u64) -> Result<u64, NoRoom> {
    let base = free.start.checked_next_multiple_of(size);
    let taken = base.and_then(|base| Some((base, base.checked_add(size).filter(|end| *end <= free.end)?)));
    let (base, end) = taken.ok_or(NoRoom::Region { size, from: free.start, to: free.end })?;
    free.start = end;
    Ok(base)
}

/// A function whose thread panicked has already ended the process in a release build.
fn lock(function: &SharedFunction) -> MutexGuard<'_, dyn Function + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One region of a function, on the bus.
struct Region {
    function: SharedFunction,
    bar: usize,
}

impl BusDevice for Region {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut function = lock(&self.function);
        match function.config().decodes(self.bar) {
            true => function.read_bar(self.bar, offset, data),
            false => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut function = lock(&self.function);
        if function.config().decodes(self.bar) {
            function.write_bar(self.bar, offset, data);
        }
    }
}

/// The bridge between the processors and the bus. It has no registers of its own.
struct HostBridge(Config);

impl Function for HostBridge {
    fn config(&mut self) -> &mut Config {
        &mut self.0
    }

    fn read_bar(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function with a region of each kind, which answers with the number of its BAR.
    struct Probe {
        config: Config,
        written: Vec<(usize, u64, Vec<u8>)>,
    }

    impl Probe {
        fn shared(size: u64) -> Arc<Mutex<Self>> {
            let mut config = Config::new(Identity { vendor: 0x1af4, device: 0x1041, ..Identity::default() });
            config.add_bar(0, BarKind::Memory32, 0x1000);
            config.add_bar(2, BarKind::Prefetchable64, size);
            Arc::new(Mutex::new(Self { config, written: Vec::new() }))
        }
    }

    impl Function for Probe {
        fn config(&mut self) -> &mut Config {
            &mut self.config
        }
        fn read_bar(&mut self, bar: usize, _offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(bar).unwrap());
        }
        fn write_bar(&mut self, bar: usize, offset: u64, data: &[u8]) {
            self.written.push((bar, offset, data.to_vec()));
        }
    }

    const BARS64: Range<u64> = 5 << 30..9 << 30;

    fn read32(device: &mut dyn BusDevice, offset: u64) -> u32 {
        let mut data = [0; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_first_device_is_a_host_bridge_and_the_others_read_as_all_ones() {
        let mut segment = Segment::new(BARS64);
        assert_eq!(read32(&mut segment, 0), 0x0008_1b36);
        assert_eq!(read32(&mut segment, 8) >> 8, 0x06_00_00);
        for number in 1..u64::try_from(DEVICES * FUNCTIONS).unwrap() {
            assert_eq!(read32(&mut segment, number << 12), u32::MAX, "function {number}");
            segment.write(number << 12 | 4, &[0xff; 4]);
        }
    }

    #[test]
    fn a_device_answers_as_function_0_of_its_number_only() {
        let mut segment = Segment::new(BARS64);
        segment.add(Probe::shared(1 << 20)).unwrap();
        assert_eq!(read32(&mut segment, 1 << 15), 0x1041_1af4);
        for function in 1..8 {
            assert_eq!(read32(&mut segment, 1 << 15 | function << 12), u32::MAX);
        }
        assert_eq!(read32(&mut segment, 2 << 15), u32::MAX);
    }

    #[test]
    fn an_access_past_the_window_or_past_a_functions_space_meets_nothing() {
        let mut segment = Segment::new(BARS64);
        segment.add(Probe::shared(1 << 20)).unwrap();
        for offset in [Segment::LENGTH, u64::MAX] {
            assert_eq!(read32(&mut segment, offset), u32::MAX);
            segment.write(offset, &[0; 8]);
        }
        assert_eq!(read32(&mut segment, (1 << 15) - 2), u32::MAX);
        assert_eq!(read32(&mut segment, (1 << 15 | 0x1000) - 2), 0xffff_0000);
        segment.write((1 << 15 | 0x1000) - 2, &[0xff; 8]);
    }

    #[test]
    fn regions_are_placed_aligned_and_answer_while_they_are_decoded() {
        let mut segment = Segment::new(BARS64);
        segment.add(Probe::shared(1 << 20)).unwrap();
        let probe = Probe::shared(1 << 30);
        let windows = segment.add(probe.clone()).unwrap();
        let placed: Vec<_> = windows.iter().map(|window| (window.base, window.length)).collect();
        assert_eq!(placed, [(0xc000_1000, 0x1000), (6 << 30, 1 << 30)]);
        let mut low = windows[0].device.lock().unwrap();
        assert_eq!(read32(&mut *low, 0), 0);
        assert_eq!(read32(&mut *windows[1].device.lock().unwrap(), 0), 0x0202_0202);
        low.write(8, &[1, 2]);
        assert_eq!(probe.lock().unwrap().written, [(0, 8, vec![1, 2])]);
        // The guest turns memory decoding off, and on again.
        segment.write(2 << 15 | 4, &[0, 0]);
        assert_eq!(read32(&mut *low, 0), u32::MAX);
        low.write(8, &[3]);
        segment.write(2 << 15 | 4, &[2, 0]);
        assert_eq!(read32(&mut *low, 0), 0);
        // The guest moves the region, and back.
        segment.write(2 << 15 | 0x10, &0xc800_0000u32.to_le_bytes());
        assert_eq!(read32(&mut *low, 0), u32::MAX);
        low.write(8, &[4]);
        segment.write(2 << 15 | 0x10, &0xc000_1000u32.to_le_bytes());
        assert_eq!(read32(&mut *low, 0), 0);
        assert_eq!(probe.lock().unwrap().written.len(), 1);
    }

    #[test]
    fn the_thirty_second_device_and_a_region_that_does_not_fit_find_no_room() {
        let mut segment = Segment::new(BARS64);
        let region = segment.add(Probe::shared(1 << 33)).err();
        assert_eq!(region, Some(NoRoom::Region { size: 1 << 33, from: 5 << 30, to: 9 << 30 }));
        for _ in 1..DEVICES {
            segment.add(Probe::shared(1 << 12)).unwrap();
        }
        assert_eq!(segment.add(Probe::shared(1 << 12)).err(), Some(NoRoom::Devices));
        assert!(matches!(Segment::new(0..0).add(Probe::shared(1 << 12)), Err(NoRoom::Region { .. })));
    }
}

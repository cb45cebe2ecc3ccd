//! The driver's side of the PCI transport: configuration space through the segment, structures through the BAR, a
//! vector for the configuration and one for each queue.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::pci::{Message, MsiRouter, Segment};
use bus::{BusDevice, Shared};
use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use super::{Driver, Registers, wiring};
use crate::device::VirtioDevice;
use crate::transport::pci::{self, Pci};
use crate::transport::{Reg, status};

/// A device over PCI, not yet reset, with a driver that has done nothing so far.
pub fn pci<D: VirtioDevice>(device: D) -> Driver<PciRegisters<D>> {
    let wiring = wiring();
    let memory = wiring.memory.clone();
    let device = Pci::new(device, wiring, Arc::<Nowhere>::default()).expect("the host has descriptors");
    let device = Arc::new(Mutex::new(device));
    let mut segment = Segment::new(0..0);
    let mut windows = segment.add(device.clone()).expect("the segment has room for one");
    let region = windows.remove(0).device;
    let lines = lock(&device).lines().map(|line| line.try_clone().expect("the host has descriptors")).collect();
    Driver { registers: PciRegisters { device, segment, region, lines }, memory, rings: Vec::new(), accepted: 0 }
}

/// A router whose interrupts go nowhere: they stay in their lines, where the test looks.
#[derive(Default)]
struct Nowhere(AtomicU32);

impl MsiRouter for Nowhere {
    fn allocate(&self) -> io::Result<u32> {
        Ok(self.0.fetch_add(1, Ordering::Relaxed))
    }
    fn route(&self, _route: u32, _message: Message) -> io::Result<()> {
        Ok(())
    }
    fn connect(&self, _route: u32, _line: &EventFd) -> io::Result<()> {
        Ok(())
    }
    fn disconnect(&self, _route: u32, _line: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

/// The registers of [`Pci`].
pub struct PciRegisters<D: VirtioDevice> {
    /// The function behind the two.
    pub device: Arc<Mutex<Pci<D>>>,
    /// Its bus, where it is device 1.
    pub segment: Segment,
    /// The window of its BAR.
    pub region: Shared,
    /// The vector for the configuration, then one for each queue.
    lines: Vec<EventFd>,
}

impl<D: VirtioDevice> PciRegisters<D> {
    /// Reads `N` bytes at an offset of the region.
    pub fn read_at<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        lock(&self.region).read(offset, &mut data);
        data
    }

    /// Writes at an offset of the region.
    pub fn write_at(&mut self, offset: u64, data: &[u8]) {
        lock(&self.region).write(offset, data);
    }

    /// Reads `N` bytes of the function's configuration space.
    pub fn read_space<const N: usize>(&mut self, register: u64) -> [u8; N] {
        let mut data = [0; N];
        self.segment.read(FUNCTION + register, &mut data);
        data
    }

    /// Writes to the function's configuration space.
    pub fn write_space(&mut self, register: u64, data: &[u8]) {
        self.segment.write(FUNCTION + register, data);
    }
}

/// Where the configuration space of device 1 lies in the segment.
const FUNCTION: u64 = 1 << 15;

/// Where a register lies in the common structure, and its bytes.
fn place(register: Reg) -> (u64, usize) {
    // After a reset the size of a queue is the largest that it can have.
    let register = if register == Reg::QueueSizeMax { Reg::QueueSize } else { register };
    pci::place(register).expect("PCI has every register but the notification")
}

impl<D: VirtioDevice> Registers for PciRegisters<D> {
    fn read(&mut self, register: Reg) -> u32 {
        let (offset, width) = place(register);
        let mut data = [0; 4];
        lock(&self.region).read(offset, &mut data[..width]);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: Reg, value: u32) {
        if register == Reg::QueueNotify {
            return self
                .write_at(pci::NOTIFY + u64::from(value) * u64::from(pci::NOTIFY_STEP), &value.to_le_bytes()[..2]);
        }
        // A driver chooses its vectors before it uses what they are for; a reset forgets them.
        if register == Reg::QueueEnable {
            let [low, high, ..] = self.read(Reg::QueueSelect).to_le_bytes();
            let vector = u16::from_le_bytes([low, high]).saturating_add(1);
            self.write_at(pci::QUEUE_VECTOR, &vector.to_le_bytes());
        }
        if register == Reg::Status && value & u32::from(status::DRIVER) != 0 {
            self.write_at(pci::CONFIG_VECTOR, &[0, 0]);
        }
        let (offset, width) = place(register);
        self.write_at(offset, &value.to_le_bytes()[..width]);
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.region).read(pci::DEVICE + offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.write_at(pci::DEVICE + offset, data);
    }

    fn line(&self, queue: Option<u16>) -> &EventFd {
        &self.lines[queue.map_or(0, |queue| usize::from(queue) + 1)]
    }

    fn acknowledge(&mut self) {}

    fn save(&mut self) -> anyhow::Result<Value> {
        Ok(serde_json::to_value(lock(&self.device).save()?)?)
    }

    fn load(&mut self, state: Value) -> anyhow::Result<()> {
        lock(&self.device).load(serde_json::from_value(state)?)
    }

    fn resume(&mut self) {
        lock(&self.device).core().resume();
    }
}

fn lock<T: ?Sized>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

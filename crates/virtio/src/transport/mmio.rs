//! Virtio over memory-mapped registers, version 2 (VIRTIO 1.2, section 4.2.2).
//!
//! Left out on purpose: the legacy interface, version 1 (section 4.2.4), and QueueReset, which goes with a feature that is not
//! offered.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bus::{BusDevice, Irq};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::Wiring;
use super::core::{Core, CoreState, Half, Reg};
use crate::device::{Interrupt, VirtioDevice};

/// How much of the guest's address space a device takes, in bytes.
pub const WINDOW: u64 = 0x1000;
/// Where, in its window, a device is notified; what is written is the queue's index, in 32 bits.
pub const QUEUE_NOTIFY: u64 = 0x050;

const MAGIC: u32 = 0x00;
const VERSION: u32 = 0x04;
const DEVICE_ID: u32 = 0x08;
const VENDOR_ID: u32 = 0x0c;
pub(crate) const INTERRUPT_STATUS: u32 = 0x60;
pub(crate) const INTERRUPT_ACK: u32 = 0x64;
const SHM_SEL: u32 = 0xac;
const SHM_LEN_LOW: u32 = 0xb0;
const SHM_LEN_HIGH: u32 = 0xb4;
const SHM_BASE_LOW: u32 = 0xb8;
const SHM_BASE_HIGH: u32 = 0xbc;
pub(crate) const CONFIG: u64 = 0x100;

/// Bits of InterruptStatus.
const USED_RING: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// A device behind memory-mapped registers.
pub struct Mmio<D: VirtioDevice> {
    core: Core<D>,
    interrupt: Arc<Line>,
    shared_memory_select: u32,
}

/// A device and its registers as they were saved.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioState {
    core: CoreState,
    interrupt_status: u32,
    shared_memory_select: u32,
}

impl<D: VirtioDevice> Mmio<D> {
    /// `irq` must be edge-triggered.
    ///
    /// # Errors
    ///
    /// The host has no room for an eventfd a queue.
    pub fn new(device: D, wiring: Wiring, irq: Irq) -> io::Result<Self> {
        let interrupt = Arc::new(Line { status: AtomicU32::new(0), irq });
        Ok(Self { core: Core::new(device, wiring, interrupt.clone())?, interrupt, shared_memory_select: 0 })
    }

    /// The eventfds for writes to [`QUEUE_NOTIFY`], each for the index of its queue.
    pub fn kicks(&self) -> impl Iterator<Item = (u16, &EventFd)> {
        (0..).zip(self.core.kicks())
    }

    /// What is the same over every transport.
    pub fn core(&mut self) -> &mut Core<D> {
        &mut self.core
    }

    /// Stops the device and says what it is in; see [`Core::save`].
    ///
    /// # Errors
    ///
    /// It cannot be saved, and goes on.
    pub fn save(&mut self) -> anyhow::Result<MmioState> {
        Ok(MmioState {
            core: self.core.save()?,
            interrupt_status: self.interrupt.status.load(Ordering::Acquire),
            shared_memory_select: self.shared_memory_select,
        })
    }

    /// Takes over what was saved; see [`Core::load`].
    ///
    /// # Errors
    ///
    /// It is no state of such a device.
    pub fn load(&mut self, state: MmioState) -> anyhow::Result<()> {
        self.core.load(state.core)?;
        self.interrupt.status.store(state.interrupt_status & (USED_RING | CONFIG_CHANGE), Ordering::Release);
        self.shared_memory_select = state.shared_memory_select;
        Ok(())
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            MAGIC => u32::from_le_bytes(*b"virt"),
            VERSION => 2,
            DEVICE_ID => self.core.kind() as u32,
            VENDOR_ID => u32::from_le_bytes(*b"VMM\0"),
            INTERRUPT_STATUS => self.interrupt.status.load(Ordering::Acquire),
            SHM_LEN_LOW | SHM_LEN_HIGH | SHM_BASE_LOW | SHM_BASE_HIGH => self.shared_memory(offset),
            _ => register(offset).map_or(0, |register| self.core.read(register)),
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            INTERRUPT_ACK => drop(self.interrupt.status.fetch_and(!value, Ordering::AcqRel)),
            SHM_SEL => self.shared_memory_select = value,
            _ => {
                if let Some(register) = register(offset) {
                    self.core.write(register, value);
                    if register == Reg::Status && value == 0 {
                        self.interrupt.status.store(0, Ordering::Release);
                        self.shared_memory_select = 0;
                    }
                }
            }
        }
    }

    /// Section 4.2.2: the length of a region that does not exist reads as -1.
    #[allow(clippy::cast_possible_truncation, reason = "half of the value is what is wanted")]
    fn shared_memory(&self, offset: u32) -> u32 {
        let id = u8::try_from(self.shared_memory_select).ok();
        let (base, length) = match id.and_then(|id| self.core.shared_memory(id)) {
            Some(region) => (region.start, region.end - region.start),
            None => (u64::MAX, u64::MAX),
        };
        match offset {
            SHM_LEN_LOW => length as u32,
            SHM_LEN_HIGH => (length >> 32) as u32,
            SHM_BASE_LOW => base as u32,
            _ => (base >> 32) as u32,
        }
    }
}

impl<D: VirtioDevice> BusDevice for Mmio<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            return self.core.read_config(offset - CONFIG, data);
        }
        // Section 4.2.2.2: the registers before the configuration space are read and written as aligned words.
        data.fill(0);
        if let (Some(offset), Ok(data)) = (word(offset), <&mut [u8; 4]>::try_from(data)) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            return self.core.write_config(offset - CONFIG, data);
        }
        if let (Some(offset), Ok(data)) = (word(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

fn word(offset: u64) -> Option<u32> {
    u32::try_from(offset).ok().filter(|offset| offset.is_multiple_of(4))
}

fn register(offset: u32) -> Option<Reg> {
    REGISTERS.iter().find(|(other, _)| *other == offset).map(|(_, register)| *register)
}

/// Section 4.2.2, table 4.1: what is the same over every transport.
pub(crate) const REGISTERS: [(u32, Reg); 17] = [
    (0x010, Reg::DeviceFeatures),
    (0x014, Reg::DeviceFeaturesSelect),
    (0x020, Reg::DriverFeatures),
    (0x024, Reg::DriverFeaturesSelect),
    (0x030, Reg::QueueSelect),
    (0x034, Reg::QueueSizeMax),
    (0x038, Reg::QueueSize),
    (0x044, Reg::QueueEnable),
    (0x050, Reg::QueueNotify),
    (0x070, Reg::Status),
    (0x080, Reg::QueueDescriptors(Half::Low)),
    (0x084, Reg::QueueDescriptors(Half::High)),
    (0x090, Reg::QueueDriver(Half::Low)),
    (0x094, Reg::QueueDriver(Half::High)),
    (0x0a0, Reg::QueueDevice(Half::Low)),
    (0x0a4, Reg::QueueDevice(Half::High)),
    (0x0fc, Reg::ConfigGeneration),
];

/// One line for everything, and a register that says what for.
struct Line {
    status: AtomicU32,
    irq: Irq,
}

impl Line {
    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        self.irq.raise();
    }
}

impl Interrupt for Line {
    fn queue(&self, _index: u16) {
        self.raise(USED_RING);
    }

    fn config(&self) {
        self.raise(CONFIG_CHANGE);
    }
}

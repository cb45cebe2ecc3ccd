//! Virtio over PCI (VIRTIO 1.2, section 4.1): a function with one region for all structures, and a vector for the
//! configuration and for each queue.
//!
//! Left out on purpose: the legacy interface and transitional devices (section 4.1.4.10), the INTx line and with it the
//! queue bit of the ISR status (the function has MSI-X only), notification data and queue reset (features that are not
//! offered), and shared memory regions (they would be a BAR of their own).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use bus::Irq;
use bus::pci::{BarKind, Config, Function, Identity, MsiRouter, Msix, msix};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::Wiring;
use super::core::{Core, CoreState, Half, Reg};
use crate::device::{Interrupt, Kind, VirtioDevice};

/// Section 4.1.2: the vendor of all virtio devices, and what is added to a device's type.
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// The lowest subsystem of a device that is not transitional (section 4.1.2.1).
const SUBSYSTEM: u16 = 0x40;

/// The region: its BAR, its bytes, and where in it the structures lie, each in pages of its own.
const BAR: usize = 0;
const REGION: u64 = 0x8000;
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
pub(crate) const DEVICE: u64 = 0x2000;
pub(crate) const NOTIFY: u64 = 0x3000;
const MSIX: u64 = 0x4000;
const MSIX_END: u64 = MSIX + msix::REGION;
/// Bytes from the notification of one queue to that of the next.
pub(crate) const NOTIFY_STEP: u16 = 4;

/// Where a driver writes which vectors it has chosen.
pub(crate) const CONFIG_VECTOR: u64 = 0x10;
pub(crate) const QUEUE_VECTOR: u64 = 0x1a;

/// Types of structure (section 4.1.4), and how many bytes those have that are shorter than their pages.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
const COMMON_LENGTH: u64 = 0x3c;
const ISR_LENGTH: u64 = 1;

/// A vendor's capability, and registers of the one with which a driver reaches the region through configuration space
/// (section 4.1.4.9), as offsets in it.
const VENDOR_CAPABILITY: u8 = 9;
const ACCESS_BAR: usize = 4;
const ACCESS_OFFSET: usize = 8;
const ACCESS_LENGTH: usize = 12;
const ACCESS_DATA: usize = 16;

/// The vector that is none, and the bit of the ISR status that says that the configuration has changed.
const NO_VECTOR: u16 = 0xffff;
const CONFIG_CHANGE: u8 = 2;

/// A device behind a PCI function.
pub struct Pci<D: VirtioDevice> {
    core: Core<D>,
    config: Config,
    msix: Msix,
    vectors: Arc<Vectors>,
    /// Where the capability begins that reaches the region through configuration space.
    access: usize,
}

/// Bytes of the configuration space and of the region of MSI-X, as far as they are saved.
const SPACE: usize = 256;
#[expect(clippy::cast_possible_truncation, reason = "two pages")]
const MSIX_BYTES: usize = msix::REGION as usize;

/// A device and its function as they were saved.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciState {
    core: CoreState,
    /// The configuration space.
    config: Vec<u8>,
    /// The table of interrupt vectors, and which are pending, as the guest reads them.
    msix: Vec<u8>,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
}

impl<D: VirtioDevice> Pci<D> {
    /// A function that is not on a bus yet. `router` takes its vectors to the processors.
    ///
    /// # Errors
    ///
    /// The host has no room for an eventfd a queue and another a vector, or the machine has no interrupt routes left.
    pub fn new(device: D, wiring: Wiring, router: Arc<dyn MsiRouter>) -> io::Result<Self> {
        let kind = device.kind();
        let mut config = Config::new(Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE + u16::from(kind as u8),
            revision: 1,
            class: class(kind),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        config.add_bar(BAR, BarKind::Memory32, REGION);
        add_structure(&mut config, COMMON_CFG, COMMON, COMMON_LENGTH);
        add_structure(&mut config, ISR_CFG, ISR, ISR_LENGTH);
        if !device.config().is_empty() {
            add_structure(&mut config, DEVICE_CFG, DEVICE, PAGE);
        }
        let mut notify = structure(NOTIFY_CFG, NOTIFY, PAGE, 4);
        notify.extend(u32::from(NOTIFY_STEP).to_le_bytes());
        config.add_capability(VENDOR_CAPABILITY, &notify, &[]);
        let mut access = structure(PCI_CFG, 0, 0, 4);
        access.extend([0; 4]);
        // The BAR, the offset and the length are the driver's to write; the data are not kept here.
        let writable = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let access = config.add_capability(VENDOR_CAPABILITY, &access, &writable);

        let queues = device.queue_sizes().len();
        let place = (u32::try_from(BAR).expect("one of six"), u32::try_from(MSIX).expect("in the region"));
        let msix = Msix::new(&mut config, place, (queues + 1).min(msix::MOST_VECTORS), router)?;
        let vectors = Arc::new(Vectors::new(&msix, queues)?);
        let core = Core::new(device, wiring, vectors.clone())?;
        Ok(Self { core, config, msix, vectors, access })
    }

    /// The eventfds of the queues' notifications, each for any write to its guest-physical address. The function must
    /// be on a bus.
    pub fn kicks(&self) -> impl Iterator<Item = (u64, &EventFd)> {
        let region = self.config.bars()[0].address;
        (region + NOTIFY..).step_by(NOTIFY_STEP.into()).zip(self.core.kicks())
    }

    /// What is the same over every transport.
    pub fn core(&mut self) -> &mut Core<D> {
        &mut self.core
    }

    /// Stops the device and says what it and its function are in; see [`Core::save`].
    ///
    /// # Errors
    ///
    /// It cannot be saved, and goes on.
    pub fn save(&mut self) -> anyhow::Result<PciState> {
        let core = self.core.save()?;
        let (mut config, mut msix) = (vec![0; SPACE], vec![0; MSIX_BYTES]);
        self.config.read(0, &mut config);
        self.msix.read(0, &mut msix);
        let vectors = &*self.vectors;
        Ok(PciState {
            core,
            config,
            msix,
            config_vector: vectors.config.load(Ordering::Acquire),
            queue_vectors: vectors.queues.iter().map(|vector| vector.load(Ordering::Acquire)).collect(),
            isr: vectors.isr.load(Ordering::Acquire),
        })
    }

    /// Takes over what was saved; see [`Core::load`]. The function must be on a bus, and goes where it was there.
    ///
    /// # Errors
    ///
    /// It is no state of such a function.
    pub fn load(&mut self, state: PciState) -> anyhow::Result<()> {
        let PciState { core, config, msix, config_vector, queue_vectors, isr } = state;
        let fits = (config.len(), msix.len(), queue_vectors.len()) == (SPACE, MSIX_BYTES, self.vectors.queues.len());
        anyhow::ensure!(fits, "The state of a PCI function has too much or too little of something");
        self.core.load(core)?;
        // What a guest cannot write stays as it is here.
        self.config.write(0, &config);
        self.msix.load(&self.config, &msix);
        for (vector, value) in self.vectors.queues.iter().zip(queue_vectors) {
            vector.store(self.checked(value.into()), Ordering::Release);
        }
        self.vectors.config.store(self.checked(config_vector.into()), Ordering::Release);
        self.vectors.isr.store(isr & CONFIG_CHANGE, Ordering::Release);
        Ok(())
    }

    /// The eventfds of the vectors: the one that a driver takes for the configuration, then one for each queue.
    pub(crate) fn lines(&self) -> impl Iterator<Item = &EventFd> {
        (0..).map_while(|vector| self.msix.line(vector))
    }

    fn read_common(&self, offset: u64, width: usize) -> Option<u32> {
        let (field, field_width) = field(offset)?;
        if width != field_width {
            return None;
        }
        Some(match field {
            Field::Reg(register) => self.core.read(register),
            Field::ConfigVector => self.vectors.config.load(Ordering::Acquire).into(),
            Field::QueueVector => self.queue_vector().map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire)).into(),
            Field::QueueNotifyOffset => self.core.selected().unwrap_or(0).into(),
        })
    }

    fn write_common(&mut self, offset: u64, width: usize, value: u32) {
        let Some((field, _)) = field(offset).filter(|(_, field_width)| width == *field_width) else { return };
        match field {
            Field::Reg(register) => {
                self.core.write(register, value);
                if register == Reg::Status && value == 0 {
                    self.vectors.reset();
                }
            }
            Field::ConfigVector => self.vectors.config.store(self.checked(value), Ordering::Release),
            Field::QueueVector => {
                if let Some(vector) = self.queue_vector() {
                    vector.store(self.checked(value), Ordering::Release);
                }
            }
            Field::QueueNotifyOffset => {}
        }
    }

    fn queue_vector(&self) -> Option<&AtomicU16> {
        self.vectors.queues.get(usize::from(self.core.selected()?))
    }

    /// Section 4.1.5.1.2.1: a vector that there is not reads back as none, which tells the driver.
    fn checked(&self, vector: u32) -> u16 {
        u16::try_from(vector).ok().filter(|vector| usize::from(*vector) < self.msix.count()).unwrap_or(NO_VECTOR)
    }

    /// Where a driver that reaches the region through configuration space wants to go, and how many bytes it wants.
    fn access(&self) -> Option<(u64, usize)> {
        let register = |offset| self.config.u32_at(self.access + offset);
        let (bar, offset, length) = (register(ACCESS_BAR) & 0xff, register(ACCESS_OFFSET), register(ACCESS_LENGTH));
        let fits =
            bar == 0 && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length) && u64::from(offset) < REGION;
        fits.then(|| (offset.into(), usize::try_from(length).expect("4 at the most")))
    }
}

impl<D: VirtioDevice> Function for Pci<D> {
    fn config(&mut self) -> &mut Config {
        &mut self.config
    }

    fn read_config(&mut self, register: usize, data: &mut [u8]) {
        self.config.read(register, data);
        if register == self.access + ACCESS_DATA
            && let Some((offset, length)) = self.access()
            && let Some(data) = data.get_mut(..length)
        {
            self.read_bar(BAR, offset, data);
        }
    }

    fn write_config(&mut self, register: usize, data: &[u8]) {
        self.config.write(register, data);
        self.msix.follow(&self.config);
        if register == self.access + ACCESS_DATA
            && let Some((offset, length)) = self.access()
            && let Some(data) = data.get(..length)
        {
            self.write_bar(BAR, offset, data);
        }
    }

    fn read_bar(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            // Section 4.1.3.1: a field is accessed as wide as it is, one of 64 bits in halves too.
            COMMON..ISR => {
                for (part, at) in data.chunks_mut(4).zip((offset..).step_by(4)) {
                    let value = self.read_common(at, part.len()).unwrap_or(0);
                    part.copy_from_slice(&value.to_le_bytes()[..part.len()]);
                }
            }
            // Reading takes it back.
            ISR => data[0] = self.vectors.isr.swap(0, Ordering::AcqRel),
            DEVICE..NOTIFY => self.core.read_config(offset - DEVICE, data),
            MSIX..MSIX_END => self.msix.read(offset - MSIX, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => {
                for (part, at) in data.chunks(4).zip((offset..).step_by(4)) {
                    let mut value = [0; 4];
                    value[..part.len()].copy_from_slice(part);
                    self.write_common(at, part.len(), u32::from_le_bytes(value));
                }
            }
            DEVICE..NOTIFY => self.core.write_config(offset - DEVICE, data),
            // Section 4.1.5.2: the address says which queue, and the value says it again.
            NOTIFY..MSIX if offset.is_multiple_of(NOTIFY_STEP.into()) => {
                let index = (offset - NOTIFY) / u64::from(NOTIFY_STEP);
                self.core.write(Reg::QueueNotify, u32::try_from(index).expect("within a page"));
            }
            MSIX..MSIX_END => self.msix.write(offset - MSIX, data),
            _ => {}
        }
    }
}

/// A field of the common configuration structure.
enum Field {
    /// It is the same over every transport.
    Reg(Reg),
    ConfigVector,
    QueueVector,
    QueueNotifyOffset,
}

/// Section 4.1.4.3: what lies at an offset, and its bytes.
fn field(offset: u64) -> Option<(Field, usize)> {
    Some(match offset {
        0x00 => (Field::Reg(Reg::DeviceFeaturesSelect), 4),
        0x04 => (Field::Reg(Reg::DeviceFeatures), 4),
        0x08 => (Field::Reg(Reg::DriverFeaturesSelect), 4),
        0x0c => (Field::Reg(Reg::DriverFeatures), 4),
        CONFIG_VECTOR => (Field::ConfigVector, 2),
        0x12 => (Field::Reg(Reg::QueueCount), 2),
        0x14 => (Field::Reg(Reg::Status), 1),
        0x15 => (Field::Reg(Reg::ConfigGeneration), 1),
        0x16 => (Field::Reg(Reg::QueueSelect), 2),
        0x18 => (Field::Reg(Reg::QueueSize), 2),
        QUEUE_VECTOR => (Field::QueueVector, 2),
        0x1c => (Field::Reg(Reg::QueueEnable), 2),
        0x1e => (Field::QueueNotifyOffset, 2),
        0x20 => (Field::Reg(Reg::QueueDescriptors(Half::Low)), 4),
        0x24 => (Field::Reg(Reg::QueueDescriptors(Half::High)), 4),
        0x28 => (Field::Reg(Reg::QueueDriver(Half::Low)), 4),
        0x2c => (Field::Reg(Reg::QueueDriver(Half::High)), 4),
        0x30 => (Field::Reg(Reg::QueueDevice(Half::Low)), 4),
        0x34 => (Field::Reg(Reg::QueueDevice(Half::High)), 4),
        _ => return None,
    })
}

/// The reverse of [`field`]: where a register lies, and its bytes.
pub(crate) fn place(register: Reg) -> Option<(u64, usize)> {
    (COMMON..COMMON_LENGTH).find_map(|offset| match field(offset) {
        Some((Field::Reg(found), width)) if found == register => Some((offset, width)),
        _ => None,
    })
}

/// Section 4.1.4: what follows the pointer to the next capability in one that says where a structure is.
fn structure(kind: u8, offset: u64, length: u64, more: u8) -> Vec<u8> {
    let short = |value: u64| u32::try_from(value).expect("in the region").to_le_bytes();
    let bar = u8::try_from(BAR).expect("one of six");
    let mut body = vec![16 + more, kind, bar, 0, 0, 0];
    body.extend(short(offset));
    body.extend(short(length));
    body
}

fn add_structure(config: &mut Config, kind: u8, offset: u64, length: u64) {
    config.add_capability(VENDOR_CAPABILITY, &structure(kind, offset, length, 0), &[]);
}

/// The class that PCI has for it (Code and ID Assignment 1.11), for those who list devices; drivers look at the
/// identity.
fn class(kind: Kind) -> u32 {
    match kind {
        Kind::Net => 0x02_00_00,
        Kind::Block | Kind::Fs => 0x01_80_00,
        Kind::Console => 0x07_80_00,
        Kind::Vsock => 0x02_80_00,
        Kind::Rng | Kind::Balloon => 0xff_00_00,
        Kind::Pmem => 0x05_80_00,
    }
}

/// How interrupts leave: the line of the vector that the driver has chosen, if it has.
struct Vectors {
    lines: Vec<Irq>,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    isr: AtomicU8,
}

impl Vectors {
    fn new(msix: &Msix, queues: usize) -> io::Result<Self> {
        let lines = (0..).map_while(|vector| msix.line(vector)).map(|line| Ok(Irq::new(line.try_clone()?)));
        let none = || AtomicU16::new(NO_VECTOR);
        let queues = (0..queues).map(|_| none()).collect();
        Ok(Self { lines: lines.collect::<io::Result<_>>()?, config: none(), queues, isr: AtomicU8::new(0) })
    }

    fn reset(&self) {
        for vector in self.queues.iter().chain([&self.config]) {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
    }

    fn irq(&self, vector: &AtomicU16) -> Option<&Irq> {
        self.lines.get(usize::from(vector.load(Ordering::Acquire)))
    }
}

impl Interrupt for Vectors {
    fn queue(&self, index: u16) {
        if let Some(irq) = self.queues.get(usize::from(index)).and_then(|vector| self.irq(vector)) {
            irq.raise();
        }
    }

    fn config(&self) {
        self.isr.fetch_or(CONFIG_CHANGE, Ordering::AcqRel);
        if let Some(irq) = self.irq(&self.config) {
            irq.raise();
        }
    }

    fn line(&self, index: u16) -> Option<EventFd> {
        self.irq(self.queues.get(usize::from(index))?)?.line().try_clone().ok()
    }
}

#[cfg(test)]
#[path = "pci/tests.rs"]
mod tests;

//! What every transport does: the status machine, feature negotiation, queue set-up, start and reset (VIRTIO 1.2,
//! sections 2.1, 2.2, 2.5, 2.7 and 3.1).
//!
//! A register write that the specification forbids at its time is dropped; a driver cannot be told more than that. What
//! a driver does wrong at DRIVER_OK or later ends in NEEDS_RESET, and a reset always works.

mod snapshot;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fmt, io};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use self::snapshot::CoreState;

use super::Wiring;
use crate::device::{Active, ConfigChange, Interrupt, Kind, VirtioDevice, features};
use crate::io_thread::{OnFault, Ticket, downcast};
use crate::queue::{Registers, VirtQueue};

/// Device status bits (section 2.1).
pub mod status {
    /// The driver has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is set up: the device runs.
    pub const DRIVER_OK: u8 = 4;
    /// Both agree on the features.
    pub const FEATURES_OK: u8 = 8;
    /// The device has given up.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

/// The registers that every transport has, in words of 32 bits whatever their width on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reg {
    /// Which half of the offered features is read.
    DeviceFeaturesSelect,
    /// The features that are offered. Read-only.
    DeviceFeatures,
    /// Which half of the accepted features is written.
    DriverFeaturesSelect,
    /// The features that the driver accepts.
    DriverFeatures,
    /// The device status; 0 resets.
    Status,
    /// Changes with the configuration space. Read-only.
    ConfigGeneration,
    /// How many queues there are. Read-only.
    QueueCount,
    /// Which queue the registers below are about.
    QueueSelect,
    /// The largest size of the queue, 0 if there is no such queue. Read-only.
    QueueSizeMax,
    /// The size of the queue.
    QueueSize,
    /// Whether the queue is enabled.
    QueueEnable,
    /// The address of the descriptor table.
    QueueDescriptors(Half),
    /// The address of the available ring.
    QueueDriver(Half),
    /// The address of the used ring.
    QueueDevice(Half),
    /// The number of a queue with something new. Write-only.
    QueueNotify,
}

/// Half of a register of 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum Half {
    Low,
    High,
}

/// A device with the state that the specification gives to each.
pub struct Core<D: VirtioDevice> {
    device: D,
    wiring: Wiring,
    interrupt: Arc<dyn Interrupt>,
    offered: u64,
    accepted: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    status: u8,
    queues: Vec<QueueSlot>,
    generation: Arc<AtomicU32>,
    fault: Arc<Fault>,
    running: Option<Ticket>,
}

struct QueueSlot {
    max_size: u16,
    kick: Arc<EventFd>,
    registers: Registers,
}

impl<D: VirtioDevice> Core<D> {
    /// A device after reset.
    ///
    /// # Errors
    ///
    /// The host has no room for an eventfd a queue.
    pub fn new(device: D, wiring: Wiring, interrupt: Arc<dyn Interrupt>) -> io::Result<Self> {
        let offered = device.features() | device.ring_features() | features::VERSION_1;
        let mut queues = Vec::new();
        for &max_size in device.queue_sizes() {
            assert!(max_size.is_power_of_two() && max_size <= 1024, "a queue's size is a power of two, at most 1024");
            let kick = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
            queues.push(QueueSlot { max_size, kick, registers: Registers { size: max_size, ..Registers::default() } });
        }
        let fault = Arc::new(Fault { name: format!("{} ({})", wiring.name, device.kind()), ..Fault::default() });
        Ok(Self {
            device,
            wiring,
            interrupt,
            offered,
            accepted: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            status: 0,
            queues,
            generation: Arc::default(),
            fault,
            running: None,
        })
    }

    /// What the guest finds.
    pub fn kind(&self) -> Kind {
        self.device.kind()
    }

    /// The eventfds that wake the device, one a queue by its index: what a write to the queue's notification does.
    pub fn kicks(&self) -> impl Iterator<Item = &EventFd> {
        self.queues.iter().map(|queue| &*queue.kick)
    }

    /// The queue that [`Reg::QueueSelect`] has selected, if there is such a queue.
    pub fn selected(&self) -> Option<u16> {
        u16::try_from(self.queue_select).ok().filter(|index| usize::from(*index) < self.queues.len())
    }

    /// The range of the shared memory region `id`.
    pub fn shared_memory(&self, id: u8) -> Option<Range<u64>> {
        self.device.shared_memory(id)
    }

    /// Has the owner of the machine look at the device or change it, with its handler if it runs: the handler comes
    /// back for as long as `f` takes, so keep it short.
    pub fn control<R>(&mut self, f: impl FnOnce(&mut D, Option<&mut D::Handler>) -> R) -> R {
        let Some(ticket) = self.running else {
            return f(&mut self.device, None);
        };
        let mut handler = self.wiring.io_thread.remove(ticket);
        let any: &mut dyn std::any::Any = &mut *handler;
        let result = f(&mut self.device, any.downcast_mut());
        self.hand_over(handler, ticket);
        result
    }

    /// Tells the driver, if there is one, that the configuration space has changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        if self.running.is_some() {
            self.interrupt.config();
        }
    }

    /// The guest reads a register. What there is not reads as 0.
    pub fn read(&self, register: Reg) -> u32 {
        let queue = self.queue();
        let address = |field: fn(&Registers) -> u64, half| queue.map_or(0, |queue| get(field(&queue.registers), half));
        match register {
            Reg::DeviceFeaturesSelect => self.device_features_select,
            Reg::DeviceFeatures => half_of(self.device_features_select).map_or(0, |half| get(self.offered, half)),
            Reg::DriverFeaturesSelect => self.driver_features_select,
            Reg::DriverFeatures => half_of(self.driver_features_select).map_or(0, |half| get(self.accepted, half)),
            Reg::Status => self.status().into(),
            Reg::ConfigGeneration => self.generation.load(Ordering::Acquire),
            Reg::QueueCount => u32::try_from(self.queues.len()).expect("a device has few queues"),
            Reg::QueueSelect => self.queue_select,
            Reg::QueueSizeMax => queue.map_or(0, |queue| queue.max_size.into()),
            Reg::QueueSize => queue.map_or(0, |queue| queue.registers.size.into()),
            Reg::QueueEnable => queue.is_some_and(|queue| queue.registers.enabled).into(),
            Reg::QueueDescriptors(half) => address(|registers| registers.descriptors, half),
            Reg::QueueDriver(half) => address(|registers| registers.driver, half),
            Reg::QueueDevice(half) => address(|registers| registers.device, half),
            Reg::QueueNotify => 0,
        }
    }

    /// The guest writes a register.
    pub fn write(&mut self, register: Reg, value: u32) {
        match register {
            Reg::DeviceFeaturesSelect => self.device_features_select = value,
            Reg::DriverFeaturesSelect => self.driver_features_select = value,
            Reg::QueueSelect => self.queue_select = value,
            Reg::Status => self.write_status(value),
            Reg::QueueNotify => self.notify(value),
            Reg::DriverFeatures => {
                // Section 3.1.1: what is negotiated stays so.
                if self.status & status::FEATURES_OK == 0
                    && let Some(half) = half_of(self.driver_features_select)
                {
                    set(&mut self.accepted, half, value);
                }
            }
            Reg::QueueSize | Reg::QueueEnable => self.write_queue(register, value),
            Reg::QueueDescriptors(_) | Reg::QueueDriver(_) | Reg::QueueDevice(_) => self.write_queue(register, value),
            Reg::DeviceFeatures | Reg::ConfigGeneration | Reg::QueueCount | Reg::QueueSizeMax => {}
        }
    }

    /// The guest reads the configuration space. Beyond its end there are zeros.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.device.config();
        let offset = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        let there = &config[offset..config.len().min(offset.saturating_add(data.len()))];
        data.fill(0);
        data[..there.len()].copy_from_slice(there);
    }

    /// The guest writes to the configuration space. A write that reaches beyond its end is dropped.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        if offset.checked_add(data.len()).is_some_and(|end| end <= self.device.config().len()) {
            self.device.write_config(offset, data);
        }
    }

    fn queue(&self) -> Option<&QueueSlot> {
        self.selected().map(|index| &self.queues[usize::from(index)])
    }

    fn status(&self) -> u8 {
        match self.fault.happened.load(Ordering::Acquire) {
            true => self.status | status::NEEDS_RESET,
            false => self.status,
        }
    }

    /// Section 3.1.1: the bits are set one after the other, and taken back only by a reset.
    fn write_status(&mut self, value: u32) {
        let Ok(value) = u8::try_from(value) else { return };
        if value == 0 {
            return self.reset();
        }
        self.status |= value & (status::ACKNOWLEDGE | status::FAILED);
        self.step(value, status::DRIVER, status::ACKNOWLEDGE);
        let fits = self.accepted & !self.offered == 0 && self.accepted & features::VERSION_1 != 0;
        if fits {
            self.step(value, status::FEATURES_OK, status::DRIVER);
        }
        if self.step(value, status::DRIVER_OK, status::FEATURES_OK) {
            self.start();
        }
    }

    /// Sets `bit` if the driver asks for it and `before` is there. Whether it is new.
    fn step(&mut self, value: u8, bit: u8, before: u8) -> bool {
        let new = value & bit != 0 && self.status & before != 0 && self.status & bit == 0;
        self.status |= if new { bit } else { 0 };
        new
    }

    fn notify(&self, index: u32) {
        let queue = usize::try_from(index).ok().and_then(|index| self.queues.get(index));
        if let Some(queue) = queue {
            // The one error is a full counter: then the device is awake anyway.
            let _ = queue.kick.write(1);
        }
    }

    /// Sections 4.1.4.3.2 and 4.2.2.2: a queue is set up between FEATURES_OK and DRIVER_OK, and while it is disabled.
    fn write_queue(&mut self, register: Reg, value: u32) {
        let Some(index) = self.selected() else { return };
        let slot = &mut self.queues[usize::from(index)];
        let registers = &mut slot.registers;
        if self.status & status::DRIVER_OK != 0 || (registers.enabled && register != Reg::QueueEnable) {
            return;
        }
        match register {
            // Kept as it was asked for, so that a size that no queue can have is a fault at DRIVER_OK and not another size.
            Reg::QueueSize => registers.size = u16::try_from(value).unwrap_or(0),
            Reg::QueueEnable => registers.enabled = value & 1 != 0,
            Reg::QueueDescriptors(half) => set(&mut registers.descriptors, half, value),
            Reg::QueueDriver(half) => set(&mut registers.driver, half, value),
            Reg::QueueDevice(half) => set(&mut registers.device, half, value),
            _ => {}
        }
    }

    fn start(&mut self) {
        match self.try_start() {
            Ok(handler) => {
                let ticket = Ticket::new();
                self.running = Some(ticket);
                self.hand_over(Box::new(handler), ticket);
                // What was made available before now, or before a snapshot, has no kick of its own.
                for queue in self.queues.iter().filter(|queue| queue.registers.enabled) {
                    let _ = queue.kick.write(1);
                }
            }
            Err(error) => {
                self.fault.report(&format_args!("{error:#}"));
                self.interrupt.config();
            }
        }
    }

    fn try_start(&mut self) -> anyhow::Result<D::Handler> {
        let mut queues = Vec::new();
        for (slot, index) in self.queues.iter().zip(0..).filter(|(slot, _)| slot.registers.enabled) {
            let asked = (&slot.registers, slot.max_size);
            let (memory, interrupt) = (self.wiring.memory.clone(), self.interrupt.clone());
            queues.push(VirtQueue::new(index, asked, self.accepted, memory, slot.kick.clone(), interrupt)?);
        }
        self.device.start(Active {
            memory: self.wiring.memory.clone(),
            queues,
            features: self.accepted,
            config_change: ConfigChange { generation: self.generation.clone(), interrupt: self.interrupt.clone() },
        })
    }

    /// Gives a handler to its thread. One that was parked there stays so: its device needs a reset.
    fn hand_over(&mut self, handler: Box<dyn crate::device::Handler>, ticket: Ticket) {
        let (fault, interrupt) = (self.fault.clone(), self.interrupt.clone());
        let on_fault = move |error: &dyn fmt::Display| {
            fault.report(error);
            interrupt.config();
        };
        let parked = self.fault.happened.load(Ordering::Acquire);
        self.wiring.io_thread.insert(handler, ticket, (!parked).then(|| Box::new(on_fault) as OnFault));
    }

    /// Section 2.4: when this returns, nothing of the device runs and no buffer of the driver's is touched any more.
    fn reset(&mut self) {
        self.stop();
        self.device.reset();
        self.status = 0;
        self.fault.happened.store(false, Ordering::Release);
        self.accepted = 0;
        (self.device_features_select, self.driver_features_select, self.queue_select) = (0, 0, 0);
        for queue in &mut self.queues {
            queue.registers = Registers { size: queue.max_size, ..Registers::default() };
        }
    }

    fn stop(&mut self) {
        if let Some(ticket) = self.running.take() {
            let handler = downcast(self.wiring.io_thread.remove(ticket));
            drop(self.device.stop(handler));
        }
    }
}

impl<D: VirtioDevice> Drop for Core<D> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the I/O thread and the transport both know: that the device has stopped by a fault.
#[derive(Default)]
struct Fault {
    happened: AtomicBool,
    name: String,
    /// The second of the last line in the log.
    logged: AtomicU64,
}

impl Fault {
    /// A driver can reset and fault as often as it likes: one line in ten seconds.
    fn report(&self, error: &dyn fmt::Display) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs());
        let last = self.logged.load(Ordering::Relaxed);
        if now >= last.saturating_add(10) || now < last {
            self.logged.store(now, Ordering::Relaxed);
            log::warn!("The device {} has stopped until its driver resets it: {error}", self.name);
        }
        self.happened.store(true, Ordering::Release);
    }
}

fn half_of(select: u32) -> Option<Half> {
    match select {
        0 => Some(Half::Low),
        1 => Some(Half::High),
        _ => None,
    }
}

#[allow(clippy::cast_possible_truncation, reason = "half of the value is what is wanted")]
fn get(value: u64, half: Half) -> u32 {
    match half {
        Half::Low => value as u32,
        Half::High => (value >> 32) as u32,
    }
}

fn set(value: &mut u64, half: Half, to: u32) {
    *value = match half {
        Half::Low => *value & !0xffff_ffff | u64::from(to),
        Half::High => *value & 0xffff_ffff | u64::from(to) << 32,
    };
}

//! The driver's side of a device, for tests, fuzzing and benches: it negotiates through the registers, keeps rings in
//! guest memory, sends requests and waits for them to come back. It runs in the same process and needs no KVM.
//!
//! It is no model of a good driver: with [`Driver::add`] and the addresses of a [`Ring`] a test writes whatever it
//! likes. A device that does not answer is a panic at a deadline, as is an error of the host.

mod pci;

pub use pci::{PciRegisters, pci};

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bus::{BusDevice, Irq};
use kv::Size;
use memory::{MemorySpec, Ram};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{VirtioDevice, features};
use crate::io_thread::IoThread;
use crate::transport::mmio::{self, Mmio};
use crate::transport::{Half, Reg, Wiring, status};

/// How long a device may take before a test fails.
pub const DEADLINE: Duration = Duration::from_secs(20);
/// The most bytes in one buffer of [`Driver::send`].
pub const BUFFER: usize = 64 << 10;
/// How much RAM [`wiring`] makes. Only what is touched is there.
pub const RAM: u64 = 2 << 30;
/// Descriptor flags (section 2.7.5).
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// How the driver reaches the registers of a device: one implementation a transport.
pub trait Registers {
    /// Reads a register.
    fn read(&mut self, register: Reg) -> u32;
    /// Writes a register.
    fn write(&mut self, register: Reg, value: u32);
    /// Reads the configuration space.
    fn read_config(&mut self, offset: u64, data: &mut [u8]);
    /// Writes the configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// The irqfd of a queue, or of configuration changes.
    fn line(&self, queue: Option<u16>) -> &EventFd;
    /// What an interrupt handler does first.
    fn acknowledge(&mut self);
    /// Stops the device and saves it, registers and all.
    ///
    /// # Errors
    ///
    /// It cannot be saved.
    fn save(&mut self) -> anyhow::Result<Value>;
    /// Loads what was saved of another device of its kind.
    ///
    /// # Errors
    ///
    /// It is no such thing.
    fn load(&mut self, state: Value) -> anyhow::Result<()>;
    /// Has a device that was saved or loaded go on.
    fn resume(&mut self);
}

/// RAM that others can map, and an I/O thread for a device.
pub fn wiring() -> Wiring {
    let spec = MemorySpec { size: Size(RAM), shared: true, ..MemorySpec::default() };
    Wiring {
        memory: Arc::new(spec.map().expect("the host has address space")),
        io_thread: IoThread::spawn(0, || ()).expect("the host has threads"),
        name: "test".to_owned(),
    }
}

/// A device over MMIO, not yet reset, with a driver that has done nothing so far.
pub fn mmio<D: VirtioDevice>(device: D) -> Driver<MmioRegisters<D>> {
    let wiring = wiring();
    let memory = wiring.memory.clone();
    let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("the host has descriptors");
    let irq = Irq::new(line.try_clone().expect("the host has descriptors"));
    let device = Mmio::new(device, wiring, irq).expect("the host has descriptors");
    Driver { registers: MmioRegisters { device, line }, memory, rings: Vec::new(), accepted: 0 }
}

/// The registers of [`Mmio`].
pub struct MmioRegisters<D: VirtioDevice> {
    /// The device on its bus.
    pub device: Mmio<D>,
    line: EventFd,
}

impl<D: VirtioDevice> MmioRegisters<D> {
    /// Reads the word at an offset.
    pub fn read_word(&mut self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes the word at an offset.
    pub fn write_word(&mut self, offset: u32, value: u32) {
        self.device.write(offset.into(), &value.to_le_bytes());
    }
}

fn offset(register: Reg) -> Option<u32> {
    mmio::REGISTERS.iter().find(|(_, other)| *other == register).map(|(offset, _)| *offset)
}

impl<D: VirtioDevice> Registers for MmioRegisters<D> {
    fn read(&mut self, register: Reg) -> u32 {
        match offset(register) {
            Some(offset) => self.read_word(offset),
            // Section 4.2.2 has no register for it: the first queue without a size is one too far.
            None => (0..)
                .find(|index| {
                    self.write(Reg::QueueSelect, *index);
                    self.read(Reg::QueueSizeMax) == 0
                })
                .expect("a device has fewer than 2^32 queues"),
        }
    }

    fn write(&mut self, register: Reg, value: u32) {
        let offset = offset(register).expect("MMIO has every register that can be written");
        self.write_word(offset, value);
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.device.read(mmio::CONFIG + offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write(mmio::CONFIG + offset, data);
    }

    fn line(&self, _queue: Option<u16>) -> &EventFd {
        &self.line
    }

    fn acknowledge(&mut self) {
        let why = self.read_word(mmio::INTERRUPT_STATUS);
        self.write_word(mmio::INTERRUPT_ACK, why);
    }

    fn save(&mut self) -> anyhow::Result<Value> {
        Ok(serde_json::to_value(self.device.save()?)?)
    }

    fn load(&mut self, state: Value) -> anyhow::Result<()> {
        self.device.load(serde_json::from_value(state)?)
    }

    fn resume(&mut self) {
        self.device.core().resume();
    }
}

/// A driver of one device.
pub struct Driver<R> {
    /// The device's registers.
    pub registers: R,
    /// The guest's memory.
    pub memory: Arc<Ram>,
    /// What [`set_up`](Self::set_up) made, one a queue.
    pub rings: Vec<Ring>,
    accepted: u64,
}

/// A driver in the midst of its work, and the device as it was saved.
pub struct Saved {
    /// The device with its registers.
    pub state: Value,
    rings: Vec<Ring>,
    /// What lies in each ring, from its descriptors to its buffers.
    contents: Vec<Vec<u8>>,
    accepted: u64,
}

/// The driver's side of a queue.
#[derive(Clone, Debug)]
pub struct Ring {
    /// How many entries the rings have.
    pub size: u16,
    /// Where the descriptor table is.
    pub descriptors: u64,
    /// Where the available ring is.
    pub available: u64,
    /// Where the used ring is.
    pub used: u64,
    /// Where the buffers are, [`BUFFER`] bytes for each descriptor.
    pub buffers: u64,
    /// The available index, as the device shall see it.
    pub next_available: u16,
    /// How far the driver has looked at the used ring.
    pub next_used: u16,
    free: Vec<u16>,
}

/// A request that came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's first descriptor, as [`Driver::send`] returned it.
    pub head: u16,
    /// How many bytes the device says that it wrote.
    pub written: u32,
    /// As many bytes of the chain's writable buffers.
    pub data: Vec<u8>,
}

/// A descriptor as it stands in a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Where the buffer is.
    pub address: u64,
    /// How many bytes it has.
    pub length: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next descriptor of the chain.
    pub next: u16,
}

impl<R: Registers> Driver<R> {
    /// Resets the device, accepts what it offers of `wanted`, sets up all queues at their largest size, and starts it.
    ///
    /// # Panics
    ///
    /// The device refuses.
    pub fn boot(&mut self, wanted: u64) {
        self.reset();
        assert!(self.negotiate(wanted), "the device refuses its own features");
        self.set_up(u16::MAX);
        self.start();
    }

    /// Resets the device.
    pub fn reset(&mut self) {
        self.registers.write(Reg::Status, 0);
        assert_eq!(self.status(), 0, "a reset is over when the status reads as 0");
        self.rings.clear();
    }

    /// Saves device and driver. The device stands still until it is [resumed](Registers::resume).
    ///
    /// # Errors
    ///
    /// The device cannot be saved.
    ///
    /// # Panics
    ///
    /// Never: the rings lie in RAM.
    pub fn save(&mut self) -> anyhow::Result<Saved> {
        let state = self.registers.save()?;
        let content = |ring: &Ring| {
            let mut content = vec![0; ring.area()];
            self.memory.read_slice(&mut content, GuestAddress(ring.descriptors)).expect("rings lie in RAM");
            content
        };
        let contents = self.rings.iter().map(content).collect();
        Ok(Saved { state, rings: self.rings.clone(), contents, accepted: self.accepted })
    }

    /// Goes on where a driver of another device was saved.
    ///
    /// # Errors
    ///
    /// The device does not take the state.
    ///
    /// # Panics
    ///
    /// Never: the rings lie in RAM.
    pub fn load(&mut self, saved: &Saved) -> anyhow::Result<()> {
        for (ring, content) in saved.rings.iter().zip(&saved.contents) {
            self.memory.write_slice(content, GuestAddress(ring.descriptors)).expect("rings lie in RAM");
        }
        (self.rings, self.accepted) = (saved.rings.clone(), saved.accepted);
        self.registers.load(saved.state.clone())?;
        self.registers.resume();
        Ok(())
    }

    /// The features that the device offers.
    pub fn offered(&mut self) -> u64 {
        let mut half = |select| {
            self.registers.write(Reg::DeviceFeaturesSelect, select);
            u64::from(self.registers.read(Reg::DeviceFeatures))
        };
        half(0) | half(1) << 32
    }

    /// Goes from reset to FEATURES_OK with what is offered of `wanted`, and VERSION_1. Whether the device agrees.
    pub fn negotiate(&mut self, wanted: u64) -> bool {
        let features = self.offered() & (wanted | features::VERSION_1);
        self.insist(features)
    }

    /// Goes from reset to FEATURES_OK with `features`, offered or not. Whether the device agrees.
    pub fn insist(&mut self, features: u64) -> bool {
        self.accepted = features;
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.registers.write(Reg::DriverFeaturesSelect, select);
            self.registers.write(Reg::DriverFeatures, u32::try_from(half).expect("it is half of 64 bits"));
        }
        self.add_status(status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// Makes rings for every queue, at most `size` entries each, and enables the queues.
    pub fn set_up(&mut self, size: u16) {
        let count = self.registers.read(Reg::QueueCount);
        let mut place = 1 << 20;
        self.rings.clear();
        for index in 0..count {
            self.registers.write(Reg::QueueSelect, index);
            let max = u16::try_from(self.registers.read(Reg::QueueSizeMax)).expect("a queue's size has 16 bits");
            let ring = Ring::new(size.min(max), place);
            place = ring.buffers + u64::from(ring.size) * BUFFER as u64;
            assert!(place <= RAM, "the test's RAM is too small for all rings");
            let zeros = vec![0; ring.area()];
            self.memory.write_slice(&zeros, GuestAddress(ring.descriptors)).expect("rings lie in RAM");
            self.enable(&ring);
            self.rings.push(ring);
        }
    }

    /// Writes where the rings are to the registers of the selected queue, and enables it.
    pub fn enable(&mut self, ring: &Ring) {
        self.registers.write(Reg::QueueSize, ring.size.into());
        type Register = fn(Half) -> Reg;
        let areas: [(Register, u64); 3] = [
            (Reg::QueueDescriptors, ring.descriptors),
            (Reg::QueueDriver, ring.available),
            (Reg::QueueDevice, ring.used),
        ];
        for (register, address) in areas {
            let low = u32::try_from(address & 0xffff_ffff).expect("it is half of 64 bits");
            self.registers.write(register(Half::Low), low);
            self.registers.write(register(Half::High), u32::try_from(address >> 32).expect("it is half of 64 bits"));
        }
        self.registers.write(Reg::QueueEnable, 1);
    }

    /// Sets DRIVER_OK.
    pub fn start(&mut self) {
        self.add_status(status::DRIVER_OK);
    }

    /// Sets a bit of the device status.
    pub fn add_status(&mut self, bit: u8) {
        let status = self.status() | bit;
        self.registers.write(Reg::Status, status.into());
    }

    /// The device status.
    pub fn status(&mut self) -> u8 {
        u8::try_from(self.registers.read(Reg::Status)).expect("a status has 8 bits")
    }

    /// Waits until the device shows NEEDS_RESET, which it announces as a configuration change.
    pub fn wait_for_needs_reset(&mut self) {
        self.wait(None, "show NEEDS_RESET", |driver| (driver.status() & status::NEEDS_RESET != 0).then_some(()));
    }

    /// Sends a request, `readable` buffers for the device to read, then room of the `writable` lengths, and kicks.
    /// Returns the chain's head.
    pub fn send(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) -> u16 {
        let head = self.add(queue, readable, writable);
        self.kick(queue);
        head
    }

    /// As [`send`](Self::send) without the kick.
    pub fn add(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) -> u16 {
        let ring = &mut self.rings[usize::from(queue)];
        let count = readable.len() + writable.len();
        assert!(ring.free.len() >= count, "the ring is full");
        let indices = ring.free.split_off(ring.free.len() - count);
        let lengths = readable.iter().map(|data| data.len()).chain(writable.iter().copied());
        for (at, length) in lengths.enumerate() {
            assert!(length <= BUFFER, "a buffer has at most {BUFFER} bytes");
            let address = ring.buffer(indices[at]);
            let next = indices.get(at + 1).copied();
            let mut flags = if next.is_some() { NEXT } else { 0 };
            match readable.get(at) {
                Some(data) => self.memory.write_slice(data, GuestAddress(address)).expect("buffers lie in RAM"),
                None => flags |= WRITE,
            }
            let length = u32::try_from(length).expect("buffers are small");
            let descriptor = Descriptor { address, length, flags, next: next.unwrap_or(0) };
            descriptor.store(&self.memory, ring.descriptors, indices[at]);
        }
        ring.offer(&self.memory, indices[0]);
        indices[0]
    }

    /// Tells the device that there is something in a queue.
    pub fn kick(&mut self, queue: u16) {
        self.registers.write(Reg::QueueNotify, queue.into());
    }

    /// Waits for the next request to come back.
    pub fn collect(&mut self, queue: u16) -> Used {
        self.wait(Some(queue), "give a request back", |driver| driver.try_collect(queue))
    }

    /// The next request that has come back already. Afterwards the device interrupts for the one after it.
    pub fn try_collect(&mut self, queue: u16) -> Option<Used> {
        let event_idx = self.accepted & features::EVENT_IDX != 0;
        let ring = &mut self.rings[usize::from(queue)];
        if event_idx {
            ring.ask_for_interrupt(&self.memory, ring.next_used);
        }
        ring.take_used(&self.memory)
    }

    /// Waits until `check` has a result, looking at each interrupt of the queue and of the configuration.
    ///
    /// # Panics
    ///
    /// At the [`DEADLINE`].
    pub fn wait<T>(&mut self, queue: Option<u16>, what: &str, mut check: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(result) = check(self) {
                return result;
            }
            let lines = [self.registers.line(queue), self.registers.line(None)];
            assert!(readable(&lines, deadline), "the device did not {what} in time");
            self.interrupted(queue);
            if queue.is_some() {
                self.interrupted(None);
            }
        }
    }

    /// Waits for an interrupt of the queue or of the configuration, and takes it.
    ///
    /// # Panics
    ///
    /// At the [`DEADLINE`].
    pub fn wait_for_interrupt(&mut self, queue: Option<u16>) {
        let line = self.registers.line(queue);
        assert!(readable(&[line], Instant::now() + DEADLINE), "the device did not interrupt in time");
        self.interrupted(queue);
    }

    /// Whether an interrupt of the queue or of the configuration is pending; takes it.
    pub fn interrupted(&mut self, queue: Option<u16>) -> bool {
        let pending = self.registers.line(queue).read().is_ok();
        self.registers.acknowledge();
        pending
    }
}

impl Ring {
    /// Rings and buffers one after the other from `place` on.
    pub fn new(size: u16, place: u64) -> Self {
        let (descriptors, entries) = (place.next_multiple_of(1 << 16), u64::from(size));
        let available = descriptors + 16 * entries;
        let used = (available + 6 + 2 * entries).next_multiple_of(4);
        let buffers = (used + 6 + 8 * entries).next_multiple_of(1 << 16);
        let free = (0..size).rev().collect();
        Self { size, descriptors, available, used, buffers, next_available: 0, next_used: 0, free }
    }

    /// How many bytes the three areas take.
    fn area(&self) -> usize {
        usize::try_from(self.buffers - self.descriptors).expect("rings are small")
    }

    /// The buffer of a descriptor.
    pub fn buffer(&self, index: u16) -> u64 {
        self.buffers + u64::from(index) * BUFFER as u64
    }

    /// Makes the chain that begins at `head` available.
    pub fn offer(&mut self, memory: &Ram, head: u16) {
        let slot = self.available + 4 + 2 * u64::from(self.next_available % self.size);
        memory.write_obj(head, GuestAddress(slot)).expect("rings lie in RAM");
        self.publish(memory, self.next_available.wrapping_add(1));
    }

    /// Writes the available index, whatever it is.
    pub fn publish(&mut self, memory: &Ram, index: u16) {
        self.next_available = index;
        memory.store(index, GuestAddress(self.available + 2), Ordering::Release).expect("rings lie in RAM");
    }

    /// How many requests the device has given back, modulo 2^16.
    pub fn used_index(&self, memory: &Ram) -> u16 {
        memory.load(GuestAddress(self.used + 2), Ordering::Acquire).expect("rings lie in RAM")
    }

    /// Has the device interrupt when it gives back the request with this number.
    pub fn ask_for_interrupt(&self, memory: &Ram, number: u16) {
        let used_event = self.available + 4 + 2 * u64::from(self.size);
        memory.store(number, GuestAddress(used_event), Ordering::SeqCst).expect("rings lie in RAM");
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// With which request the device wants to be kicked again.
    pub fn kick_wanted_at(&self, memory: &Ram) -> u16 {
        let avail_event = self.used + 4 + 8 * u64::from(self.size);
        memory.load(GuestAddress(avail_event), Ordering::Acquire).expect("rings lie in RAM")
    }

    fn take_used(&mut self, memory: &Ram) -> Option<Used> {
        if self.used_index(memory) == self.next_used {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let [head, written]: [u32; 2] = memory.read_obj(GuestAddress(slot)).expect("rings lie in RAM");
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(head).expect("a head has 16 bits");
        let mut data = Vec::new();
        let mut index = head;
        loop {
            let descriptor = Descriptor::load(memory, self.descriptors, index);
            let left = written as usize - data.len();
            if descriptor.flags & WRITE != 0 && left > 0 {
                let mut piece = vec![0; left.min(descriptor.length as usize)];
                memory.read_slice(&mut piece, GuestAddress(descriptor.address)).expect("buffers lie in RAM");
                data.append(&mut piece);
            }
            self.free.push(index);
            if descriptor.flags & NEXT == 0 {
                return Some(Used { head, written, data });
            }
            index = descriptor.next;
        }
    }
}

impl Descriptor {
    /// Writes it to a table.
    pub fn store(&self, memory: &Ram, table: u64, index: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&self.address.to_le_bytes());
        raw[8..12].copy_from_slice(&self.length.to_le_bytes());
        raw[12..14].copy_from_slice(&self.flags.to_le_bytes());
        raw[14..].copy_from_slice(&self.next.to_le_bytes());
        memory.write_slice(&raw, GuestAddress(table + 16 * u64::from(index))).expect("tables lie in RAM");
    }

    fn load(memory: &Ram, table: u64, index: u16) -> Self {
        let at = |offset| GuestAddress(table + 16 * u64::from(index) + offset);
        Self {
            address: memory.read_obj(at(0)).expect("tables lie in RAM"),
            length: memory.read_obj(at(8)).expect("tables lie in RAM"),
            flags: memory.read_obj(at(12)).expect("tables lie in RAM"),
            next: memory.read_obj(at(14)).expect("tables lie in RAM"),
        }
    }
}

/// Waits until one of the lines can be read, or the time is over. They may be the same.
fn readable(lines: &[&EventFd], deadline: Instant) -> bool {
    let epoll = Epoll::new().expect("the host has descriptors");
    for line in lines {
        let event = EpollEvent::new(EventSet::IN, 0);
        match epoll.ctl(ControlOperation::Add, line.as_raw_fd(), event) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            result => result.expect("an eventfd can be watched"),
        }
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        match epoll.wait(limit, &mut [EpollEvent::default()]) {
            Ok(count) => return count > 0,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::Interrupted, "{error}"),
        }
    }
}

//! The places for a machine's devices: on the PCI bus, or behind memory-mapped registers.
//!
//! Devices are attached before there is a machine in KVM, because the tables that the kernel reads speak of them;
//! [`Slots::connect`] then takes their interrupts and doorbells to it. Each device has an I/O thread of its own.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use acpi_tables::Aml;
use acpi_tables::aml::{Device, Interrupt, Memory32Fixed, Name, ONE, ResourceTemplate};
use anyhow::Context;
use bus::pci::{self, Message, MsiRouter, Segment, Window};
use bus::{Bus, Irq};
use devices::{Attach, Transport};
use kvm::{Doorbell, MsiRoutes, Place, Value, Vm};
use memory::{FileRegion, Ram, layout};
use virtio::transport::{Handle, Mmio, Pci, Wiring, mmio};
use virtio::{IoThread, VirtioDevice};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::error::ConfigError;
use crate::machine::Lines;

/// What a kernel is told where there is no PCI bus, which it would look for.
const NO_PCI: &str = "pci=off";

/// A machine's places for devices, some of them taken.
pub(crate) struct Slots<'a> {
    /// Of those devices that do not say.
    transport: Transport,
    memory: Arc<Ram>,
    lines: &'a Lines,
    segment: Segment,
    /// Where large regions of PCI functions may lie.
    bars64: Range<u64>,
    routes: Arc<MsiRoutes>,
    windows: Vec<Window>,
    doorbells: Vec<(Doorbell, EventFd)>,
    /// Files that are guest memory, and the addresses that are left for more.
    files: Vec<(u64, Arc<FileRegion>)>,
    free: Range<u64>,
    /// What each I/O thread does first.
    at_start: fn(),
    /// How many devices there are, and how many of them have memory-mapped registers.
    attached: u32,
    mapped: u32,
    aml: Vec<u8>,
    /// What the kernel's command line says of the devices.
    announced: Vec<String>,
}

impl<'a> Slots<'a> {
    /// No place is taken yet.
    pub(crate) fn new(transport: Transport, ram: &Ram, lines: &'a Lines, address_bits: u8, at_start: fn()) -> Self {
        let size = ram.iter().map(GuestMemoryRegion::len).sum();
        let bars64 = layout::pci_bars64(size, address_bits);
        Self {
            transport,
            memory: Arc::new(ram.clone()),
            lines,
            segment: Segment::new(bars64.clone()),
            bars64,
            routes: Arc::default(),
            windows: Vec::new(),
            doorbells: Vec::new(),
            files: Vec::new(),
            free: layout::file_regions(size, address_bits),
            at_start,
            attached: 0,
            mapped: 0,
            aml: Vec::new(),
            announced: Vec::new(),
        }
    }

    /// Whether there is a PCI bus: only where something is on it, because looking for it costs a kernel time.
    pub(crate) fn has_pci(&self) -> bool {
        self.attached > self.mapped
    }

    /// What a kernel is to be told of the devices on its command line.
    pub(crate) fn kernel_parameters(&self) -> impl Iterator<Item = &str> {
        self.announced.iter().map(String::as_str).chain((!self.has_pci()).then_some(NO_PCI))
    }

    /// What the devices say of themselves in the DSDT.
    pub(crate) fn aml(&self) -> Vec<u8> {
        let mut aml = self.aml.clone();
        if self.has_pci() {
            pci::aml(&self.bars64, &mut aml);
        }
        aml
    }

    /// Takes interrupts and doorbells to the machine, and gives the bus of memory addresses with the devices on it.
    pub(crate) fn connect(self, vm: &mut Vm) -> anyhow::Result<Bus> {
        vm.connect_messages(&self.routes);
        for (doorbell, kick) in &self.doorbells {
            vm.connect_doorbell(*doorbell, kick)?;
        }
        for (address, file) in &self.files {
            vm.add_file(*address, file.clone())?;
        }
        let mut mmio = Bus::default();
        if self.has_pci() {
            mmio.insert(layout::PCI_ECAM, Segment::LENGTH, Arc::new(Mutex::new(self.segment)));
        }
        for Window { base, length, device } in self.windows {
            mmio.insert(base, length, device);
        }
        Ok(mmio)
    }

    fn attach_pci<D: VirtioDevice>(&mut self, device: D, wiring: Wiring) -> anyhow::Result<Handle<D>> {
        let function = Pci::new(device, wiring, Arc::new(Router(self.routes.clone())))?;
        let handle = Arc::new(Mutex::new(function));
        let windows = self.segment.add(handle.clone()).map_err(|error| ConfigError::NoPlace(error.to_string()))?;
        self.windows.extend(windows);
        let function = handle.lock().expect("nobody else knows it yet");
        for (address, kick) in function.kicks() {
            let doorbell = Doorbell { at: Place::Memory(address), value: Value::Any };
            self.doorbells.push((doorbell, kick.try_clone().context("Cannot duplicate an eventfd")?));
        }
        drop(function);
        Ok(handle)
    }

    /// Returns the way to the device, its number among its like, where its registers are, and its interrupt.
    fn attach_mmio<D: VirtioDevice>(
        &mut self,
        device: D,
        wiring: Wiring,
    ) -> anyhow::Result<(Handle<D>, u32, u64, u32)> {
        let number = self.mapped;
        let gsi = layout::VIRTIO_GSIS.start + number;
        if gsi >= layout::VIRTIO_GSIS.end {
            let places = layout::VIRTIO_GSIS.len();
            let why = format!("a machine has {places} places for devices with transport=mmio: use transport=pci");
            return Err(ConfigError::NoPlace(why).into());
        }
        let base = layout::VIRTIO_MMIO + u64::from(number) * mmio::WINDOW;
        let device = Mmio::new(device, wiring, Irq::new(self.lines.add(gsi)?))?;
        for (index, kick) in device.kicks() {
            let at = Place::Memory(base + mmio::QUEUE_NOTIFY);
            let doorbell = Doorbell { at, value: Value::U32(index.into()) };
            self.doorbells.push((doorbell, kick.try_clone().context("Cannot duplicate an eventfd")?));
        }
        let device = Arc::new(Mutex::new(device));
        self.windows.push(Window { base, length: mmio::WINDOW, device: device.clone() });
        self.mapped += 1;
        Ok((device, number, base, gsi))
    }

    /// VIRTIO 1.2, section 4.2.1 leaves it open how a device is found; this is the id that Linux's driver knows.
    fn announce_in_aml(&mut self, number: u32, base: u64, gsi: u32) {
        let low = |address: u64| u32::try_from(address).expect("below 4 GiB");
        let id = Name::new("_HID".into(), &"LNRO0005");
        let unique = Name::new("_UID".into(), &number);
        let coherent = Name::new("_CCA".into(), &ONE);
        let registers = Memory32Fixed::new(true, low(base), low(mmio::WINDOW));
        let interrupt = Interrupt::new(true, true, false, false, gsi);
        let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &interrupt]));
        let name = format!("_SB_.VI{number:02}");
        let children: Vec<&dyn Aml> = vec![&id, &unique, &coherent, &resources];
        Device::new(name.as_str().into(), children).to_aml_bytes(&mut self.aml);
    }
}

impl Attach for Slots<'_> {
    fn attach<D: VirtioDevice>(
        &mut self,
        name: String,
        transport: Option<Transport>,
        device: D,
    ) -> anyhow::Result<Handle<D>> {
        let io_thread = IoThread::spawn(self.attached, self.at_start).context("Cannot start an I/O thread")?;
        let wiring = Wiring { memory: self.memory.clone(), io_thread, name };
        let handle = match transport.unwrap_or(self.transport) {
            Transport::Pci => self.attach_pci(device, wiring)?,
            Transport::Mmio => {
                let (handle, number, base, gsi) = self.attach_mmio(device, wiring)?;
                self.announce_in_aml(number, base, gsi);
                handle
            }
            Transport::MmioCmdline => {
                let (handle, _, base, gsi) = self.attach_mmio(device, wiring)?;
                self.announced.push(format!("virtio_mmio.device={:#x}@{base:#x}:{gsi}", mmio::WINDOW));
                handle
            }
        };
        self.attached += 1;
        Ok(handle)
    }

    fn place(&mut self, file: Arc<FileRegion>) -> anyhow::Result<u64> {
        let (start, length) = (self.free.start, file.length());
        let end = start.checked_add(length).filter(|end| *end <= self.free.end);
        self.free.start = end.ok_or_else(|| {
            let why = format!("a file of {length:#x} bytes finds no place above the guest's RAM: take a smaller one");
            ConfigError::NoPlace(why)
        })?;
        self.files.push((start, file));
        Ok(start)
    }
}

/// KVM's routes as PCI functions see them.
struct Router(Arc<MsiRoutes>);

impl MsiRouter for Router {
    fn allocate(&self) -> io::Result<u32> {
        self.0.allocate()
    }

    fn route(&self, route: u32, message: Message) -> io::Result<()> {
        self.0.route(route, message.address, message.data)
    }

    fn connect(&self, route: u32, line: &EventFd) -> io::Result<()> {
        self.0.connect(route, line)
    }

    fn disconnect(&self, route: u32, line: &EventFd) -> io::Result<()> {
        self.0.disconnect(route, line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::Devices;
    use memory::MemorySpec;

    /// The places of a machine with the devices of these flags.
    fn with_places<T>(rngs: &[&str], transport: Transport, look: impl FnOnce(&Slots<'_>) -> T) -> T {
        let (ram, lines) = (MemorySpec::default().map().unwrap(), Lines::default());
        let mut slots = Slots::new(transport, &ram, &lines, 40, || ());
        let rng = rngs.iter().map(|text| kv::from_str(text).unwrap()).collect();
        Devices { rng, ..Devices::default() }.attach(None, None, &mut slots).unwrap();
        look(&slots)
    }

    fn mapped_in_acpi(slots: &Slots<'_>) -> usize {
        slots.aml().windows(8).filter(|bytes| bytes == b"LNRO0005").count()
    }

    #[test]
    fn each_device_is_where_it_says_and_the_others_where_the_machine_says() {
        let asked = ["transport=mmio", "", "transport=mmio-cmdline", "transport=pci"];
        for (transport, in_acpi, on_pci) in [(Transport::Pci, 1, true), (Transport::Mmio, 2, true)] {
            with_places(&asked, transport, |slots| {
                assert_eq!((mapped_in_acpi(slots), slots.has_pci()), (in_acpi, on_pci));
                let line: Vec<_> = slots.kernel_parameters().collect();
                assert_eq!(line, [format!("virtio_mmio.device=0x1000@0xd000{in_acpi}000:{}", 6 + in_acpi)]);
            });
        }
    }

    #[test]
    fn a_kernel_looks_for_a_pci_bus_only_where_a_device_is_on_it() {
        let says_none = |slots: &Slots<'_>| slots.kernel_parameters().any(|word| word == "pci=off");
        assert!(with_places(&[], Transport::Pci, says_none));
        assert!(with_places(&["transport=mmio"], Transport::Pci, says_none));
        assert!(!with_places(&["transport=pci"], Transport::Mmio, says_none));
    }
}

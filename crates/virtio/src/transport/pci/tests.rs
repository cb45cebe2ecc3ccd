//! The PCI transport over the driver's side.

use std::os::fd::AsRawFd as _;
use std::time::Instant;

use super::*;
use crate::device::{Active, GuestFault, Handler, features};
use crate::io_thread::Watch;
use crate::queue::VirtQueue;
use crate::testing::{DEADLINE, Driver, PciRegisters, Registers, pci};
use crate::transport::status;

/// A device with two queues, which gives back every request at once, filled with the queue's number.
struct Echo {
    config: Vec<u8>,
}

struct EchoHandler(Vec<VirtQueue>);

impl VirtioDevice for Echo {
    type Handler = EchoHandler;

    fn kind(&self) -> Kind {
        Kind::Vsock
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8, 16]
    }
    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config[offset..offset + data.len()].copy_from_slice(data);
    }
    fn start(&mut self, active: Active) -> anyhow::Result<EchoHandler> {
        Ok(EchoHandler(active.queues))
    }
    fn stop(&mut self, handler: EchoHandler) -> Vec<VirtQueue> {
        handler.0
    }
}

impl Handler for EchoHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        self.0.iter().try_for_each(|queue| watch.add(queue, queue.index().into()))
    }
    fn ready(&mut self, token: u32, _watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        for queue in self.0.iter_mut().filter(|queue| u32::from(queue.index()) == token) {
            queue.kicked();
            while let Some(chain) = queue.pop()? {
                queue.push(chain, 0);
            }
            queue.signal();
        }
        Ok(())
    }
}

fn echo() -> Driver<PciRegisters<Echo>> {
    pci(Echo { config: vec![1, 2, 3, 4, 5, 6, 7, 8] })
}

/// Waits for what comes without an interrupt.
fn until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
}

/// The capabilities of the function: register, id, and for those of virtio their type.
fn capabilities(registers: &mut PciRegisters<Echo>) -> Vec<(u64, u8, u8)> {
    let mut found = Vec::new();
    let [mut at] = registers.read_space(0x34);
    while at != 0 {
        let [id, next, _length, kind] = registers.read_space(at.into());
        found.push((at.into(), id, if id == VENDOR_CAPABILITY { kind } else { 0 }));
        at = next;
    }
    found
}

fn capability(registers: &mut PciRegisters<Echo>, kind: u8) -> u64 {
    capabilities(registers).iter().find(|found| found.2 == kind).unwrap().0
}

#[test]
fn the_function_is_a_virtio_device_of_its_type_that_is_not_transitional() {
    let mut driver = echo();
    assert_eq!(driver.registers.read_space(0), [0xf4, 0x1a, 0x53, 0x10]);
    assert_eq!(driver.registers.read_space::<4>(8)[0], 1);
    assert_eq!(driver.registers.read_space(0x2c), [0xf4, 0x1a, 0x40, 0]);
}

#[test]
fn every_structure_is_announced_inside_the_region_and_none_covers_another() {
    let mut driver = echo();
    let mut ranges = Vec::new();
    let mut kinds = Vec::new();
    for (at, id, kind) in capabilities(&mut driver.registers) {
        if id != VENDOR_CAPABILITY {
            continue;
        }
        kinds.push(kind);
        let [bar, _, _, _] = driver.registers.read_space(at + 4);
        let offset = u32::from_le_bytes(driver.registers.read_space(at + 8));
        let length = u32::from_le_bytes(driver.registers.read_space(at + 12));
        assert!(bar == 0 && u64::from(offset) + u64::from(length) <= MSIX);
        if kind != PCI_CFG {
            ranges.push(offset..offset + length);
        }
    }
    ranges.sort_by_key(|range| range.start);
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "{ranges:x?}");
    kinds.sort_unstable();
    assert_eq!(kinds, [COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG]);
    let notify = capability(&mut driver.registers, NOTIFY_CFG);
    assert_eq!(driver.registers.read_space(notify + 16), u32::from(NOTIFY_STEP).to_le_bytes());
}

#[test]
fn a_device_without_configuration_announces_none() {
    let mut driver = pci(Echo { config: Vec::new() });
    assert!(capabilities(&mut driver.registers).iter().all(|found| found.2 != DEVICE_CFG));
}

#[test]
fn a_request_goes_through_each_queue_and_interrupts_on_its_own_vector() {
    let mut driver = echo();
    driver.boot(features::EVENT_IDX);
    for queue in [0, 1] {
        let head = driver.send(queue, &[b"x"], &[1]);
        assert_eq!(driver.collect(queue).head, head);
    }
    driver.registers.write_at(NOTIFY + 2 * u64::from(NOTIFY_STEP), &[2, 0]);
    driver.registers.write_at(NOTIFY + 1, &[0, 0]);
    let head = driver.send(1, &[b"y"], &[]);
    assert_eq!(driver.collect(1).head, head);
    assert!(!driver.interrupted(Some(0)) && !driver.interrupted(None));
}

#[test]
fn vectors_that_there_are_not_read_back_as_none_and_a_reset_forgets_all() {
    let mut driver = echo();
    let vector = |driver: &mut Driver<PciRegisters<Echo>>, at| u16::from_le_bytes(driver.registers.read_at(at));
    for at in [CONFIG_VECTOR, QUEUE_VECTOR] {
        assert_eq!(vector(&mut driver, at), NO_VECTOR);
        driver.registers.write_at(at, &[2, 0]);
        assert_eq!(vector(&mut driver, at), 2);
        driver.registers.write_at(at, &[3, 0]);
        assert_eq!(vector(&mut driver, at), NO_VECTOR);
        driver.registers.write_at(at, &[1, 0]);
    }
    driver.registers.write(Reg::QueueSelect, 2);
    driver.registers.write_at(QUEUE_VECTOR, &[1, 0]);
    assert_eq!(vector(&mut driver, QUEUE_VECTOR), NO_VECTOR, "a queue that there is not");
    driver.reset();
    assert_eq!((vector(&mut driver, CONFIG_VECTOR), vector(&mut driver, QUEUE_VECTOR)), (NO_VECTOR, NO_VECTOR));
}

#[test]
fn a_queue_without_a_vector_is_served_and_interrupts_nobody() {
    let mut driver = echo();
    driver.boot(0);
    driver.registers.write(Reg::QueueSelect, 0);
    driver.registers.write_at(QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
    driver.send(0, &[b"x"], &[]);
    // Queue 1 is served by the same thread, so after it queue 0 has been.
    driver.send(1, &[b"x"], &[]);
    driver.collect(1);
    until(|| driver.try_collect(0).is_some());
    assert!(!driver.interrupted(Some(0)));
}

#[test]
fn a_change_of_the_configuration_shows_in_the_generation_and_the_isr_status_once() {
    let mut driver = echo();
    driver.boot(0);
    let before = driver.registers.read(Reg::ConfigGeneration);
    driver.registers.device.lock().unwrap().core().config_changed();
    assert!(driver.interrupted(None));
    assert_ne!(driver.registers.read(Reg::ConfigGeneration), before);
    assert_eq!(driver.registers.read_at(ISR), [CONFIG_CHANGE]);
    assert_eq!(driver.registers.read_at(ISR), [0]);
}

#[test]
fn a_faulty_ring_ends_in_needs_reset_and_a_reset_starts_anew() {
    let mut driver = echo();
    driver.boot(0);
    let ring = &mut driver.rings[0];
    ring.publish(&driver.memory, 1000);
    driver.kick(0);
    driver.wait_for_needs_reset();
    driver.boot(0);
    let head = driver.send(0, &[b"x"], &[]);
    assert_eq!(driver.collect(0).head, head);
}

#[test]
fn fields_are_accessed_as_wide_as_they_are_and_addresses_in_one_piece_too() {
    let mut driver = echo();
    driver.registers.write_at(0x20, &0x1122_3344_5566_7780u64.to_le_bytes());
    assert_eq!(driver.registers.read_at(0x20), 0x1122_3344_5566_7780u64.to_le_bytes());
    assert_eq!(driver.registers.read_at(0x24), 0x1122_3344u32.to_le_bytes());
    // Too wide, too narrow, askew: nothing.
    assert_eq!(driver.registers.read_at(0x14), [0; 4]);
    assert_eq!(driver.registers.read_at(0x20), [0; 2]);
    assert_eq!(driver.registers.read_at(0x21), [0; 4]);
    driver.registers.write_at(0x14, &[status::ACKNOWLEDGE; 2]);
    driver.registers.write_at(0x22, &[0xff; 4]);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.registers.read_at(0x20), 0x5566_7780u32.to_le_bytes());
}

#[test]
fn an_access_of_any_width_anywhere_in_the_region_is_answered() {
    let mut driver = echo();
    for offset in 0..REGION {
        for width in [1, 2, 4, 8] {
            let mut data = [0xee; 8];
            let mut region = driver.registers.region.lock().unwrap();
            region.write(offset, &data[..width]);
            region.read(offset, &mut data[..width]);
        }
    }
    driver.reset();
    driver.boot(0);
}

#[test]
fn the_region_can_be_reached_through_configuration_space() {
    let mut driver = echo();
    let at = capability(&mut driver.registers, PCI_CFG);
    let select = |registers: &mut PciRegisters<Echo>, bar: u8, offset: u32, length: u32| {
        registers.write_space(at + 4, &[bar]);
        registers.write_space(at + 8, &offset.to_le_bytes());
        registers.write_space(at + 12, &length.to_le_bytes());
    };
    let registers = &mut driver.registers;
    select(registers, 0, u32::try_from(DEVICE).unwrap(), 4);
    assert_eq!(registers.read_space(at + 16), [1, 2, 3, 4]);
    registers.write_space(at + 16, &[9, 8, 7, 6]);
    assert_eq!(registers.read_at(DEVICE), [9, 8, 7, 6]);
    select(registers, 0, 0x14, 1);
    registers.write_space(at + 16, &[status::ACKNOWLEDGE, 0xff, 0xff, 0xff]);
    assert_eq!(registers.read_space(at + 16), [status::ACKNOWLEDGE, 0, 0, 0]);
    for (bar, offset, length) in
        [(1, 0x14, 1), (0, 0x14, 3), (0, 0x15, 2), (0, 0x8000, 4), (0, u32::MAX, 1), (0, 0x14, 0), (0, 0x14, u32::MAX)]
    {
        select(registers, bar, offset, length);
        registers.write_space(at + 16, &[0; 4]);
        assert_eq!(registers.read_space(at + 16), [0; 4]);
    }
    assert_eq!(driver.status(), status::ACKNOWLEDGE);
}

#[test]
fn each_queue_has_a_notification_of_its_own_whose_kick_is_the_queues() {
    let mut driver = echo();
    let offset = |driver: &mut Driver<PciRegisters<Echo>>, queue| {
        driver.registers.write(Reg::QueueSelect, queue);
        u16::from_le_bytes(driver.registers.read_at(0x1e))
    };
    assert_eq!((offset(&mut driver, 0), offset(&mut driver, 1)), (0, 1));
    let region = u64::from(u32::from_le_bytes(driver.registers.read_space(0x10)));
    let device = driver.registers.device.lock().unwrap();
    let kicks: Vec<_> = device.kicks().map(|(address, kick)| (address - region - NOTIFY, kick.as_raw_fd())).collect();
    let own: Vec<_> = device.core.kicks().map(|kick| kick.as_raw_fd()).collect();
    assert_eq!(kicks, [(0, own[0]), (4, own[1])]);
}

#[test]
fn msix_has_a_vector_for_the_configuration_and_each_queue_in_the_region() {
    let mut driver = echo();
    let at = capabilities(&mut driver.registers).iter().find(|found| found.1 == 0x11).unwrap().0;
    assert_eq!(driver.registers.read_space(at + 2), [2, 0]);
    let table = u32::from_le_bytes(driver.registers.read_space(at + 4));
    assert_eq!(u64::from(table), MSIX);
    // Enabled, with vector 1 unmasked: it is connected, which its pending bit shows.
    let pending = |driver: &mut Driver<PciRegisters<Echo>>| driver.registers.read_at::<1>(MSIX + PAGE);
    driver.registers.write_space(at + 2, &[0, 0x80]);
    driver.boot(0);
    driver.send(0, &[b"x"], &[]);
    until(|| pending(&mut driver) == [0b10]);
    driver.registers.write_at(MSIX + 16 + 12, &[0; 4]);
    assert_eq!(pending(&mut driver), [0]);
}

#[test]
fn a_region_that_the_guest_has_moved_or_turned_off_is_not_there() {
    let mut driver = echo();
    driver.registers.write_space(4, &[0, 0]);
    assert_eq!(driver.registers.read_at(0x12), [0xff; 2]);
    driver.registers.write_space(4, &[6, 0]);
    assert_eq!(driver.registers.read_at(0x12), [2, 0]);
    let placed: [u8; 4] = driver.registers.read_space(0x10);
    driver.registers.write_space(0x10, &[0xff; 4]);
    assert_eq!(driver.registers.read_space(0x10), (!(u32::try_from(REGION).unwrap() - 1)).to_le_bytes());
    assert_eq!(driver.registers.read_at(0x12), [0xff; 2]);
    driver.registers.write_space(0x10, &placed);
    assert_eq!(driver.registers.read_at(0x12), [2, 0]);
}

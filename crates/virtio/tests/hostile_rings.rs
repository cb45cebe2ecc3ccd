//! What a driver can put into its rings to harm us, and that each ends in NEEDS_RESET, from which a reset leads out.

mod support;

use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;

use support::{EchoDriver, assert_echoes, echo, wait_until_seen};
use virtio::features::{EVENT_IDX, INDIRECT_DESC};
use virtio::testing::{DEADLINE, Descriptor, INDIRECT, NEXT, RAM, WRITE};
use virtio::transport::status;
use vm_memory::{Bytes, GuestAddress};

const GOOD: Descriptor = Descriptor { address: 0x10_0000, length: 16, flags: 0, next: 0 };

/// Starts a device, offers it the chain at descriptor 0 of a table that holds `descriptors`, and wants it to stop; then
/// wants it to run again after a reset.
fn assert_fault(descriptors: &[Descriptor]) {
    assert_fault_with(|driver| {
        for (descriptor, index) in descriptors.iter().zip(0..) {
            descriptor.store(&driver.memory, driver.rings[0].descriptors, index);
        }
        driver.rings[0].offer(&driver.memory, 0);
    });
}

fn assert_fault_with(prepare: impl FnOnce(&mut EchoDriver)) {
    let (mut driver, _) = echo();
    driver.boot(INDIRECT_DESC | EVENT_IDX);
    prepare(&mut driver);
    driver.kick(0);
    driver.wait_for_needs_reset();
    driver.boot(INDIRECT_DESC | EVENT_IDX);
    assert_echoes(&mut driver, 0);
}

/// As [`assert_fault`] with an indirect table.
fn assert_indirect_fault(table: &[Descriptor], length: u32) {
    assert_fault_with(|driver| offer_indirect(driver, table, length));
}

/// The table lies where the last descriptor's buffer would be.
fn offer_indirect(driver: &mut EchoDriver, table: &[Descriptor], length: u32) {
    let ring = &mut driver.rings[0];
    let address = ring.buffer(ring.size - 1);
    for (descriptor, index) in table.iter().zip(0..) {
        descriptor.store(&driver.memory, address, index);
    }
    let descriptor = Descriptor { address, length, flags: INDIRECT, next: 0 };
    descriptor.store(&driver.memory, ring.descriptors, 0);
    ring.offer(&driver.memory, 0);
}

#[test]
fn a_chain_that_is_a_circle_is_a_fault() {
    assert_fault(&[Descriptor { flags: NEXT, ..GOOD }]);
    assert_fault(&[Descriptor { flags: NEXT, next: 1, ..GOOD }, Descriptor { flags: NEXT, next: 0, ..GOOD }]);
}

#[test]
fn a_chain_that_leaves_its_table_is_a_fault() {
    assert_fault(&[Descriptor { flags: NEXT, next: 16, ..GOOD }]);
    assert_fault(&[Descriptor { flags: NEXT, next: u16::MAX, ..GOOD }]);
    assert_fault_with(|driver| driver.rings[0].offer(&driver.memory, 16));
}

#[test]
fn a_buffer_outside_ram_is_a_fault() {
    for (address, length) in [(RAM, 1), (RAM - 1, 2), (0xfee0_0000, 4), (u64::MAX, 1), (1 << 63, 1)] {
        assert_fault(&[Descriptor { address, length, ..GOOD }]);
        assert_fault(&[Descriptor { address, length, flags: WRITE, ..GOOD }]);
    }
}

#[test]
fn a_buffer_that_wraps_round_the_address_space_is_a_fault() {
    assert_fault(&[Descriptor { address: u64::MAX - 7, length: 16, ..GOOD }]);
    assert_fault(&[Descriptor { address: 0x1000, length: u32::MAX, ..GOOD }]);
}

#[test]
fn buffers_of_4_gib_together_are_a_fault() {
    let all = Descriptor { address: 0, length: u32::try_from(RAM).unwrap(), flags: NEXT, next: 1 };
    assert_fault(&[all, Descriptor { flags: 0, ..all }]);
}

#[test]
fn an_empty_buffer_is_a_fault() {
    assert_fault(&[Descriptor { length: 0, ..GOOD }]);
    assert_fault(&[Descriptor { flags: NEXT, next: 1, ..GOOD }, Descriptor { length: 0, flags: WRITE, ..GOOD }]);
}

#[test]
fn a_readable_buffer_after_a_writable_one_is_a_fault() {
    assert_fault(&[Descriptor { flags: WRITE | NEXT, next: 1, ..GOOD }, GOOD]);
}

#[test]
fn an_available_index_that_jumps_by_more_than_the_ring_is_a_fault() {
    for index in [17, 0x8000, u16::MAX] {
        assert_fault_with(|driver| driver.rings[0].publish(&driver.memory, index));
    }
}

#[test]
fn a_descriptor_offered_again_while_the_device_has_it_is_a_fault_in_the_end() {
    let (mut driver, knobs) = echo();
    driver.boot(0);
    knobs.hold.store(true, Ordering::Relaxed);
    GOOD.store(&driver.memory, driver.rings[0].descriptors, 0);
    for round in 1..=16 {
        driver.rings[0].offer(&driver.memory, 0);
        driver.kick(0);
        wait_until_seen(&knobs, round);
    }
    driver.rings[0].offer(&driver.memory, 0);
    driver.kick(0);
    driver.wait_for_needs_reset();
    assert_eq!(knobs.seen.load(Ordering::Relaxed), 16);
}

#[test]
fn an_indirect_table_works() {
    let (mut driver, _) = echo();
    driver.boot(INDIRECT_DESC);
    let (from, to) = (driver.rings[0].buffer(1), driver.rings[0].buffer(2));
    driver.memory.write_slice(b"indirect", GuestAddress(from)).unwrap();
    let table = [
        Descriptor { address: from, length: 8, flags: NEXT, next: 2 },
        Descriptor::default(),
        Descriptor { address: to, length: 8, flags: WRITE, next: 0 },
    ];
    offer_indirect(&mut driver, &table, 48);
    driver.kick(0);
    driver.wait(Some(0), "answer", |driver| (driver.rings[0].used_index(&driver.memory) == 1).then_some(()));
    let mut back = [0; 8];
    driver.memory.read_slice(&mut back, GuestAddress(to)).unwrap();
    assert_eq!(&back, b"indirect");
}

#[test]
fn an_indirect_table_of_no_whole_number_of_descriptors_is_a_fault() {
    for length in [0, 1, 15, 17, 0xffff_ffff] {
        assert_indirect_fault(&[GOOD, GOOD], length);
    }
}

#[test]
fn an_indirect_table_in_an_indirect_table_is_a_fault() {
    assert_indirect_fault(&[Descriptor { flags: INDIRECT, ..GOOD }], 16);
}

#[test]
fn an_indirect_descriptor_with_a_successor_is_a_fault() {
    assert_fault(&[Descriptor { flags: INDIRECT | NEXT, next: 1, ..GOOD }, GOOD]);
}

#[test]
fn an_indirect_descriptor_that_was_not_negotiated_is_a_fault() {
    let (mut driver, _) = echo();
    driver.boot(0);
    offer_indirect(&mut driver, &[GOOD], 16);
    driver.kick(0);
    driver.wait_for_needs_reset();
}

#[test]
fn a_chain_in_an_indirect_table_is_bounded_like_any_other() {
    assert_indirect_fault(&[Descriptor { flags: NEXT, ..GOOD }], 16);
    assert_indirect_fault(&[Descriptor { flags: NEXT, next: 1, ..GOOD }], 16);
    let long: Vec<Descriptor> = (1..=40).map(|next| Descriptor { flags: NEXT, next, ..GOOD }).collect();
    assert_indirect_fault(&long, 16 * 40);
}

#[test]
fn an_indirect_table_outside_ram_is_a_fault() {
    for address in [RAM, RAM - 8, u64::MAX - 15] {
        assert_fault(&[Descriptor { address, length: 32, flags: INDIRECT, next: 0 }]);
    }
}

#[test]
fn rings_that_no_queue_can_have_are_a_fault_at_driver_ok() {
    type Spoil = fn(&mut virtio::testing::Ring);
    let spoilt: [Spoil; 11] = [
        |ring| ring.size = 0,
        |ring| ring.size = 3,
        |ring| ring.size = 32,
        |ring| ring.descriptors += 8,
        |ring| ring.available += 1,
        |ring| ring.used += 2,
        |ring| ring.descriptors = RAM - 16,
        |ring| ring.available = RAM,
        |ring| ring.used = RAM - 4,
        |ring| ring.descriptors = u64::MAX - 15,
        |ring| ring.used = 0xffff_ffff_ffff_fffc,
    ];
    for spoil in spoilt {
        let (mut driver, knobs) = echo();
        driver.reset();
        assert!(driver.negotiate(0));
        let mut ring = virtio::testing::Ring::new(16, 1 << 20);
        spoil(&mut ring);
        driver.registers.write_word(0x30, 0);
        driver.enable(&ring);
        driver.start();
        driver.wait_for_needs_reset();
        driver.kick(0);
        assert_eq!(knobs.seen.load(Ordering::Relaxed), 0);
        driver.boot(0);
        assert_echoes(&mut driver, 0);
    }
}

#[test]
fn a_size_that_changes_after_driver_ok_changes_nothing() {
    let (mut driver, _) = echo();
    driver.boot(0);
    for value in [0, 1, 3, 8, 0x10000, u32::MAX] {
        driver.registers.write_word(0x30, 0);
        driver.registers.write_word(0x38, value);
        driver.registers.write_word(0x80, value);
        driver.registers.write_word(0x44, 0);
    }
    for _ in 0..40 {
        assert_echoes(&mut driver, 0);
    }
    assert_eq!(driver.registers.read_word(0x44), 1);
}

#[test]
fn a_kick_before_driver_ok_does_nothing() {
    let (mut driver, knobs) = echo();
    driver.reset();
    driver.kick(0);
    assert!(driver.negotiate(0));
    driver.kick(0);
    driver.set_up(u16::MAX);
    driver.add(0, &[b"early"], &[5]);
    driver.kick(0);
    assert_eq!(knobs.seen.load(Ordering::Relaxed), 0);
    driver.start();
    assert_eq!(driver.collect(0).data, b"early");
}

#[test]
fn a_kick_of_a_queue_that_there_is_not_does_nothing() {
    let (mut driver, _) = echo();
    driver.boot(0);
    for index in [2, 0xffff, 0x1_0000, u32::MAX] {
        driver.registers.write_word(0x50, index);
    }
    assert_echoes(&mut driver, 1);
    assert_eq!(driver.status() & status::NEEDS_RESET, 0);
}

#[test]
fn a_driver_that_never_stops_does_not_keep_the_thread() {
    let (mut driver, knobs) = echo();
    driver.boot(EVENT_IDX);
    knobs.endless.store(true, Ordering::Relaxed);
    GOOD.store(&driver.memory, driver.rings[0].descriptors, 0);
    driver.rings[0].offer(&driver.memory, 0);
    driver.kick(0);
    wait_until_seen(&knobs, 10_000);
    let (done, over) = channel();
    std::thread::spawn(move || {
        driver.reset();
        done.send(()).unwrap();
    });
    assert_eq!(over.recv_timeout(DEADLINE), Ok(()), "the reset waits for a handler that never returns");
}

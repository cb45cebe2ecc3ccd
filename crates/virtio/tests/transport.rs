//! The status machine, negotiation, start, reset and interrupts, through the registers of MMIO.

mod support;

use std::sync::atomic::Ordering;

use support::{FEATURE, assert_echoes, echo, wait_until_seen};
use virtio::features::{EVENT_IDX, INDIRECT_DESC, VERSION_1};
use virtio::testing::Registers as _;
use virtio::transport::{Half, Reg, status};

const READY: u8 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;

#[test]
fn a_request_goes_through_the_device_and_back_on_every_queue() {
    let (mut driver, _) = echo();
    driver.boot(u64::MAX);
    for _ in 0..100 {
        assert_echoes(&mut driver, 0);
        assert_echoes(&mut driver, 1);
    }
}

#[test]
fn the_status_is_reached_only_step_by_step() {
    let (mut driver, knobs) = echo();
    for bit in [status::DRIVER, status::FEATURES_OK, status::DRIVER_OK] {
        driver.registers.write(Reg::Status, bit.into());
        assert_eq!(driver.status(), 0);
    }
    let all = u32::from(READY);
    driver.registers.write(Reg::Status, all);
    assert_eq!(driver.status(), status::ACKNOWLEDGE | status::DRIVER, "no features are accepted yet");
    driver.reset();
    assert!(driver.negotiate(0));
    driver.set_up(u16::MAX);
    driver.start();
    assert_eq!(driver.status(), READY);
    driver.registers.write(Reg::Status, u32::from(status::ACKNOWLEDGE));
    driver.registers.write(Reg::Status, 0x100);
    assert_eq!(driver.status(), READY, "only a reset takes bits back");
    assert_echoes(&mut driver, 0);
    assert_eq!(knobs.stopped.load(Ordering::Relaxed), 0);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let (mut driver, _) = echo();
    assert_eq!(driver.offered(), FEATURE | VERSION_1 | EVENT_IDX | INDIRECT_DESC);
    assert!(!driver.insist(VERSION_1 | 1));
    driver.reset();
    assert!(!driver.insist(VERSION_1 | 1 << 63));
    driver.reset();
    assert!(!driver.insist(FEATURE), "a legacy driver");
    driver.reset();
    assert!(driver.insist(VERSION_1 | FEATURE));
}

#[test]
fn features_stay_as_they_were_negotiated() {
    let (mut driver, _) = echo();
    driver.reset();
    assert!(driver.negotiate(FEATURE));
    driver.registers.write(Reg::DriverFeaturesSelect, 0);
    driver.registers.write(Reg::DriverFeatures, u32::MAX);
    driver.registers.write(Reg::DriverFeaturesSelect, 2);
    driver.registers.write(Reg::DriverFeatures, u32::MAX);
    driver.registers.write(Reg::DeviceFeaturesSelect, 2);
    assert_eq!(driver.registers.read(Reg::DeviceFeatures), 0);
    driver.set_up(u16::MAX);
    driver.start();
    assert_echoes(&mut driver, 0);
}

#[test]
fn a_queue_cannot_be_changed_while_it_is_enabled() {
    let (mut driver, _) = echo();
    driver.reset();
    assert!(driver.negotiate(0));
    driver.set_up(u16::MAX);
    driver.registers.write(Reg::QueueSelect, 0);
    for register in [Reg::QueueSize, Reg::QueueDevice(Half::Low), Reg::QueueDevice(Half::High)] {
        driver.registers.write(register, 1);
    }
    driver.start();
    assert_echoes(&mut driver, 0);
}

#[test]
fn a_queue_that_there_is_not_has_no_size_and_takes_no_writes() {
    let (mut driver, _) = echo();
    for index in [2, 0x1_0000, u32::MAX] {
        driver.registers.write(Reg::QueueSelect, index);
        assert_eq!(driver.registers.read(Reg::QueueSizeMax), 0);
        driver.registers.write(Reg::QueueSize, 4);
        driver.registers.write(Reg::QueueEnable, 1);
        assert_eq!(driver.registers.read(Reg::QueueEnable), 0);
    }
    assert_eq!(driver.registers.read(Reg::QueueCount), 2);
}

#[test]
fn a_queue_that_is_not_enabled_stays_out() {
    let (mut driver, knobs) = echo();
    driver.reset();
    assert!(driver.negotiate(0));
    driver.set_up(u16::MAX);
    driver.registers.write(Reg::QueueSelect, 1);
    driver.registers.write(Reg::QueueEnable, 0);
    driver.start();
    assert_echoes(&mut driver, 0);
    driver.reset();
    assert_eq!(knobs.stopped.load(Ordering::Relaxed), 1);
}

#[test]
fn a_reset_while_requests_are_in_flight_stops_everything_and_the_device_starts_again() {
    let (mut driver, knobs) = echo();
    driver.boot(EVENT_IDX);
    knobs.hold.store(true, Ordering::Relaxed);
    for _ in 0..3 {
        driver.send(0, &[b"lost"], &[4]);
    }
    wait_until_seen(&knobs, 3);
    let used = driver.rings[0].used;
    driver.reset();
    assert_eq!(knobs.stopped.load(Ordering::Relaxed), 2);
    assert_eq!(virtio::testing::Ring::used_index(&ring_at(used), &driver.memory), 0);
    knobs.hold.store(false, Ordering::Relaxed);
    driver.boot(0);
    assert_echoes(&mut driver, 0);
}

fn ring_at(used: u64) -> virtio::testing::Ring {
    let mut ring = virtio::testing::Ring::new(16, 0);
    ring.used = used;
    ring
}

#[test]
fn a_thousand_resets_leave_no_trace() {
    let (mut driver, _) = echo();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    driver.boot(0);
    for _ in 0..1000 {
        driver.boot(u64::MAX);
        driver.send(0, &[b"maybe lost"], &[10]);
    }
    driver.boot(0);
    assert_echoes(&mut driver, 0);
    // Other tests of this executable open some of their own meanwhile.
    assert!(open() < 900, "{} descriptors are open", open());
}

#[test]
fn a_device_that_cannot_start_needs_a_reset_and_can_start_later() {
    let (mut driver, knobs) = echo();
    knobs.broken.store(true, Ordering::Relaxed);
    driver.boot(0);
    driver.wait_for_needs_reset();
    assert_eq!(driver.status(), READY | status::NEEDS_RESET);
    knobs.broken.store(false, Ordering::Relaxed);
    driver.boot(0);
    assert_echoes(&mut driver, 0);
}

#[test]
fn event_idx_holds_interrupts_back() {
    let (mut driver, _) = echo();
    driver.boot(EVENT_IDX);
    // The driver wants to know of the fourth request that comes back, not of those before.
    driver.rings[0].ask_for_interrupt(&driver.memory, 3);
    for done in 1..=3 {
        driver.send(0, &[b"x"], &[1]);
        spin(|| driver.rings[0].used_index(&driver.memory) == done);
        spin(|| driver.rings[0].kick_wanted_at(&driver.memory) == done);
    }
    // A round trip to the thread: the wake-up that gave back the third request is over.
    driver.registers.device.core().control(|_, _| ());
    assert!(!driver.interrupted(Some(0)));
    driver.send(0, &[b"x"], &[1]);
    driver.wait_for_interrupt(Some(0));
}

#[test]
fn without_event_idx_the_flag_holds_interrupts_back() {
    use vm_memory::{Bytes, GuestAddress};
    let (mut driver, _) = echo();
    driver.boot(0);
    driver.memory.write_obj(1u16, GuestAddress(driver.rings[0].available)).unwrap();
    driver.send(0, &[b"x"], &[1]);
    spin(|| driver.rings[0].used_index(&driver.memory) == 1);
    driver.registers.device.core().control(|_, _| ());
    assert!(!driver.interrupted(Some(0)));
    driver.memory.write_obj(0u16, GuestAddress(driver.rings[0].available)).unwrap();
    driver.send(0, &[b"x"], &[1]);
    driver.wait_for_interrupt(Some(0));
}

fn spin(condition: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + virtio::testing::DEADLINE;
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "the device does not answer");
        std::thread::yield_now();
    }
}

#[test]
fn the_owner_of_the_machine_changes_a_device_while_it_runs() {
    let (mut driver, knobs) = echo();
    driver.boot(0);
    knobs.hold.store(true, Ordering::Relaxed);
    let head = driver.send(0, &[b"held"], &[4]);
    wait_until_seen(&knobs, 1);
    knobs.hold.store(false, Ordering::Relaxed);
    driver.registers.device.core().control(|_, handler| handler.unwrap().release());
    assert_eq!(driver.collect(0).head, head);
    assert_echoes(&mut driver, 0);
}

#[test]
fn a_parked_handler_is_not_woken_by_a_look_at_it() {
    let (mut driver, knobs) = echo();
    driver.boot(0);
    driver.rings[0].publish(&driver.memory, 1000);
    driver.kick(0);
    driver.wait_for_needs_reset();
    assert!(driver.registers.device.core().control(|_, handler| handler.is_some()));
    driver.add(1, &[b"x"], &[1]);
    driver.kick(1);
    driver.registers.device.core().control(|_, _| ());
    assert_eq!(knobs.seen.load(Ordering::Relaxed), 0);
    driver.boot(0);
    assert_echoes(&mut driver, 1);
}

#[test]
fn the_configuration_is_read_and_written_within_its_bounds() {
    let (mut driver, knobs) = echo();
    let mut data = [0xff; 8];
    driver.registers.read_config(0, &mut data);
    assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 0]);
    driver.registers.read_config(6, &mut data[..2]);
    assert_eq!(data[..2], [7, 0]);
    for offset in [7, 0xeff, u64::MAX - 0x100] {
        data = [0xff; 8];
        driver.registers.read_config(offset, &mut data);
        assert_eq!(data, [0; 8]);
        driver.registers.write_config(offset, &[1]);
    }
    driver.registers.write_config(6, &[1, 2]);
    driver.registers.write_config(5, &[1, 2]);
    assert_eq!(*knobs.config_writes.lock().unwrap(), [(5, vec![1, 2])]);
}

#[test]
fn a_change_of_the_configuration_is_announced() {
    let (mut driver, knobs) = echo();
    driver.boot(0);
    let before = driver.registers.read(Reg::ConfigGeneration);
    knobs.config_change.lock().unwrap().as_ref().unwrap().raise();
    driver.wait(None, "announce", |driver| (driver.registers.read_word(0x60) & 2 != 0).then_some(()));
    assert_ne!(driver.registers.read(Reg::ConfigGeneration), before);
    driver.registers.write_word(0x64, 2);
    assert_eq!(driver.registers.read_word(0x60) & 2, 0);
    driver.reset();
    driver.interrupted(None);
    let before = driver.registers.read(Reg::ConfigGeneration);
    driver.registers.device.core().config_changed();
    assert_ne!(driver.registers.read(Reg::ConfigGeneration), before);
    assert!(!driver.interrupted(None), "nothing is announced to a driver that there is not");
}

#[test]
fn the_registers_are_those_of_version_2() {
    let (mut driver, _) = echo();
    let registers = &mut driver.registers;
    let read: Vec<u32> = [0, 4, 8].into_iter().map(|offset| registers.read_word(offset)).collect();
    assert_eq!(read, [0x7472_6976, 2, 3]);
    assert_eq!(registers.read_word(0x34), 16);
    for offset in [0x18, 0x28, 0x3c, 0x40, 0xa8, 0xc0] {
        registers.write_word(offset, u32::MAX);
        assert_eq!(registers.read_word(offset), 0);
    }
}

#[test]
fn registers_are_reached_as_aligned_words_only() {
    use bus::BusDevice as _;
    let (mut driver, _) = echo();
    let device = &mut driver.registers.device;
    for (offset, length) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 2), (u64::MAX - 3, 4)] {
        let mut data = vec![0xff; length];
        device.read(offset, &mut data);
        assert_eq!(data, vec![0; length]);
        device.write(offset, &data);
    }
    device.write(0x70, &[1]);
    device.write(0x70, &[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.status(), 0);
}

#[test]
fn shared_memory_is_where_the_device_says_and_else_minus_one_long() {
    let (mut driver, _) = echo();
    let mut region = |id| {
        driver.registers.write_word(0xac, id);
        [0xb8, 0xbc, 0xb0, 0xb4].map(|offset| driver.registers.read_word(offset))
    };
    assert_eq!(region(7), [0x2345_6000, 1, 0x1000, 8]);
    for id in [0, 8, 0x107, u32::MAX] {
        assert_eq!(region(id), [u32::MAX; 4]);
    }
}

//! The balloon over the driver's side of virtio.

use super::*;
use virtio::features::{EVENT_IDX, INDIRECT_DESC};
use virtio::testing::{self, Driver, MmioRegisters, RAM, Registers as _};
use virtio::transport::Reg;
use vm_memory::{Bytes as _, GuestAddress};

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
const RINGS: u64 = EVENT_IDX | INDIRECT_DESC;
/// Memory that no ring and no buffer of the driver's is in.
const FREE: u64 = RAM / 2;

type Guest = Driver<MmioRegisters<Balloon>>;

fn make(text: &str) -> Guest {
    testing::mmio(Balloon::new(&kv::from_str(text).unwrap()).unwrap())
}

fn boot(text: &str) -> Guest {
    let mut guest = make(text);
    guest.boot(u64::MAX);
    guest
}

fn config(guest: &mut Guest) -> [u32; 2] {
    let mut config = [0; 8];
    guest.registers.read_config(0, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    [word(0), word(4)]
}

fn numbers(pages: impl IntoIterator<Item = u64>) -> Vec<u8> {
    pages.into_iter().flat_map(|page| u32::try_from(page).unwrap().to_le_bytes()).collect()
}

fn control<R>(guest: &mut Guest, f: impl FnOnce(&mut Balloon, Option<&mut BalloonHandler>) -> R) -> R {
    guest.registers.device.core().control(f)
}

#[test]
fn pages_in_the_balloon_are_gone_and_come_back_as_zeros() {
    let mut guest = boot("256M");
    assert_eq!(config(&mut guest), [65536, 0]);
    guest.memory.write_slice(&[7; 4 * 4096], GuestAddress(FREE)).unwrap();
    let page = FREE / PAGE;
    // Out of order and with one twice; the third page stays.
    guest.send(INFLATE, &[&numbers([page + 3, page + 1, page, page + 1])], &[]);
    assert_eq!(guest.collect(INFLATE).written, 0);
    let firsts: Vec<u8> = (0..4).map(|at| guest.memory.read_obj(GuestAddress(FREE + at * PAGE)).unwrap()).collect();
    assert_eq!(firsts, [0, 0, 7, 0]);
    guest.registers.write_config(4, &4u32.to_le_bytes());
    assert_eq!(control(&mut guest, |balloon, _| balloon.actual()), Size(4 * PAGE));
    guest.send(DEFLATE, &[&numbers([page, page + 1])], &[]);
    guest.collect(DEFLATE);
    guest.memory.write_obj(9u8, GuestAddress(FREE)).unwrap();
    assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(FREE)).unwrap(), 9);
}

#[test]
fn a_new_target_reaches_the_driver_while_it_runs() {
    let mut guest = boot("");
    while guest.interrupted(None) {}
    control(&mut guest, |balloon, _| balloon.set_target(Size(8 << 20))).unwrap();
    guest.wait_for_interrupt(None);
    assert_eq!(config(&mut guest), [2048, 0]);
    assert_eq!(control(&mut guest, |balloon, _| balloon.target()), Size(8 << 20));
    for size in [Size(4095), Size(16 << 40)] {
        assert!(control(&mut guest, |balloon, _| balloon.set_target(size)).is_err());
    }
    assert_eq!(config(&mut guest), [2048, 0]);
}

#[test]
fn the_driver_writes_the_actual_size_and_nothing_else() {
    let mut guest = boot("1M");
    guest.registers.write_config(0, &7u32.to_le_bytes());
    guest.registers.write_config(0, &7u64.to_le_bytes());
    guest.registers.write_config(6, &7u32.to_le_bytes());
    assert_eq!(config(&mut guest), [256, 0]);
    guest.registers.write_config(4, &[3]);
    guest.registers.write_config(5, &[1]);
    assert_eq!(config(&mut guest), [256, 0x103]);
    guest.boot(u64::MAX);
    assert_eq!(config(&mut guest), [256, 0], "after a reset the balloon is empty");
}

#[test]
fn what_is_not_ram_or_no_list_of_pages_is_a_fault() {
    let mut guest = boot("");
    for list in [numbers([RAM / PAGE]), numbers([FREE / PAGE, u64::from(u32::MAX)]), vec![0; 5], vec![0; 4100]] {
        guest.send(INFLATE, &[&list], &[]);
        guest.wait_for_needs_reset();
        guest.boot(u64::MAX);
    }
    guest.send(INFLATE, &[&numbers((0..1024).map(|at| FREE / PAGE + 2 * at))], &[]);
    guest.collect(INFLATE);
}

#[test]
fn features_are_offered_as_asked_for() {
    let device = |guest: &mut Guest| guest.offered() & 0xff_ffff;
    assert_eq!(device(&mut make("")), 0);
    assert_eq!(device(&mut make("deflate-on-oom")), 1 << 2);
    assert_eq!(device(&mut make("stats-interval=1,free-page-reporting")), 1 << 1 | 1 << 5);
}

#[test]
fn statistics_come_at_each_interval_in_the_same_buffer() {
    let mut guest = boot("stats-interval=1");
    let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    for round in 1..3 {
        let report = [entry(4, 100 * round), entry(5, 1 << 30), entry(999, 1), entry(0, u64::MAX), vec![1; 7]];
        guest.send(STATISTICS, &[&report.concat()], &[]);
        assert_eq!(guest.collect(STATISTICS).written, 0);
        let statistics = control(&mut guest, |_, handler| handler.unwrap().statistics().clone());
        let all: Vec<_> = statistics.iter().collect();
        assert_eq!(all, [("swap_in", u64::MAX), ("free_memory", 100 * round), ("total_memory", 1 << 30)]);
    }
    // A driver that gives more buffers than the one gets the older ones back, and a reset in between is no loss.
    for _ in 0..3 {
        guest.add(STATISTICS, &[], &[1]);
    }
    guest.kick(STATISTICS);
    guest.collect(STATISTICS);
    guest.collect(STATISTICS);
    guest.reset();
    guest.boot(u64::MAX);
}

#[test]
fn reported_pages_are_the_hosts_wherever_the_driver_has_the_queue() {
    // By the specification, and as older versions of Linux number them, with and without statistics.
    for (text, queue) in
        [("free-page-reporting", 4), ("free-page-reporting,stats-interval=9", 3), ("free-page-reporting", 2)]
    {
        let mut guest = make(text);
        guest.reset();
        assert!(guest.negotiate(RINGS | u64::from(u32::MAX)));
        guest.set_up(64);
        for index in (2..5).filter(|index| *index > queue || *index == 2 && queue == 4) {
            guest.registers.write(Reg::QueueSelect, index);
            guest.registers.write(Reg::QueueEnable, 0);
        }
        guest.start();
        let queue = u16::try_from(queue).unwrap();
        let place = guest.rings[usize::from(queue)].buffer(0);
        guest.memory.write_slice(&[7; 16 << 10], GuestAddress(place)).unwrap();
        guest.send(queue, &[], &[8 << 10]);
        assert_eq!(guest.collect(queue).written, 0);
        let firsts: Vec<u8> =
            (0..4).map(|at| guest.memory.read_obj(GuestAddress(place + at * PAGE)).unwrap()).collect();
        assert_eq!(firsts, [0, 0, 7, 7], "{text}");
    }
}

#[test]
fn a_feature_without_its_queue_is_a_fault() {
    let mut guest = make("free-page-reporting");
    guest.reset();
    assert!(guest.negotiate(u64::MAX));
    guest.set_up(64);
    for index in 2..5 {
        guest.registers.write(Reg::QueueSelect, index);
        guest.registers.write(Reg::QueueEnable, 0);
    }
    guest.start();
    guest.wait_for_needs_reset();
}

#[test]
fn what_cannot_be_is_refused_with_the_way_out() {
    for (text, cure) in [("1", "multiple of 4K"), ("16T", "less than 16T"), ("stats-interval=0", "1 or more")] {
        let fault = Balloon::new(&kv::from_str(text).unwrap()).err().expect("it is refused").to_string();
        assert!(fault.contains(cure), "{text}: {fault}");
    }
    let spec: BalloonSpec = kv::from_str("64M,id=b0,deflate-on-oom").unwrap();
    assert_eq!((spec.size, spec.id(), spec.deflate_on_oom), (Size(64 << 20), "b0", true));
}

#[test]
fn another_interval_for_reports_holds_at_once() {
    let mut guest = boot("stats-interval=4000000");
    guest.send(STATISTICS, &[&[0; 10]], &[]);
    control(&mut guest, |balloon, handler| balloon.set_interval(1, handler)).unwrap();
    // The buffer comes back when the device wants the next report.
    guest.collect(STATISTICS);
    let refused = control(&mut guest, |balloon, handler| balloon.set_interval(0, handler)).unwrap_err();
    assert!(refused.to_string().contains("1 or more"), "{refused}");
    assert_eq!(control(&mut guest, |balloon, _| balloon.spec().stats_interval), Some(1));
    let refused = control(&mut boot(""), |balloon, handler| balloon.set_interval(1, handler)).unwrap_err();
    assert!(refused.to_string().contains("stats-interval"), "{refused}");
}

#[test]
fn what_it_holds_and_shall_hold_is_saved() {
    let mut guest = boot("256M,stats-interval=1000");
    guest.registers.write_config(4, &4u32.to_le_bytes());
    control(&mut guest, |balloon, _| balloon.set_target(Size(8 * PAGE))).unwrap();
    let statistics = guest.send(STATISTICS, &[&[0; 10]], &[]);
    let saved = guest.save().unwrap();
    let mut other = make("16M,stats-interval=1");
    other.load(&saved).unwrap();
    assert_eq!(config(&mut other), [8, 4]);
    // The buffer for statistics was the device's, and is so again.
    assert_eq!(other.collect(STATISTICS).head, statistics);
    other.reset();
    assert_eq!(config(&mut other), [8, 0]);
    assert!(make("16M").load(&saved).is_err(), "a balloon without statistics has a driver that wants them");
}

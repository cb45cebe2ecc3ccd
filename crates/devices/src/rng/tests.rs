//! The entropy device over the driver's side of virtio.

use super::*;
use virtio::features::{EVENT_IDX, INDIRECT_DESC};
use virtio::testing::{self, Driver, MmioRegisters, NEXT, WRITE};

fn boot(text: &str) -> Driver<MmioRegisters<Rng>> {
    let mut guest = testing::mmio(Rng::new(&kv::from_str(text).unwrap()).unwrap());
    guest.boot(EVENT_IDX | INDIRECT_DESC);
    guest
}

#[test]
fn every_buffer_of_a_request_is_filled_and_no_two_are_alike() {
    let mut guest = boot("");
    guest.send(0, &[], &[32, 1, 31]);
    guest.send(0, &[], &[64]);
    let (first, second) = (guest.collect(0), guest.collect(0));
    assert_eq!((first.written, second.written), (64, 64));
    assert_ne!(first.data, second.data);
    // 64 random bytes are 8 equal ones in a row once in 2^50 times.
    assert!(first.data.windows(8).all(|window| window.iter().any(|byte| *byte != window[0])));
}

#[test]
fn a_huge_request_is_cut_to_what_one_wake_up_may_take() {
    let mut guest = boot("");
    guest.send(0, &[], &[testing::BUFFER; 4]);
    assert_eq!(guest.collect(0).written as usize, MOST);
}

#[test]
fn the_rate_limit_lets_the_burst_pass_and_the_rest_later() {
    let mut guest = boot("rate=1M,burst=1");
    let start = std::time::Instant::now();
    for _ in 0..8 {
        guest.send(0, &[], &[16 << 10]);
    }
    for _ in 0..8 {
        assert_eq!(guest.collect(0).written, 16 << 10);
    }
    // The first is free, the seven after it wait for 16 KiB each: 109 ms.
    assert!(start.elapsed() >= std::time::Duration::from_millis(100), "{:?}", start.elapsed());
}

#[test]
fn a_request_without_room_is_a_fault() {
    let mut guest = boot("");
    guest.send(0, &[b"please"], &[]);
    guest.wait_for_needs_reset();
    guest.boot(0);
    guest.send(0, &[], &[8]);
    assert_eq!(guest.collect(0).written, 8);
}

#[test]
fn a_request_that_leaves_ram_is_a_fault() {
    let mut guest = boot("");
    let ring = &mut guest.rings[0];
    let wild = testing::Descriptor { address: testing::RAM - 8, length: 16, flags: WRITE, next: 0 };
    let first = testing::Descriptor { address: ring.buffer(0), length: 16, flags: WRITE | NEXT, next: 1 };
    wild.store(&guest.memory, ring.descriptors, 1);
    first.store(&guest.memory, ring.descriptors, 0);
    ring.offer(&guest.memory, 0);
    guest.kick(0);
    guest.wait_for_needs_reset();
}

#[test]
fn a_limit_that_lets_nothing_through_is_refused_with_the_way_out() {
    for (text, cure) in [("rate=0", "say more"), ("rate=1K,burst=0", "say more"), ("burst=1K", "say rate=")] {
        let fault = Rng::new(&kv::from_str(text).unwrap()).err().expect("it is refused").to_string();
        assert!(fault.contains(cure), "{text}: {fault}");
    }
    assert_eq!(kv::from_str::<RngSpec>("entropy").unwrap().id(), "entropy");
    assert_eq!(RngSpec::default().id(), "rng");
}

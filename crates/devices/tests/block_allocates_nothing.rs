//! A disk's requests allocate nothing, once each of its lists has had its largest size.
#![allow(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::block::{Block, BlockSpec, EngineSpec};
use virtio::testing::{self, Driver, MmioRegisters};

/// Allocations by all threads but those of the test itself.
static COUNT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static IS_TEST: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !IS_TEST.get() {
            COUNT.fetch_add(1, Ordering::SeqCst);
        }
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Writes and reads 64 blocks, all in flight at once.
fn round(guest: &mut Driver<MmioRegisters<Block>>) {
    let header = |kind: u8, block: u8| [kind, 0, 0, 0, 0, 0, 0, 0, block, 0, 0, 0, 0, 0, 0, 0];
    for block in 0..64 {
        guest.add(0, &[&header(1, block), &[block; 512]], &[1]);
    }
    guest.kick(0);
    for _ in 0..64 {
        assert_eq!(guest.collect(0).data, [0]);
    }
    for block in 0..64 {
        guest.add(0, &[&header(0, block)], &[512, 1]);
    }
    guest.kick(0);
    for _ in 0..64 {
        assert_eq!(guest.collect(0).data.last(), Some(&0));
    }
}

#[test]
fn a_request_allocates_nothing_in_any_engine() {
    IS_TEST.set(true);
    for engine in [EngineSpec::Inline, EngineSpec::IoUring, EngineSpec::Threads] {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("disk");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let mut guest = testing::mmio(Block::open(&BlockSpec { path, engine, ..BlockSpec::default() }).unwrap());
        guest.boot(u64::MAX);
        for _ in 0..8 {
            round(&mut guest);
        }
        let before = COUNT.load(Ordering::SeqCst);
        for _ in 0..16 {
            round(&mut guest);
        }
        assert_eq!(COUNT.load(Ordering::SeqCst) - before, 0, "{engine:?}");
    }
}

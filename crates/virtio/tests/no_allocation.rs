//! The data path allocates nothing per request, counted at the allocator itself.
#![allow(unsafe_code, reason = "a global allocator has no safe form")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::echo;
use virtio::features::{EVENT_IDX, INDIRECT_DESC};

/// Counts what I/O threads allocate.
struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this is an I/O thread, once somebody has looked.
    static COUNTED: Cell<Option<bool>> = const { Cell::new(None) };
}

fn count() {
    let counted = COUNTED.try_with(|counted| {
        // Looking may allocate; that is not counted.
        let known = counted.replace(Some(false));
        let is_io = known.unwrap_or_else(|| std::thread::current().name().is_some_and(|name| name.starts_with("io-")));
        counted.set(Some(is_io));
        is_io
    });
    if counted == Ok(true) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_request_allocates_nothing_on_the_io_thread() {
    let (mut driver, _) = echo();
    driver.boot(EVENT_IDX | INDIRECT_DESC);
    let mut batch = || {
        for _ in 0..4 {
            driver.add(0, &[b"a", b"request"], &[4, 4]);
        }
        driver.kick(0);
        for _ in 0..4 {
            assert_eq!(driver.collect(0).data, b"arequest");
        }
    };
    // The first requests make the lists that the later ones use again.
    batch();
    let before = COUNT.load(Ordering::Relaxed);
    assert!(before > 0, "the count does not see the first requests");
    for _ in 0..1000 {
        batch();
    }
    assert_eq!(COUNT.load(Ordering::Relaxed), before);
}

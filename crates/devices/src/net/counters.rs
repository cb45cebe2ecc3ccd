//! What a card has moved and what it has dropped.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of one direction. The card's I/O thread alone adds to them; any thread may read.
#[derive(Debug, Default)]
pub struct Counters {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

impl Counters {
    /// Frames that were moved.
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Their bytes, from the Ethernet header on.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Frames that were not: too short, too long, refused by the host, forbidden, or without a link.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub(super) fn moved(&self, bytes: usize) {
        add(&self.frames, 1);
        add(&self.bytes, bytes as u64);
    }

    pub(super) fn drop_one(&self) {
        add(&self.dropped, 1);
    }
}

/// There is one writer, so this needs no atomic addition, which costs more than the rest.
fn add(to: &AtomicU64, amount: u64) {
    to.store(to.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

/// Both directions, as the guest sees them.
#[derive(Debug, Default)]
pub struct Traffic {
    /// To the guest.
    pub rx: Counters,
    /// From the guest.
    pub tx: Counters,
}

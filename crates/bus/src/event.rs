//! What the guest says to the machine as a whole, through one register or another.

use std::sync::atomic::{AtomicU8, Ordering};

/// An end that the guest brings about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum GuestEnd {
    /// It powers the machine off.
    PowerOff = 1,
    /// It resets the machine.
    Reset = 2,
    /// Its kernel says that it panicked.
    Panic = 3,
}

/// Keeps the first end that any device reports.
///
/// The processor whose access reported it looks here right after the access, so it executes
/// nothing beyond it; the cost for every other access is one load.
#[derive(Debug, Default)]
pub struct EndLatch(AtomicU8);

impl EndLatch {
    /// Reports an end. Any but the first is ignored.
    pub fn set(&self, end: GuestEnd) {
        let _ = self.0.compare_exchange(0, end as u8, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// The end that was reported, if one was.
    pub fn get(&self) -> Option<GuestEnd> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            1 => Some(GuestEnd::PowerOff),
            2 => Some(GuestEnd::Reset),
            _ => Some(GuestEnd::Panic),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_stays() {
        let latch = EndLatch::default();
        assert_eq!(latch.get(), None);
        latch.set(GuestEnd::Panic);
        latch.set(GuestEnd::Reset);
        assert_eq!(latch.get(), Some(GuestEnd::Panic));
    }
}

//! Exits from the guest, counted by reason.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// One processor's exits. Only its own thread counts, so a count is a load and a store, without a
/// locked instruction; anybody may read.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct ExitCounts {
    /// Port reads and writes.
    pub(crate) port: AtomicU64,
    /// Reads and writes of memory where no RAM is.
    pub(crate) mmio: AtomicU64,
    /// Signals and kicks.
    pub(crate) kick: AtomicU64,
    /// Everything else, which ends the guest.
    pub(crate) end: AtomicU64,
}

/// Counts one exit.
pub(crate) fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

/// The sums over all processors, as one line: `io=12 mmio=0 kick=1 end=0`.
pub(crate) struct Sum<'a>(pub(crate) &'a [ExitCounts]);

impl fmt::Display for Sum<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |counter: fn(&ExitCounts) -> &AtomicU64| -> u64 {
            self.0.iter().map(|counts| counter(counts).load(Ordering::Relaxed)).sum()
        };
        write!(
            f,
            "io={} mmio={} kick={} end={}",
            sum(|counts| &counts.port),
            sum(|counts| &counts.mmio),
            sum(|counts| &counts.kick),
            sum(|counts| &counts.end)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_goes_over_all_processors() {
        let counts = [ExitCounts::default(), ExitCounts::default()];
        count(&counts[0].port);
        count(&counts[1].port);
        count(&counts[1].kick);
        assert_eq!(Sum(&counts).to_string(), "io=2 mmio=0 kick=1 end=0");
    }
}

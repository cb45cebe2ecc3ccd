//! What the guest has said, for as long as nobody has taken it.

use std::collections::VecDeque;
use std::io;

/// So many bytes of output wait for a reader; after that the oldest give way.
pub(crate) const OUTPUT: usize = 64 << 10;
/// So many bytes of input wait for the guest; after that the console stops reading.
pub(crate) const INPUT: usize = 64 << 10;

/// Output that waits for the console. The oldest bytes give way: what a guest said last tells most.
#[derive(Default)]
pub(crate) struct Output {
    bytes: VecDeque<u8>,
    dropped: u64,
    discard: bool,
}

impl Output {
    pub(crate) fn with_room() -> Self {
        Self { bytes: VecDeque::with_capacity(OUTPUT), ..Self::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if self.discard {
            return;
        }
        for byte in bytes {
            if self.bytes.len() == OUTPUT {
                self.bytes.pop_front();
                self.lose(1);
            }
            self.bytes.push_back(*byte);
        }
    }

    /// So many bytes were never seen here.
    pub(crate) fn lose(&mut self, bytes: u64) {
        self.dropped = self.dropped.saturating_add(bytes);
    }

    /// Moves everything into `empty`, which becomes the queue, and returns how many bytes were lost since the last time.
    pub(crate) fn take(&mut self, empty: &mut VecDeque<u8>) -> u64 {
        debug_assert!(empty.is_empty());
        std::mem::swap(&mut self.bytes, empty);
        std::mem::take(&mut self.dropped)
    }

    /// From now on output goes nowhere.
    pub(crate) fn discard(&mut self) {
        (self.bytes, self.discard) = (VecDeque::new(), true);
    }
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

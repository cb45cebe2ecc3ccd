//! One port with which a guest marks the end of its boot, for `--boot-timer`.

use bus::BusDevice;

/// The port.
pub const PORT: u16 = 0x500;
/// The value that marks the end of the boot.
pub const VALUE: u8 = 0x7b;

/// Calls back on the first mark, and on no later one.
pub struct BootMark(Option<Box<dyn FnOnce() + Send>>);

impl BootMark {
    /// A port that calls `marked` from the thread of the processor that writes it.
    pub fn new(marked: Box<dyn FnOnce() + Send>) -> Self {
        Self(Some(marked))
    }
}

impl BusDevice for BootMark {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data == [VALUE]
            && let Some(marked) = self.0.take()
        {
            marked();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn only_the_first_mark_counts() {
        let count = Arc::new(AtomicU32::new(0));
        let seen = count.clone();
        let mut mark = BootMark::new(Box::new(move || {
            seen.fetch_add(1, Ordering::Relaxed);
        }));
        for value in [0, VALUE, VALUE] {
            mark.write(0, &[value]);
        }
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }
}

//! An interrupt line as its device sees it.

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// An edge on an interrupt line, through an irqfd. It neither blocks nor fails.
#[derive(Debug)]
pub struct Irq {
    line: EventFd,
    broken: AtomicBool,
}

impl Irq {
    /// `line` must be non-blocking and registered with the interrupt controller as an irqfd.
    pub fn new(line: EventFd) -> Self {
        Self { line, broken: AtomicBool::new(false) }
    }

    /// The irqfd itself, for whoever raises the interrupt in this one's place.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Raises the interrupt.
    pub fn raise(&self) {
        // The one error that an eventfd's write has is a full counter, which means that an edge
        // is pending anyway. Anything else is told once: the guest decides how often this runs.
        if let Err(error) = self.line.write(1)
            && error.kind() != std::io::ErrorKind::WouldBlock
            && !self.broken.swap(true, Ordering::Relaxed)
        {
            log::warn!("Cannot raise an interrupt: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[test]
    fn raising_signals_the_irqfd_and_never_blocks_on_a_full_one() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let irq = Irq::new(line.try_clone().unwrap());
        irq.raise();
        irq.raise();
        assert_eq!(line.read().unwrap(), 2);
        line.write(u64::MAX - 1).unwrap();
        irq.raise();
        assert!(!irq.broken.load(Ordering::Relaxed));
    }
}

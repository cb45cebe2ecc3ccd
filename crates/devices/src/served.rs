//! A queue that somebody else serves: vhost in the host's kernel, or another process.
//!
//! The other gets the queue's kick and its interrupt as eventfds. Where interrupts have a status register (MMIO), it
//! cannot raise one: it wakes the I/O thread, which does.

use std::io;

use virtio::{VirtQueue, Watch};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A queue with what its server is given.
pub(crate) struct Served {
    pub(crate) queue: VirtQueue,
    /// What the server writes to for an interrupt: the line itself, or one of ours.
    pub(crate) call: EventFd,
    /// Whether `call` is ours, so that the interrupt is still to be raised.
    relayed: bool,
}

impl Served {
    /// # Errors
    ///
    /// The host has no room for an eventfd.
    pub(crate) fn new(queue: VirtQueue) -> io::Result<Self> {
        let line = queue.line();
        let relayed = line.is_none();
        let call = line.map_or_else(|| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC), Ok)?;
        Ok(Self { queue, call, relayed })
    }

    /// Has [`relay`](Self::relay) called for at `token`, where that is needed.
    pub(crate) fn watch(&self, watch: &mut Watch<'_>, token: u32) -> io::Result<()> {
        if self.relayed { watch.add(&self.call, token) } else { Ok(()) }
    }

    /// Raises the interrupt that the server has asked for.
    pub(crate) fn relay(&self) {
        // The one error of a non-blocking eventfd is that there was nothing.
        let _ = self.call.read();
        self.queue.interrupt();
    }
}

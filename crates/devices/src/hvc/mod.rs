//! The console device (VIRTIO 1.2, section 5.3): `hvc0`, one port, on the same [`Console`](crate::console) as the serial
//! port could be.
//!
//! ```text
//! transmit queue ── HvcHandler ──▶ Port: output queue ──▶ Console      (the I/O thread, and the main thread)
//! receive queue  ◀── HvcHandler ── Port: input queue  ◀── Console
//! ```
//!
//! Linux waits in a loop until what it says is taken, so it always is at once: a reader who stops costs the oldest bytes,
//! as with the serial port. Left out on purpose: more ports than one (MULTIPORT), and EMERG_WRITE.

mod handler;
mod port;

#[cfg(test)]
mod tests;

pub use handler::HvcHandler;
pub use port::Port;

use std::sync::Arc;

use virtio::{Active, Kind, VirtQueue, VirtioDevice};

/// What a kernel is to be told of it on its command line.
pub const KERNEL_PARAMETER: &str = "console=hvc0";

/// Entries of each queue.
const QUEUE_SIZE: u16 = 64;

/// VIRTIO_CONSOLE_F_SIZE (section 5.3.3): the configuration space has columns and rows.
const SIZE: u64 = 1;

/// A virtio console. One exists per machine; its [`Port`] outlives it.
pub struct Hvc {
    port: Arc<Port>,
}

impl Hvc {
    /// The guest's side of a console.
    pub(crate) fn new(port: Arc<Port>) -> Self {
        Self { port }
    }
}

impl VirtioDevice for Hvc {
    type Handler = HvcHandler;

    fn kind(&self) -> Kind {
        Kind::Console
    }

    /// To the guest, from the guest (section 5.3.2).
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        if self.port.size().is_some() { SIZE } else { 0 }
    }

    /// `cols` and `rows`; what follows belongs to features that are not offered.
    fn config(&self) -> Vec<u8> {
        let (columns, rows) = self.port.size().unwrap_or((0, 0));
        [columns.to_le_bytes(), rows.to_le_bytes()].concat()
    }

    fn start(&mut self, mut active: Active) -> anyhow::Result<HvcHandler> {
        let (receive, transmit) = (active.take(0)?, active.take(1)?);
        self.port.set_driver(active.has(SIZE).then_some(active.config_change));
        Ok(HvcHandler::new(receive, transmit, self.port.clone()))
    }

    fn stop(&mut self, handler: HvcHandler) -> Vec<VirtQueue> {
        self.port.set_driver(None);
        handler.stop()
    }
}

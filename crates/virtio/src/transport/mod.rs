//! How the guest reaches a device: one [`Core`] under two tables of registers (VIRTIO 1.2, section 4).
//!
//! A transport is what differs between buses and nothing else: where each [`Reg`] lies and how wide it is, where the
//! configuration space and the notifications are, and how an interrupt leaves ([`Interrupt`](crate::Interrupt)).
//! [`mmio`] has one line and a register that says why it was raised; [`pci`] has a line for each queue and an address for
//! each queue's notification.

mod core;
pub mod mmio;
pub mod pci;

pub use self::core::{Core, Half, Reg, status};
pub use self::mmio::Mmio;
pub use self::pci::Pci;

use memory::Ram;

use crate::io_thread::IoThread;

/// What a device is connected to, whatever its transport.
#[derive(Clone)]
pub struct Wiring {
    /// The guest's memory.
    pub memory: std::sync::Arc<Ram>,
    /// Where the device's handler runs.
    pub io_thread: IoThread,
    /// What the log calls the device.
    pub name: String,
}

//! How the guest reaches a device: one [`Core`] under two tables of registers (VIRTIO 1.2, section 4).
//!
//! A transport is what differs between buses and nothing else: where each [`Reg`] lies and how wide it is, where the
//! configuration space and the notifications are, and how an interrupt leaves ([`Interrupt`](crate::Interrupt)).
//! [`mmio`] has one line and a register that says why it was raised; [`pci`] has a line for each queue and an address for
//! each queue's notification.

mod core;
pub mod mmio;
pub mod pci;

pub use self::core::{Core, CoreState, Half, Reg, status};
pub use self::mmio::{Mmio, MmioState};
pub use self::pci::{Pci, PciState};

use std::sync::{Arc, Mutex, PoisonError};

use memory::Ram;

use crate::device::VirtioDevice;
use crate::io_thread::IoThread;

/// What a device is connected to, whatever its transport.
#[derive(Clone)]
pub struct Wiring {
    /// The guest's memory.
    pub memory: Arc<Ram>,
    /// Where the device's handler runs.
    pub io_thread: IoThread,
    /// What the log calls the device.
    pub name: String,
}

/// The way of a machine's owner to a device that it has attached, whatever the transport.
///
/// It waits for the lock of the transport's registers, which a processor has for the length of one access, and for the
/// device's I/O thread, which has no lock of the transport's: never for the guest.
pub type Handle<D> = Arc<dyn Access<D>>;

/// A transport that has a device, which is reached by `with`.
pub trait Access<D: VirtioDevice>: Send + Sync {
    /// Calls `f` once; see [`Core::control`].
    fn control(&self, f: Control<'_, D>);
}

/// What is done to a device and to its handler, which is there while the device runs.
pub type Control<'a, D> = &'a mut dyn FnMut(&mut D, Option<&mut <D as VirtioDevice>::Handler>);

impl<D: VirtioDevice> dyn Access<D> {
    /// Looks at the device or changes it; see [`Core::control`].
    pub fn with<R>(&self, f: impl FnOnce(&mut D, Option<&mut D::Handler>) -> R) -> R {
        let (mut f, mut result) = (Some(f), None);
        self.control(&mut |device, handler| result = f.take().map(|f| f(device, handler)));
        result.expect("a transport calls it once")
    }
}

impl<D: VirtioDevice> Access<D> for Mutex<Pci<D>> {
    fn control(&self, f: Control<'_, D>) {
        self.lock().unwrap_or_else(PoisonError::into_inner).core().control(f);
    }
}

impl<D: VirtioDevice> Access<D> for Mutex<Mmio<D>> {
    fn control(&self, f: Control<'_, D>) {
        self.lock().unwrap_or_else(PoisonError::into_inner).core().control(f);
    }
}

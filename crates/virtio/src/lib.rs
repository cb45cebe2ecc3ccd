//! VIRTIO 1.2 without the devices: the contract between a device and its transport, split queues, I/O threads.
//!
//! A [`VirtioDevice`] says what it is and how it starts; [`transport`] shows it to the guest. At DRIVER_OK the device
//! makes a [`Handler`] out of its queues, which moves to an [`IoThread`] and comes back from there at a reset. Each
//! [`VirtQueue`] hands out [`Chain`]s of descriptors as checked lists of guest memory. Neither KVM nor any device is
//! known here: an interrupt, a kick and a timer are descriptors.
//!
//! Left out on purpose: packed rings, legacy and transitional devices, and VIRTIO_F_RING_RESET, VIRTIO_F_IN_ORDER,
//! VIRTIO_F_ACCESS_PLATFORM, which no driver of ours needs and none is offered.

mod chain;
mod device;
mod io_thread;
mod queue;
mod rate;
pub mod testing;
pub mod transport;

pub use chain::{Chain, IoVec};
pub use device::{Active, ConfigChange, GuestFault, Handler, Interrupt, Kind, VirtioDevice, features};
pub use io_thread::{EventSet, IoThread, Watch};
pub use queue::VirtQueue;
pub use rate::{Limit, RateLimiter};

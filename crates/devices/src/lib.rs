//! Devices, one folder each.

pub mod balloon;
pub mod block;
#[cfg(test)]
mod conformance;
pub mod console;
mod control;
mod files;
pub mod fs;
mod helper;
pub mod hvc;
pub mod legacy;
mod list;
pub mod net;
pub mod pmem;
pub mod rng;
mod served;
mod starter;
mod transport;
pub mod unix;
mod vhost_user;
pub mod vsock;

pub use control::{Controls, DeviceReply, DeviceRequest};
pub use files::Files;
pub use list::{Attach, Devices};
pub use starter::Starter;
pub use transport::Transport;

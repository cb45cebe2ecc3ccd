//! Devices, one folder each.

pub mod balloon;
pub mod block;
pub mod console;
pub mod hvc;
pub mod legacy;
mod list;
pub mod net;
pub mod rng;
mod unix;
pub mod vsock;

pub use list::{Attach, Devices};

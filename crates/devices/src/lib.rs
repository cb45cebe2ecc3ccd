//! Devices, one folder each.

pub mod console;
pub mod legacy;

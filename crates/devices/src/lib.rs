//! Devices, one folder each.

//! PCI: configuration spaces, the segment that they are in, and interrupts as messages.
//!
//! A [`Function`] has a [`Config`] and, behind its BARs, regions. A [`Segment`] gives it its number and its addresses,
//! and is itself the device behind the window to all configuration spaces. [`Msix`] makes interrupts of eventfds,
//! through an [`MsiRouter`] that the hypervisor's side gives: nothing here knows KVM.

mod aml;
pub mod config;
pub mod msix;
mod segment;

pub use aml::aml;
pub use config::{Bar, BarKind, Config, Identity};
pub use msix::{Message, MsiRouter, Msix};
pub use segment::{Function, NoRoom, Segment, SharedFunction, Window};

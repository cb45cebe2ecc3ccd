//! The only user of the KVM API: virtual machines and virtual processors.
//!
//! [`Host`] is `/dev/kvm` with what it offers, [`Vm`] a machine with its memory and interrupt
//! controllers, [`Vcpu`] one of its processors, whose [`Vcpu::run`] returns an [`Exit`] for each
//! thing that only the rest of the program can answer. Nothing here knows a device.

mod affinity;
mod exit;
mod host;
mod irq;
mod kick;
pub mod probe;
mod vcpu;
mod vm;
pub mod x86;

pub use affinity::{may_run_on, pin_to};
pub use exit::{Exit, InternalError, Stuck};
pub use host::{Host, HostError};
pub use irq::MsiRoutes;
pub use kick::{Kicker, install_kick_handler};
pub use vcpu::Vcpu;
pub use vm::{Doorbell, Place, Value, Vm};

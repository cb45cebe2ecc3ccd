//! How the guest finds a device: of the machine as a whole, and of each device that says otherwise.

use serde::{Deserialize, Serialize};

/// How the guest finds a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// As a function on a PCI bus, with an interrupt of its own for each queue.
    #[default]
    Pci,
    /// As registers in memory, which ACPI names.
    Mmio,
    /// As registers in memory, which the kernel's command line names: for kernels without ACPI.
    MmioCmdline,
}

//! What a user can get wrong about a machine.

use boot::BootError;
use kvm::HostError;
use kvm::x86::cpuid::CpuidError;
use memory::MemoryError;

/// A machine that cannot be built as it was asked for, and what to ask for instead. Everything
/// else that can fail while it is built is the host's fault.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Nothing to boot.
    #[error("there is no kernel to boot: give --kernel PATH, or a [kernel] path in the file")]
    NoKernel,
    /// The host runs no machines at all.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its processors' features.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// What it boots.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The number of its processors.
    #[error("--cpus {asked} is out of range: a machine on this host has 1 to {most} processors")]
    CpuCount {
        /// What was asked for.
        asked: u32,
        /// The most that can be had.
        most: u32,
    },
    /// Two consoles at one terminal.
    #[error("--serial and --console cannot both be stdio: send one of them elsewhere, or drop --serial")]
    TwoConsoles,
    /// A host processor that is not there.
    #[error(
        "--cpus pin= names processor {0}, on which this process may not run: see Cpus_allowed_list in /proc/self/status"
    )]
    Pin(usize),
    /// A device that cannot be had as it was asked for.
    #[error("{0}")]
    Device(String),
    /// More devices, or larger ones, than the machine has places for.
    #[error("{0}")]
    NoPlace(String),
}

impl ConfigError {
    /// What kept a device from being made: an error of ours as it is, any other as the user's.
    pub(crate) fn of_device(error: anyhow::Error) -> Self {
        error.downcast().unwrap_or_else(|error| Self::Device(format!("{error:#}")))
    }
}

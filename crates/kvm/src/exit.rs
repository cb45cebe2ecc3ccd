//! Why a virtual processor came back from the guest.

use std::fmt;

/// What the rest of the program has to answer.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads a port: `data` is one or more elements of `width` bytes, to be filled in.
    PortIn {
        /// The port.
        port: u16,
        /// Bytes of one element: 1, 2 or 4.
        width: usize,
        /// All elements.
        data: &'a mut [u8],
    },
    /// The guest writes a port: `data` is one or more elements of `width` bytes.
    PortOut {
        /// The port.
        port: u16,
        /// Bytes of one element: 1, 2 or 4.
        width: usize,
        /// All elements.
        data: &'a [u8],
    },
    /// The guest reads memory where no RAM is.
    MmioRead {
        /// The guest-physical address.
        address: u64,
        /// To be filled in.
        data: &'a mut [u8],
    },
    /// The guest writes memory where no RAM is.
    MmioWrite {
        /// The guest-physical address.
        address: u64,
        /// What it writes.
        data: &'a [u8],
    },
    /// A signal arrived, or a kick did; or the guest can try again what it did.
    Kicked,
    /// A fault while handling a fault while handling a fault.
    TripleFault,
    /// KVM does not know how to go on: [`crate::Vcpu::explain`] says more.
    Stuck(Stuck),
}

/// A reason that ends the guest.
#[derive(Debug)]
pub enum Stuck {
    /// KVM_EXIT_INTERNAL_ERROR.
    Internal,
    /// Another one, in words.
    Other(String),
}

/// Where and at what KVM gave up (KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// What KVM says happened.
    pub reason: String,
    /// The instruction's address.
    pub rip: u64,
    /// Processor mode: `real mode`, `32-bit protected mode`, `64-bit long mode`, …
    pub mode: &'static str,
    /// The bytes of the instruction, as far as KVM or guest memory tells.
    pub instruction: Vec<u8>,
}

impl fmt::Display for InternalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at rip {:#x} in {}", self.reason, self.rip, self.mode)?;
        if self.instruction.is_empty() {
            return write!(f, ", instruction bytes unknown");
        }
        write!(f, ", instruction bytes")?;
        self.instruction.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}

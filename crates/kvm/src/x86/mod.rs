//! The x86-64 processor: what it says of itself, and how it starts.

pub mod cpuid;
pub mod msr;
pub mod regs;

//! Puts a Linux kernel into guest memory: images, KASLR, zero page, PVH, ACPI, MP table.
//!
//! [`load`] is all that a machine calls: it brings kernel, initrd, command line and tables into
//! fresh guest RAM at the addresses of `memory::layout` and says where the first processor starts.

mod acpi;
pub mod cache;
mod cmdline;
mod e820;
pub mod image;
mod load;
mod mptable;
mod page_tables;
mod pvh;
mod zero_page;

pub use acpi::AcpiSpec;
pub use cmdline::{Cmdline, CmdlineError, tells_panics_apart};
pub use load::{BootError, KernelSpec, Sources, Start, load};

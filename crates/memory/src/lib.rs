//! Guest RAM, files beside it, and the table of guest-physical addresses.
//!
//! [`layout`] says where everything of ours lies in the guest's address space; [`Ram`] is the
//! memory behind the part of it that is RAM. Dirty pages and files as RAM are left out until
//! there are snapshots to take.

mod discard;
mod file_region;
pub mod layout;
mod mapping;
mod region;
mod spec;

pub use discard::{discard, discard_mapped};
pub use file_region::FileRegion;
pub use region::{Ram, Region};
pub use spec::{HugePages, MemoryError, MemorySpec};

//! The memory map that the kernel is told: what is RAM and what is not.
//!
//! The numbers of its types are those of the BIOS call E820 (ACPI 6.5, 15.1), which the zero page
//! and PVH share.

use std::ops::Range;

use memory::layout;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// Usable RAM.
pub(crate) const RAM: u32 = 1;
/// Not to be touched.
pub(crate) const RESERVED: u32 = 2;

/// One range of the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct E820Entry {
    pub(crate) range: Range<u64>,
    pub(crate) kind: u32,
}

/// The map of a machine with this memory: RAM without the legacy area below 1 MiB.
pub(crate) fn map(ram: &impl GuestMemoryBackend) -> Vec<E820Entry> {
    let mut map = vec![
        E820Entry { range: 0..layout::LOW_RAM_END, kind: RAM },
        E820Entry { range: layout::LOW_RAM_END..layout::HIGH_RAM, kind: RESERVED },
    ];
    for region in ram.iter() {
        let range = region.start_addr().0.max(layout::HIGH_RAM)..region.last_addr().unchecked_add(1).0;
        map.push(E820Entry { range, kind: RAM });
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    #[test]
    fn the_map_leaves_out_the_legacy_area_and_the_hole() {
        let ranges = [(GuestAddress(0), 64 << 20), (GuestAddress(4 << 30), 2 << 20)];
        let ram = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let usable: Vec<_> = map(&ram).into_iter().filter(|entry| entry.kind == RAM).map(|entry| entry.range).collect();
        assert_eq!(usable, [0..0x9fc00, 0x10_0000..64 << 20, 4 << 30..(4 << 30) + (2 << 20)]);
    }
}

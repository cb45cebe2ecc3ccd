//! The table of guest-physical addresses: every one that we choose stands here, once.
//!
//! Below 1 MiB it follows what a PC has there, since kernels look for some of it (Linux boot
//! protocol, "Memory layout"; ACPI 6.5, 5.2.5.1). RAM goes round a hole below 4 GiB that belongs
//! to devices and to the interrupt controllers.

use std::ops::Range;

/// 1 KiB, 1 MiB and 1 GiB.
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The BIOS data area's reset word, 16 bits: a kernel that restarts the machine by its own will
/// leaves 0x1234 here for a warm restart and 0 for a cold one.
pub const RESET_WORD: u64 = 0x472;
/// The boot-time global descriptor table.
pub const GDT: u64 = 0x500;
/// PVH's `hvm_start_info`, its module list and its memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// `struct boot_params`, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// `struct setup_data` with a seed for the guest's random numbers.
pub const SETUP_DATA: u64 = 0x8000;
/// The boot-time page tables, PML4 first.
pub const PAGE_TABLES: Range<u64> = 0x9000..0x1f000;
/// The kernel's command line, with its terminating zero.
pub const CMDLINE: Range<u64> = 0x20000..0x30000;
/// The end of RAM below the legacy video and firmware area.
pub const LOW_RAM_END: u64 = 0x9fc00;
/// The ACPI tables, RSDP first, where a kernel also finds it by searching.
pub const ACPI: Range<u64> = 0xe0000..0xf0000;
/// The MultiProcessor Specification's tables, where a kernel finds them by searching.
pub const MP_TABLE: Range<u64> = 0xf0000..MIB;
/// Where RAM goes on above the legacy area, and where a kernel may lie at the earliest.
pub const HIGH_RAM: u64 = MIB;

/// The hole in RAM for devices.
pub const MMIO_HOLE: Range<u64> = 3 * GIB..4 * GIB;
/// Where the regions of PCI functions lie that must be below 4 GiB.
pub const PCI_BARS32: Range<u64> = 0xc000_0000..0xd000_0000;
/// Registers of the first device behind memory-mapped registers; the others follow, 4 KiB each.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// The interrupt lines of those devices: the I/O APIC's pins above the platform's own.
pub const VIRTIO_GSIS: Range<u32> = 6..IO_APIC_PINS as u32;
/// The configuration spaces of the PCI functions, 1 MiB for the one bus.
pub const PCI_ECAM: u64 = 0xe000_0000;
/// The I/O APIC's registers.
pub const IO_APIC: u64 = 0xfec0_0000;
/// How many interrupt lines it has.
pub const IO_APIC_PINS: u8 = 24;
/// The local APICs' registers.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page for KVM's identity map and three for its task state segment, which Intel processors
/// without unrestricted guests need. Above every device, in the hole.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: u64 = KVM_IDENTITY_MAP + 4 * KIB;

/// The ranges of RAM of a machine with `size` bytes: one, or two where it reaches the hole.
pub fn ram(size: u64) -> Vec<Range<u64>> {
    let below = size.min(MMIO_HOLE.start);
    let low = 0..below;
    match size - below {
        0 => vec![low],
        above => vec![low, MMIO_HOLE.end..MMIO_HOLE.end.saturating_add(above)],
    }
}

/// The first address above all RAM of a machine with `size` bytes.
pub fn ram_end(size: u64) -> u64 {
    ram(size).last().map_or(0, |range| range.end)
}

/// Where files lie that are the guest's memory: the lower half of what is above the RAM of a machine with `size` bytes
/// and within the reach of a processor with `address_bits`. Empty where nothing is left.
pub fn file_regions(size: u64, address_bits: u8) -> Range<u64> {
    let all = above_ram(size, address_bits);
    all.start..pci_bars64(size, address_bits).start
}

/// Where the regions of PCI functions lie that may be anywhere: the upper half.
pub fn pci_bars64(size: u64, address_bits: u8) -> Range<u64> {
    let all = above_ram(size, address_bits);
    let middle = all.start + (all.end - all.start) / 2;
    middle.checked_next_multiple_of(GIB).map_or(all.end, |middle| middle.min(all.end))..all.end
}

fn above_ram(size: u64, address_bits: u8) -> Range<u64> {
    let limit = 1u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX);
    let start = ram_end(size).max(MMIO_HOLE.end).checked_next_multiple_of(GIB).unwrap_or(limit);
    start.min(limit)..limit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_below_the_hole_is_one_range() {
        for size in [512 * MIB, 3 * GIB] {
            let ranges = ram(size);
            assert_eq!((ranges.len(), &ranges[0]), (1, &(0..size)));
        }
    }

    #[test]
    fn ram_that_reaches_the_hole_goes_on_above_it() {
        assert_eq!(ram(6 * GIB), [0..3 * GIB, 4 * GIB..7 * GIB]);
        assert_eq!(ram_end(6 * GIB), 7 * GIB);
        assert_eq!(ram_end(u64::MAX), u64::MAX);
    }

    #[test]
    fn regions_begin_above_ram_and_end_where_the_processor_does() {
        assert_eq!(file_regions(512 * MIB, 40), 4 * GIB..514 * GIB);
        assert_eq!(pci_bars64(512 * MIB, 40), 514 * GIB..1024 * GIB);
        assert_eq!(file_regions(6 * GIB + MIB, 36), 8 * GIB..36 * GIB);
        assert_eq!(pci_bars64(6 * GIB + MIB, 36), 36 * GIB..64 * GIB);
        for regions in [file_regions, pci_bars64] {
            assert!(regions(512 * MIB, 32).is_empty() && regions(u64::MAX, 64).is_empty());
        }
        assert!(pci_bars64(63 * GIB, 36).is_empty());
    }

    #[test]
    fn the_areas_of_the_hole_do_not_overlap() {
        let areas = [
            MMIO_HOLE.start..PCI_BARS32.start,
            PCI_BARS32,
            VIRTIO_MMIO..PCI_ECAM,
            PCI_ECAM..PCI_ECAM + MIB,
            IO_APIC..MMIO_HOLE.end,
        ];
        assert!(areas.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }

    #[test]
    fn the_areas_of_the_first_mebibyte_do_not_overlap() {
        let areas = [
            RESET_WORD..RESET_WORD + 2,
            GDT..GDT + 4 * 8,
            PVH_START_INFO..ZERO_PAGE,
            ZERO_PAGE..SETUP_DATA,
            SETUP_DATA..PAGE_TABLES.start,
            PAGE_TABLES,
            CMDLINE,
            LOW_RAM_END..ACPI.start,
            ACPI,
            MP_TABLE,
            HIGH_RAM..MMIO_HOLE.start,
        ];
        assert!(areas.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
}

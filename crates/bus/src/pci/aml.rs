//! What ACPI says of the segment: the host bridge with its windows, and whose the configuration space is.
//!
//! PCI Firmware 3.3, 4.1.2 (the memory that MCFG names is reserved by a motherboard resource, or Linux does not use it)
//! and 4.1.3; ACPI 6.5, 6.4.3.5 (address spaces). Left out on purpose: `_PRT`, because no function has an INTx line, and
//! `_OSC`, because there is no PCI Express feature whose control could be handed over.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Memory32Fixed, Name, ResourceTemplate, ZERO,
};
use memory::layout;

use super::segment::Segment;

/// The DSDT's part, for a segment whose regions have `bars64` above RAM.
pub fn aml(bars64: &Range<u64>, sink: &mut Vec<u8>) {
    let low = |address: u64| u32::try_from(address).expect("below 4 GiB");
    let id = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let space = Memory32Fixed::new(true, low(layout::PCI_ECAM), low(Segment::LENGTH));
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&space]));
    Device::new("_SB_.ECAM".into(), vec![&id, &resources]).to_aml_bytes(sink);

    let id = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let compatible = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let segment = Name::new("_SEG".into(), &ZERO);
    let number = Name::new("_UID".into(), &ZERO);
    let buses = AddressSpace::new_bus_number(0u16, 0);
    let Range { start, end } = layout::PCI_BARS32;
    let uncached = AddressSpaceCacheable::NotCacheable;
    let bars32 = AddressSpace::new_memory(uncached, true, low(start), low(end - 1), None);
    let mut windows: Vec<&dyn Aml> = vec![&buses, &bars32];
    let above;
    if !bars64.is_empty() {
        let cacheable = AddressSpaceCacheable::Cacheable;
        above = AddressSpace::new_memory(cacheable, true, bars64.start, bars64.end - 1, None);
        windows.push(&above);
    }
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(windows));
    Device::new("_SB_.PCI0".into(), vec![&id, &compatible, &segment, &number, &resources]).to_aml_bytes(sink);
}

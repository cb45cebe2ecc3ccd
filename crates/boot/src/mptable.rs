//! The tables of the Intel MultiProcessor Specification 1.4, chapter 4: processors, I/O APIC and interrupts for a kernel
//! that has no ACPI, or is told to leave it alone (`acpi=off`).
//!
//! Every machine has them. They are a few hundred bytes, a kernel that finds the same in ACPI reads no further than the
//! first sixteen, and one that looks for them in vain searches all of the firmware's area.
//!
//! Left out on purpose: what each processor says better itself by CPUID (signature and features), PCI, whose interrupts
//! are messages, and the extended table.

use memory::layout;

/// The revision of the specification, in both structures.
const REVISION: u8 = 4;
/// Bytes of the floating pointer structure (4.1), which the configuration table follows, and of that one's header.
const POINTER: u64 = 16;
const HEADER: usize = 44;

/// Types of the table's entries (table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Versions of the interrupt controllers, as KVM's registers have them.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
/// Flags of processors and I/O APICs (4.3.1 and 4.3.3).
const ENABLED: u8 = 1 << 0;
const BOOT_PROCESSOR: u8 = 1 << 1;

/// The numbers of the one bus and of the one I/O APIC; the MADT has the same.
const ISA: u8 = 0;
const IO_APIC_ID: u8 = 0;
/// Every local APIC.
const ALL: u8 = 0xff;

/// Types of interrupts (table 4-10).
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// The tables as they stand at [`layout::MP_TABLE`], the floating pointer first, for `vcpus` processors whose APIC ids
/// count from 0.
///
/// # Panics
///
/// Never: a table for 255 processors has 5 KiB.
pub(crate) fn bytes(vcpus: u8) -> Vec<u8> {
    let mut entries: Vec<Vec<u8>> = (0..vcpus).map(processor).collect();
    entries.push([&[BUS, ISA], &b"ISA   "[..]].concat());
    let io_apic = address(layout::IO_APIC);
    entries.push([&[IO_APIC, IO_APIC_ID, IO_APIC_VERSION, ENABLED], &io_apic[..]].concat());
    // Interrupt n of the bus is at pin n, which is GSI n.
    entries.extend((0..layout::IO_APIC_PINS).map(|pin| interrupt(IO_INTERRUPT, VECTORED, pin, [IO_APIC_ID, pin])));
    // What KVM has at LINT0 of the first processor and at LINT1 of all.
    entries.push(interrupt(LOCAL_INTERRUPT, EXT_INT, 0, [0, 0]));
    entries.push(interrupt(LOCAL_INTERRUPT, NMI, 0, [ALL, 1]));

    let mut pointer = [&b"_MP_"[..], &address(layout::MP_TABLE.start + POINTER)].concat();
    // The length in units of 16 bytes, the revision, the checksum, and by zeros that there is a table.
    pointer.extend([1, REVISION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut pointer, 10);
    let mut table = header(&entries);
    table.extend(entries.concat());
    set_checksum(&mut table, 7);
    [pointer, table].concat()
}

/// The configuration table's header (4.2), without its checksum.
fn header(entries: &[Vec<u8>]) -> Vec<u8> {
    let word = |number: usize| u16::try_from(number).expect("5 KiB at most").to_le_bytes();
    let length = HEADER + entries.iter().map(Vec::len).sum::<usize>();
    let mut header = b"PCMP".to_vec();
    header.extend(word(length));
    header.extend([REVISION, 0]);
    header.extend(b"VMM     VMM         ");
    // No table of the maker's own.
    header.extend([0; 6]);
    header.extend(word(entries.len()));
    header.extend(address(layout::LOCAL_APIC));
    // No extended table.
    header.extend([0; 4]);
    header
}

fn processor(id: u8) -> Vec<u8> {
    let flags = if id == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
    [&[PROCESSOR, id, LOCAL_APIC_VERSION, flags], &[0; 16][..]].concat()
}

/// Which interrupt of the bus goes to which pin of which APIC, in the bus's manner: edges, active high (4.3.4, 4.3.5).
fn interrupt(entry: u8, kind: u8, source: u8, [apic, pin]: [u8; 2]) -> Vec<u8> {
    vec![entry, kind, 0, 0, ISA, source, apic, pin]
}

fn address(address: u64) -> [u8; 4] {
    u32::try_from(address).expect("in the hole below 4 GiB, or below 1 MiB").to_le_bytes()
}

/// Has all bytes add up to zero.
fn set_checksum(bytes: &mut [u8], at: usize) {
    bytes[at] = bytes.iter().fold(0u8, |rest, byte| rest.wrapping_sub(*byte));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn word(bytes: &[u8], at: usize) -> usize {
        u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()).into()
    }

    /// The entries of the table, by their lengths, which the types decide.
    fn entries(mut table: &[u8]) -> Vec<&[u8]> {
        let mut entries = Vec::new();
        while let Some(kind) = table.first() {
            let (entry, rest) = table.split_at(if *kind == 0 { 20 } else { 8 });
            entries.push(entry);
            table = rest;
        }
        entries
    }

    #[test]
    fn both_structures_add_up_to_zero_and_one_points_to_the_other() {
        for vcpus in [1, 255] {
            let bytes = bytes(vcpus);
            let (pointer, table) = bytes.split_at(16);
            assert_eq!((sum(pointer), sum(table)), (0, 0));
            assert_eq!((&pointer[..4], &table[..4]), (&b"_MP_"[..], &b"PCMP"[..]));
            assert_eq!(pointer[4..8], [0x10, 0, 0xf, 0]);
            assert_eq!(word(table, 4), table.len());
            assert_eq!(table[36..40], 0xfee0_0000_u32.to_le_bytes());
            assert!(bytes.len() as u64 <= layout::MP_TABLE.end - layout::MP_TABLE.start);
        }
    }

    #[test]
    fn every_processor_and_every_pin_is_listed_in_the_order_of_types() {
        let bytes = bytes(3);
        let entries = entries(&bytes[16 + 44..]);
        assert_eq!(entries.len(), word(&bytes[16..], 34));
        assert!(entries.is_sorted_by_key(|entry| entry[0]));
        let processors: Vec<_> = entries.iter().filter(|entry| entry[0] == 0).map(|entry| &entry[1..4]).collect();
        assert_eq!(processors, [[0, 0x14, 3], [1, 0x14, 1], [2, 0x14, 1]]);
        assert!(entries.contains(&&[2, 0, 0x11, 1, 0, 0, 0xc0, 0xfe][..]));
        for pin in 0..24 {
            assert!(entries.contains(&&[3, 0, 0, 0, 0, pin, 0, pin][..]));
        }
        assert_eq!(entries.iter().filter(|entry| entry[0] == 3).count(), 24);
    }
}

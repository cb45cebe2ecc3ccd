//! The identity mapping that the 64-bit entry starts with, in 2 MiB pages.
//!
//! Linux boot protocol, "64-bit Boot Protocol": the kernel, the zero page and the command line have
//! to be mapped at their own addresses. All memory below 4 GiB is, and the kernel where it lies above.

use std::ops::Range;

use memory::layout;

const PAGE: u64 = 4096;
const ENTRIES: u64 = 512;
/// Present and writable.
const TABLE: u64 = 0b11;
/// Present, writable, and a page of its own size.
const LARGE_PAGE: u64 = 0b1000_0011;

/// Bytes that one entry of a page directory, of a page-directory-pointer table, and of the PML4 maps.
const DIRECTORY_ENTRY: u64 = 2 << 20;
const POINTER_ENTRY: u64 = DIRECTORY_ENTRY * ENTRIES;
const ROOT_ENTRY: u64 = POINTER_ENTRY * ENTRIES;

/// The tables at [`layout::PAGE_TABLES`], the PML4 first, for all below 4 GiB and for `kernel`.
pub(crate) fn identity(kernel: &Range<u64>) -> Vec<u8> {
    let mut tables = Tables { words: vec![0; 512] };
    for gigabyte in 0..4 {
        tables.map_gigabyte(gigabyte * POINTER_ENTRY);
    }
    let mut at = kernel.start & !(POINTER_ENTRY - 1);
    while at < kernel.end {
        tables.map_gigabyte(at);
        at += POINTER_ENTRY;
    }
    let bytes: Vec<u8> = tables.words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let room = layout::PAGE_TABLES.end - layout::PAGE_TABLES.start;
    assert!(bytes.len() as u64 <= room, "a kernel spans less than 12 GiB");
    bytes
}

struct Tables {
    words: Vec<u64>,
}

impl Tables {
    /// Maps the gigabyte at `address`, unless it is mapped.
    fn map_gigabyte(&mut self, address: u64) {
        let pointers = self.descend(0, address / ROOT_ENTRY % ENTRIES);
        let slot = address / POINTER_ENTRY % ENTRIES;
        if self.words[index(pointers, slot)] != 0 {
            return;
        }
        let directory = self.descend(pointers, slot);
        for page in 0..ENTRIES {
            self.words[index(directory, page)] = (address + page * DIRECTORY_ENTRY) | LARGE_PAGE;
        }
    }

    /// The number of the table that entry `slot` of table `table` points to, made where it is not.
    fn descend(&mut self, table: u64, slot: u64) -> u64 {
        let at = index(table, slot);
        if self.words[at] == 0 {
            let next = self.words.len() as u64 / ENTRIES;
            self.words[at] = (layout::PAGE_TABLES.start + next * PAGE) | TABLE;
            self.words.resize(self.words.len() + 512, 0);
            return next;
        }
        (self.words[at] - layout::PAGE_TABLES.start) / PAGE
    }
}

fn index(table: u64, slot: u64) -> usize {
    usize::try_from(table * ENTRIES + slot).expect("a few pages")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the processor would make of a linear address.
    fn walk(tables: &[u8], linear: u64) -> Option<u64> {
        let entry = |table: u64, slot: u64| {
            let at = usize::try_from(table - layout::PAGE_TABLES.start + slot * 8).unwrap();
            Some(u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())).filter(|entry| entry & 1 == 1)
        };
        let pointers = entry(layout::PAGE_TABLES.start, linear >> 39 & 511)? & !0xfff;
        let directory = entry(pointers, linear >> 30 & 511)? & !0xfff;
        let page = entry(directory, linear >> 21 & 511)?;
        Some((page & !0x1f_ffff) | (linear & 0x1f_ffff))
    }

    #[test]
    fn everything_below_4_gib_is_mapped_to_itself() {
        let tables = identity(&(16 << 20..64 << 20));
        for address in [0, 0x7000, 0x123_4567, (4 << 30) - 1] {
            assert_eq!(walk(&tables, address), Some(address));
        }
        assert_eq!(walk(&tables, 4 << 30), None);
    }

    #[test]
    fn a_kernel_above_4_gib_is_mapped_wherever_it_lies() {
        for start in [5 << 30, (6 << 30) - (2 << 20), (512 << 30) - (2 << 20), 3 << 40] {
            let tables = identity(&(start..start + (64 << 20)));
            for address in [0x7000, start, start + (64 << 20) - 1] {
                assert_eq!(walk(&tables, address), Some(address), "{start:#x}");
            }
        }
    }
}

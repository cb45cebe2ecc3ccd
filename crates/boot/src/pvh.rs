//! `hvm_start_info`, through which a PVH kernel is told what the zero page tells another.
//!
//! Xen's `public/arch-x86/hvm/start_info.h`. One area holds the structure, the module list (the
//! initrd) and the memory map, in this order, all little-endian.

use memory::layout;

use crate::e820::E820Entry;

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;
const START_INFO: u64 = 56;
const MODULE: u64 = 32;

/// What the structure says.
#[derive(Debug, Default)]
pub(crate) struct StartInfo {
    /// Where the initrd lies and its bytes; zeroes for none.
    pub(crate) initrd: (u64, u64),
    /// The ACPI root pointer.
    pub(crate) rsdp: u64,
    /// The memory map.
    pub(crate) e820: Vec<E820Entry>,
}

impl StartInfo {
    /// The area at [`layout::PVH_START_INFO`].
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let modules = u32::from(self.initrd.1 > 0);
        let modlist = layout::PVH_START_INFO + START_INFO;
        let memmap = modlist + MODULE;
        let entries = u32::try_from(self.e820.len()).expect("a handful of ranges");
        let mut area = Vec::new();
        [MAGIC, VERSION, 0, modules].iter().for_each(|word| area.extend(word.to_le_bytes()));
        let addresses = [modlist, layout::CMDLINE.start, self.rsdp, memmap];
        addresses.iter().for_each(|word| area.extend(word.to_le_bytes()));
        [entries, 0].iter().for_each(|word| area.extend(word.to_le_bytes()));
        // The module: address, bytes, no command line of its own, reserved.
        [self.initrd.0, self.initrd.1, 0, 0].iter().for_each(|word| area.extend(word.to_le_bytes()));
        for entry in &self.e820 {
            area.extend(entry.range.start.to_le_bytes());
            area.extend((entry.range.end - entry.range.start).to_le_bytes());
            area.extend(entry.kind.to_le_bytes());
            area.extend([0; 4]);
        }
        area
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::e820::{RAM, RESERVED};

    fn field(area: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(area[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_area_holds_the_structure_the_module_and_the_map() {
        let info = StartInfo {
            initrd: (0x400_0000, 0x1000),
            rsdp: 0xe0000,
            e820: vec![
                E820Entry { range: 0..0x9_0000, kind: RAM },
                E820Entry { range: 0x9_0000..0x10_0000, kind: RESERVED },
            ],
        };
        let area = info.bytes();
        assert_eq!(area[..4], [0x78, 0xc5, 0x6e, 0x33]);
        assert_eq!(area[12], 1);
        assert_eq!(field(&area, 16), 0x6000 + 56);
        assert_eq!(field(&area, 32), 0xe0000);
        assert_eq!(field(&area, 40), 0x6000 + 88);
        assert_eq!((field(&area, 56), field(&area, 64)), (0x400_0000, 0x1000));
        assert_eq!((field(&area, 88 + 24), area[88 + 40]), (0x9_0000, 2));
        assert_eq!(area.len(), 88 + 2 * 24);
    }

    #[test]
    fn a_machine_without_an_initrd_has_no_module() {
        assert_eq!(StartInfo::default().bytes()[12], 0);
    }
}

//! `struct boot_params`, the page through which a boot loader talks to a kernel.
//!
//! Linux boot protocol, "The Real-mode Kernel Header" and "Zero Page". It is built as bytes at the
//! offsets that those documents give: every field that is not set is zero, which means absent.

use linux_loader::loader::bootparam::setup_header;
use memory::layout;
use vm_memory::ByteValued;

use crate::e820::E820Entry;

const ACPI_RSDP: usize = 0x070;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const EXT_RAMDISK_SIZE: usize = 0x0c4;
const E820_COUNT: usize = 0x1e8;
const SETUP_HEADER: usize = 0x1f1;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY: usize = 20;
const E820_MOST: usize = 128;
const LENGTH: usize = 4096;

/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The protocol of a kernel that brings no header: 2.15, the first with a KASLR flag and an RSDP.
const PROTOCOL: u16 = 0x020f;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1 << 0;
const KASLR_FLAG: u8 = 1 << 1;

/// What the page says.
#[derive(Debug, Default)]
pub(crate) struct ZeroPage {
    /// The header that came with the kernel, if one did.
    pub(crate) header: Option<setup_header>,
    /// Whether the kernel was put at a random address, and is to randomise its memory regions too.
    pub(crate) kaslr: bool,
    /// Bytes of the command line without its terminating zero.
    pub(crate) cmdline_length: usize,
    /// Where the initrd lies and its bytes; zeroes for none.
    pub(crate) initrd: (u64, u64),
    /// The first of the `setup_data` list.
    pub(crate) setup_data: u64,
    /// The ACPI root pointer.
    pub(crate) rsdp: u64,
    /// The memory map.
    pub(crate) e820: Vec<E820Entry>,
}

impl ZeroPage {
    /// The page as the kernel reads it.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut page = vec![0; LENGTH];
        let header = self.header();
        put(&mut page, SETUP_HEADER, header.as_slice());
        put(&mut page, ACPI_RSDP, &self.rsdp.to_le_bytes());
        put(&mut page, EXT_RAMDISK_IMAGE, &self.initrd.0.to_le_bytes()[4..]);
        put(&mut page, EXT_RAMDISK_SIZE, &self.initrd.1.to_le_bytes()[4..]);
        let entries = &self.e820[..self.e820.len().min(E820_MOST)];
        page[E820_COUNT] = u8::try_from(entries.len()).expect("at most 128");
        for (index, entry) in entries.iter().enumerate() {
            let at = E820_TABLE + index * E820_ENTRY;
            put(&mut page, at, &entry.range.start.to_le_bytes());
            put(&mut page, at + 8, &(entry.range.end - entry.range.start).to_le_bytes());
            put(&mut page, at + 16, &entry.kind.to_le_bytes());
        }
        page
    }

    fn header(&self) -> setup_header {
        let mut header = self.header.unwrap_or(setup_header {
            boot_flag: 0xaa55,
            header: HEADER_MAGIC,
            version: PROTOCOL,
            ..setup_header::default()
        });
        header.type_of_loader = LOADER_UNDEFINED;
        header.loadflags |= LOADED_HIGH;
        if self.kaslr {
            header.loadflags |= KASLR_FLAG;
        }
        header.cmd_line_ptr = low(layout::CMDLINE.start);
        header.cmdline_size = u32::try_from(self.cmdline_length).expect("bounded by the area");
        header.ramdisk_image = low(self.initrd.0);
        header.ramdisk_size = low(self.initrd.1);
        header.setup_data = self.setup_data;
        header
    }
}

/// The lower half of a value whose upper half stands elsewhere in the page.
fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::e820::RAM;

    fn field(page: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(page[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn every_field_stands_at_the_offset_that_the_protocol_gives() {
        let page = ZeroPage {
            initrd: (0x1_2345_6000, 0x2_0000_0001),
            cmdline_length: 7,
            rsdp: 0xe0000,
            setup_data: 0x8000,
            e820: vec![E820Entry { range: 0x1000..0x3000, kind: RAM }],
            ..ZeroPage::default()
        }
        .bytes();
        assert_eq!(page.len(), 4096);
        assert_eq!(field(&page, 0x070), 0xe0000);
        assert_eq!((field(&page, 0x218), field(&page, 0x0c0)), (0x2345_6000, 1));
        assert_eq!((field(&page, 0x21c), field(&page, 0x0c4)), (1, 2));
        assert_eq!(field(&page, 0x228), 0x20000);
        assert_eq!(field(&page, 0x250), 0x8000);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!((page[0x1fe], page[0x1ff]), (0x55, 0xaa));
        assert_eq!((page[0x1e8], field(&page, 0x2d0), field(&page, 0x2d8)), (1, 0x1000, 0x2000));
        assert_eq!(field(&page, 0x2e0), RAM);
    }

    #[test]
    fn the_kernel_learns_that_its_address_is_random_only_where_it_is() {
        for kaslr in [false, true] {
            let page = ZeroPage { kaslr, ..ZeroPage::default() }.bytes();
            assert_eq!(page[0x211] & KASLR_FLAG != 0, kaslr);
            assert_ne!(page[0x211] & LOADED_HIGH, 0);
        }
    }
}

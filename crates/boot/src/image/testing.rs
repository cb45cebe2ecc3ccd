//! Small kernels, made byte by byte, for tests: ELF files with relocations behind them, and bzImages of every format.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use kv::Size;
use linux_loader::loader::bootparam::setup_header;
use lzma_rust2::{FilterType, LzmaOptions, LzmaWriter, XzOptions, XzWriter};
use memory::{MemorySpec, Ram};
use vm_memory::{ByteValued, Bytes, GuestAddress};
use zerocopy::{FromZeros, IntoBytes};

use super::elf::{Header, PT_LOAD, PT_NOTE, ProgramHeader, XEN_ELFNOTE_PHYS32_ENTRY};
use super::unpack::Format;
use super::{ImageError, ImageFault, LoadOptions, LoadedKernel, lzop};

/// Where the test kernel is linked to.
pub(super) const LINKED: u64 = 16 << 20;
/// Its end, with .bss.
pub(super) const LINKED_END: u64 = DATA + 0x4000;
/// Where its second segment is.
pub(super) const DATA: u64 = LINKED + 0x20_0000;
pub(super) const ENTRY: u64 = LINKED + 0x40;
pub(super) const PVH_ENTRY: u32 = 0x100_0080;

const TEXT_OFFSET: u64 = 0x1000;
const DATA_OFFSET: u64 = 0x2000;
const FILE_END: usize = 0x3000;
const NOTE_OFFSET: usize = 0x200;

/// An ELF kernel of two segments and a note, whose parts a test may spoil before it writes them out.
pub(super) struct TestElf {
    pub(super) header: Header,
    pub(super) segments: Vec<ProgramHeader>,
    /// What stands behind the ELF file.
    pub(super) tail: Vec<u8>,
}

impl TestElf {
    pub(super) fn new() -> Self {
        let mut header = Header::new_zeroed();
        header.ident[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        header.kind = 2.into();
        header.machine = 62.into();
        header.entry = ENTRY.into();
        header.phoff = 64.into();
        header.phentsize = 56.into();
        let segment = |kind: u32, paddr: u64, offset: u64, filesz: u64, memsz: u64| {
            let mut segment = ProgramHeader::new_zeroed();
            segment.kind = kind.into();
            segment.paddr = paddr.into();
            segment.offset = offset.into();
            segment.filesz = filesz.into();
            segment.memsz = memsz.into();
            segment
        };
        Self {
            header,
            segments: vec![
                segment(PT_LOAD, LINKED, TEXT_OFFSET, 0x1000, 0x1000),
                segment(PT_LOAD, DATA, DATA_OFFSET, 0x1000, 0x4000),
                segment(PT_NOTE, LINKED, NOTE_OFFSET as u64, 24, 24),
            ],
            tail: Vec::new(),
        }
    }

    /// With the relocation lists given, in the order in which they stand in the file.
    pub(super) fn with_relocations(lists: &[&[u32]]) -> Self {
        let entries = lists.iter().flat_map(|list| [0].into_iter().chain(list.iter().copied()));
        Self { tail: entries.flat_map(u32::to_le_bytes).collect(), ..Self::new() }
    }

    pub(super) fn bytes(mut self) -> Vec<u8> {
        self.header.phnum = u16::try_from(self.segments.len()).unwrap().into();
        let mut bytes = vec![0; FILE_END];
        bytes[..64].copy_from_slice(self.header.as_bytes());
        let table = self.segments.as_bytes();
        bytes[64..64 + table.len()].copy_from_slice(table);
        let note = [4, 8, XEN_ELFNOTE_PHYS32_ENTRY, u32::from_le_bytes(*b"Xen\0"), PVH_ENTRY, 0];
        bytes[NOTE_OFFSET..NOTE_OFFSET + 24].copy_from_slice(note.as_bytes());
        for (number, byte) in bytes[0x1000..].iter_mut().enumerate() {
            *byte = content(number);
        }
        bytes.extend(self.tail);
        bytes
    }
}

/// The bytes of the two segments, one after the other.
pub(super) fn content(number: usize) -> u8 {
    u8::try_from(number % 251).unwrap()
}

/// A bzImage around a payload, whose header a test may spoil.
pub(super) struct TestBzImage {
    pub(super) header: setup_header,
    pub(super) payload: Vec<u8>,
}

impl TestBzImage {
    /// Around a payload with its size behind it.
    pub(super) fn new(payload: Vec<u8>) -> Self {
        let code_len = CODE_HEAD + payload.len();
        let header = setup_header {
            setup_sects: 1,
            syssize: u32::try_from(code_len.div_ceil(16)).unwrap(),
            boot_flag: 0xaa55,
            // A jump over the header: opcode 0xeb, and the distance from 0x202 to 0x26c.
            jump: 0x6aeb,
            header: u32::from_le_bytes(*b"HdrS"),
            version: 0x020f,
            loadflags: 1,
            initrd_addr_max: 0x7fff_ffff,
            kernel_alignment: 2 << 20,
            relocatable_kernel: 1,
            xloadflags: 3,
            cmdline_size: 2047,
            payload_offset: u32::try_from(CODE_HEAD).unwrap(),
            payload_length: u32::try_from(payload.len()).unwrap(),
            pref_address: LINKED,
            init_size: 1 << 20,
            ..setup_header::default()
        };
        Self { header, payload }
    }

    /// With `kernel` packed in `format`.
    pub(super) fn packed(format: Format, kernel: &[u8]) -> Self {
        Self::new(with_size(pack(format, kernel), kernel.len()))
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        let header = self.header.as_slice();
        bytes[0x1f1..0x1f1 + header.len()].copy_from_slice(header);
        bytes.extend((0..CODE_HEAD).map(|number| if number < 0x200 { 0 } else { 0x90 }));
        bytes.extend(self.payload);
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        bytes
    }
}

/// What stands before the payload in the protected-mode part.
pub(super) const CODE_HEAD: usize = 0x300;

/// Appends the unpacked size, as the kernel's build does; gzip has it by itself.
pub(super) fn with_size(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
    if !packed.starts_with(&[0x1f, 0x8b]) {
        packed.extend(u32::try_from(size).unwrap().to_le_bytes());
    }
    packed
}

/// Packs as the kernel's build does: xz with the x86 filter, lz4 in legacy frames.
pub(super) fn pack(format: Format, data: &[u8]) -> Vec<u8> {
    match format {
        Format::Gzip => {
            let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            writer.write_all(data).unwrap();
            writer.finish().unwrap()
        }
        Format::Bzip2 => {
            let mut writer = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            writer.write_all(data).unwrap();
            writer.finish().unwrap()
        }
        Format::Lzma => {
            let mut writer = LzmaWriter::new_use_header(Vec::new(), &LzmaOptions::with_preset(1), None).unwrap();
            writer.write_all(data).unwrap();
            writer.finish().unwrap()
        }
        Format::Xz => {
            let mut options = XzOptions::with_preset(1);
            options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
            options.prepend_pre_filter(FilterType::BcjX86, 0);
            let mut writer = XzWriter::new(Vec::new(), options).unwrap();
            writer.write_all(data).unwrap();
            writer.finish().unwrap()
        }
        Format::Lz4 => {
            let mut bytes = vec![0x02, 0x21, 0x4c, 0x18];
            for block in data.chunks(8 << 20) {
                let packed = lz4_flex::block::compress(block);
                bytes.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
                bytes.extend(packed);
            }
            bytes
        }
        Format::Zstd => ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest),
        Format::Lzo => pack_lzo(data),
    }
}

/// An lzop file of the test kernel: a block of LZO1X with a literal run and matches, and a block that is stored.
fn pack_lzo(kernel: &[u8]) -> Vec<u8> {
    const LITERALS: usize = 0x300;
    let (packed, stored) = kernel.split_at(0x1000);
    assert!(packed[LITERALS - 1..].iter().all(|&byte| byte == 0), "behind the note there are zeros");
    // A literal run counts from 18, in zeros for 255 each and a last byte.
    let rest = LITERALS - 18;
    let mut block = vec![0; 1 + (rest - 1) / 255];
    block.push(u8::try_from((rest - 1) % 255 + 1).unwrap());
    block.extend(&packed[..LITERALS]);
    // Each match copies 32 bytes from a distance of 1; then the end marker.
    block.extend([0x3e, 0, 0].repeat((packed.len() - LITERALS) / 32));
    block.extend([0x11, 0, 0]);

    // Version, library's, needed; method, level; flags: Adler-32 of both; mode, time; name; check sum.
    let mut bytes = lzop::MAGIC.to_vec();
    bytes.extend([0x10, 0x30, 0x20, 0x80, 0x09, 0x40, 3, 9, 0, 0, 0, 3]);
    bytes.extend([0; 12]);
    bytes.extend(b"\x06kernel");
    bytes.extend([0; 4]);
    let mut add = |unpacked_len: usize, block: &[u8], sums: usize| {
        for len in [unpacked_len, block.len()] {
            bytes.extend(u32::try_from(len).unwrap().to_be_bytes());
        }
        bytes.resize(bytes.len() + 4 * sums, 0);
        bytes.extend(block);
    };
    add(packed.len(), &block, 2);
    add(stored.len(), stored, 1);
    bytes.extend([0; 4]);
    bytes
}

/// Guest memory of so many MiB.
pub(super) fn memory(mib: u64) -> Ram {
    MemorySpec { size: Size(mib << 20), ..MemorySpec::default() }.map().unwrap()
}

/// A file with an image in it.
pub(super) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Loads an image.
pub(super) fn load(bytes: &[u8], memory: &Ram, options: &LoadOptions<'_>) -> Result<LoadedKernel, ImageFault> {
    super::load(Path::new("image"), &file(bytes), memory, options).map_err(|error| error.fault)
}

/// What is wrong with an image, in 64 MiB of memory and with relocations.
pub(super) fn fault(bytes: &[u8]) -> ImageFault {
    let seed = super::KaslrSeed { physical: 3, virtual_: 5 };
    let options = LoadOptions { kaslr: Some(seed), ..LoadOptions::default() };
    load(bytes, &memory(64), &options).expect_err("a bad image is refused")
}

/// The sentence that a user reads.
pub(super) fn sentence(fault: ImageFault) -> String {
    ImageError::new(Path::new("image"), fault).to_string()
}

/// Reads guest memory.
pub(super) fn guest_bytes(memory: &Ram, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

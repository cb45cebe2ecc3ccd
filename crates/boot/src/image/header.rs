//! The setup header of a bzImage, and where its parts lie in the file. Linux kernel documentation, x86/boot.rst,
//! protocol 2.08 and later (kernel 2.6.26).
//!
//! Left out on purpose: zImage, real-mode and 32-bit entries.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::elf::KERNEL_IMAGE_SIZE;
use super::error::ImageFault;

/// How many bytes of an image suffice to tell what it is.
pub(crate) const HEAD_LEN: usize = 4096;

const SECTOR: u64 = 512;
const HEADER_START: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
/// XLF_KERNEL_64: there is a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1 << 0;
/// XLF_CAN_BE_LOADED_ABOVE_4G: initrd, command line and zero page may lie anywhere.
const XLF_ABOVE_4G: u16 = 1 << 1;

/// A bzImage's header, checked against the length of the file.
#[derive(Clone, Copy)]
pub(crate) struct BzImage {
    pub(crate) header: setup_header,
    /// Offset of the protected-mode part in the file.
    pub(crate) code: u64,
    /// Length of the protected-mode part.
    pub(crate) code_len: usize,
    /// Offset of the compressed kernel in the file.
    pub(crate) payload: u64,
    /// Its length, with the unpacked size behind it.
    pub(crate) payload_len: usize,
}

/// Whether the file starts as a bzImage does.
pub(crate) fn is_bzimage(head: &[u8]) -> bool {
    head.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS") && head.get(0x1fe..0x200) == Some(&[0x55, 0xaa])
}

impl BzImage {
    /// Where in the file the kernel says its release (the field `kernel_version`, which counts from 0x200).
    pub(crate) fn version_offset(&self) -> Option<u64> {
        let offset = self.header.kernel_version;
        (offset != 0).then(|| u64::from(offset) + SECTOR)
    }

    /// Reads the header out of the first bytes of a file of `file_len` bytes.
    pub(crate) fn parse(head: &[u8], file_len: u64) -> Result<Self, ImageFault> {
        let jump = usize::from(*head.get(HEADER_MAGIC - 1).ok_or(ImageFault::NotAKernel)?);
        // The jump over the header says where it ends; what an older protocol does not have stays zero.
        let end = (HEADER_MAGIC + jump).min(HEADER_START + size_of::<setup_header>());
        let bytes =
            head.get(HEADER_START..end).ok_or(ImageFault::Truncated { needed: end as u64, present: file_len })?;
        let mut header = setup_header::default();
        header.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        if header.version < 0x0208 {
            return Err(ImageFault::No64BitEntry);
        }

        let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
        let code = (sectors + 1) * SECTOR;
        let code_len = u64::from(header.syssize) * 16;
        let payload = code + u64::from(header.payload_offset);
        let needed = (code + code_len).max(payload + u64::from(header.payload_length));
        // syssize counts in 16 bytes and is rounded up, which a file need not be.
        if needed.saturating_sub(15) > file_len || payload + u64::from(header.payload_length) > file_len {
            return Err(ImageFault::Truncated { needed, present: file_len });
        }
        let len = |len: u64| match usize::try_from(len) {
            Ok(value) if len <= KERNEL_IMAGE_SIZE => Ok(value),
            _ => Err(ImageFault::Oversized(len)),
        };
        Ok(Self {
            header,
            code,
            code_len: len(code_len.min(file_len - code))?,
            payload,
            payload_len: len(header.payload_length.into())?,
        })
    }

    /// Whether it has the 64-bit entry at 0x200 of its protected-mode part.
    pub(crate) fn has_64bit_entry(&self) -> bool {
        self.header.version >= 0x020c && self.header.xloadflags & XLF_KERNEL_64 != 0
    }

    /// The alignment that the kernel wants, at least the 2 MiB of its early page tables.
    pub(crate) fn alignment(&self) -> u64 {
        let wanted = u64::from(self.header.kernel_alignment);
        if wanted.is_power_of_two() { wanted.clamp(super::place::ALIGNMENT, 1 << 30) } else { super::place::ALIGNMENT }
    }

    /// The first address that the initrd must not reach.
    pub(crate) fn initrd_limit(&self) -> u64 {
        if self.header.version >= 0x020c && self.header.xloadflags & XLF_ABOVE_4G != 0 {
            u64::MAX
        } else {
            u64::from(self.header.initrd_addr_max) + 1
        }
    }

    /// The most bytes that the command line may have, its terminator not counted.
    pub(crate) fn cmdline_limit(&self) -> usize {
        usize::try_from(self.header.cmdline_size).unwrap_or(usize::MAX)
    }
}

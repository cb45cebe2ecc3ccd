//! The relocations behind the ELF file of a kernel with CONFIG_RANDOMIZE_BASE, as `arch/x86/boot/compressed/misc.c` of
//! Linux reads them: lists of 32-bit entries, each led by a zero, which from the end backwards are
//!
//! 1. 32-bit places to which the virtual offset is added,
//! 2. up to Linux 6.14 only: 32-bit places from which it is subtracted (per-CPU data, relative to the program counter),
//! 3. 64-bit places to which it is added.
//!
//! An entry is the lower half of a place's linked virtual address, whose upper half is all ones.

use vm_memory::{VolatileMemory, VolatileSlice};

use super::elf::Elf;
use super::error::ImageFault;
use super::source::{Buffer, Source};

/// Lower half of __START_KERNEL_map, the virtual address of physical address 0 as linked.
const START_KERNEL_MAP: u32 = 0x8000_0000;
/// Debian's kernels have 0.9 MiB of them.
const MAX_BYTES: u64 = 64 << 20;

/// Relocation lists that have been read and checked.
pub(crate) struct Relocations {
    bytes: Buffer,
    /// Three lists, where there could also be two.
    has_inverse: bool,
    /// What an entry is when it means the first byte of the kernel.
    bias: u32,
}

impl Relocations {
    /// Reads the lists behind `elf`; `None` if nothing is there, so that the kernel cannot be moved.
    pub(crate) fn read(source: &Source<'_>, elf: &Elf) -> Result<Option<Self>, ImageFault> {
        let len = source.len().saturating_sub(elf.end);
        if len == 0 {
            return Ok(None);
        }
        if len > MAX_BYTES || !len.is_multiple_of(4) {
            return Err(ImageFault::RelocationLists);
        }
        let mut bytes = Buffer::new(usize::try_from(len).map_err(|_| ImageFault::RelocationLists)?)?;
        source.read(elf.end, bytes.as_mut_slice())?;

        let start = u32::try_from(elf.extent.start).map_err(|_| ImageFault::SegmentOutside(elf.extent.start))?;
        let size = u32::try_from(elf.extent.end - elf.extent.start).unwrap_or(u32::MAX);
        let bias = START_KERNEL_MAP.wrapping_add(start);
        let mut lists = 0;
        for entry in entries(bytes.as_slice()) {
            if entry == 0 {
                lists += 1;
            } else if entry.wrapping_sub(bias) > size.saturating_sub(8) {
                // Every place is held to 8 bytes: at a kernel's end is .brk, which no relocation is in.
                return Err(ImageFault::RelocationOutside(0xffff_ffff_0000_0000 | u64::from(entry)));
            }
        }
        // The zero that leads the last list is the first thing behind the ELF file, or what we have is no lists.
        if !(2..=3).contains(&lists) || !bytes.as_slice().starts_with(&[0; 4]) {
            return Err(ImageFault::RelocationLists);
        }
        Ok(Some(Self { bytes, has_inverse: lists == 3, bias }))
    }

    /// Adds `offset` to every place in `kernel`, which starts at the kernel's first byte.
    pub(crate) fn apply(&self, kernel: &VolatileSlice<'_>, offset: u32) -> Result<(), ImageFault> {
        let mut list = 0;
        let outside = |entry: u32| ImageFault::RelocationOutside(0xffff_ffff_0000_0000 | u64::from(entry));
        for entry in entries(self.bytes.as_slice()) {
            let place = entry.wrapping_sub(self.bias) as usize;
            if entry == 0 {
                list += if list == 0 && !self.has_inverse { 2 } else { 1 };
            } else if list == 2 {
                let place = kernel.get_ref::<u64>(place).map_err(|_| outside(entry))?;
                place.store(place.load().wrapping_add(offset.into()));
            } else {
                let delta = if list == 0 { offset } else { offset.wrapping_neg() };
                let place = kernel.get_ref::<u32>(place).map_err(|_| outside(entry))?;
                place.store(place.load().wrapping_add(delta));
            }
        }
        Ok(())
    }
}

/// The entries from the end backwards.
fn entries(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks::<4>().0.iter().rev().map(|entry| u32::from_le_bytes(*entry))
}

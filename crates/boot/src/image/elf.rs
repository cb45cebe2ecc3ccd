//! An x86-64 ELF kernel: its segments, its entries, and where it ends. System V ABI, chapters 4 and 5; the PVH entry
//! is the Xen note XEN_ELFNOTE_PHYS32_ENTRY.
//!
//! Everything is checked before a byte of guest memory is written, so that a damaged cached kernel can be rebuilt.
//! Left out on purpose: sections and symbols, which booting does not need.

use std::ops::Range;

use memory::layout::HIGH_RAM;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::error::ImageFault;
use super::source::Source;

/// What every ELF file starts with.
pub(crate) const MAGIC: &[u8; 4] = b"\x7fELF";
/// The kernel's mapping of itself (KERNEL_IMAGE_SIZE), and so the end of any address that it is linked to.
pub(crate) const KERNEL_IMAGE_SIZE: u64 = 1 << 30;
/// A vmlinux has five program headers or so.
const MAX_PROGRAM_HEADERS: u16 = 64;
const MAX_NOTES: u64 = 1 << 16;

/// `Elf64_Ehdr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) ident: [u8; 16],
    pub(crate) kind: U16,
    pub(crate) machine: U16,
    pub(crate) version: U32,
    pub(crate) entry: U64,
    pub(crate) phoff: U64,
    pub(crate) shoff: U64,
    pub(crate) flags: U32,
    pub(crate) ehsize: U16,
    pub(crate) phentsize: U16,
    pub(crate) phnum: U16,
    pub(crate) shentsize: U16,
    pub(crate) shnum: U16,
    pub(crate) shstrndx: U16,
}

/// `Elf64_Phdr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct ProgramHeader {
    pub(crate) kind: U32,
    pub(crate) flags: U32,
    pub(crate) offset: U64,
    pub(crate) vaddr: U64,
    pub(crate) paddr: U64,
    pub(crate) filesz: U64,
    pub(crate) memsz: U64,
    pub(crate) align: U64,
}

pub(crate) const PT_LOAD: u32 = 1;
pub(crate) const PT_NOTE: u32 = 4;
pub(crate) const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// What has to be copied: `file_len` bytes from `offset` of the file to guest-physical `address`, as linked.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) address: u64,
    pub(crate) offset: u64,
    pub(crate) file_len: usize,
}

/// An ELF kernel whose every number has been checked.
#[derive(Debug)]
pub(crate) struct Elf {
    /// In ascending order, without overlap, inside `extent`.
    pub(crate) segments: Vec<Segment>,
    /// The guest-physical addresses that it is linked to, with .bss and .brk.
    pub(crate) extent: Range<u64>,
    /// The 64-bit entry, as linked; `None` where it lies in no segment.
    pub(crate) entry: Option<u64>,
    /// The ELF header's entry, whatever it is.
    pub(crate) raw_entry: u64,
    /// The 32-bit PVH entry.
    pub(crate) pvh_entry: Option<u32>,
    /// Offset of the first byte behind the ELF file: there a relocatable kernel has its relocations.
    pub(crate) end: u64,
}

impl Elf {
    /// Reads the headers, and refuses what cannot be placed.
    pub(crate) fn parse(source: &Source<'_>) -> Result<Self, ImageFault> {
        let header: Header = read_one(source, 0)?;
        check_machine(&header)?;
        if header.phnum.get() > MAX_PROGRAM_HEADERS || usize::from(header.phentsize.get()) != size_of::<ProgramHeader>()
        {
            return Err(ImageFault::ElfHeaders("program headers of an unknown size or number"));
        }
        let mut headers = vec![ProgramHeader::new_zeroed(); header.phnum.get().into()];
        source.read(header.phoff.get(), headers.as_mut_slice().as_mut_bytes())?;

        let mut loads: Vec<_> = headers.iter().filter(|h| h.kind == PT_LOAD && h.memsz != 0).collect();
        loads.sort_by_key(|h| h.paddr.get());
        let extent = check_segments(&loads, source)?;
        let mut pvh_entry = None;
        for note in headers.iter().filter(|h| h.kind == PT_NOTE) {
            pvh_entry = pvh_entry.or(find_pvh_note(note, source)?);
        }
        let raw_entry = header.entry.get();
        let is_loaded = |address: u64| loads.iter().any(|h| address.wrapping_sub(h.paddr.get()) < h.filesz.get());
        let end = end_of_file(&header, &loads);
        Ok(Self {
            entry: is_loaded(raw_entry).then_some(raw_entry),
            raw_entry,
            pvh_entry: pvh_entry.filter(|&entry| is_loaded(entry.into())),
            extent,
            end: end.ok_or(ImageFault::ElfHeaders("a table wraps"))?,
            segments: loads
                .iter()
                .map(|h| {
                    let file_len =
                        usize::try_from(h.filesz.get()).map_err(|_| ImageFault::SegmentWraps(h.paddr.get()))?;
                    Ok(Segment { address: h.paddr.get(), offset: h.offset.get(), file_len })
                })
                .collect::<Result<_, ImageFault>>()?,
        })
    }
}

fn read_one<T: FromBytes + IntoBytes>(source: &Source<'_>, offset: u64) -> Result<T, ImageFault> {
    let mut value = T::new_zeroed();
    source.read(offset, value.as_mut_bytes())?;
    Ok(value)
}

/// x86-64 is class 2 (64 bits), data 1 (little-endian), machine 62, and an executable (2) or a shared object (3).
fn check_machine(header: &Header) -> Result<(), ImageFault> {
    if header.ident[4] != 2 {
        return Err(ImageFault::ForeignElf("it has 32 bits"));
    }
    if header.ident[5] != 1 || header.machine != 62 {
        return Err(ImageFault::ForeignElf("it is for another machine"));
    }
    if header.kind != 2 && header.kind != 3 {
        return Err(ImageFault::ForeignElf("it is an object or core file"));
    }
    Ok(())
}

/// Checks the segments, which are sorted by address, and returns what they cover.
fn check_segments(loads: &[&ProgramHeader], source: &Source<'_>) -> Result<Range<u64>, ImageFault> {
    let mut extent: Option<Range<u64>> = None;
    for header in loads {
        let start = header.paddr.get();
        let end = start.checked_add(header.memsz.get()).ok_or(ImageFault::SegmentWraps(start))?;
        let file_end = header.offset.get().checked_add(header.filesz.get()).ok_or(ImageFault::SegmentWraps(start))?;
        if header.filesz.get() > header.memsz.get() {
            return Err(ImageFault::SegmentWraps(start));
        }
        if start < HIGH_RAM || end > KERNEL_IMAGE_SIZE {
            return Err(ImageFault::SegmentOutside(start));
        }
        if file_end > source.len() {
            return Err(ImageFault::Truncated { needed: file_end, present: source.len() });
        }
        extent = match extent {
            Some(before) if start < before.end => return Err(ImageFault::SegmentsOverlap(start)),
            Some(before) => Some(before.start..end),
            None => Some(start..end),
        };
    }
    extent.ok_or(ImageFault::NoSegments)
}

/// The end of the last of headers, tables and segments. The section headers are what linkers write last.
fn end_of_file(header: &Header, loads: &[&ProgramHeader]) -> Option<u64> {
    let table =
        |start: U64, count: U16, size: U16| start.get().checked_add(u64::from(count.get()) * u64::from(size.get()));
    let mut end = table(header.phoff, header.phnum, header.phentsize)?;
    end = end.max(table(header.shoff, header.shnum, header.shentsize)?);
    for load in loads {
        end = end.max(load.offset.get().checked_add(load.filesz.get())?);
    }
    Some(end)
}

/// Looks for the PVH entry in one note segment: name size, descriptor size, type, and both padded to 4 bytes.
fn find_pvh_note(note: &ProgramHeader, source: &Source<'_>) -> Result<Option<u32>, ImageFault> {
    if note.filesz.get() > MAX_NOTES {
        return Err(ImageFault::ElfHeaders("notes of more than 64 KiB"));
    }
    let len = usize::try_from(note.filesz.get()).map_err(|_| ImageFault::ElfHeaders("notes of more than 64 KiB"))?;
    let mut notes = vec![0; len];
    source.read(note.offset.get(), &mut notes)?;

    let mut rest = notes.as_slice();
    while let Ok((head, body)) = <[U32; 3]>::read_from_prefix(rest) {
        let [name_len, value_len, kind] = head.map(U32::get);
        let Some((name, after)) = split_padded(body, name_len) else { break };
        let Some((value, after)) = split_padded(after, value_len) else { break };
        // The value is a pointer: 8 bytes in a 64-bit kernel, of which a 32-bit entry has the lower 4.
        if name == b"Xen\0" && kind == XEN_ELFNOTE_PHYS32_ENTRY && value.len() >= 4 {
            return Ok(U32::read_from_prefix(value).ok().map(|(entry, _)| entry.get()));
        }
        rest = after;
    }
    Ok(None)
}

/// Splits off `len` bytes, and the padding to a multiple of 4 which the last note may lack.
fn split_padded(bytes: &[u8], len: u32) -> Option<(&[u8], &[u8])> {
    let len = usize::try_from(len).ok()?;
    let value = bytes.get(..len)?;
    Some((value, bytes.get(len.checked_next_multiple_of(4)?..).unwrap_or_default()))
}

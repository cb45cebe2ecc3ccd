//! Kernel images: a bzImage or an ELF vmlinux from a file into guest memory, at a random address.
//!
//! A bzImage is unpacked here and not by the guest, which is faster (and cached, see [`crate::cache`]), and so the work
//! of its unpacker is done here too: placing the ELF segments, choosing the physical and the virtual base, applying
//! the relocations. What cannot be unpacked here is entered at the bzImage's own 64-bit entry and unpacks itself.
//!
//! Specification: Linux documentation, x86/boot.rst, "64-bit Boot Protocol"; for the vmlinux, `arch/x86/kernel/head_64.S`,
//! which runs at any 2 MiB multiple from its link address. Left out on purpose: the zero page, the page tables and the
//! initrd's bytes, which are for the caller.

mod elf;
mod error;
mod header;
mod lzop;
mod place;
mod relocs;
mod source;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod unpack;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use memory::Ram;
use memory::layout::HIGH_RAM;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

pub use self::error::{ImageError, ImageFault};

use self::elf::Elf;
use self::header::BzImage;
use self::place::Request;
use self::relocs::Relocations;
use self::source::{Buffer, Source};
use self::unpack::Format;
use crate::cache::{self, Cache, Identity, Key};

/// The virtual address of physical address 0 in a kernel's own mapping (__START_KERNEL_map).
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// COMMAND_LINE_SIZE of x86 is 2048, its terminator counted.
const VMLINUX_CMDLINE_LIMIT: usize = 2047;

/// Where the first vCPU starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryChoice {
    /// The unpacked kernel's 64-bit entry; failing that PVH, and for a bzImage its own entry.
    #[default]
    Auto,
    /// The unpacked kernel's 64-bit entry.
    Linux64,
    /// The unpacked kernel's PVH entry, at the address that it is linked to.
    Pvh,
    /// The bzImage's own 64-bit entry: the guest unpacks it.
    Unpack,
}

/// The random numbers that the kernel's addresses are drawn with.
#[derive(Clone, Copy, Debug)]
pub struct KaslrSeed {
    /// For the physical base.
    pub physical: u64,
    /// For the virtual base.
    pub virtual_: u64,
}

/// How a kernel is to be loaded.
#[derive(Default)]
pub struct LoadOptions<'a> {
    /// Where it is entered.
    pub entry: EntryChoice,
    /// Random numbers for its addresses, or `None` for `nokaslr`.
    pub kaslr: Option<KaslrSeed>,
    /// Where unpacked kernels are kept.
    pub cache: Option<&'a Cache>,
    /// Bytes of the initrd for which room must be left.
    pub initrd_len: u64,
}

/// The entry of a loaded kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In long mode with an identity mapping of the whole [`LoadedKernel::extent`], the zero page's address in RSI.
    Linux64 {
        /// Its guest-physical address.
        rip: GuestAddress,
    },
    /// In 32-bit protected mode without paging, the start info's address in EBX.
    Pvh {
        /// Its guest-physical address.
        eip: u32,
    },
}

/// The addresses that were drawn for a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kaslr {
    /// Virtual address of its first byte (`_text`).
    pub virtual_base: u64,
    /// Guest-physical address of its first byte.
    pub physical_base: u64,
}

/// A kernel in guest memory.
#[derive(Clone, Debug)]
pub struct LoadedKernel {
    /// Where to start.
    pub entry: Entry,
    /// The setup header of a bzImage, for the zero page; a vmlinux has none.
    pub setup_header: Option<setup_header>,
    /// The guest-physical memory that is the kernel's, with .bss and .brk (for one that unpacks itself: `init_size`).
    /// It may lie above 4 GiB. An identity mapping for the 64-bit entry has to cover it.
    pub extent: Range<u64>,
    /// The guest-physical memory to put the initrd into, whose start is a multiple of 4096; empty without one.
    pub initrd: Range<u64>,
    /// The addresses drawn, for which KASLR_FLAG has to be set in `loadflags`; `None` if the kernel was not moved.
    pub kaslr: Option<Kaslr>,
    /// The most bytes that the command line may have, its terminator not counted.
    pub cmdline_limit: usize,
}

/// Opens a kernel image.
pub fn open(path: &Path) -> Result<File, ImageError> {
    // Opening a FIFO would wait for a writer; that it is no kernel is found out later.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    file.map_err(|e| ImageError::new(path, ImageFault::Open(e)))
}

/// Checks that `file`, which the user knows as `path`, is a kernel image by its header. Its content may still be damaged.
pub fn check(path: &Path, file: &File) -> Result<(), ImageError> {
    Image::probe(file).map(|_| ()).map_err(|fault| ImageError::new(path, fault))
}

/// The release of the kernel in a bzImage, as `uname -r` says it there and its folder of modules is called; none where
/// the image does not say it as one word of a path.
pub fn release(path: &Path, file: &File) -> Result<Option<String>, ImageError> {
    let Image::BzImage(image) = Image::probe(file).map_err(|fault| ImageError::new(path, fault))? else {
        return Ok(None);
    };
    // The text is the release, a space, and who built it when.
    let mut text = [0; LONGEST_RELEASE];
    let read = image.version_offset().and_then(|offset| file.read_at(&mut text, offset).ok()).unwrap_or(0);
    let word = text[..read].split(|byte| *byte == b' ').next().unwrap_or_default();
    let fine = |byte: &u8| byte.is_ascii_alphanumeric() || b".-+_~".contains(byte);
    let word = Some(word).filter(|word| word.first().is_some_and(u8::is_ascii_digit) && word.iter().all(fine));
    Ok(word.filter(|word| word.len() < read).and_then(|word| String::from_utf8(word.to_vec()).ok()))
}

/// Puts the kernel image `file`, which the user knows as `path`, into guest memory.
///
/// The memory must be fresh, that is zeroed: .bss and .brk are not written.
pub fn load(path: &Path, file: &File, memory: &Ram, options: &LoadOptions<'_>) -> Result<LoadedKernel, ImageError> {
    load_file(file, memory, options).map_err(|fault| ImageError::new(path, fault))
}

/// The ELF file inside a bzImage, with its relocations behind it: an uncompressed vmlinux.
pub fn unpack_vmlinux(path: &Path, file: &File) -> Result<Vec<u8>, ImageError> {
    let unpack = || match Image::probe(file)? {
        Image::BzImage(image) => {
            let format = detect_format(&image, file)?.ok_or(ImageFault::CannotUnpack)?;
            Ok(unpack::unpack(format, read_payload(&image, file)?.as_slice())?.as_slice().to_vec())
        }
        Image::Elf(_) => Err(ImageFault::NotABzImage),
    };
    unpack().map_err(|fault| ImageError::new(path, fault))
}

fn load_file(file: &File, memory: &Ram, options: &LoadOptions<'_>) -> Result<LoadedKernel, ImageFault> {
    match Image::probe(file)? {
        Image::Elf(_) if options.entry == EntryChoice::Unpack => Err(ImageFault::NotABzImage),
        Image::Elf(len) => place_kernel(&Kernel::parse(Source::File { file, len }, options)?, None, memory, options),
        Image::BzImage(image) if options.entry == EntryChoice::Unpack => self_unpacking(&image, file, memory, options),
        Image::BzImage(image) => load_bzimage(&image, file, memory, options),
    }
}

/// The kernel keeps its release in 64 bytes with its terminator (`__NEW_UTS_LEN`).
const LONGEST_RELEASE: usize = 65;

/// A file, told by its first bytes.
enum Image {
    /// An ELF file and its length.
    Elf(u64),
    BzImage(BzImage),
}

impl Image {
    fn probe(file: &File) -> Result<Self, ImageFault> {
        let metadata = file.metadata().map_err(ImageFault::Read)?;
        if metadata.is_dir() {
            return Err(ImageFault::Directory);
        }
        if !metadata.is_file() {
            return Err(ImageFault::NotAFile);
        }
        let mut head = [0; header::HEAD_LEN];
        let len = usize::try_from(metadata.len()).unwrap_or(usize::MAX).min(head.len());
        let head = &mut head[..len];
        file.read_exact_at(head, 0).map_err(ImageFault::Read)?;
        if head.is_empty() {
            Err(ImageFault::Empty)
        } else if head.starts_with(elf::MAGIC) {
            Ok(Self::Elf(metadata.len()))
        } else if header::is_bzimage(head) {
            Ok(Self::BzImage(BzImage::parse(head, metadata.len())?))
        } else if head.get(56..60) == Some(b"ARM\x64") {
            Err(ImageFault::Arm64)
        } else {
            Err(ImageFault::NotAKernel)
        }
    }
}

/// An ELF kernel whose headers and relocations have been checked.
struct Kernel<'a> {
    source: Source<'a>,
    elf: Elf,
    /// Only if the kernel is to be moved, and can be.
    relocations: Option<Relocations>,
}

impl<'a> Kernel<'a> {
    fn parse(source: Source<'a>, options: &LoadOptions<'_>) -> Result<Self, ImageFault> {
        let elf = Elf::parse(&source)?;
        // Not every kernel's PVH entry can be moved: that of 6.1 cannot.
        let is_moved = options.kaslr.is_some() && options.entry != EntryChoice::Pvh && elf.entry.is_some();
        let relocations = if is_moved { Relocations::read(&source, &elf)? } else { None };
        Ok(Self { source, elf, relocations })
    }
}

/// Unpacks a bzImage and places it, or finds it unpacked in the cache.
fn load_bzimage(
    image: &BzImage,
    file: &File,
    memory: &Ram,
    options: &LoadOptions<'_>,
) -> Result<LoadedKernel, ImageFault> {
    let may_unpack_itself = options.entry == EntryChoice::Auto && image.has_64bit_entry();
    let Some(format) = detect_format(image, file)? else {
        return if may_unpack_itself {
            self_unpacking(image, file, memory, options)
        } else {
            Err(ImageFault::CannotUnpack)
        };
    };
    let identity = Identity::of(&file.metadata().map_err(ImageFault::Read)?);
    if let Some(cache) = options.cache
        && let Some(entry) = cache.find_file(&identity)
        && let Some(kernel) = parse_cached(cache, &entry, options)
    {
        return place_kernel(&kernel, Some(image), memory, options);
    }
    let payload = read_payload(image, file)?;
    let cache = options.cache.map(|cache| (cache, Key::of(payload.as_slice())));
    if let Some((cache, key)) = cache
        && let Some(entry) = cache.find(key)
        && let Some(kernel) = parse_cached(cache, &entry, options)
    {
        cache.remember(&identity, key);
        return place_kernel(&kernel, Some(image), memory, options);
    }
    let unpacked = unpack::unpack(format, payload.as_slice())?;
    drop(payload);
    if may_unpack_itself && !unpacked.as_slice().starts_with(elf::MAGIC) {
        return self_unpacking(image, file, memory, options);
    }
    let kernel = Kernel::parse(Source::Memory(unpacked.as_slice()), options)?;
    if let Some((cache, key)) = cache {
        cache.store(key, unpacked.as_slice());
        cache.remember(&identity, key);
    }
    place_kernel(&kernel, Some(image), memory, options)
}

/// Checks a kernel from the cache before a byte of it is in guest memory; a damaged one is removed.
fn parse_cached<'a>(cache: &Cache, entry: &'a cache::Entry, options: &LoadOptions<'_>) -> Option<Kernel<'a>> {
    let source = Source::File { file: &entry.file, len: entry.len };
    Kernel::parse(source, options).inspect_err(|fault| cache.discard(entry, fault)).ok()
}

fn detect_format(image: &BzImage, file: &File) -> Result<Option<Format>, ImageFault> {
    let mut start = [0; 16];
    let len = start.len().min(image.payload_len);
    file.read_exact_at(&mut start[..len], image.payload).map_err(ImageFault::Read)?;
    Ok(Format::detect(&start[..len]))
}

fn read_payload(image: &BzImage, file: &File) -> Result<Buffer, ImageFault> {
    let mut payload = Buffer::new(image.payload_len)?;
    file.read_exact_at(payload.as_mut_slice(), image.payload).map_err(ImageFault::Read)?;
    Ok(payload)
}

/// Copies a kernel to the address that is drawn for it, and relocates it.
fn place_kernel(
    kernel: &Kernel<'_>,
    image: Option<&BzImage>,
    memory: &Ram,
    options: &LoadOptions<'_>,
) -> Result<LoadedKernel, ImageFault> {
    let elf = &kernel.elf;
    let entry = match (options.entry, elf.entry, elf.pvh_entry) {
        (EntryChoice::Pvh, _, pvh) => Entry::Pvh { eip: pvh.ok_or(ImageFault::NoPvhEntry)? },
        (_, Some(entry), _) => Entry::Linux64 { rip: GuestAddress(entry) },
        (EntryChoice::Auto, None, Some(eip)) => Entry::Pvh { eip },
        (_, None, _) => return Err(ImageFault::NoEntry(elf.raw_entry)),
    };
    let seed = options.kaslr.filter(|_| kernel.relocations.is_some());
    let alignment = image.map_or(place::ALIGNMENT, BzImage::alignment);
    let initrd_limit = match entry {
        // Linux takes the module's address of a PVH start info for one of 32 bits.
        Entry::Pvh { .. } => 1 << 32,
        Entry::Linux64 { .. } => image.map_or(u64::MAX, BzImage::initrd_limit),
    };
    let linked = elf.extent.clone();
    let request = Request {
        linked: linked.clone(),
        alignment,
        random: seed.map(|seed| seed.physical),
        initrd_len: options.initrd_len,
        initrd_limit,
    };
    let placement = place::place(memory, &request)?;

    let extent = placement.base..placement.base + (linked.end - linked.start);
    let target = guest_slice(memory, &extent)?;
    for segment in &elf.segments {
        // Only what is in the file: fresh memory is zero, as .bss and .brk have to be.
        let offset = usize_of(segment.address - linked.start);
        let mut part = target.subslice(offset, segment.file_len).expect("a segment lies inside the extent");
        kernel.source.read_volatile(segment.offset, &mut part)?;
    }
    let mut virtual_offset = 0;
    if let (Some(seed), Some(relocations)) = (seed, &kernel.relocations) {
        virtual_offset = place::virtual_offset(&linked, alignment, seed.virtual_);
        relocations.apply(&target, virtual_offset)?;
    }
    Ok(LoadedKernel {
        entry: match entry {
            Entry::Linux64 { rip } => Entry::Linux64 { rip: GuestAddress(rip.0 - linked.start + extent.start) },
            pvh @ Entry::Pvh { .. } => pvh,
        },
        setup_header: image.map(|image| image.header),
        initrd: placement.initrd,
        kaslr: seed.map(|_| Kaslr {
            virtual_base: START_KERNEL_MAP + linked.start + u64::from(virtual_offset),
            physical_base: extent.start,
        }),
        extent,
        cmdline_limit: image.map_or(VMLINUX_CMDLINE_LIMIT, BzImage::cmdline_limit),
    })
}

/// Copies the protected-mode part of a bzImage to where it prefers to be; the rest is the guest's, KASLR too.
fn self_unpacking(
    image: &BzImage,
    file: &File,
    memory: &Ram,
    options: &LoadOptions<'_>,
) -> Result<LoadedKernel, ImageFault> {
    if !image.has_64bit_entry() {
        return Err(ImageFault::No64BitEntry);
    }
    let start = image.header.pref_address;
    let len = u64::from(image.header.init_size).max(image.code_len as u64);
    let linked = start..start.checked_add(len).ok_or(ImageFault::SegmentWraps(start))?;
    if linked.start < HIGH_RAM || linked.end > elf::KERNEL_IMAGE_SIZE {
        return Err(ImageFault::SegmentOutside(start));
    }
    let request = Request {
        linked: linked.clone(),
        alignment: image.alignment(),
        random: None,
        initrd_len: options.initrd_len,
        initrd_limit: image.initrd_limit(),
    };
    let placement = place::place(memory, &request)?;
    let mut target = guest_slice(memory, &(linked.start..linked.start + image.code_len as u64))?;
    let code = Source::File { file, len: image.code + image.code_len as u64 };
    code.read_volatile(image.code, &mut target)?;
    Ok(LoadedKernel {
        entry: Entry::Linux64 { rip: GuestAddress(linked.start + 0x200) },
        setup_header: Some(image.header),
        extent: linked,
        initrd: placement.initrd,
        kaslr: None,
        cmdline_limit: image.cmdline_limit(),
    })
}

fn guest_slice<'m>(memory: &'m Ram, range: &Range<u64>) -> Result<VolatileSlice<'m>, ImageFault> {
    let slice = memory.get_slice(GuestAddress(range.start), usize_of(range.end - range.start));
    slice.map_err(|_| ImageFault::SegmentOutside(range.start))
}

/// Lengths inside a kernel, which is at most 1 GiB.
fn usize_of(len: u64) -> usize {
    usize::try_from(len).expect("a kernel's size fits the address space")
}

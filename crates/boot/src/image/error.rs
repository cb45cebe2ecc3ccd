//! What can be wrong with a kernel image: one sentence each, which names the cure.
//!
//! Left out on purpose: the path stands once, in [`ImageError`], so that no parser has to carry it.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A kernel image that cannot be booted: which one, and why.
#[derive(Debug, Error)]
#[error("Cannot boot the kernel image {}: {fault}", path.display())]
pub struct ImageError {
    /// The image as the user named it.
    pub path: PathBuf,
    /// What is wrong with it.
    pub fault: ImageFault,
}

impl ImageError {
    pub(crate) fn new(path: &Path, fault: ImageFault) -> Self {
        Self { path: path.to_owned(), fault }
    }
}

/// What is wrong with a kernel image, and what to do about it.
#[derive(Debug, Error)]
pub enum ImageFault {
    /// The file cannot be opened.
    #[error("it cannot be opened ({0}); check the path and its permissions")]
    Open(io::Error),
    /// The file cannot be read.
    #[error("it cannot be read ({0})")]
    Read(io::Error),
    /// No memory for the unpacked kernel.
    #[error("no memory can be had to unpack it ({0})")]
    NoBuffer(io::Error),
    /// A directory.
    #[error("it is a directory; name the kernel file in it, a bzImage or a vmlinux")]
    Directory,
    /// A device, a pipe or a socket.
    #[error("it is not a regular file; name a bzImage or vmlinux file")]
    NotAFile,
    /// No bytes at all.
    #[error("it is empty; name a bzImage or vmlinux file")]
    Empty,
    /// Neither of the two formats.
    #[error("it is neither a bzImage nor an ELF vmlinux; name an x86-64 Linux kernel, such as /boot/vmlinuz-VERSION")]
    NotAKernel,
    /// An arm64 `Image`.
    #[error("it is a kernel for arm64; name one that was built for x86-64")]
    Arm64,
    /// An ELF file of another class, byte order or machine.
    #[error("it is an ELF file, but not one for x86-64 ({0}); name a kernel that was built for x86-64")]
    ForeignElf(&'static str),
    /// A bzImage of a 32-bit kernel, or one from before the 64-bit entry.
    #[error("it has no 64-bit entry (boot protocol 2.12, kernel 3.8); name a 64-bit kernel")]
    No64BitEntry,
    /// The file ends before what its headers announce.
    #[error("it is truncated: its headers announce {needed} bytes and there are {present}; copy it again")]
    Truncated {
        /// Bytes up to the end of what is announced.
        needed: u64,
        /// Bytes there.
        present: u64,
    },
    /// The compressed kernel inside a bzImage does not unpack.
    #[error("its {format} payload is damaged ({reason}); copy or install it again")]
    Damaged {
        /// The compression, such as "zstd".
        format: &'static str,
        /// The decoder's word.
        reason: String,
    },
    /// The payload goes on after the size that stands behind it.
    #[error("its payload unpacks to more than the {0} bytes that it announces; copy or install it again")]
    Overlong(usize),
    /// An announced size is more than the kernel mapping.
    #[error("it announces {0} bytes, and a kernel has at most 1 GiB; copy or install it again")]
    Oversized(u64),
    /// No loadable segment.
    #[error("its ELF file has no loadable segment; name a vmlinux, not an object file")]
    NoSegments,
    /// Two segments claim the same memory.
    #[error("its ELF segments overlap at {0:#x}; build it again")]
    SegmentsOverlap(u64),
    /// A segment's address and size exceed 64 bits, or it is larger in the file than in memory.
    #[error("its ELF segment at {0:#x} wraps or has contradictory sizes; build it again")]
    SegmentWraps(u64),
    /// An address outside of what a kernel may occupy.
    #[error("it has to be at {0:#x}, outside of the memory from 1 MiB to 1 GiB that a kernel may have; build it again")]
    SegmentOutside(u64),
    /// Notes or program headers beyond any sane size.
    #[error("its ELF headers make no sense ({0}); build it again")]
    ElfHeaders(&'static str),
    /// The relocation lists do not fill what follows the ELF file.
    #[error("the relocations behind its ELF file cannot be told apart; build it again, or boot it with `nokaslr`")]
    RelocationLists,
    /// A relocation outside of the kernel.
    #[error("its relocation of {0:#x} points outside of the kernel; build it again, or boot it with `nokaslr`")]
    RelocationOutside(u64),
    /// The kernel and the initrd do not fit.
    #[error(
        "kernel and initrd need at least {minimum_mib}M of guest memory, which has {memory_mib}M; say --mem {minimum_mib}M or more"
    )]
    MemoryTooSmall {
        /// The least that will do, in MiB.
        minimum_mib: u64,
        /// What there is, in MiB.
        memory_mib: u64,
    },
    /// `entry=pvh` of a kernel without one.
    #[error("it has no PVH entry (CONFIG_PVH); leave out entry=pvh")]
    NoPvhEntry,
    /// The ELF entry lies outside of its segments, and there is no PVH entry either.
    #[error("its entry {0:#x} lies outside of its segments, and it has no PVH entry; name a Linux kernel")]
    NoEntry(u64),
    /// `entry=unpack` of an ELF file.
    #[error("it is not a bzImage, so it cannot unpack itself; leave out entry=unpack")]
    NotABzImage,
    /// `entry=linux64` or `entry=pvh` of a bzImage which only unpacks itself.
    #[error("its payload cannot be unpacked on the host; leave out the entry option, and it will unpack itself")]
    CannotUnpack,
}

//! Where the bytes of an ELF kernel come from: a file (a vmlinux, a cached kernel) or memory (just unpacked).
//!
//! Segments go straight from here into guest memory. Files are read, never mapped: another process may truncate
//! them, and a mapping would turn that into a SIGBUS.
#![allow(
    unsafe_code,
    reason = "a large buffer is an anonymous mapping, so that its memory really goes back, and holes are found by lseek"
)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};
use std::slice;

use vm_memory::{ReadVolatile, VolatileSlice};

use super::error::ImageFault;

/// A run of bytes with an ELF file in it.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// The first `len` bytes of a file.
    File {
        /// The file; its position is moved.
        file: &'a File,
        /// How many bytes count.
        len: u64,
    },
    /// Bytes in memory.
    Memory(&'a [u8]),
}

impl Source<'_> {
    /// The number of bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::File { len, .. } => *len,
            Self::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// Fills `buffer` from `offset`.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageFault> {
        self.check(offset, buffer.len())?;
        match self {
            Self::File { file, .. } => file.read_exact_at(buffer, offset).map_err(ImageFault::Read),
            Self::Memory(bytes) => {
                buffer.copy_from_slice(self.part(bytes, offset, buffer.len())?);
                Ok(())
            }
        }
    }

    /// Fills guest memory, which is zero, from `offset`, without a copy in between.
    pub(crate) fn read_volatile(&self, offset: u64, target: &mut VolatileSlice<'_>) -> Result<(), ImageFault> {
        self.check(offset, target.len())?;
        match self {
            Self::File { file, .. } => read_data(file, offset, target).map_err(ImageFault::Read),
            Self::Memory(bytes) => {
                target.copy_from(self.part(bytes, offset, target.len())?);
                Ok(())
            }
        }
    }

    /// Refuses a range that ends after the last byte.
    pub(crate) fn check(&self, offset: u64, len: usize) -> Result<(), ImageFault> {
        let needed = offset.saturating_add(len as u64);
        if needed > self.len() {
            return Err(ImageFault::Truncated { needed, present: self.len() });
        }
        Ok(())
    }

    fn part<'b>(&self, bytes: &'b [u8], offset: u64, len: usize) -> Result<&'b [u8], ImageFault> {
        usize::try_from(offset)
            .ok()
            .and_then(|start| bytes.get(start..start.checked_add(len)?))
            .ok_or(ImageFault::Truncated { needed: offset.saturating_add(len as u64), present: self.len() })
    }
}

/// Reads what is in a file and leaves out its holes, since `target` is zero: a third of a Debian kernel is zeros, which
/// its linker and our cache leave unwritten.
fn read_data(mut file: &File, offset: u64, target: &VolatileSlice<'_>) -> io::Result<()> {
    let end = offset + target.len() as u64;
    let mut at = offset;
    while at < end {
        let start = match seek(file, at, libc::SEEK_DATA) {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
            // A file system that does not know of holes has none.
            result => result.unwrap_or(at).max(at),
        };
        if start >= end {
            break;
        }
        let stop = seek(file, start, libc::SEEK_HOLE).unwrap_or(end).min(end);
        let stop = if stop > start { stop } else { end };
        file.seek(SeekFrom::Start(start))?;
        let range = usize::try_from(start - offset).ok().zip(usize::try_from(stop - start).ok());
        let mut part =
            range.and_then(|(start, len)| target.subslice(start, len).ok()).ok_or(io::ErrorKind::InvalidInput)?;
        file.read_exact_volatile(&mut part).map_err(io::Error::other)?;
        at = stop;
    }
    Ok(())
}

/// Finds the next data or hole.
fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: lseek touches no memory, and the descriptor is open.
    let position = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(position).map_err(|_| io::Error::last_os_error())
}

/// Zeroed memory for one kernel. A mapping of its own, not the heap: what the heap has once grown to it keeps, and
/// an idle machine's memory is counted. Pages that nobody writes cost nothing.
pub(crate) struct Buffer {
    start: NonNull<u8>,
    len: usize,
}

impl Buffer {
    /// Maps `len` bytes, which must not be 0.
    pub(crate) fn new(len: usize) -> Result<Self, ImageFault> {
        // SAFETY: a new private anonymous mapping aliases nothing; the result is checked below.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(ImageFault::NoBuffer(io::Error::last_os_error()));
        }
        let start = NonNull::new(start.cast()).expect("mmap without MAP_FIXED never returns the null page");
        Ok(Self { start, len })
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the mapping is `len` readable, initialised (zeroed) bytes, which live as long as `self`.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, writable, and `&mut self` makes this the only reference.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives `self`.
        let result = unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert_eq!(result, 0, "a mapping of ours can be unmapped");
    }
}

//! Host memory behind guest RAM: mapped without reserve, aligned for huge pages, left out of core
//! dumps, unmapped on drop.
#![allow(unsafe_code, reason = "mmap, munmap and madvise have no safe form")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::null_mut;

use crate::spec::{HugePages, MemorySpec};

/// The alignment that lets KVM map 2 MiB of guest memory at once: guest-physical and host-virtual
/// addresses must agree below it.
pub(crate) const ALIGNMENT: usize = 2 << 20;

/// A mapping that this process owns.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: usize,
    length: usize,
}

impl Mapping {
    /// Maps `length` bytes of fresh, zeroed memory; with a file, its bytes from `offset` on.
    pub(crate) fn new(length: usize, spec: &MemorySpec, file: Option<(&File, i64)>) -> io::Result<Self> {
        let (mut flags, fd, offset) = match file {
            Some((file, offset)) => (libc::MAP_SHARED, file.as_raw_fd(), offset),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
        };
        // Pages of a reserved pool are set aside right here, so that a later touch cannot fail;
        // they come aligned. All else is mapped without reserve and aligned by hand.
        let slack = match spec.hugepages {
            HugePages::Huge2M | HugePages::Huge1G => {
                if file.is_none() {
                    flags |= huge_flags(spec.hugepages);
                }
                0
            }
            HugePages::Off | HugePages::Transparent => {
                flags |= libc::MAP_NORESERVE;
                ALIGNMENT
            }
        };
        let reserved = reserve(length.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?, slack, flags)?;
        let address = match reserved {
            None => map(0, length, READ_WRITE, flags, fd, offset)?,
            Some(start) => {
                let address = trim(start, length);
                map(address, length, READ_WRITE, flags | libc::MAP_FIXED, fd, offset)?
            }
        };
        let mapping = Self { address, length };
        mapping.advise(spec)?;
        Ok(mapping)
    }

    pub(crate) fn address(&self) -> *mut u8 {
        self.address as *mut u8
    }

    fn advise(&self, spec: &MemorySpec) -> io::Result<()> {
        self.madvise(libc::MADV_DONTDUMP)?;
        match spec.hugepages {
            // A kernel without transparent huge pages answers EINVAL: asked for, not given.
            HugePages::Transparent => drop(self.madvise(libc::MADV_HUGEPAGE)),
            HugePages::Off => drop(self.madvise(libc::MADV_NOHUGEPAGE)),
            HugePages::Huge2M | HugePages::Huge1G => {}
        }
        if spec.prefault {
            self.madvise(libc::MADV_POPULATE_WRITE)?;
        }
        Ok(())
    }

    fn madvise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the range is this mapping, and none of the advices above changes its contents.
        match unsafe { libc::madvise(self.address as *mut _, self.length, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.address, self.length);
    }
}

/// A memory file of `length` bytes that no holder of it can shrink under us.
pub(crate) fn memory_file(length: u64, hugepages: HugePages) -> io::Result<File> {
    let name = CString::new("guest-ram").expect("the name holds no zero byte");
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    flags |= match hugepages {
        HugePages::Huge2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        HugePages::Huge1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
        HugePages::Off | HugePages::Transparent => 0,
    };
    // SAFETY: the name is a valid C string for the length of the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(length)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: the descriptor is open and the argument is an integer.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

fn huge_flags(hugepages: HugePages) -> i32 {
    match hugepages {
        HugePages::Huge1G => libc::MAP_HUGETLB | libc::MAP_HUGE_1GB,
        _ => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
    }
}

/// Aligned address space of `length` bytes, which nothing is behind yet.
pub(crate) fn reserve_aligned(length: usize) -> io::Result<usize> {
    let with_room = length.checked_add(ALIGNMENT).ok_or(io::ErrorKind::OutOfMemory)?;
    let reserved = reserve(with_room, ALIGNMENT, libc::MAP_NORESERVE)?;
    Ok(trim(reserved.expect("there is room to align in"), length))
}

/// Keeps `length` aligned bytes of a reservation that is longer by the alignment, and returns where they are.
fn trim(start: usize, length: usize) -> usize {
    let address = start.next_multiple_of(ALIGNMENT);
    unmap(start, address - start);
    unmap(address + length, start + ALIGNMENT - address);
    address
}

/// Address space with room to align in, for mappings that do not come aligned.
fn reserve(length: usize, slack: usize, flags: i32) -> io::Result<Option<usize>> {
    if slack == 0 {
        return Ok(None);
    }
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | (flags & libc::MAP_NORESERVE);
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches no other memory.
    let address = unsafe { libc::mmap(null_mut(), length, libc::PROT_NONE, private, -1, 0) };
    checked(address).map(Some)
}

/// What RAM can be used for.
pub(crate) const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Maps memory at an address of a reservation, with `MAP_FIXED`, or anywhere.
pub(crate) fn map(
    address: usize,
    length: usize,
    protection: i32,
    flags: i32,
    fd: i32,
    offset: i64,
) -> io::Result<usize> {
    // SAFETY: with MAP_FIXED the address lies in a reservation of ours that nothing else uses;
    // without it the kernel chooses.
    checked(unsafe { libc::mmap(address as *mut _, length, protection, flags, fd, offset) })
}

fn checked(address: *mut libc::c_void) -> io::Result<usize> {
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address as usize) }
}

pub(crate) fn unmap(address: usize, length: usize) {
    if length > 0 {
        // SAFETY: the range belongs to a mapping or reservation of ours, and its owner is gone.
        let result = unsafe { libc::munmap(address as *mut _, length) };
        assert_eq!(result, 0, "munmap of an own mapping cannot fail");
    }
}

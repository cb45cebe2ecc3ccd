//! Giving guest RAM back to the host: pages whose contents the guest has no use for.
#![allow(unsafe_code, reason = "madvise and fallocate have no safe form")]

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;

use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _, MemoryRegionAddress};

use crate::region::{Ram, Region};

/// The smallest page of the host.
const PAGE: u64 = 4096;

/// Gives the whole pages of `range`, guest-physical, back to the host. They read as zero afterwards, for every process
/// that maps them, and take memory again when they are touched. Parts of huge pages from a reserved pool stay as they
/// are.
///
/// # Errors
///
/// `InvalidInput` if any of it is not RAM, and then nothing is given back; or the host refuses.
pub fn discard(ram: &Ram, range: Range<u64>) -> io::Result<()> {
    let length = range.end.checked_sub(range.start).and_then(|length| usize::try_from(length).ok());
    if !length.is_some_and(|length| length > 0 && ram.check_range(GuestAddress(range.start), length)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for region in ram.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        let from = range.start.max(start).next_multiple_of(PAGE);
        let to = range.end.min(end) & !(PAGE - 1);
        if from < to {
            discard_in(region, from - start, to - from)?;
        }
    }
    Ok(())
}

/// As [`discard`], for a piece of guest RAM that is known by its place in this process, such as a buffer of a virtqueue.
///
/// # Errors
///
/// As [`discard`].
pub fn discard_mapped(ram: &Ram, address: *const u8, length: usize) -> io::Result<()> {
    let range = ram.iter().find_map(|region| {
        let base = region.get_host_address(MemoryRegionAddress(0)).ok()?;
        let offset = u64::try_from(address.addr().checked_sub(base.addr())?).ok()?;
        let start = region.start_addr().0 + (offset < region.len()).then_some(offset)?;
        Some(start..start.checked_add(u64::try_from(length).ok()?)?)
    });
    discard(ram, range.ok_or(io::ErrorKind::InvalidInput)?)
}

/// `offset` and `length` are whole pages inside the region.
fn discard_in(region: &Region, offset: u64, length: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let result = match region.file_offset() {
        Some(file) => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let offset = i64::try_from(file.start() + offset).map_err(invalid)?;
            let length = i64::try_from(length).map_err(invalid)?;
            // SAFETY: no memory is passed. That the file's pages turn to zeros under the mapping is what is asked for,
            // and guest memory may change at any time anyway.
            unsafe { libc::fallocate(file.file().as_raw_fd(), mode, offset, length) }
        }
        None => {
            let address = region.get_host_address(MemoryRegionAddress(offset)).map_err(io::Error::other)?;
            let length = usize::try_from(length).map_err(invalid)?;
            // SAFETY: the range lies inside the region's mapping, which is anonymous. That it turns to zeros is what is
            // asked for, and guest memory may change at any time anyway.
            unsafe { libc::madvise(address.cast(), length, libc::MADV_DONTNEED) }
        }
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // What madvise says to a part of a page of a reserved pool.
    if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;
    use crate::spec::{HugePages, MemorySpec};
    use kv::Size;
    use vm_memory::Bytes as _;

    const MIB: u64 = 1 << 20;

    fn map(size: u64, shared: bool) -> Ram {
        MemorySpec { size: Size(size), shared, hugepages: HugePages::Off, prefault: false }.map().unwrap()
    }

    /// How many bytes of the first region the host has pages for.
    fn resident(ram: &Ram) -> u64 {
        let region = ram.iter().next().unwrap();
        let base = region.get_host_address(MemoryRegionAddress(0)).unwrap();
        let length = usize::try_from(region.len()).unwrap();
        let mut pages = vec![0u8; length / 4096];
        // SAFETY: the range is a mapping, and there is a byte for each of its pages.
        assert_eq!(unsafe { libc::mincore(base.cast(), length, pages.as_mut_ptr()) }, 0);
        pages.iter().filter(|page| **page & 1 != 0).count() as u64 * 4096
    }

    #[test]
    fn discarded_pages_are_the_hosts_again_and_read_as_zero() {
        for shared in [false, true] {
            let ram = map(64 * MIB, shared);
            let data = vec![7; 8 << 20];
            ram.write_slice(&data, GuestAddress(16 * MIB)).unwrap();
            assert_eq!(resident(&ram), 8 * MIB);
            discard(&ram, 17 * MIB..20 * MIB).unwrap();
            assert_eq!(resident(&ram), 5 * MIB);
            assert_eq!(ram.read_obj::<u8>(GuestAddress(17 * MIB - 1)).unwrap(), 7);
            assert_eq!(ram.read_obj::<u8>(GuestAddress(17 * MIB)).unwrap(), 0);
            assert_eq!(ram.read_obj::<u8>(GuestAddress(20 * MIB - 1)).unwrap(), 0);
            assert_eq!(ram.read_obj::<u8>(GuestAddress(20 * MIB)).unwrap(), 7);
        }
    }

    #[test]
    fn only_whole_pages_are_discarded() {
        let ram = map(64 * MIB, false);
        ram.write_slice(&[7; 3 * 4096], GuestAddress(MIB)).unwrap();
        discard(&ram, MIB + 1..MIB + 3 * 4096 - 1).unwrap();
        discard(&ram, MIB + 1..MIB + 2).unwrap();
        let firsts = [0, 4096, 8192].map(|at| ram.read_obj::<u8>(GuestAddress(MIB + at)).unwrap());
        assert_eq!(firsts, [7, 0, 7]);
    }

    #[test]
    fn a_range_that_is_not_ram_from_end_to_end_is_refused_untouched() {
        let ram = map(4 << 30, false);
        let hole = layout::MMIO_HOLE;
        ram.write_obj(7u8, GuestAddress(hole.start - 4096)).unwrap();
        ram.write_obj(7u8, GuestAddress(hole.end)).unwrap();
        let backwards = Range { start: 2 * MIB, end: MIB };
        for range in [
            hole.start - 4096..hole.end + 4096,
            hole.start..hole.start + 4096,
            hole.start - 4096..hole.start + 1,
            0..u64::MAX,
            u64::MAX - 4095..u64::MAX,
            MIB..MIB,
            backwards,
        ] {
            let error = discard(&ram, range.clone()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{range:x?}");
        }
        assert_eq!(ram.read_obj::<u8>(GuestAddress(hole.start - 4096)).unwrap(), 7);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(hole.end)).unwrap(), 7);
    }

    #[test]
    fn a_mapped_piece_is_found_in_its_region() {
        for shared in [false, true] {
            let ram = map(4 << 30, shared);
            let high = GuestAddress(layout::MMIO_HOLE.end + MIB);
            ram.write_slice(&[7; 2 * 4096], high).unwrap();
            let address = ram.get_host_address(high).unwrap();
            discard_mapped(&ram, address, 4096).unwrap();
            assert_eq!(ram.read_obj::<u8>(high).unwrap(), 0);
            assert_eq!(ram.read_obj::<u8>(GuestAddress(high.0 + 4096)).unwrap(), 7);
            let nowhere = [0u8; 4096];
            assert!(discard_mapped(&ram, nowhere.as_ptr(), 4096).is_err());
            assert!(discard_mapped(&ram, address, usize::MAX).is_err());
            assert!(discard_mapped(&ram, address, 4 << 30).is_err());
        }
    }
}

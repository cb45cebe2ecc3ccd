//! Guest RAM as the rest of the program reads and writes it.
#![allow(unsafe_code, reason = "vm-memory takes a mapping that we own as a raw pointer")]

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use kv::Size;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result as MemoryResult;
use vm_memory::region::GuestRegionCollection;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionMmap, GuestUsize,
    MemoryRegionAddress, MmapRegion, VolatileSlice,
};

use crate::layout;
use crate::mapping::{Mapping, memory_file};
use crate::spec::{HugePages, MemoryError, MemorySpec};

/// Guest RAM. A clone is another handle on the same memory, which goes when the last one does.
pub type Ram = GuestRegionCollection<Region>;

/// One contiguous range of guest RAM, together with the mapping that it owns.
#[derive(Debug)]
pub struct Region {
    inner: GuestRegionMmap,
    _mapping: Mapping,
}

impl Region {
    fn new(range: &Range<u64>, spec: &MemorySpec, file: Option<FileOffset>) -> std::io::Result<Self> {
        let length = usize::try_from(range.end - range.start).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        let backing = match &file {
            Some(file) => {
                let start = i64::try_from(file.start()).map_err(|_| std::io::ErrorKind::InvalidInput)?;
                Some((file.file(), start))
            }
            None => None,
        };
        let mapping = Mapping::new(length, spec, backing)?;
        let mut builder = vm_memory::mmap::MmapRegionBuilder::new(length)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_NORESERVE);
        // SAFETY: the mapping is `length` bytes, readable and writable, and stands beside the
        // region that points into it until both are dropped.
        builder = unsafe { builder.with_raw_mmap_pointer(mapping.address()) };
        if let Some(file) = file {
            builder = builder.with_file_offset(file);
        }
        let region: MmapRegion = builder.build().map_err(std::io::Error::other)?;
        let inner = GuestRegionMmap::new(region, GuestAddress(range.start)).expect("the layout's ranges do not wrap");
        Ok(Self { inner, _mapping: mapping })
    }
}

impl MemorySpec {
    /// Maps the RAM that is asked for. The spec has been validated.
    ///
    /// # Errors
    ///
    /// Where the host has no such memory: the pool of huge pages is too small, the address space
    /// or the commit limit too narrow.
    pub fn map(&self) -> Result<Ram, MemoryError> {
        let size = self.size.bytes();
        let refused = |error: std::io::Error| self.refusal(&error);
        let file: Option<Arc<File>> = match self.shared {
            true => Some(memory_file(size, self.hugepages).map_err(refused)?.into()),
            false => None,
        };
        let mut offset = 0;
        let mut regions = Vec::new();
        for range in layout::ram(size) {
            let backing = file.as_ref().map(|file| FileOffset::from_arc(file.clone(), offset));
            regions.push(Region::new(&range, self, backing).map_err(refused)?);
            offset += range.end - range.start;
        }
        Ok(Ram::from_regions(regions).expect("the layout's ranges are sorted and apart"))
    }

    fn refusal(&self, error: &std::io::Error) -> MemoryError {
        let page = self.hugepages.page_size();
        match self.hugepages {
            HugePages::Huge2M | HugePages::Huge1G => {
                MemoryError::NoHugePages { pages: self.size.bytes() / page, page: Size(page), kib: page >> 10 }
            }
            HugePages::Off | HugePages::Transparent => {
                MemoryError::NoRoom { size: self.size, reason: error.to_string() }
            }
        }
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.inner.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.inner.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {
        self.inner.bitmap();
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> MemoryResult<*mut u8> {
        self.inner.get_host_address(address)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.inner.file_offset()
    }

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> MemoryResult<VolatileSlice<'_, BS<'_, ()>>> {
        self.inner.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for Region {}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    fn map(spec: &MemorySpec) -> Ram {
        spec.map().unwrap()
    }

    fn spec(size: u64) -> MemorySpec {
        MemorySpec { size: Size(size), ..MemorySpec::default() }
    }

    #[test]
    fn ram_reads_as_zero_and_keeps_what_is_written() {
        for shared in [false, true] {
            let ram = map(&MemorySpec { shared, ..spec(64 << 20) });
            let last = GuestAddress((64 << 20) - 8);
            assert_eq!(ram.read_obj::<u64>(last).unwrap(), 0);
            ram.write_obj(7u64, last).unwrap();
            assert_eq!(ram.clone().read_obj::<u64>(last).unwrap(), 7);
            assert!(ram.write_obj(7u64, GuestAddress(64 << 20)).is_err());
        }
    }

    #[test]
    fn ram_above_the_hole_is_there_and_the_hole_is_not() {
        // Not one page of these is touched but two: memory is mapped without reserve.
        let ram = map(&spec(1 << 40));
        ram.write_obj(1u8, GuestAddress(layout::MMIO_HOLE.start - 1)).unwrap();
        ram.write_obj(1u8, GuestAddress(layout::MMIO_HOLE.end)).unwrap();
        assert!(ram.write_obj(1u8, GuestAddress(layout::MMIO_HOLE.start)).is_err());
    }

    #[test]
    fn every_region_is_aligned_for_huge_pages_on_the_host() {
        for region in map(&spec(4 << 30)).iter() {
            let host = region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
            assert!((host ^ region.start_addr().0).is_multiple_of(2 << 20));
        }
    }

    #[test]
    fn the_mapping_goes_with_the_last_handle() {
        let ram = map(&spec(64 << 20));
        let host = ram.iter().next().unwrap().get_host_address(MemoryRegionAddress(0)).unwrap() as usize;
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            maps.lines().any(|line| line.starts_with(&format!("{host:x}-")))
        };
        let other = ram.clone();
        drop(ram);
        assert!(mapped());
        drop(other);
        assert!(!mapped());
    }

    #[test]
    fn guest_ram_stays_out_of_core_dumps() {
        let ram = map(&spec(64 << 20));
        let host = ram.iter().next().unwrap().get_host_address(MemoryRegionAddress(0)).unwrap() as usize;
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let ours = maps.split_once(&format!("{host:x}-")).unwrap().1;
        let flags = ours.lines().find(|line| line.starts_with("VmFlags")).unwrap();
        assert!(flags.contains(" dd"), "{flags}");
    }

    #[test]
    fn a_missing_pool_of_huge_pages_is_named_with_its_cure() {
        // No host that runs this test has a pool of a thousand 1 GiB pages.
        let spec = MemorySpec { hugepages: HugePages::Huge1G, ..spec(1000 << 30) };
        let error = spec.map().unwrap_err().to_string();
        assert!(error.contains("hugepages-1048576kB/nr_hugepages"), "{error}");
    }
}

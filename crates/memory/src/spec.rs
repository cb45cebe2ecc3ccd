//! What memory is asked for, and whether it can be had at all.

use kv::Size;
use serde::{Deserialize, Serialize};

use crate::layout;

/// Guest RAM as asked for: `512M,hugepages=2M,prefault,shared`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct MemorySpec {
    /// Bytes of RAM, such as 512M or 6G; a whole number of pages
    pub size: Size,
    /// Pages behind it: transparent (asked for, taken when free), 2M or 1G (reserved at start), off
    #[arg(value_parser = kv::from_str::<HugePages>)]
    pub hugepages: HugePages,
    /// Touch every page at start, so that the guest never waits for one
    pub prefault: bool,
    /// Back it by a memory file that other processes can map
    pub shared: bool,
}

/// The pages behind guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Ordinary pages only.
    #[serde(rename = "off")]
    Off,
    /// The kernel is asked for transparent huge pages and gives them when it has them.
    #[default]
    #[serde(rename = "transparent")]
    Transparent,
    /// 2 MiB pages from the host's reserved pool.
    #[serde(rename = "2M")]
    Huge2M,
    /// 1 GiB pages from the host's reserved pool.
    #[serde(rename = "1G")]
    Huge1G,
}

impl HugePages {
    /// Bytes of one page; RAM is a whole number of them, and so is each range of it.
    pub fn page_size(self) -> u64 {
        match self {
            Self::Off | Self::Transparent => 4 << 10,
            Self::Huge2M => 2 << 20,
            Self::Huge1G => 1 << 30,
        }
    }
}

impl Default for MemorySpec {
    fn default() -> Self {
        Self { size: Size(512 << 20), hugepages: HugePages::default(), prefault: false, shared: false }
    }
}

/// Memory that cannot be had, by the user's fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MemoryError {
    /// Below what any kernel can start in.
    #[error("--mem {0} is too little: no kernel starts in less than 32M, and a stock one wants 128M")]
    TooSmall(Size),
    /// Not a whole number of the chosen pages.
    #[error("--mem {size} is not a whole number of {page} pages: take a multiple of {page}")]
    NotWholePages {
        /// What was asked for.
        size: Size,
        /// One page.
        page: Size,
    },
    /// Beyond the processor's physical addresses.
    #[error("--mem {size} does not fit: this processor addresses {limit} of physical memory")]
    TooLarge {
        /// What was asked for.
        size: Size,
        /// The first address that does not exist.
        limit: Size,
    },
    /// The pool of huge pages is too small.
    #[error(
        "the host has not {pages} free pages of {page}: reserve them with \
         `echo {pages} > /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages`, or leave hugepages= out"
    )]
    NoHugePages {
        /// How many are needed.
        pages: u64,
        /// One page.
        page: Size,
        /// One page in KiB, as the kernel's file names have it.
        kib: u64,
    },
    /// The host refuses the mapping.
    #[error("the host has no room for --mem {size} ({reason}): ask for less, or see /proc/sys/vm/overcommit_memory")]
    NoRoom {
        /// What was asked for.
        size: Size,
        /// The system's words.
        reason: String,
    },
}

impl MemorySpec {
    /// The smallest RAM that is accepted, in bytes.
    pub const MINIMUM: u64 = 32 << 20;

    /// Checks what was asked for against a processor with `address_bits` of physical address.
    pub fn validate(&self, address_bits: u8) -> Result<(), MemoryError> {
        let size = self.size.bytes();
        let page = self.hugepages.page_size();
        let limit = 1u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX);
        if size < Self::MINIMUM {
            return Err(MemoryError::TooSmall(self.size));
        }
        if !size.is_multiple_of(page) {
            return Err(MemoryError::NotWholePages { size: self.size, page: Size(page) });
        }
        if layout::ram_end(size) > limit || usize::try_from(size).is_err() {
            return Err(MemoryError::TooLarge { size: self.size, limit: Size(limit) });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(size: u64, hugepages: HugePages) -> MemorySpec {
        MemorySpec { size: Size(size), hugepages, ..MemorySpec::default() }
    }

    #[test]
    fn the_default_is_half_a_gibibyte_of_transparent_pages() {
        assert_eq!(MemorySpec::default(), spec(512 << 20, HugePages::Transparent));
        assert_eq!(MemorySpec::default().validate(40), Ok(()));
    }

    #[test]
    fn too_little_memory_is_refused_with_the_minimum() {
        for size in [0, 1 << 20, (32 << 20) - 1] {
            let error = spec(size, HugePages::Off).validate(40).unwrap_err();
            assert!(error.to_string().contains("32M"), "{error}");
        }
    }

    #[test]
    fn memory_beyond_the_processors_addresses_is_refused() {
        let terabyte = spec(1 << 40, HugePages::Off);
        assert_eq!(terabyte.validate(46), Ok(()));
        // The hole pushes the last gibibyte past the fortieth bit.
        assert!(matches!(terabyte.validate(40), Err(MemoryError::TooLarge { .. })));
        assert!(matches!(spec(15 << 60, HugePages::Off).validate(52), Err(MemoryError::TooLarge { .. })));
    }

    #[test]
    fn memory_is_a_whole_number_of_pages() {
        for (size, pages) in
            [((64 << 20) + 1, HugePages::Off), (65 << 20, HugePages::Huge2M), (512 << 20, HugePages::Huge1G)]
        {
            let error = spec(size, pages).validate(46).unwrap_err();
            assert!(matches!(error, MemoryError::NotWholePages { .. }), "{error}");
        }
    }
}

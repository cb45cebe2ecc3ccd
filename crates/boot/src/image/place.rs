//! Where kernel and initrd go in guest memory, by chance or as linked. The rules are those of Linux'
//! `arch/x86/boot/compressed/kaslr.c`: any aligned slot from the link address (at most 512 MiB) upwards for the
//! physical base, any aligned slot of the 1 GiB kernel mapping for the virtual one, each drawn on its own.
//!
//! Left out on purpose: `mem=` and `memmap=`; a user of those says `nokaslr` as well.

use std::ops::Range;

use memory::Ram;
use memory::layout::HIGH_RAM;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::elf::KERNEL_IMAGE_SIZE;
use super::error::ImageFault;

/// The kernel's early page tables have 2 MiB pages (MIN_KERNEL_ALIGN).
pub(crate) const ALIGNMENT: u64 = 2 << 20;
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Where `kaslr.c` starts at the latest.
const HIGHEST_MINIMUM: u64 = 512 << 20;

/// What has to be placed.
pub(crate) struct Request {
    /// The guest-physical addresses that the kernel is linked to.
    pub(crate) linked: Range<u64>,
    /// What the physical base may be a multiple of, counted from the link address.
    pub(crate) alignment: u64,
    /// A random number, or `None` for the address that it is linked to.
    pub(crate) random: Option<u64>,
    /// Bytes of the initrd.
    pub(crate) initrd_len: u64,
    /// The first address that the initrd must not reach.
    pub(crate) initrd_limit: u64,
}

/// Where it goes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    /// The physical base of the kernel.
    pub(crate) base: u64,
    /// The memory of the initrd, empty without one.
    pub(crate) initrd: Range<u64>,
}

/// Places the initrd as high as it may in the first region of memory that leaves room for the kernel, and then the kernel.
pub(crate) fn place(memory: &Ram, request: &Request) -> Result<Placement, ImageFault> {
    let regions: Vec<Range<u64>> = memory
        .iter()
        .map(|region| region.start_addr().raw_value()..region.start_addr().raw_value().saturating_add(region.len()))
        .collect();
    let total: u64 = regions.iter().map(|region| region.end - region.start).sum();
    let minimum = minimum_memory(&request.linked, request.initrd_len);
    let too_small = ImageFault::MemoryTooSmall {
        minimum_mib: minimum.max(total.saturating_add(1)).div_ceil(MIB),
        memory_mib: total / MIB,
    };
    if total < minimum {
        return Err(too_small);
    }
    for region in &regions {
        let Some(initrd) = initrd_in(region, request) else { continue };
        if let Some(base) = choose_base(&regions, &initrd, request) {
            return Ok(Placement { base, initrd });
        }
    }
    Err(too_small)
}

/// A random offset from the virtual address that the kernel is linked to; it is never so large that the kernel leaves
/// its mapping.
pub(crate) fn virtual_offset(linked: &Range<u64>, alignment: u64, random: u64) -> u32 {
    let slots = 1 + KERNEL_IMAGE_SIZE.saturating_sub(linked.end) / alignment;
    u32::try_from(random % slots * alignment).expect("at most 1 GiB")
}

/// The least memory that a kernel and its initrd boot with: up to the end of the kernel as linked, a quarter of its size
/// for what it allocates before it runs anything (Debian's 6.1 ends at 62 MiB, and failed with 66, not with 72), and the
/// initrd twice, as it is and unpacked.
fn minimum_memory(linked: &Range<u64>, initrd_len: u64) -> u64 {
    let initrd = initrd_len.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
    let working = (linked.end - linked.start) / 4;
    linked.end.saturating_add(working).saturating_add(initrd.saturating_mul(2))
}

fn initrd_in(region: &Range<u64>, request: &Request) -> Option<Range<u64>> {
    if request.initrd_len == 0 {
        return Some(region.start..region.start);
    }
    let end = region.end.min(request.initrd_limit);
    let start = end.checked_sub(request.initrd_len)? / PAGE * PAGE;
    // Below are the tables that the kernel is given.
    (start >= region.start.max(HIGH_RAM)).then(|| start..start + request.initrd_len)
}

/// The kernel's base: a random one of the slots in what the initrd leaves, or the address that it is linked to.
fn choose_base(regions: &[Range<u64>], initrd: &Range<u64>, request: &Request) -> Option<u64> {
    let len = request.linked.end - request.linked.start;
    let linked = request.linked.start;
    let free = regions.iter().flat_map(|region| without(region, initrd));
    let Some(random) = request.random else {
        return free.into_iter().any(|free| free.start <= linked && request.linked.end <= free.end).then_some(linked);
    };
    let phase = linked % request.alignment;
    let slots: Vec<(u64, u64)> = free
        .filter_map(|free| {
            let from = free.start.max(linked.min(HIGHEST_MINIMUM));
            let first = from.checked_sub(phase)?.checked_next_multiple_of(request.alignment)?.checked_add(phase)?;
            let room = free.end.checked_sub(first)?.checked_sub(len)?;
            Some((first, 1 + room / request.alignment))
        })
        .collect();
    let mut slot = random.checked_rem(slots.iter().map(|(_, count)| count).sum())?;
    for (first, count) in slots {
        if slot < count {
            return Some(first + slot * request.alignment);
        }
        slot -= count;
    }
    None
}

/// What `hole` leaves of `range`.
fn without(range: &Range<u64>, hole: &Range<u64>) -> [Range<u64>; 2] {
    [range.start..range.end.min(hole.start.max(range.start)), range.start.max(hole.end.min(range.end))..range.end]
}

#[cfg(test)]
mod tests {
    use super::super::testing::memory;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_draw_is_aligned_and_inside_of_free_memory(
            random in any::<u64>(),
            mib in prop::sample::select(vec![100_u64, 128, 512, 3000, 3072, 3100, 6144]),
            kernel_mib in 1..40_u64,
            initrd_len in 0..(8_u64 << 20),
            alignment in prop::sample::select(vec![2_u64 << 20, 16 << 20]),
        ) {
            let memory = memory(mib);
            let linked = (16 << 20)..((16 + kernel_mib) << 20);
            let request = Request { linked, alignment, random: Some(random), initrd_len, initrd_limit: 1 << 31 };
            let Placement { base, initrd } = place(&memory, &request).unwrap();
            let kernel = base..base + (kernel_mib << 20);
            prop_assert_eq!(base % alignment, 0);
            prop_assert!(base >= 16 << 20);
            prop_assert_eq!(initrd.start % PAGE, 0);
            prop_assert!(initrd.end <= 1 << 31);
            for range in [&kernel, &initrd] {
                let inside = memory::layout::ram(mib << 20).iter().any(|ram| ram.start <= range.start && range.end <= ram.end);
                prop_assert!(inside, "{range:x?}");
            }
            prop_assert!(initrd.is_empty() || kernel.end <= initrd.start || initrd.end <= kernel.start);
        }

        #[test]
        fn the_virtual_base_never_leaves_the_kernel_mapping(random in any::<u64>(), end in (17_u64 << 20)..=KERNEL_IMAGE_SIZE) {
            let linked = (16 << 20)..end;
            let offset = u64::from(virtual_offset(&linked, ALIGNMENT, random));
            prop_assert_eq!(offset % ALIGNMENT, 0);
            prop_assert!(end + offset <= KERNEL_IMAGE_SIZE);
        }
    }

    #[test]
    fn every_slot_is_drawn_once() {
        let memory = memory(6144);
        let request = |random| Request {
            linked: (16 << 20)..(56 << 20),
            alignment: ALIGNMENT,
            random: Some(random),
            initrd_len: 5 << 20,
            initrd_limit: u64::MAX,
        };
        let draw = |random| place(&memory, &request(random)).unwrap().base;
        // 16 MiB to 3067 MiB, and 4096 MiB to 7168 MiB, in steps of 2 MiB.
        let slots = (3067 - 56 - 16 + 16) / 2 + 1 + (3072 - 40) / 2 + 1;
        let mut bases: Vec<u64> = (0..slots).map(draw).collect();
        assert_eq!(draw(slots), bases[0], "and from the first again");
        bases.dedup();
        assert_eq!(bases.len() as u64, slots);
        assert!(bases.is_sorted());
        assert_eq!((bases[0], *bases.last().unwrap()), (16 << 20, (7168 - 40) << 20));
    }
}

//! What the guest says of its memory (VIRTIO 1.2, section 5.5.6.3).

use virtio::{Chain, GuestFault};

/// The names of the tags, from 0 on (section 5.5.6.4).
const NAMES: [&str; 10] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
];
/// A tag of 16 bits and a value of 64.
const ENTRY: usize = 10;
/// More entries than any driver has tags for.
const MOST: usize = 64;

/// The last report of the guest. Memory is in bytes; nothing of it can be trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics([Option<u64>; NAMES.len()]);

impl Statistics {
    /// What the guest reported, by the names of section 5.5.6.4 in lower case.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        NAMES.into_iter().zip(self.0).filter_map(|(name, value)| Some((name, value?)))
    }

    /// Takes over a report; tags that nobody knows are skipped.
    pub(super) fn read(&mut self, chain: &Chain) -> Result<(), GuestFault> {
        self.0 = Default::default();
        for index in 0..(chain.readable_len() / ENTRY).min(MOST) {
            let mut entry = [0; ENTRY];
            chain.read_at(index * ENTRY, &mut entry)?;
            let [tag_low, tag_high, value @ ..] = entry;
            if let Some(slot) = self.0.get_mut(usize::from(u16::from_le_bytes([tag_low, tag_high]))) {
                *slot = Some(u64::from_le_bytes(value));
            }
        }
        Ok(())
    }
}

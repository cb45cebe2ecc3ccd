//! Fresh memory from the kernel, with transparent huge pages or surely without them.

#![allow(unsafe_code, reason = "memory is mapped and advised by hand, so that the kind of its pages is known")]

use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Memory of a huge page's alignment, all zeros and not yet there.
pub(super) struct Pages {
    mapping: NonNull<u8>,
    mapped: usize,
    offset: usize,
    size: usize,
}

/// A transparent huge page of x86-64.
const HUGE: usize = 2 << 20;

impl Pages {
    /// So many bytes. `huge` is advice: where the kernel has no huge pages, or none left, they are small.
    pub(super) fn map(size: usize, huge: bool) -> rustix::io::Result<Self> {
        let mapped = size + HUGE;
        // SAFETY: a new private mapping at an address of the kernel's choice overlaps nothing.
        let start =
            unsafe { mmap_anonymous(ptr::null_mut(), mapped, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) }?;
        let mapping = NonNull::new(start.cast::<u8>()).ok_or(rustix::io::Errno::NOMEM)?;
        let pages = Self { mapping, mapped, offset: mapping.as_ptr().align_offset(HUGE), size };
        let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
        // SAFETY: it is our mapping, and the advice leaves its content alone. A kernel without huge pages refuses it.
        let _ = unsafe { madvise(start, mapped, advice) };
        Ok(pages)
    }

    /// The memory.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `offset + size` is within the mapping, since that is larger by what the offset can be.
        let start = unsafe { self.mapping.as_ptr().add(self.offset) };
        // SAFETY: the mapping is readable and writable, of zeros at first, and is ours alone as long as `self` is.
        unsafe { std::slice::from_raw_parts_mut(start, self.size) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more: every slice of it borrowed `self`.
        let _ = unsafe { munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}

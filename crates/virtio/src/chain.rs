//! A chain of descriptors as two lists of guest memory, checked once (VIRTIO 1.2, section 2.7.5).
//!
//! The lists are the very `iovec`s that readv, writev and io_uring take. Their storage belongs to the queue and goes
//! back there with the chain, so a request allocates nothing.
#![allow(unsafe_code, reason = "copies to and from guest memory through addresses that were checked before")]

use std::ops::Range;
use std::sync::Arc;

use memory::Ram;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::device::GuestFault;

/// A piece of guest memory, laid out as the system's `struct iovec`: a list of them can be cast to one of `iovec`s.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct IoVec(libc::iovec);

// SAFETY: an address and a length, of memory that every thread may reach; who follows the address answers for it.
unsafe impl Send for IoVec {}
// SAFETY: as above; there is nothing to change through a shared reference.
unsafe impl Sync for IoVec {}

impl IoVec {
    /// The host's address of the first byte. It is valid for as long as the [`Chain`] is, and the guest may write there
    /// at any time.
    pub fn address(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// The number of bytes, never 0.
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    fn new(address: *mut u8, length: usize) -> Self {
        Self(libc::iovec { iov_base: address.cast(), iov_len: length })
    }
}

/// One request of the driver: bytes for the device to read, then room for it to write. It goes back by
/// [`VirtQueue::push`](crate::VirtQueue::push), or by [`undo_pop`](crate::VirtQueue::undo_pop).
#[derive(Debug)]
#[must_use = "a chain that is not pushed back is lost for the driver until the device's reset"]
pub struct Chain {
    pub(crate) head: u16,
    pub(crate) storage: Storage,
}

impl Chain {
    /// The index of the first descriptor, which tells the chain apart from all others in flight.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// How many bytes the device can read, all descriptors together.
    pub fn readable_len(&self) -> usize {
        self.storage.readable_len
    }

    /// How many bytes the device can write, all descriptors together.
    pub fn writable_len(&self) -> usize {
        self.storage.writable_len
    }

    /// Where the driver's bytes are.
    pub fn readable(&self) -> &[IoVec] {
        &self.storage.iovecs[..self.storage.split]
    }

    /// Where the device's bytes go.
    pub fn writable(&self) -> &[IoVec] {
        &self.storage.iovecs[self.storage.split..]
    }

    /// A part of [`readable`](Self::readable), by bytes. The list stays in its place, even when the chain is moved,
    /// until the next call for a range or until the chain is pushed.
    ///
    /// # Errors
    ///
    /// The driver gave fewer bytes.
    pub fn readable_range(&mut self, range: Range<usize>) -> Result<&[IoVec], GuestFault> {
        self.check_readable(range.end)?;
        let storage = &mut self.storage;
        storage.window.clear();
        storage.window.extend(cut(&storage.iovecs[..storage.split], range));
        Ok(&storage.window)
    }

    /// A part of [`writable`](Self::writable), by bytes, as [`readable_range`](Self::readable_range).
    ///
    /// # Errors
    ///
    /// The driver gave less room.
    pub fn writable_range(&mut self, range: Range<usize>) -> Result<&[IoVec], GuestFault> {
        self.check_writable(range.end)?;
        let storage = &mut self.storage;
        storage.window.clear();
        storage.window.extend(cut(&storage.iovecs[storage.split..], range));
        Ok(&storage.window)
    }

    /// Copies the driver's bytes from `offset` on, until `data` is full.
    ///
    /// # Errors
    ///
    /// The driver gave fewer bytes; `data` is untouched then.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<(), GuestFault> {
        let end = offset.saturating_add(data.len());
        self.check_readable(end)?;
        let mut done = 0;
        for piece in cut(self.readable(), offset..end) {
            done += volatile(&piece).copy_to(&mut data[done..]);
        }
        Ok(())
    }

    /// Copies all of `data` to the driver's room from `offset` on.
    ///
    /// # Errors
    ///
    /// The driver gave less room; nothing is written then.
    pub fn write_at(&mut self, offset: usize, data: &[u8]) -> Result<(), GuestFault> {
        let end = offset.saturating_add(data.len());
        self.check_writable(end)?;
        let mut done = 0;
        for piece in cut(self.writable(), offset..end) {
            volatile(&piece).copy_from(&data[done..done + piece.len()]);
            done += piece.len();
        }
        Ok(())
    }

    fn check_readable(&self, end: usize) -> Result<(), GuestFault> {
        short("readable", end, self.readable_len())
    }

    fn check_writable(&self, end: usize) -> Result<(), GuestFault> {
        short("writable", end, self.writable_len())
    }
}

fn short(part: &str, wanted: usize, given: usize) -> Result<(), GuestFault> {
    if wanted <= given {
        return Ok(());
    }
    Err(GuestFault::new(format!("a chain has {given} {part} bytes where {wanted} are needed")))
}

/// The pieces of `list` that cover `range`, in bytes from its start.
fn cut(list: &[IoVec], range: Range<usize>) -> impl Iterator<Item = IoVec> {
    let mut start = 0;
    list.iter().filter_map(move |piece| {
        let from = range.start.saturating_sub(start).min(piece.len());
        let to = range.end.saturating_sub(start).min(piece.len());
        start += piece.len();
        // The result lies inside the piece, so the address is one of its own.
        (from < to).then(|| IoVec::new(piece.address().wrapping_add(from), to - from))
    })
}

fn volatile(piece: &IoVec) -> VolatileSlice<'_> {
    // SAFETY: the piece comes from a chain, which keeps the guest's memory mapped and was checked to lie inside it; the
    // guest may change it meanwhile, which is what a volatile slice is for.
    unsafe { VolatileSlice::new(piece.address(), piece.len()) }
}

/// Section 2.7.5: what `flags` of a descriptor say.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// The size of a descriptor.
const DESCRIPTOR: u64 = 16;

/// Where and how a queue's descriptors are looked up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    pub(crate) address: u64,
    pub(crate) size: u16,
    /// The most descriptors in one chain: the largest size that the device offers for the queue (section 2.7.5.3.1).
    pub(crate) longest: u16,
    pub(crate) indirect: bool,
}

/// The lists behind a [`Chain`], used again and again.
#[derive(Debug)]
pub(crate) struct Storage {
    /// Keeps the memory that the lists point into.
    memory: Arc<Ram>,
    /// The readable pieces up to `split`, the writable ones from there on.
    iovecs: Vec<IoVec>,
    split: usize,
    readable_len: usize,
    writable_len: usize,
    /// What the last call for a range returned.
    window: Vec<IoVec>,
}

impl Storage {
    pub(crate) fn new(memory: Arc<Ram>) -> Self {
        Self { memory, iovecs: Vec::new(), split: 0, readable_len: 0, writable_len: 0, window: Vec::new() }
    }

    /// Follows the chain that begins at `head`. Every descriptor is read once, so the guest cannot change it after the
    /// check; their number is bounded, so it cannot make a circle; their sum is below 4 GiB (section 2.7.4).
    pub(crate) fn fill(&mut self, table: Table, head: u16) -> Result<(), GuestFault> {
        self.iovecs.clear();
        (self.split, self.readable_len, self.writable_len) = (0, 0, 0);
        let (mut address, mut size, mut index) = (table.address, u32::from(table.size), head);
        let (mut indirect, mut count, mut total) = (false, 0, 0u32);
        loop {
            if u32::from(index) >= size {
                return Err(GuestFault::new(format!("a chain goes on at descriptor {index} of a table of {size}")));
            }
            let descriptor = Descriptor::read(&self.memory, address, index)?;
            if descriptor.flags & INDIRECT != 0 {
                if indirect || !table.indirect || descriptor.flags & NEXT != 0 {
                    return Err(GuestFault::new("an indirect descriptor is where none may be"));
                }
                if descriptor.length == 0 || !u64::from(descriptor.length).is_multiple_of(DESCRIPTOR) {
                    let length = descriptor.length;
                    return Err(GuestFault::new(format!("an indirect table is {length} bytes long")));
                }
                (address, size, index) = (descriptor.address, descriptor.length / 16, 0);
                indirect = true;
                continue;
            }
            count += 1;
            if count > table.longest {
                return Err(GuestFault::new("a chain is a circle, or longer than its queue"));
            }
            total = total
                .checked_add(descriptor.length)
                .ok_or_else(|| GuestFault::new("the buffers of a chain are 4 GiB or more together"))?;
            self.append(&descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn append(&mut self, descriptor: &Descriptor) -> Result<(), GuestFault> {
        let Descriptor { address, length, .. } = *descriptor;
        if length == 0 {
            return Err(GuestFault::new("a buffer is empty"));
        }
        let length = length as usize;
        if descriptor.flags & WRITE != 0 {
            self.writable_len += length;
        } else if self.writable_len > 0 {
            return Err(GuestFault::new("a readable buffer comes after a writable one"));
        } else {
            self.readable_len += length;
        }
        for slice in self.memory.get_slices(GuestAddress(address), length) {
            let slice = slice.map_err(|_| wild("a buffer", address, length))?;
            self.iovecs.push(IoVec::new(slice.ptr_guard_mut().as_ptr(), slice.len()));
        }
        if descriptor.flags & WRITE == 0 {
            self.split = self.iovecs.len();
        }
        Ok(())
    }
}

fn wild(what: &str, address: u64, length: usize) -> GuestFault {
    GuestFault::new(format!("{what} of {length} bytes at {address:#x} is not in RAM"))
}

/// `struct virtq_desc`.
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &Ram, table: u64, index: u16) -> Result<Self, GuestFault> {
        let outside = || wild("a descriptor", table, 16);
        let address = table.checked_add(u64::from(index) * DESCRIPTOR).ok_or_else(outside)?;
        let mut raw = [0; 16];
        memory.read_slice(&mut raw, GuestAddress(address)).map_err(|_| outside())?;
        let raw = u128::from_le_bytes(raw);
        #[allow(clippy::cast_possible_truncation, reason = "each field is cut out of its place")]
        Ok(Self {
            address: raw as u64,
            length: (raw >> 64) as u32,
            flags: (raw >> 96) as u16,
            next: (raw >> 112) as u16,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    /// A chain of buffers of these lengths, from 0x2000 on with a gap after each; the first `readable` are the driver's.
    fn chain(lengths: &[u32], readable: usize) -> Chain {
        let memory = testing::wiring().memory;
        let mut address = 0x2000;
        for (&length, at) in lengths.iter().zip(0..) {
            let last = usize::from(at) + 1 == lengths.len();
            let write = usize::from(at) >= readable;
            let flags = if last { 0 } else { NEXT } | if write { WRITE } else { 0 };
            testing::Descriptor { address, length, flags, next: at + 1 }.store(&memory, 0x1000, at);
            address += u64::from(length) + 0x10;
        }
        let table = Table { address: 0x1000, size: 16, longest: 16, indirect: false };
        let mut storage = Storage::new(memory);
        storage.fill(table, 0).unwrap();
        Chain { head: 0, storage }
    }

    #[test]
    fn bytes_are_copied_across_buffers_from_any_offset() {
        let mut chain = chain(&[3, 5, 2, 4, 4], 3);
        let memory = chain.storage.memory.clone();
        for (at, text) in [(0x2000, "abc"), (0x2013, "defgh"), (0x2028, "ij")] {
            memory.write_slice(text.as_bytes(), GuestAddress(at)).unwrap();
        }
        assert_eq!((chain.readable_len(), chain.writable_len()), (10, 8));
        let mut data = [0; 6];
        chain.read_at(2, &mut data).unwrap();
        assert_eq!(&data, b"cdefgh");
        chain.read_at(0, &mut []).unwrap();
        chain.read_at(10, &mut []).unwrap();
        chain.write_at(2, b"1234").unwrap();
        let mut back = [0; 0x18];
        memory.read_slice(&mut back, GuestAddress(0x203a)).unwrap();
        assert_eq!((&back[2..4], &back[0x14..0x16]), (b"12".as_slice(), b"34".as_slice()));
    }

    #[test]
    fn more_than_the_chain_has_is_a_fault_and_touches_nothing() {
        let mut chain = chain(&[3, 4], 1);
        let mut data = [7; 3];
        for offset in [1, 3, usize::MAX] {
            assert!(chain.read_at(offset, &mut data).is_err());
            assert!(chain.write_at(offset.max(2), &data).is_err());
            assert!(chain.writable_range(2..offset.max(5)).is_err());
            assert!(chain.readable_range(0..offset.max(4)).is_err());
        }
        assert_eq!(data, [7; 3]);
        let mut back = [0; 4];
        chain.storage.memory.read_slice(&mut back, GuestAddress(0x2013)).unwrap();
        assert_eq!(back, [0; 4]);
    }

    #[test]
    fn a_range_is_cut_out_of_the_buffers_and_a_move_of_the_chain_leaves_it_in_its_place() {
        let mut chain = chain(&[16, 100, 100, 1], 1);
        let start = chain.writable()[0].address() as usize;
        let second = chain.writable()[1].address() as usize;
        let range = chain.writable_range(10..150).unwrap();
        let pieces: Vec<_> = range.iter().map(|piece| (piece.address() as usize, piece.len())).collect();
        assert_eq!(pieces, [(start + 10, 90), (second, 50)]);
        let place = range.as_ptr();
        let mut moved = Box::new(chain);
        assert_eq!(place, moved.storage.window.as_ptr());
        assert!(moved.writable_range(201..201).unwrap().is_empty());
        assert_eq!(moved.readable_range(0..16).unwrap().len(), 1);
    }

    #[test]
    fn storage_that_is_used_again_holds_nothing_of_the_last_chain() {
        let mut chain = chain(&[3, 5, 2], 1);
        testing::Descriptor { address: 0x3000, length: 9, flags: WRITE, next: 0 }.store(
            &chain.storage.memory,
            0x1000,
            0,
        );
        let table = Table { address: 0x1000, size: 16, longest: 16, indirect: false };
        chain.storage.fill(table, 0).unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (0, 9));
        assert_eq!((chain.readable().len(), chain.writable().len()), (0, 1));
    }
}

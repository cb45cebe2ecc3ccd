//! One split virtqueue as its device uses it (VIRTIO 1.2, section 2.7).
//!
//! The ring itself is the virtio-queue crate's; following chains, telling faults apart and bounding what a guest can
//! make a thread do is ours. The kick is always armed when [`VirtQueue::pop`] has said that there is nothing, so a
//! device that pops until then cannot miss a request.

use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use memory::Ram;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::chain::{Chain, Storage, Table};
use crate::device::{GuestFault, Interrupt, features};

/// VIRTQ_AVAIL_F_NO_INTERRUPT (section 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// A queue that the driver has enabled and whose rings lie in RAM.
///
/// A device waits for its kick with [`Watch`](crate::Watch) (the queue can be given to it as the descriptor), calls
/// [`kicked`](Self::kicked) when that is ready, then [`pop`](Self::pop)s until there is nothing,
/// [`push`](Self::push)es what is done and [`signal`](Self::signal)s once.
pub struct VirtQueue {
    index: u16,
    ring: Queue,
    table: Table,
    memory: Arc<Ram>,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    /// The driver's index as last read: up to here the ring need not be looked at again.
    available: Wrapping<u16>,
    /// Chains that the device has and the driver has not got back.
    in_flight: u16,
    /// How many chains `pop` gives before it lets others have the thread.
    budget: u16,
    /// Whether the driver was told to kick.
    armed: bool,
    /// Whether there are chains that `signal` has not told the driver of.
    unsignalled: bool,
    spare: Vec<Storage>,
}

/// What the driver wrote to the registers of a queue, and how far both have come.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Registers {
    pub(crate) size: u16,
    pub(crate) enabled: bool,
    pub(crate) descriptors: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
    /// The index of the next entry, in either ring.
    pub(crate) position: u16,
}

impl VirtQueue {
    /// Checks what the driver asks for: a size within `max_size`, rings that are aligned and in RAM.
    pub(crate) fn new(
        index: u16,
        (registers, max_size): (&Registers, u16),
        accepted: u64,
        memory: Arc<Ram>,
        kick: Arc<EventFd>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, GuestFault> {
        let event_idx = accepted & features::EVENT_IDX != 0;
        let state = QueueState {
            max_size,
            next_avail: registers.position,
            next_used: registers.position,
            event_idx_enabled: event_idx,
            size: registers.size,
            ready: true,
            desc_table: registers.descriptors,
            avail_ring: registers.driver,
            used_ring: registers.device,
        };
        let ring = Queue::try_from(state).map_err(|error| GuestFault::new(format!("queue {index}: {error}")))?;
        let size = usize::from(registers.size);
        let parts = [
            ("descriptor table", registers.descriptors, 16 * size),
            ("driver area", registers.driver, 6 + 2 * size),
            ("device area", registers.device, 6 + 8 * size),
        ];
        for (part, address, length) in parts {
            if !memory.check_range(GuestAddress(address), length) {
                return Err(GuestFault::new(format!(
                    "queue {index}: its {part} of {length} bytes at {address:#x} is not in RAM"
                )));
            }
        }
        let indirect = accepted & features::INDIRECT_DESC != 0;
        let table = Table { address: registers.descriptors, size: registers.size, longest: max_size, indirect };
        Ok(Self {
            index,
            ring,
            table,
            memory,
            kick,
            interrupt,
            available: Wrapping(registers.position),
            in_flight: 0,
            budget: registers.size,
            armed: true,
            unsignalled: false,
            spare: Vec::with_capacity(usize::from(registers.size)),
        })
    }

    /// The queue's number in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How many entries its rings have.
    pub fn size(&self) -> u16 {
        self.table.size
    }

    /// To call when the kick is ready, before [`pop`](Self::pop): forgets the kicks so far, and lets `pop` give another
    /// ring's worth of chains.
    pub fn kicked(&mut self) {
        // The one error of a non-blocking eventfd is that nobody kicked.
        let _ = self.kick.read();
        self.budget = self.table.size;
    }

    /// The next chain that the driver has made available. `None` means that the kick will be ready when there is more:
    /// the driver has been asked for it, or, after a ring's worth of chains since the last [`kicked`](Self::kicked), the
    /// queue has kicked itself, so that a driver that never stops cannot keep the thread from its other work.
    ///
    /// # Errors
    ///
    /// The ring or the chain is not what section 2.7 allows.
    pub fn pop(&mut self) -> Result<Option<Chain>, GuestFault> {
        if self.next() == self.available && !self.look()? {
            return Ok(None);
        }
        if self.budget == 0 {
            // The one error is a full counter: then the kick is ready anyway.
            let _ = self.kick.write(1);
            return Ok(None);
        }
        // A driver that offers a descriptor again while the device has it could make us hold chains without end.
        if self.in_flight >= self.table.size {
            return Err(self.fault("more chains are available than it has descriptors"));
        }
        if self.armed {
            self.armed = false;
            self.ring.disable_notification(&*self.memory).expect(CHECKED);
        }
        let next = self.next();
        let slot = self.ring.avail_ring() + 4 + 2 * u64::from(next.0 % self.table.size);
        let head: u16 = self.memory.load(GuestAddress(slot), Ordering::Relaxed).expect(CHECKED);
        let head = u16::from_le(head);
        let mut storage = self.spare.pop().unwrap_or_else(|| Storage::new(self.memory.clone()));
        storage.fill(self.table, head).map_err(|fault| self.fault(&fault.to_string()))?;
        self.ring.set_next_avail((next + Wrapping(1)).0);
        self.budget -= 1;
        self.in_flight += 1;
        Ok(Some(Chain { head, storage }))
    }

    /// Takes back the chain that was popped last, as if it had not been: the next [`pop`](Self::pop) gives it again. The
    /// driver is not asked to kick for it.
    pub fn undo_pop(&mut self, chain: Chain) {
        self.ring.set_next_avail((self.next() - Wrapping(1)).0);
        self.budget += 1;
        self.recycle(chain);
    }

    /// Gives a chain back to the driver, of whose writable part the device has filled the first `written` bytes. The
    /// driver is told by the next [`signal`](Self::signal).
    pub fn push(&mut self, chain: Chain, written: u32) {
        debug_assert!(written as usize <= chain.writable_len(), "more is written than there is room");
        self.ring.add_used(&*self.memory, chain.head, written).expect(CHECKED);
        self.unsignalled = true;
        self.recycle(chain);
    }

    /// Interrupts the driver if chains were pushed since the last call and it wants to know. Once for many chains is best.
    pub fn signal(&mut self) {
        if !std::mem::take(&mut self.unsignalled) {
            return;
        }
        let wanted = self.ring.needs_notification(&*self.memory).expect(CHECKED);
        if wanted && (self.ring.event_idx_enabled() || !self.interrupts_are_off()) {
            self.interrupt.queue(self.index);
        }
    }

    /// Interrupts the driver whatever it wants, for a queue that somebody else serves.
    pub fn interrupt(&self) {
        self.interrupt.queue(self.index);
    }

    /// The kick, for a queue that somebody else serves.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// A descriptor that interrupts the driver when somebody else writes to it, where the transport has one; otherwise
    /// the handler watches an eventfd of its own and calls [`interrupt`](Self::interrupt).
    pub fn line(&self) -> Option<EventFd> {
        self.interrupt.line(self.index)
    }

    /// How many chains have been taken, and how many were given back, both modulo 2^16.
    pub(crate) fn positions(&self) -> (u16, u16) {
        (self.ring.next_avail(), self.ring.next_used())
    }

    /// The sizes, addresses and positions, for a queue that somebody else serves.
    pub fn state(&self) -> QueueState {
        self.ring.state()
    }

    /// Takes the queue back from somebody else who served it. `position` is how far that has read the available ring,
    /// where it says so. Without it the queue goes on behind the last chain that was given back: what the other has taken
    /// and not given back is popped again, which is right where chains are given back in the order they were taken in.
    pub fn take_back(&mut self, position: Option<u16>) {
        let used = self.ring.used_idx(&*self.memory, Ordering::Acquire).expect(CHECKED);
        self.ring.set_next_used(used.0);
        self.ring.set_next_avail(position.unwrap_or(used.0));
        self.available = self.next();
    }

    fn next(&self) -> Wrapping<u16> {
        Wrapping(self.ring.next_avail())
    }

    /// Looks for new entries, and if there are none, has the driver kick for the next one. Whether there are any.
    fn look(&mut self) -> Result<bool, GuestFault> {
        self.available = self.ring.avail_idx(&*self.memory, Ordering::Acquire).expect(CHECKED);
        if self.available == self.next() {
            self.armed = true;
            if !self.ring.enable_notification(&*self.memory).expect(CHECKED) {
                return Ok(false);
            }
            self.available = self.ring.avail_idx(&*self.memory, Ordering::Acquire).expect(CHECKED);
        }
        let new = (self.available - self.next()).0;
        if new > self.table.size {
            return Err(self.fault(&format!("its available index jumps by {new}")));
        }
        Ok(new > 0)
    }

    fn interrupts_are_off(&self) -> bool {
        let flags: u16 = self.memory.load(GuestAddress(self.ring.avail_ring()), Ordering::Relaxed).expect(CHECKED);
        u16::from_le(flags) & NO_INTERRUPT != 0
    }

    fn recycle(&mut self, chain: Chain) {
        self.in_flight -= 1;
        self.spare.push(chain.storage);
    }

    fn fault(&self, what: &str) -> GuestFault {
        GuestFault::new(format!("queue {}: {what}", self.index))
    }
}

/// Why reading and writing the rings cannot fail: guest memory is never unmapped while a queue holds it.
const CHECKED: &str = "the rings were found to lie in RAM when the queue was made";

impl AsRawFd for VirtQueue {
    /// The kick.
    fn as_raw_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }
}

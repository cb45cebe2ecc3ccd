//! MSI-X: the table of a function's interrupt vectors, what is pending in it, and how a vector is raised.
//!
//! PCI Local Bus 3.0, 6.8.2. A vector is an eventfd, its line: whoever has it raises the interrupt with one write. While
//! the vector is unmasked, the line is connected to the processors as an irqfd; while it is masked it is not, so that
//! the line's own counter is the pending bit, and connecting it delivers what has come meanwhile. Nothing is lost
//! between, and nothing asks on the way whether a vector is masked.
//!
//! The table and the pending bits lie in a region behind a BAR. A write to an entry takes effect at once, masked or not
//! (the specification leaves the second open).

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::Config;

/// The capability's id.
const ID: u8 = 0x11;
/// The register of message control, as an offset in the capability, and its bits.
const CONTROL: usize = 2;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK: u16 = 1 << 14;

/// Bytes of an entry: address in two halves, data, vector control.
const ENTRY: usize = 16;
const ENTRY_CONTROL: usize = 12;
const ENTRY_MASKED: u8 = 1;

/// Bytes of a page: table and pending bits have one each at the least, so that they can be mapped apart.
const PAGE: usize = 4096;
/// The most vectors that a table here has: its page full. The specification's limit is 2048.
pub const MOST_VECTORS: usize = PAGE / ENTRY;
/// Bytes of the region: a page for the table and one for the pending bits.
pub const REGION: u64 = 2 * PAGE as u64;

/// A message that is an interrupt: what a function writes, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// The address, which names processors.
    pub address: u64,
    /// The data, which names their vector.
    pub data: u32,
}

/// Takes lines to processors. The hypervisor is behind it.
pub trait MsiRouter: Send + Sync {
    /// Sets a route apart for one vector, and says its number. There may be no machine yet.
    fn allocate(&self) -> io::Result<u32>;

    /// Says where the route leads, from now on.
    fn route(&self, route: u32, message: Message) -> io::Result<()>;

    /// Connects `line` to the route: each write to it is an interrupt. What the line holds already is delivered once
    /// and taken out of it.
    fn connect(&self, route: u32, line: &EventFd) -> io::Result<()>;

    /// Takes `line` away from the route: whatever is written from now on stays in it.
    fn disconnect(&self, route: u32, line: &EventFd) -> io::Result<()>;
}

/// The vectors of a function.
pub struct Msix {
    router: Arc<dyn MsiRouter>,
    vectors: Vec<Vector>,
    /// Where the capability begins.
    capability: usize,
    enabled: bool,
    masked: bool,
    /// Whether the log has been told of a vector that cannot be connected: the guest decides how often it happens.
    told: bool,
}

struct Vector {
    line: EventFd,
    route: u32,
    /// The entry of the table, as the guest sees it.
    entry: [u8; ENTRY],
    /// Where the route leads, once it leads anywhere.
    routed: Option<Message>,
    connected: bool,
}

impl Msix {
    /// Makes `count` masked vectors and their capability, with the table at `offset` of the BAR number `bar`.
    ///
    /// # Panics
    ///
    /// When the count, the BAR or the offset are none that the capability can tell: they are ours.
    pub fn new(
        config: &mut Config,
        (bar, offset): (u32, u32),
        count: usize,
        router: Arc<dyn MsiRouter>,
    ) -> io::Result<Self> {
        assert!((1..=MOST_VECTORS).contains(&count) && bar < 6 && offset.is_multiple_of(8));
        let last = u16::try_from(count - 1).expect("at most a page of entries");
        let pending = offset + u32::try_from(PAGE).expect("a page");
        let mut body = [0; 10];
        body[..2].copy_from_slice(&last.to_le_bytes());
        body[2..6].copy_from_slice(&(offset | bar).to_le_bytes());
        body[6..].copy_from_slice(&(pending | bar).to_le_bytes());
        let capability = config.add_capability(ID, &body, &(CONTROL_ENABLE | CONTROL_MASK).to_le_bytes());
        let vectors = (0..count).map(|_| Vector::new(&*router)).collect::<io::Result<_>>()?;
        Ok(Self { router, vectors, capability, enabled: false, masked: false, told: false })
    }

    /// How many vectors there are.
    pub fn count(&self) -> usize {
        self.vectors.len()
    }

    /// The line of a vector; `None` where there is no such vector. It never blocks.
    pub fn line(&self, vector: u16) -> Option<&EventFd> {
        self.vectors.get(usize::from(vector)).map(|vector| &vector.line)
    }

    /// Takes over what the guest has written to message control. To be called after each write to `config`.
    pub fn follow(&mut self, config: &Config) {
        let control = config.u16_at(self.capability + CONTROL);
        let (enabled, masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0);
        if (enabled, masked) == (self.enabled, self.masked) {
            return;
        }
        if enabled && !self.enabled {
            // What was raised while there was no MSI-X was no message.
            self.vectors.iter().for_each(Vector::forget);
        }
        (self.enabled, self.masked) = (enabled, masked);
        for index in 0..self.vectors.len() {
            self.apply(index);
        }
    }

    /// The guest reads at `offset` of the region.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let offset = within(offset);
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = match at.checked_sub(PAGE) {
                None => self.vectors.get(at / ENTRY).map_or(0, |vector| vector.entry[at % ENTRY]),
                Some(at) => self.pending_byte(at),
            };
        }
    }

    /// The guest writes at `offset` of the region. The pending bits are not its to write.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let offset = within(offset);
        for (value, at) in data.iter().zip(offset..PAGE) {
            if let Some(vector) = self.vectors.get_mut(at / ENTRY) {
                vector.entry[at % ENTRY] = match at % ENTRY {
                    ENTRY_CONTROL => value & ENTRY_MASKED,
                    // The rest of vector control is reserved.
                    at if at > ENTRY_CONTROL => 0,
                    _ => *value,
                };
            }
        }
        // An access of up to 8 bytes touches two entries at the most.
        let end = offset.saturating_add(data.len()).div_ceil(ENTRY);
        for index in offset / ENTRY..end.min(self.vectors.len()) {
            self.apply(index);
        }
    }

    /// Brings a function's vectors, of which none is in use yet, to where [`read`](Self::read) found those of another:
    /// `region` is its table and pending bits, `config` has its message control.
    pub fn load(&mut self, config: &Config, region: &[u8]) {
        let (table, pending) = region.split_at(region.len().min(PAGE));
        self.follow(config);
        for (vector, at) in self.vectors.iter().zip(0..) {
            if pending.get(at / 8).is_some_and(|bits| bits & 1 << (at % 8) != 0) {
                // It is empty, so it does not block; once the vector is connected, the processor gets it.
                let _ = vector.line.write(1);
            }
        }
        self.write(0, table);
    }

    /// Eight pending bits.
    fn pending_byte(&self, at: usize) -> u8 {
        let vectors = self.vectors.iter().skip(at.saturating_mul(8)).take(8);
        vectors.enumerate().fold(0, |bits, (bit, vector)| bits | u8::from(vector.is_pending()) << bit)
    }

    /// Connects a vector, or takes it away, as its entry and message control say.
    fn apply(&mut self, index: usize) {
        let vector = &mut self.vectors[index];
        let wanted = self.enabled && !self.masked && !vector.is_masked();
        if let Err(error) = vector.apply(wanted, &*self.router)
            && !self.told
        {
            self.told = true;
            log::warn!("Cannot deliver an interrupt vector of a PCI device as the guest asks: {error}");
        }
    }
}

impl Vector {
    fn new(router: &dyn MsiRouter) -> io::Result<Self> {
        let mut entry = [0; ENTRY];
        entry[ENTRY_CONTROL] = ENTRY_MASKED;
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { line, route: router.allocate()?, entry, routed: None, connected: false })
    }

    fn is_masked(&self) -> bool {
        self.entry[ENTRY_CONTROL] & ENTRY_MASKED != 0
    }

    fn message(&self) -> Message {
        let (address, rest) = self.entry.split_first_chunk().expect("an entry begins with an address");
        let data = rest.first_chunk().expect("data follow the address");
        Message { address: u64::from_le_bytes(*address), data: u32::from_le_bytes(*data) }
    }

    fn apply(&mut self, wanted: bool, router: &dyn MsiRouter) -> io::Result<()> {
        if !wanted {
            if self.connected {
                router.disconnect(self.route, &self.line)?;
                self.connected = false;
            }
            return Ok(());
        }
        let message = self.message();
        if self.routed != Some(message) {
            router.route(self.route, message)?;
            self.routed = Some(message);
        }
        if !self.connected {
            router.connect(self.route, &self.line)?;
            self.connected = true;
        }
        Ok(())
    }

    /// Whether the line holds an interrupt that has not been delivered. Only a read says so; it is written back, and
    /// whoever raises it between the two only adds to it.
    fn is_pending(&self) -> bool {
        !self.connected && self.line.read().and_then(|count| self.line.write(count)).is_ok()
    }

    fn forget(&self) {
        if !self.connected {
            // An error says that it is empty.
            let _ = self.line.read();
        }
    }
}

/// An offset in the region, or its end for any past it.
fn within(offset: u64) -> usize {
    usize::try_from(offset.min(REGION)).expect("two pages")
}

#[cfg(test)]
#[path = "msix/tests.rs"]
mod tests;

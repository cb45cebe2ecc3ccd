//! Vectors that are masked, unmasked and changed, as a driver does it.

use std::os::fd::AsRawFd as _;
use std::sync::Mutex;

use super::*;
use crate::pci::Identity;

/// A router that delivers as KVM does: a connected line is emptied into its route.
#[derive(Default)]
struct Router {
    routes: Mutex<Vec<Route>>,
    refuses: bool,
}

#[derive(Clone, Default)]
struct Route {
    leads_to: Message,
    /// The descriptor of the line that is connected.
    line: Option<i32>,
    delivered: Vec<Message>,
}

impl MsiRouter for Router {
    fn allocate(&self) -> io::Result<u32> {
        let mut routes = self.routes.lock().unwrap();
        routes.push(Route::default());
        Ok(u32::try_from(routes.len() - 1).unwrap())
    }

    fn route(&self, route: u32, message: Message) -> io::Result<()> {
        if self.refuses {
            return Err(io::Error::other("no such processor"));
        }
        self.routes.lock().unwrap()[route as usize].leads_to = message;
        Ok(())
    }

    fn connect(&self, route: u32, line: &EventFd) -> io::Result<()> {
        let connected = self.routes.lock().unwrap()[route as usize].line.replace(line.as_raw_fd());
        assert_eq!(connected, None, "KVM refuses a line that is connected");
        self.deliver(route, line);
        Ok(())
    }

    fn disconnect(&self, route: u32, line: &EventFd) -> io::Result<()> {
        self.deliver(route, line);
        let connected = self.routes.lock().unwrap()[route as usize].line.take();
        assert_eq!(connected, Some(line.as_raw_fd()), "KVM refuses a line that is not connected");
        Ok(())
    }
}

impl Router {
    /// What KVM does as soon as a connected line is written.
    fn deliver(&self, route: u32, line: &EventFd) {
        let route = &mut self.routes.lock().unwrap()[route as usize];
        if route.line.is_some() && line.read().is_ok() {
            route.delivered.push(route.leads_to);
        }
    }
}

/// A function with vectors, as its guest sees it.
struct Guest {
    router: Arc<Router>,
    config: Config,
    msix: Msix,
}

const FIRST: Message = Message { address: 0xfee0_1000, data: 0x31 };
const SECOND: Message = Message { address: 0xfee0_2000, data: 0x42 };

impl Guest {
    fn new(count: usize) -> Self {
        Self::with(count, Router::default())
    }

    fn with(count: usize, router: Router) -> Self {
        let router = Arc::new(router);
        let mut config = Config::new(Identity::default());
        let msix = Msix::new(&mut config, (1, 0x4000), count, router.clone()).unwrap();
        Self { router, config, msix }
    }

    fn control(&mut self, control: u16) {
        self.config.write(self.msix.capability + CONTROL, &control.to_le_bytes());
        self.msix.follow(&self.config);
    }

    fn write32(&mut self, offset: usize, value: u32) {
        self.msix.write(offset as u64, &value.to_le_bytes());
    }

    fn set(&mut self, vector: usize, message: Message) {
        self.msix.write((vector * ENTRY) as u64, &message.address.to_le_bytes());
        self.write32(vector * ENTRY + 8, message.data);
    }

    fn mask(&mut self, vector: usize, masked: bool) {
        self.write32(vector * ENTRY + ENTRY_CONTROL, masked.into());
    }

    fn raise(&self, vector: usize) {
        let Vector { line, route, .. } = &self.msix.vectors[vector];
        line.write(1).unwrap();
        self.router.deliver(*route, line);
    }

    fn delivered(&self, vector: usize) -> Vec<Message> {
        self.router.routes.lock().unwrap()[vector].delivered.clone()
    }

    fn pending(&self) -> u64 {
        let mut bits = [0; 8];
        self.msix.read(PAGE as u64, &mut bits);
        u64::from_le_bytes(bits)
    }
}

#[test]
fn the_capability_says_how_many_vectors_there_are_and_where() {
    let guest = Guest::new(5);
    let at = guest.msix.capability;
    assert_eq!(guest.config.u32_at(at), 4 << 16 | u32::from(ID));
    assert_eq!((guest.config.u32_at(at + 4), guest.config.u32_at(at + 8)), (0x4001, 0x5001));
    assert_eq!(guest.msix.count(), 5);
    assert!(guest.msix.line(4).is_some() && guest.msix.line(5).is_none() && guest.msix.line(0xffff).is_none());
}

#[test]
fn a_vector_is_delivered_once_it_is_enabled_and_unmasked() {
    let mut guest = Guest::new(2);
    guest.set(1, FIRST);
    guest.mask(1, false);
    guest.raise(1);
    assert_eq!(guest.delivered(1), []);
    guest.control(CONTROL_ENABLE);
    assert_eq!(guest.delivered(1), [], "raised before there was MSI-X");
    guest.raise(1);
    assert_eq!(guest.delivered(1), [FIRST]);
    assert_eq!(guest.pending(), 0);
    guest.raise(0);
    assert_eq!(guest.delivered(0), [], "masked since it was made");
}

#[test]
fn a_masked_vector_is_pending_and_delivered_once_when_it_is_unmasked() {
    let mut guest = Guest::new(9);
    guest.control(CONTROL_ENABLE);
    guest.set(8, FIRST);
    guest.raise(8);
    guest.raise(8);
    assert_eq!(guest.pending(), 1 << 8);
    assert_eq!(guest.pending(), 1 << 8, "reading the bits does not take them");
    guest.mask(8, false);
    assert_eq!((guest.delivered(8), guest.pending()), (vec![FIRST], 0));
    guest.mask(8, true);
    assert_eq!(guest.pending(), 0);
    guest.raise(8);
    assert_eq!((guest.delivered(8).len(), guest.pending()), (1, 1 << 8));
}

#[test]
fn the_functions_mask_holds_every_vector_back() {
    let mut guest = Guest::new(2);
    guest.control(CONTROL_ENABLE | CONTROL_MASK);
    for vector in 0..2 {
        guest.set(vector, FIRST);
        guest.raise(vector);
    }
    guest.mask(0, false);
    assert_eq!((guest.delivered(0).len(), guest.pending()), (0, 0b11));
    guest.control(CONTROL_ENABLE);
    assert_eq!((guest.delivered(0), guest.delivered(1)), (vec![FIRST], vec![]));
    assert_eq!(guest.pending(), 0b10, "still masked in the table");
}

#[test]
fn turning_msix_off_takes_every_vector_away() {
    let mut guest = Guest::new(1);
    guest.control(CONTROL_ENABLE);
    guest.set(0, FIRST);
    guest.mask(0, false);
    guest.control(0);
    guest.raise(0);
    guest.control(CONTROL_ENABLE);
    assert_eq!(guest.delivered(0), []);
    guest.raise(0);
    assert_eq!(guest.delivered(0), [FIRST]);
}

#[test]
fn an_entry_that_changes_while_it_is_masked_leads_to_its_new_message() {
    let mut guest = Guest::new(1);
    guest.control(CONTROL_ENABLE);
    guest.set(0, FIRST);
    guest.mask(0, false);
    guest.raise(0);
    guest.mask(0, true);
    guest.set(0, SECOND);
    guest.raise(0);
    assert_eq!(guest.delivered(0), [FIRST]);
    guest.mask(0, false);
    assert_eq!(guest.delivered(0), [FIRST, SECOND]);
}

#[test]
fn an_entry_that_changes_while_it_is_unmasked_follows_at_once() {
    let mut guest = Guest::new(1);
    guest.control(CONTROL_ENABLE);
    guest.set(0, FIRST);
    guest.mask(0, false);
    guest.set(0, SECOND);
    guest.raise(0);
    assert_eq!(guest.delivered(0), [SECOND]);
}

#[test]
fn the_table_takes_accesses_of_any_width_and_keeps_reserved_bits_zero() {
    let mut guest = Guest::new(2);
    for offset in 0..2 * ENTRY as u64 {
        guest.msix.write(offset, &[0xff; 8]);
    }
    let mut entry = [0; ENTRY];
    let (low, high) = entry.split_at_mut(8);
    guest.msix.read(0, low);
    guest.msix.read(8, high);
    assert_eq!(u128::from_le_bytes(entry), u128::from(u64::MAX) | 0x1_ffff_ffff << 64);
    // One write over the end of the first entry and the beginning of the second.
    guest.msix.write(12, &[0; 8]);
    let mut across = [0xee; 8];
    guest.msix.read(12, &mut across);
    assert_eq!(across, [0; 8]);
}

#[test]
fn what_lies_beside_the_table_and_the_pending_bits_reads_as_zero_and_is_not_written() {
    let mut guest = Guest::new(1);
    guest.control(CONTROL_ENABLE);
    guest.raise(0);
    for offset in [ENTRY as u64, PAGE as u64 - 4, PAGE as u64, PAGE as u64 + 8, REGION - 1, REGION, u64::MAX] {
        guest.msix.write(offset, &[0xff; 8]);
    }
    assert_eq!(guest.pending(), 1);
    let mut data = [0xee; 8];
    guest.msix.read(ENTRY as u64, &mut data);
    assert_eq!(data, [0; 8]);
    guest.msix.read(PAGE as u64 - 4, &mut data);
    assert_eq!(data, [0, 0, 0, 0, 1, 0, 0, 0]);
    guest.msix.read(u64::MAX, &mut data);
}

#[test]
fn a_message_that_cannot_be_routed_leaves_the_vector_pending() {
    let mut guest = Guest::with(1, Router { refuses: true, ..Router::default() });
    guest.control(CONTROL_ENABLE);
    guest.set(0, FIRST);
    guest.mask(0, false);
    guest.raise(0);
    assert_eq!((guest.delivered(0), guest.pending()), (vec![], 1));
    assert!(guest.msix.told);
}

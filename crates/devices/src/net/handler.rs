//! The half of a card that moves frames, on an I/O thread.
//!
//! To the guest: chains are taken ahead, enough for the largest frame, and each frame of a tap is read straight into them
//! by one call (passt's come in a stream and are copied); what it does not fill stays for the next one. Should the driver
//! have given less than that, the end of a frame goes to memory of ours, and waits there for the driver's next buffers.
//! From the guest: each frame is written by one call straight from where it is. No lock is taken and nothing allocated
//! for a frame.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio::{Active, Chain, ConfigChange, EventSet, GuestFault, Handler, RateLimiter, VirtQueue, Watch};

use super::control::{Control, Queues};
use super::counters::Traffic;
use super::guard::Guard;
use super::port::{Port, scatter, send};
use super::sys::{self, Pieces, Read};
use super::{HEADER, LARGEST, feature};

/// Frames to the guest before others have the thread.
const BURST: u32 = 64;
/// An Ethernet header.
const SHORTEST: usize = HEADER + 14;
/// Where `num_buffers` is in the header (section 5.1.6).
const NUM_BUFFERS: usize = 10;

/// Tokens: three for each pair of queues, and these.
const CONTROL: u32 = 0x1000;
const RX_LIMITER: u32 = 0x1001;
const TX_LIMITER: u32 = 0x1002;
const RESTART: u32 = 0x1003;

/// What the handler shares with the device or was told by it.
pub(super) struct Setup {
    pub(super) name: String,
    pub(super) guard: Option<Guard>,
    pub(super) rx_limiter: Option<RateLimiter>,
    pub(super) tx_limiter: Option<RateLimiter>,
    pub(super) traffic: Arc<Traffic>,
    /// Whether there is a link, for the device's configuration space.
    pub(super) link: Arc<AtomicBool>,
    /// The largest frame without offloads, its header included.
    pub(super) frame: usize,
}

/// Moves frames between queues and ports.
pub struct FrameHandler {
    setup: Setup,
    config_change: ConfigChange,
    pairs: Vec<Pair>,
    /// Ports whose queues the driver has not enabled.
    idle: Vec<Port>,
    /// How many pairs the driver uses.
    active: usize,
    control: Option<Control>,
}

/// A pair of queues and its port.
struct Pair {
    port: Port,
    rx: Rx,
    tx: Tx,
    pieces: Pieces,
    /// What the port is watched for, if it is.
    watched: Option<EventSet>,
}

struct Rx {
    queue: VirtQueue,
    /// Chains that were taken ahead, and their room.
    stock: VecDeque<Chain>,
    room: usize,
    /// How much room a frame may need.
    need: usize,
    /// Whether a frame may use several chains.
    mergeable: bool,
    /// What of a frame found no room in the chains.
    rest: Box<[u8]>,
    /// A frame that was read and not given to the driver.
    held: Option<Held>,
    /// Nothing more can be given to the driver until it, or the limiter, says so.
    stalled: bool,
}

struct Held {
    length: usize,
    /// How much of it is in the chains.
    in_place: usize,
    admitted: bool,
}

struct Tx {
    queue: VirtQueue,
    /// The port takes no more for now.
    blocked: bool,
    /// The next frame has passed the limiter.
    admitted: bool,
}

impl FrameHandler {
    /// Starts with ports that are [prepared](Port::prepare), of which the first `used` are in use.
    pub(super) fn new(setup: Setup, (ports, used): (Vec<Port>, usize), queues: Queues, active: Active) -> Self {
        let mut ports = ports.into_iter();
        let pair = |(port, (rx, tx))| Pair::new(port, Rx::new(rx, active.features, setup.frame), tx);
        let pairs: Vec<Pair> = ports.by_ref().zip(queues.pairs).map(pair).collect();
        let (config_change, idle) = (active.config_change, ports.collect());
        let active = used.min(pairs.len());
        let handler = Self { setup, config_change, pairs, idle, active, control: queues.control };
        handler.use_taps();
        handler
    }

    /// How many pairs the driver uses.
    pub(super) fn used(&self) -> usize {
        self.active
    }

    /// Gives back the queues and the ports.
    pub(super) fn stop(self) -> (Vec<VirtQueue>, Vec<Port>) {
        let (mut queues, mut ports) = (Vec::new(), Vec::new());
        for Pair { port, mut rx, tx, .. } in self.pairs {
            while let Some(chain) = rx.stock.pop_back() {
                rx.queue.undo_pop(chain);
            }
            queues.extend([rx.queue, tx.queue]);
            ports.push(port);
        }
        queues.extend(self.control.map(Control::into_queue));
        ports.extend(self.idle);
        (queues, ports)
    }

    /// Moves what there is to the guest, and has the port watched for what it now needs.
    fn receive(&mut self, index: usize, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        let Some(pair) = self.pairs.get_mut(index) else { return Ok(()) };
        let result = pair.receive(&mut self.setup)?;
        pair.rx.queue.signal();
        self.settle(index, result, watch);
        Ok(())
    }

    /// Moves what there is from the guest.
    fn transmit(&mut self, index: usize, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        let Some(pair) = self.pairs.get_mut(index) else { return Ok(()) };
        let result = pair.transmit(&mut self.setup)?;
        pair.tx.queue.signal();
        self.settle(index, result, watch);
        Ok(())
    }

    /// An end that goes while nothing is to be read from it is not found by reading, and reported without end.
    fn look(&mut self, index: usize, watch: &mut Watch<'_>) {
        let Pair { port, watched, .. } = &self.pairs[index];
        let quiet = *watched == Some(EventSet::empty());
        if quiet && port.descriptor().is_some_and(sys::hung_up) {
            self.lost(index, &ErrorKind::UnexpectedEof.into(), watch);
        }
    }

    fn settle(&mut self, index: usize, result: io::Result<()>, watch: &mut Watch<'_>) {
        if let Err(error) = result {
            self.lost(index, &error, watch);
        }
        let used = index < self.active;
        if let Err(error) = self.pairs[index].watch(index, used, watch) {
            log::error!("{}: cannot wait for the host's end, the card stands still: {error}", self.setup.name);
        }
    }

    /// The port is of no use any more.
    fn lost(&mut self, index: usize, error: &io::Error, watch: &mut Watch<'_>) {
        let pair = &mut self.pairs[index];
        pair.unwatch(watch);
        // What the guest has sent and we have not waits for the port's return, and not for room in it.
        pair.tx.blocked = false;
        match &mut pair.port {
            Port::Passt(passt) => passt.lost(&self.setup.name, error),
            Port::Tap(_) if !self.setup.link.load(Ordering::Relaxed) => return,
            Port::Tap(_) => {
                let name = &self.setup.name;
                log::error!("{name}: the tap has gone, the link is down until the VM is started again: {error}");
            }
        }
        self.set_link(false);
    }

    fn set_link(&self, up: bool) {
        if self.setup.link.swap(up, Ordering::Relaxed) != up {
            self.config_change.raise();
        }
    }

    fn restart(&mut self, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        let Some(Pair { port: Port::Passt(passt), .. }) = self.pairs.first_mut() else { return Ok(()) };
        if passt.restart(&self.setup.name) {
            self.set_link(true);
            // The guest has kicked for what waits here, and need not do so again.
            self.transmit(0, watch)?;
            self.receive(0, watch)?;
        }
        Ok(())
    }

    /// The driver uses this many pairs from now on.
    fn use_pairs(&mut self, count: usize, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        self.active = count;
        for pair in &mut self.pairs[count..] {
            pair.unwatch(watch);
        }
        self.use_taps();
        for index in 0..count {
            self.receive(index, watch)?;
        }
        Ok(())
    }

    fn use_taps(&self) {
        let taps = self.pairs.iter().filter_map(|pair| match &pair.port {
            Port::Tap(tap) => Some(tap),
            Port::Passt(_) => None,
        });
        super::tap::use_queues(&self.setup.name, taps, self.active);
    }
}

impl Handler for FrameHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            let token = token(index);
            watch.add(&pair.rx.queue, token)?;
            watch.add(&pair.tx.queue, token + 1)?;
            pair.watched = None;
            pair.watch(index, index < self.active, watch)?;
            if let Port::Passt(passt) = &pair.port {
                watch.add(&passt.backoff, RESTART)?;
            }
        }
        for (limiter, token) in [(&self.setup.rx_limiter, RX_LIMITER), (&self.setup.tx_limiter, TX_LIMITER)] {
            if let Some(limiter) = limiter {
                watch.add(limiter, token)?;
            }
        }
        self.control.as_ref().map_or(Ok(()), |control| watch.add(control.queue(), CONTROL))
    }

    fn ready(&mut self, token: u32, watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        match token {
            CONTROL => {
                let most = self.pairs.len();
                if let Some(count) = self.control.as_mut().map_or(Ok(None), |control| control.serve(most))? {
                    self.use_pairs(count, watch)?;
                }
            }
            RX_LIMITER => {
                self.setup.rx_limiter.iter_mut().for_each(RateLimiter::refilled);
                for index in 0..self.active {
                    self.receive(index, watch)?;
                }
            }
            TX_LIMITER => {
                self.setup.tx_limiter.iter_mut().for_each(RateLimiter::refilled);
                for index in 0..self.pairs.len() {
                    self.transmit(index, watch)?;
                }
            }
            RESTART => self.restart(watch)?,
            token => {
                let index = token as usize / 3;
                let Some(pair) = self.pairs.get_mut(index) else { return Ok(()) };
                match token % 3 {
                    0 => {
                        pair.rx.queue.kicked();
                        if pair.rx.stalled {
                            self.receive(index, watch)?;
                        }
                    }
                    1 => {
                        pair.tx.queue.kicked();
                        self.transmit(index, watch)?;
                    }
                    _ => {
                        if pair.tx.blocked || pair.port.has_more() {
                            self.transmit(index, watch)?;
                        }
                        self.receive(index, watch)?;
                        self.look(index, watch);
                    }
                }
            }
        }
        Ok(())
    }
}

/// The token of the first of a pair's three descriptors: kick of the receive queue, kick of the other, port.
fn token(index: usize) -> u32 {
    u32::try_from(index * 3).unwrap_or(u32::MAX)
}

impl Pair {
    fn new(port: Port, rx: Rx, tx: VirtQueue) -> Self {
        let tx = Tx { queue: tx, blocked: false, admitted: false };
        Self { port, rx, tx, pieces: Pieces::new(), watched: None }
    }

    /// Frames to the guest. The inner error is the port's end.
    fn receive(&mut self, setup: &mut Setup) -> Result<io::Result<()>, GuestFault> {
        let Self { port, rx, pieces, .. } = self;
        rx.stalled = false;
        let mut count = 0;
        // What passt's buffer holds no event will tell of.
        while count < BURST || port.holds_frame() {
            count += 1;
            if !rx.deliver(setup)? || !rx.refill()? {
                rx.stalled = true;
                break;
            }
            match port.receive(pieces, &mut rx.stock, &mut rx.rest) {
                Ok(Read { length, .. }) if length < SHORTEST => setup.traffic.rx.drop_one(),
                Ok(Read { length, room }) => rx.held = Some(Held { length, in_place: room, admitted: false }),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => break,
                Err(error) if port.ends_with(&error) => return Ok(Err(error)),
                Err(_) => setup.traffic.rx.drop_one(),
            }
        }
        rx.stalled |= !rx.deliver(setup)?;
        Ok(Ok(()))
    }

    /// Frames from the guest. The inner error is the port's end.
    fn transmit(&mut self, setup: &mut Setup) -> Result<io::Result<()>, GuestFault> {
        let Self { port, tx, pieces, .. } = self;
        tx.blocked = false;
        let link = setup.link.load(Ordering::Relaxed);
        if let Some(error) = port.flush().err().filter(|error| error.kind() != ErrorKind::WouldBlock) {
            return Ok(Err(error));
        }
        while let Some(mut chain) = tx.queue.pop()? {
            let length = chain.readable_len();
            let sent = if !link || !(SHORTEST..=LARGEST).contains(&length) {
                Err(ErrorKind::InvalidInput.into())
            } else {
                let limiter = setup.tx_limiter.as_mut().filter(|_| !tx.admitted);
                if limiter.is_some_and(|limiter| !limiter.admit((length - HEADER) as u64)) {
                    tx.queue.undo_pop(chain);
                    break;
                }
                send(port, pieces, setup.guard.as_ref(), &mut chain)
            };
            match sent {
                Ok(()) => setup.traffic.tx.moved(length - HEADER),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    tx.queue.undo_pop(chain);
                    (tx.blocked, tx.admitted) = (true, true);
                    break;
                }
                Err(error) => {
                    setup.traffic.tx.drop_one();
                    if link && port.ends_with(&error) {
                        tx.queue.push(chain, 0);
                        return Ok(Err(error));
                    }
                }
            }
            tx.admitted = false;
            tx.queue.push(chain, 0);
        }
        Ok(Ok(()))
    }

    /// Has the port watched for what it can do now.
    fn watch(&mut self, index: usize, used: bool, watch: &mut Watch<'_>) -> io::Result<()> {
        let Some(port) = self.port.descriptor() else { return Ok(()) };
        let mut wanted = EventSet::empty();
        if used && !self.rx.stalled {
            wanted |= EventSet::IN;
        }
        if self.tx.blocked || self.port.has_more() {
            wanted |= EventSet::OUT;
        }
        match self.watched {
            Some(watched) if watched == wanted => return Ok(()),
            Some(_) => watch.modify(&port, wanted, token(index) + 2)?,
            // A queue that is detached from its tap reports nothing but an error, and that without end.
            None if !used => return Ok(()),
            None => watch.add_for(&port, wanted, token(index) + 2)?,
        }
        self.watched = Some(wanted);
        Ok(())
    }

    fn unwatch(&mut self, watch: &mut Watch<'_>) {
        if let Some(port) = self.port.descriptor() {
            watch.remove(&port);
        }
        self.watched = None;
    }
}

impl Rx {
    fn new(queue: VirtQueue, features: u64, frame: usize) -> Self {
        let offloads = features & (feature::GUEST_TSO4 | feature::GUEST_TSO6) != 0;
        let stock = VecDeque::with_capacity(queue.size().into());
        Self {
            queue,
            stock,
            room: 0,
            need: if offloads { LARGEST } else { frame },
            mergeable: features & feature::MRG_RXBUF != 0,
            rest: vec![0; LARGEST].into_boxed_slice(),
            held: None,
            stalled: false,
        }
    }

    /// Takes chains for the next frame. Whether there are any.
    fn refill(&mut self) -> Result<bool, GuestFault> {
        while self.room < self.need && (self.mergeable || self.stock.is_empty()) {
            if !self.take_one()? {
                break;
            }
        }
        Ok(!self.stock.is_empty())
    }

    fn take_one(&mut self) -> Result<bool, GuestFault> {
        let mut chain = self.queue.pop()?;
        if chain.is_none() && self.stock.is_empty() {
            // There may be more, but for the queue's regard for others: the bound here is that on frames.
            self.queue.kicked();
            chain = self.queue.pop()?;
        }
        let Some(chain) = chain else { return Ok(false) };
        if chain.writable_len() == 0 {
            return Err(GuestFault::new("a chain to receive into has no room"));
        }
        self.room += chain.writable_len();
        self.stock.push_back(chain);
        Ok(true)
    }

    /// Gives the frame that was read to the driver. Whether it has gone, to the driver or for good.
    fn deliver(&mut self, setup: &mut Setup) -> Result<bool, GuestFault> {
        let Some(held) = &mut self.held else { return Ok(true) };
        let (length, in_place) = (held.length, held.in_place);
        if !held.admitted {
            held.admitted = setup.rx_limiter.as_mut().is_none_or(|limiter| limiter.admit((length - HEADER) as u64));
            if !held.admitted {
                return Ok(false);
            }
        }
        while self.room < length {
            // Neither a longer frame than a chain nor one than all of the ring will ever fit.
            if !self.mergeable || self.stock.len() >= usize::from(self.queue.size()) {
                setup.traffic.rx.drop_one();
                self.held = None;
                return Ok(true);
            }
            if !self.take_one()? {
                return Ok(false);
            }
        }
        if length > in_place {
            scatter(&mut self.stock, in_place, &self.rest[..length - in_place]);
        }
        self.push(length)?;
        self.held = None;
        setup.traffic.rx.moved(length - HEADER);
        Ok(true)
    }

    /// Gives back the chains that the first `length` bytes of the stock fill.
    fn push(&mut self, length: usize) -> Result<(), GuestFault> {
        let (mut count, mut room) = (0u16, 0);
        for chain in &self.stock {
            if room >= length {
                break;
            }
            (count, room) = (count + 1, room + chain.writable_len());
        }
        if let Some(first) = self.stock.front_mut() {
            first.write_at(NUM_BUFFERS, &count.to_le_bytes())?;
        }
        let mut left = length;
        for chain in self.stock.drain(..usize::from(count)) {
            let room = chain.writable_len();
            let written = left.min(room);
            (left, self.room) = (left - written, self.room - room);
            self.queue.push(chain, u32::try_from(written).unwrap_or(u32::MAX));
        }
        Ok(())
    }
}

//! A device that sends back what it is sent, and does on demand what a test needs.
#![allow(clippy::unwrap_used, reason = "it belongs to tests")]
#![allow(dead_code, reason = "each test executable uses its part")]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use memory::Ram;
use virtio::testing::{self, Driver, MmioRegisters};
use virtio::{Active, Chain, ConfigChange, GuestFault, Handler, Kind, VirtQueue, VirtioDevice, Watch};
use vm_memory::{Bytes, GuestAddress};

pub(crate) type EchoDriver = Driver<MmioRegisters<Echo>>;

/// A device feature, for tests of negotiation.
pub(crate) const FEATURE: u64 = 1 << 3;

/// What a test and the device share.
#[derive(Default)]
pub(crate) struct Knobs {
    /// Keep chains instead of sending them back.
    pub(crate) hold: AtomicBool,
    /// Refuse to start.
    pub(crate) broken: AtomicBool,
    /// Make the next chain available before the last one is back, as the fastest of drivers would.
    pub(crate) endless: AtomicBool,
    /// How many chains the device has seen.
    pub(crate) seen: AtomicUsize,
    /// How many queues came back, all stops together.
    pub(crate) stopped: AtomicUsize,
    pub(crate) config_writes: Mutex<Vec<(usize, Vec<u8>)>>,
    pub(crate) config_change: Mutex<Option<ConfigChange>>,
}

pub(crate) struct Echo {
    pub(crate) knobs: Arc<Knobs>,
    pub(crate) config: Vec<u8>,
}

pub(crate) struct EchoHandler {
    knobs: Arc<Knobs>,
    memory: Arc<Ram>,
    queues: Vec<VirtQueue>,
    held: Vec<Chain>,
    buffer: Vec<u8>,
}

pub(crate) fn echo() -> (EchoDriver, Arc<Knobs>) {
    let knobs = Arc::<Knobs>::default();
    (testing::mmio(Echo { knobs: knobs.clone(), config: vec![1, 2, 3, 4, 5, 6, 7] }), knobs)
}

impl VirtioDevice for Echo {
    type Handler = EchoHandler;

    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.knobs.config_writes.lock().unwrap().push((offset, data.to_vec()));
    }

    fn shared_memory(&self, id: u8) -> Option<std::ops::Range<u64>> {
        (id == 7).then_some(0x1_2345_6000..0x9_2345_7000)
    }

    fn start(&mut self, active: Active) -> anyhow::Result<EchoHandler> {
        anyhow::ensure!(!self.knobs.broken.load(Ordering::Relaxed), "the back end is gone");
        *self.knobs.config_change.lock().unwrap() = Some(active.config_change.clone());
        let buffer = vec![0; 2 * testing::BUFFER];
        let (knobs, memory, queues) = (self.knobs.clone(), active.memory, active.queues);
        Ok(EchoHandler { knobs, memory, queues, held: Vec::new(), buffer })
    }

    fn stop(&mut self, handler: EchoHandler) -> Vec<VirtQueue> {
        self.knobs.stopped.fetch_add(handler.queues.len(), Ordering::Relaxed);
        handler.queues
    }
}

impl EchoHandler {
    /// Sends back what was held.
    pub(crate) fn release(&mut self) {
        for mut chain in std::mem::take(&mut self.held) {
            let written = answer(&mut self.buffer, &mut chain).unwrap();
            self.queues[0].push(chain, written);
        }
        self.queues[0].signal();
    }
}

impl Handler for EchoHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        self.queues.iter().zip(0..).try_for_each(|(queue, token)| watch.add(queue, token))
    }

    fn ready(&mut self, token: u32, _watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        let queue = &mut self.queues[token as usize];
        queue.kicked();
        while let Some(mut chain) = queue.pop()? {
            self.knobs.seen.fetch_add(1, Ordering::Relaxed);
            if self.knobs.hold.load(Ordering::Relaxed) {
                self.held.push(chain);
                continue;
            }
            let written = answer(&mut self.buffer, &mut chain)?;
            if self.knobs.endless.load(Ordering::Relaxed) {
                let index = GuestAddress(queue.state().avail_ring + 2);
                let now: u16 = self.memory.load(index, Ordering::Relaxed).unwrap();
                self.memory.store(now.wrapping_add(1), index, Ordering::Relaxed).unwrap();
            }
            queue.push(chain, written);
        }
        queue.signal();
        Ok(())
    }
}

/// Copies as much as there is and fits.
fn answer(buffer: &mut [u8], chain: &mut Chain) -> Result<u32, GuestFault> {
    let length = chain.readable_len().min(chain.writable_len()).min(buffer.len());
    chain.read_at(0, &mut buffer[..length])?;
    chain.write_at(0, &buffer[..length])?;
    Ok(u32::try_from(length).unwrap())
}

/// Sends a message through the device and back.
pub(crate) fn assert_echoes(driver: &mut EchoDriver, queue: u16) {
    let head = driver.send(queue, &[b"hello, ", b"world"], &[3, 20]);
    let used = driver.collect(queue);
    assert_eq!((used.head, used.data.as_slice()), (head, b"hello, world".as_slice()));
}

/// Waits until the device has seen this many chains.
pub(crate) fn wait_until_seen(knobs: &Knobs, count: usize) {
    let deadline = std::time::Instant::now() + testing::DEADLINE;
    while knobs.seen.load(Ordering::Relaxed) < count {
        assert!(std::time::Instant::now() < deadline, "the device has not seen {count} chains");
        std::thread::yield_now();
    }
}

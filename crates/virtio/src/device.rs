//! The contract between a device, its transport and its I/O thread (VIRTIO 1.2, sections 2 and 3.1).
//!
//! ```text
//!            start (DRIVER_OK)           GuestFault
//!  stopped ────────────────▶ running ─────────────────▶ parked, NEEDS_RESET
//!     ▲                         │                              │
//!     └────────── stop ─────────┴──────────── reset ───────────┘
//! ```

use std::any::Any;
use std::borrow::Cow;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memory::Ram;
use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use crate::io_thread::Watch;
use crate::queue::VirtQueue;

/// Feature bits that belong to the queues and the transport (section 6).
pub mod features {
    /// VIRTIO_F_INDIRECT_DESC: a descriptor may refer to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX: either side says from which entry on it wants to be notified.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1: not a legacy device. Always offered, and a driver must accept it.
    pub const VERSION_1: u64 = 1 << 32;
}

/// A virtio device as its transport sees it: identity, configuration space, how to start. It knows no bus address, no
/// interrupt line and no thread.
pub trait VirtioDevice: Send + 'static {
    /// The half that runs on an I/O thread.
    type Handler: Handler;

    /// What the guest finds.
    fn kind(&self) -> Kind;

    /// The largest size of each queue: powers of two, at most 1024.
    fn queue_sizes(&self) -> &[u16];

    /// The device's own feature bits. The transport adds VERSION_1 and [`ring_features`](Self::ring_features).
    fn features(&self) -> u64 {
        0
    }

    /// What the queues can do. [`VirtQueue`] can do both; a device whose queues are served elsewhere says what they can.
    fn ring_features(&self) -> u64 {
        features::EVENT_IDX | features::INDIRECT_DESC
    }

    /// The configuration space as it is now, little-endian. The transport does offsets, widths and bounds.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver writes `data` at `offset` of the configuration space: 1, 2, 4 or 8 bytes inside [`config`](Self::config).
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The guest-physical range of the shared memory region `id` (section 2.10).
    fn shared_memory(&self, id: u8) -> Option<Range<u64>> {
        let _ = id;
        None
    }

    /// The driver has set DRIVER_OK: the back end moves into a handler.
    ///
    /// # Errors
    ///
    /// A [`GuestFault`] or a fault of the host. Either way the device stands still and shows NEEDS_RESET.
    fn start(&mut self, active: Active) -> anyhow::Result<Self::Handler>;

    /// The reverse of [`start`](Self::start): requests in flight are finished first, and the back end comes back. It can be
    /// started again where it was, unless a [`reset`](Self::reset) follows.
    fn stop(&mut self, handler: Self::Handler) -> Vec<VirtQueue>;

    /// The driver has reset the device, which is stopped: what the driver had said is forgotten.
    fn reset(&mut self) {}

    /// What the driver has said that is neither in the registers nor in the queues, for [`load`](Self::load). The handler is
    /// there if the device runs.
    ///
    /// # Errors
    ///
    /// The device has what cannot be saved; it goes on as if nobody had asked.
    fn save(&self, handler: Option<&Self::Handler>) -> anyhow::Result<Value> {
        let _ = handler;
        Ok(Value::Null)
    }

    /// Takes over what a device of the same spec has saved. Comes before the first [`start`](Self::start), if at all.
    ///
    /// # Errors
    ///
    /// It is nothing that such a device saves; then nothing has changed. It comes from a file, so it may be anything.
    fn load(&mut self, state: Value) -> anyhow::Result<()> {
        anyhow::ensure!(state.is_null(), "its state is {state}, and such a device has none");
        Ok(())
    }
}

/// The half of a device that owns its queues. One I/O thread has it at a time, so it takes no lock.
pub trait Handler: Any + Send {
    /// Registers the descriptors to wait for, the queues' kicks among them. Called each time that the handler comes to
    /// a thread, which can be more than once.
    ///
    /// # Errors
    ///
    /// The host has no room for another watch.
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()>;

    /// A descriptor that was registered with `token` is ready, or was when the thread looked. It must not block. What it
    /// leaves unread is reported again at once, and so is an end that hung up, until it is taken out of `watch`.
    ///
    /// # Errors
    ///
    /// The guest broke its side of the contract: the handler is called no more and the device shows NEEDS_RESET.
    fn ready(&mut self, token: u32, watch: &mut Watch<'_>) -> Result<(), GuestFault>;
}

/// What a device starts with.
pub struct Active {
    /// The guest's memory.
    pub memory: Arc<Ram>,
    /// The queues that the driver enabled, by ascending index.
    pub queues: Vec<VirtQueue>,
    /// The features that the driver accepted.
    pub features: u64,
    /// Tells the driver that the configuration space has changed.
    pub config_change: ConfigChange,
}

impl Active {
    /// Takes out the queue with this index.
    ///
    /// # Errors
    ///
    /// The driver did not enable it.
    pub fn take(&mut self, index: u16) -> Result<VirtQueue, GuestFault> {
        let at = self.queues.iter().position(|queue| queue.index() == index);
        at.map(|at| self.queues.remove(at))
            .ok_or_else(|| GuestFault::new(format!("the driver started the device without its queue {index}")))
    }

    /// Whether the driver accepted every one of these feature bits.
    pub fn has(&self, features: u64) -> bool {
        self.features & features == features
    }
}

/// Tells the driver that the configuration space has changed. Any thread may.
#[derive(Clone)]
pub struct ConfigChange {
    pub(crate) generation: Arc<AtomicU32>,
    pub(crate) interrupt: Arc<dyn Interrupt>,
}

impl ConfigChange {
    /// Call it after the change can be seen in [`VirtioDevice::config`].
    pub fn raise(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt.config();
    }
}

/// How a device's interrupts leave, which only its transport knows.
pub trait Interrupt: Send + Sync {
    /// There is something in the used ring of queue `index`.
    fn queue(&self, index: u16);

    /// The configuration or the device's status has changed.
    fn config(&self);

    /// A descriptor that does what [`queue`](Self::queue) does when somebody else writes to it, such as vhost in the
    /// kernel or in another process. A transport whose interrupts have a status register has none.
    fn line(&self, index: u16) -> Option<EventFd> {
        let _ = index;
        None
    }
}

/// The guest broke the contract between driver and device: a sentence without its subject's name, which is in the line
/// that logs it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GuestFault(Cow<'static, str>);

impl GuestFault {
    /// What the guest did.
    pub fn new(what: impl Into<Cow<'static, str>>) -> Self {
        Self(what.into())
    }
}

/// Device types (section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum Kind {
    Net = 1,
    Block = 2,
    Console = 3,
    Rng = 4,
    Balloon = 5,
    Vsock = 19,
    Fs = 26,
    Pmem = 27,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Console => "console",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
            Self::Fs => "fs",
            Self::Pmem => "pmem",
        })
    }
}

//! The block device (VIRTIO 1.2, section 5.2): disks from raw files, block devices of the host, and qcow2 images.
//!
//! ```text
//! Block ──start──▶ BlockHandler: chain ─▶ request::parse ─▶ Job ─▶ Engine ─▶ Image (Raw | Qcow2)
//!                                                            └─▶ settle: done, rest, retry, wait for room, error
//! ```
//!
//! The guest is the adversary of everything from the chain on, and who made a qcow2 image of all that stands in it.
//! Offered are several queues, flushes, discard and write-zeroes. Left out on purpose: the legacy geometry, a cache mode
//! that the guest changes (`CONFIG_WCE`), lifetime, secure erase and zones.

mod engine;
mod handler;
mod image;
mod job;
mod qcow2;
mod raw;
mod request;
mod spec;
mod sys;

#[cfg(test)]
mod tests;

pub use handler::BlockHandler;
pub use spec::{BlockSpec, Cache, EngineSpec, Format, OnFull, Opened};
pub(crate) use sys::{lock, reserve};

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use kv::Size;
use virtio::{Active, ConfigChange, Kind, RateLimiter, VirtQueue, VirtioDevice};
use vmm_sys_util::timerfd::TimerFd;

use engine::Engine;
use handler::{Conduct, Medium, Timers};
use image::Image;
use request::{MOST_SECTORS, SECTOR};

/// Feature bits (section 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Buffers of one request, less its header and its status.
const MOST_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// What the host allocates at once, for the guest to align its discards and its partitions to.
const HOST_BLOCK: u32 = 4096;

/// A disk.
pub struct Block {
    spec: BlockSpec,
    name: String,
    queue_sizes: Vec<u16>,
    features: u64,
    /// Bytes that the guest can reach.
    capacity: u64,
    image: Arc<Image>,
    /// While there is no handler that has it.
    medium: Option<Medium>,
    /// While there is a handler.
    config_change: Option<ConfigChange>,
}

impl Block {
    /// Opens and locks the image and starts its engine.
    ///
    /// # Errors
    ///
    /// The user's: what is wrong with the image or with what was asked for, and what to do about it.
    pub fn open(spec: &BlockSpec) -> anyhow::Result<Self> {
        spec.validate()?;
        let medium = open(spec)?;
        let name = format!("Disk {}", spec.id());
        let image = medium.image.clone();
        let mut features = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY;
        if spec.queues() > 1 {
            features |= feature::MQ;
        }
        if spec.readonly {
            features |= feature::RO;
        } else {
            features |= feature::WRITE_ZEROES;
        }
        if image.can_punch() {
            features |= feature::DISCARD;
        }
        let capacity = image.size();
        log::info!("{name}: {}, {}, by {}", spec.path.display(), Size(capacity), medium.engine.name());
        let queue_sizes = vec![QUEUE_SIZE; spec.queues().into()];
        let (spec, medium) = (spec.clone(), Some(medium));
        Ok(Self { spec, name, queue_sizes, features, capacity, image, medium, config_change: None })
    }

    /// The name by which the disk is addressed.
    pub fn id(&self) -> String {
        self.spec.id()
    }

    /// The disk as it is now.
    pub fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    /// Puts the image at `path` into the drive, or in `opened`, which then is called `path`. Where it is the one in the
    /// drive, takes up the size that it has now. Takes the handler if there is one.
    ///
    /// # Errors
    ///
    /// See [`resize`](Self::resize) and [`change_medium`](Self::change_medium); a disk with an overlay stays as it is.
    pub fn change(
        &mut self,
        path: &Path,
        opened: Option<Opened>,
        handler: Option<&mut BlockHandler>,
    ) -> anyhow::Result<()> {
        if self.spec.overlay.is_some() {
            bail!("The drive {} has an overlay, which belongs to its image: stop the VM to change it", self.id());
        }
        if self.holds(path, opened.as_ref()) {
            return self.resize(handler).map(drop);
        }
        let new = BlockSpec { path: path.to_owned(), opened, id: Some(self.id()), ..self.spec.clone() };
        self.change_medium(&new, handler)
    }

    /// Whether an image is the one in the drive: the same file, whatever it is called now. Who sends no file means the one
    /// that is in there by its name, which need not be a path: nothing is opened because of it.
    fn holds(&self, path: &Path, opened: Option<&Opened>) -> bool {
        match (&*self.image, opened.map(|opened| opened.0.metadata())) {
            (Image::Raw(raw), Some(Ok(new))) => {
                raw.file.metadata().is_ok_and(|old| (old.dev(), old.ino()) == (new.dev(), new.ino()))
            }
            _ => path == self.spec.path,
        }
    }

    /// Takes up the size that the raw image's file has now, after somebody made it larger, and tells the guest. Returns
    /// the size in bytes. Takes the handler if there is one.
    ///
    /// # Errors
    ///
    /// The image is not raw, or its size is not possible.
    pub fn resize(&mut self, handler: Option<&mut BlockHandler>) -> anyhow::Result<u64> {
        let name = self.spec.path.display();
        let Image::Raw(raw) = &*self.image else {
            bail!("{name}: the size of a qcow2 image stands in the image: stop the VM, and use `qemu-img resize`");
        };
        let size = raw.size_now(&self.spec.path, self.spec.block_size())?;
        if let Some(handler) = handler {
            handler.set_capacity(size);
        }
        self.announce(size);
        Ok(size)
    }

    /// Puts another medium into the drive, after the requests that are in flight are done, and tells the guest. All but
    /// the image and what belongs to it stays as it was. Takes the handler if there is one.
    ///
    /// # Errors
    ///
    /// The new image cannot be had, or is not one for this drive. The old one stays.
    pub fn change_medium(&mut self, new: &BlockSpec, handler: Option<&mut BlockHandler>) -> anyhow::Result<()> {
        new.validate()?;
        let name = new.path.display();
        if new.readonly != self.spec.readonly || new.block_size() != self.spec.block_size() {
            bail!("{name}: readonly and block-size= of a drive stay as they were at the start: say them like that");
        }
        // What belongs to the drive stays, its queues above all: the engine has a place for each of their requests.
        let BlockSpec { id, queues, serial, cache, rate, burst, ops, ops_burst, on_full, .. } = self.spec.clone();
        let id = Some(id.unwrap_or_else(|| self.spec.id()));
        let spec = BlockSpec { id, queues, serial, cache, rate, burst, ops, ops_burst, on_full, ..new.clone() };
        let medium = open(&spec)?;
        self.spec = spec;
        self.image = medium.image.clone();
        self.announce(medium.image.size());
        match handler {
            Some(handler) => handler.change_medium(medium),
            None => self.medium = Some(medium),
        }
        Ok(())
    }

    /// Shows the guest another size.
    fn announce(&mut self, size: u64) {
        self.capacity = size;
        if let Some(config_change) = &self.config_change {
            config_change.raise();
        }
    }

    fn conduct(&self, active: &Active) -> Conduct {
        Conduct {
            name: self.name.clone(),
            serial: self.spec.serial.clone().unwrap_or_default(),
            writable: !self.spec.readonly,
            write_through: !active.has(feature::FLUSH) && self.spec.cache == Cache::Writeback,
            ignore_flush: self.spec.cache == Cache::Unsafe,
            discard: active.has(feature::DISCARD),
            write_zeroes: active.has(feature::WRITE_ZEROES),
            wait_for_room: self.spec.on_full == OnFull::Wait,
        }
    }
}

fn open(spec: &BlockSpec) -> anyhow::Result<Medium> {
    let image = Arc::new(Image::open(spec)?);
    let engine = Engine::new(spec, &image, u32::from(QUEUE_SIZE) * u32::from(spec.queues()))?;
    Ok(Medium { engine, image })
}

impl VirtioDevice for Block {
    type Handler = BlockHandler;

    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    /// `struct virtio_blk_config` (section 5.2.4), up to the fields of write-zeroes.
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(60);
        let mut put = |bytes: &[u8]| config.extend_from_slice(bytes);
        put(&(self.capacity / SECTOR).to_le_bytes());
        // size_max, which is not offered.
        put(&[0; 4]);
        put(&MOST_SEGMENTS.to_le_bytes());
        // The legacy geometry, which is not offered.
        put(&[0; 4]);
        let block = self.spec.block_size();
        put(&block.to_le_bytes());
        // Topology: a physical block is 2^n logical ones, the first of them is aligned, and I/O goes by physical ones.
        let physical = (HOST_BLOCK / block).max(1);
        put(&[u8::try_from(physical.trailing_zeros()).unwrap_or(0), 0]);
        put(&u16::try_from(physical).unwrap_or(1).to_le_bytes());
        put(&[0; 4]);
        // writeback and a byte of padding.
        put(&[0; 2]);
        put(&self.spec.queues().to_le_bytes());
        // Discard: the longest, one range at a time, the alignment.
        put(&MOST_SECTORS.to_le_bytes());
        put(&1u32.to_le_bytes());
        put(&(HOST_BLOCK / 512).to_le_bytes());
        // Write-zeroes: the longest, one range at a time, whether it may deallocate.
        put(&MOST_SECTORS.to_le_bytes());
        put(&1u32.to_le_bytes());
        put(&[u8::from(self.features & feature::DISCARD != 0), 0, 0, 0]);
        config
    }

    fn start(&mut self, active: Active) -> anyhow::Result<BlockHandler> {
        let conduct = self.conduct(&active);
        let limits = self.spec.limits();
        let limiter = limits.map(|(bytes, operations)| RateLimiter::new(bytes, operations)).transpose();
        let limiter = limiter.context("Cannot make a timer for a disk's rate limit")?;
        let timers = Timers { limiter, room: TimerFd::new().context("Cannot make a timer for a disk")? };
        let medium = self.medium.take().context("A disk that runs was started again")?;
        self.config_change = Some(active.config_change);
        Ok(BlockHandler::new(medium, conduct, active.queues, timers, self.capacity))
    }

    fn stop(&mut self, handler: BlockHandler) -> Vec<VirtQueue> {
        let (queues, medium) = handler.stop();
        (self.medium, self.config_change) = (Some(medium), None);
        queues
    }
}

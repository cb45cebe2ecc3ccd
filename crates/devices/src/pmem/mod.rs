//! Persistent memory (VIRTIO 1.2, section 5.19): a file of the host's that the guest reads and writes without asking us.
//! Its one request is to have what it wrote reach the host's disk.
//!
//! The file has to be a multiple of 2 MiB long, which is what Linux takes as memory, unless it can only be read: whatever
//! a guest wrote behind its end would be lost. A file that somebody makes shorter while a guest uses it reads as zeros
//! from there on, and every flush fails (see [`FileRegion`]).
//!
//! Left out on purpose: other devices do not reach the file's pages, so a guest must not have a disk read straight into
//! a file that it has mapped from here (`O_DIRECT`); block devices; and the shared memory region of VIRTIO 1.3.

#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use kv::Size;
use memory::FileRegion;
use serde::{Deserialize, Serialize};
use virtio::{Active, Chain, GuestFault, Handler, Kind, VirtQueue, VirtioDevice, Watch};

use crate::{Transport, block};

/// A file as persistent memory: `root.img,readonly`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct PmemSpec {
    /// The file
    pub path: PathBuf,
    /// The device's name; the file's name without its ending unless said
    pub id: Option<String>,
    /// How the guest finds it: pci, mmio or mmio-cmdline; as the machine's other devices unless said
    #[arg(value_parser = kv::from_str::<Transport>)]
    pub transport: Option<Transport>,
    /// What the guest writes is dropped, and other readers may have the file too
    pub readonly: bool,
    /// A file that is not there is made, with this size
    pub size: Option<Size>,
}

/// What Linux takes as memory.
const BLOCK: u64 = 2 << 20;

impl PmemSpec {
    /// The name by which the device is addressed while the VM runs.
    pub fn id(&self) -> String {
        let stem = || self.path.file_stem().map(OsStr::to_string_lossy).unwrap_or_default().into_owned();
        self.id.clone().unwrap_or_else(stem)
    }

    /// Checks what was asked for.
    ///
    /// # Errors
    ///
    /// What is wrong, and what to say instead.
    pub fn validate(&self) -> anyhow::Result<()> {
        match self.size {
            Some(_) if self.readonly => bail!("{}: size= makes a file to write to: drop it, or readonly", self.id()),
            Some(size) if size.bytes() == 0 || !size.bytes().is_multiple_of(BLOCK) => {
                bail!("{}: size={size} is no multiple of 2M: say one that is", self.id())
            }
            _ => Ok(()),
        }
    }
}

/// Opens the file and maps it. It is locked, for one writer or any number of readers, for as long as it is mapped.
///
/// # Errors
///
/// It cannot be had as it was asked for; the message says what to do.
pub fn open(spec: &PmemSpec) -> anyhow::Result<FileRegion> {
    spec.validate()?;
    let name = spec.path.display();
    let file = open_file(spec)?;
    let metadata = file.metadata().with_context(|| format!("Cannot examine {name}"))?;
    if !metadata.is_file() {
        bail!("{name} is no regular file: persistent memory has to be one");
    }
    match block::lock(&file, !spec.readonly) {
        Ok(()) => {}
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            bail!("{name} is locked, another VM uses it: stop that one, or have all of them use it readonly")
        }
        Err(error) => log::warn!("Cannot lock {name}, let no other VM use it: {error}"),
    }
    match metadata.len() {
        0 => bail!("{name} is empty: give it a size first (`truncate -s 1G {name}`)"),
        size if !spec.readonly && !size.is_multiple_of(BLOCK) => {
            bail!("{name} has {size} bytes, which is no multiple of 2M: lengthen it (`truncate -s %2M {name}`)")
        }
        size if !spec.readonly => match block::reserve(&file, size) {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                bail!("There is no room on the host for all of {name}, {size} bytes: make some, or a smaller file")
            }
            // Where a file system cannot do that, a page that it has no room for ends the guest.
            _ => map(file, spec),
        },
        _ => map(file, spec),
    }
}

fn map(file: File, spec: &PmemSpec) -> anyhow::Result<FileRegion> {
    let name = spec.path.display();
    FileRegion::new(file, name.to_string(), spec.readonly).with_context(|| format!("Cannot map {name}"))
}

fn open_file(spec: &PmemSpec) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    // A pipe is refused later, and opening one shall not wait for its other end.
    options.read(true).write(!spec.readonly).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    if let Some(size) = spec.size {
        match options.clone().create_new(true).mode(0o600).open(&spec.path) {
            Ok(file) => {
                file.set_len(size.bytes()).with_context(|| format!("Cannot give {} a size", spec.path.display()))?;
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(explain(error, spec)),
        }
    }
    options.open(&spec.path).map_err(|error| explain(error, spec))
}

fn explain(error: io::Error, spec: &PmemSpec) -> anyhow::Error {
    let cure = match error.kind() {
        io::ErrorKind::NotFound if spec.size.is_some() => "make its folder first",
        io::ErrorKind::NotFound => "it does not exist, check the path, or say size= to have it made",
        io::ErrorKind::IsADirectory => "it is a directory, name a file in it",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !spec.readonly => {
            "this user may not write to it, say readonly or change its mode"
        }
        _ => "choose another path",
    };
    anyhow::Error::new(error).context(format!("Cannot open {}: {cure}", spec.path.display()))
}

/// Entries of the queue.
const QUEUE_SIZE: u16 = 64;
/// What the I/O thread tells us about: the queue, and the file that somebody else changes.
const REQUESTS: u32 = 0;
const CHANGES: u32 = 1;

/// The one type of request, and its answers (sections 5.19.6 and 5.19.7).
const FLUSH: u32 = 0;
const DONE: i32 = 0;
const FAILED: i32 = -1;

/// Persistent memory.
pub struct Pmem {
    file: Arc<FileRegion>,
    address: u64,
}

impl Pmem {
    /// The device for a file that the guest has at `address` of its physical space.
    pub fn new(file: Arc<FileRegion>, address: u64) -> Self {
        Self { file, address }
    }
}

impl VirtioDevice for Pmem {
    type Handler = PmemHandler;

    fn kind(&self) -> Kind {
        Kind::Pmem
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// `start` and `size` (section 5.19.4).
    fn config(&self) -> Vec<u8> {
        [self.address.to_le_bytes(), self.file.length().to_le_bytes()].concat()
    }

    fn start(&mut self, mut active: Active) -> anyhow::Result<PmemHandler> {
        let (file, queue) = (self.file.clone(), active.take(0)?);
        Ok(PmemHandler { file, queue, waiting: Vec::with_capacity(QUEUE_SIZE.into()), failed: false })
    }

    fn stop(&mut self, handler: PmemHandler) -> Vec<VirtQueue> {
        vec![handler.queue]
    }
}

/// The half of a [`Pmem`] that owns its queue.
pub struct PmemHandler {
    file: Arc<FileRegion>,
    queue: VirtQueue,
    /// Flushes that one system call is for.
    waiting: Vec<Chain>,
    /// The log has said that flushes fail.
    failed: bool,
}

impl PmemHandler {
    /// Takes the flushes that are there, and answers what is none.
    fn take(&mut self) -> Result<(), GuestFault> {
        // Up to the one that is not there, since only looking for that one asks for the next kick. The queue never gives
        // out more chains than it has entries.
        while let Some(mut chain) = self.queue.pop()? {
            let mut kind = [0; 4];
            chain.read_at(0, &mut kind)?;
            match u32::from_le_bytes(kind) {
                FLUSH => self.waiting.push(chain),
                _ => {
                    chain.write_at(0, &FAILED.to_le_bytes())?;
                    self.queue.push(chain, 4);
                }
            }
        }
        Ok(())
    }

    /// One system call for all that wait: what they want flushed was written before they were sent. The thread waits
    /// for the disk with nothing else to do.
    fn flush(&mut self) -> Result<(), GuestFault> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let result = self.file.sync();
        if let Err(error) = &result
            && !std::mem::replace(&mut self.failed, true)
        {
            log::error!("Cannot flush {}, its guest has been told: {error}", self.file.name());
        }
        let answer = if result.is_ok() { DONE } else { FAILED };
        for mut chain in self.waiting.drain(..) {
            chain.write_at(0, &answer.to_le_bytes())?;
            self.queue.push(chain, 4);
        }
        Ok(())
    }
}

impl Handler for PmemHandler {
    fn watch(&mut self, watch: &mut Watch<'_>) -> io::Result<()> {
        watch.add(self.file.changes(), CHANGES)?;
        watch.add(&self.queue, REQUESTS)
    }

    fn ready(&mut self, token: u32, _watch: &mut Watch<'_>) -> Result<(), GuestFault> {
        if token == CHANGES {
            self.file.changed();
            return Ok(());
        }
        self.queue.kicked();
        self.take()?;
        self.flush()?;
        self.queue.signal();
        Ok(())
    }
}

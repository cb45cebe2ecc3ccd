//! A disk as asked for, and what can be refused before any file is opened.

use std::ffi::OsStr;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use kv::Size;
use serde::{Deserialize, Serialize};
use virtio::Limit;

use crate::Transport;

/// The longest serial number, in bytes (VIRTIO 1.2, 5.2.6, `VIRTIO_BLK_T_GET_ID`).
pub(super) const SERIAL_LENGTH: usize = 20;
/// More queues than any machine of ours has processors.
const MOST_QUEUES: u16 = 64;

/// A disk: `root.img,serial=root,cache=unsafe`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct BlockSpec {
    /// The image: a file, or a block device of the host
    pub path: PathBuf,
    /// The disk's name for later changes; the file's name without its ending unless said
    pub id: Option<String>,
    /// How the guest finds it: pci, mmio or mmio-cmdline; as the machine's other devices unless said
    #[arg(value_parser = kv::from_str::<Transport>)]
    pub transport: Option<Transport>,
    /// raw or qcow2; raw unless said, but then a qcow2 image is refused
    #[arg(value_parser = kv::from_str::<Format>)]
    pub format: Option<Format>,
    /// The guest cannot write to it, and other readers may have it too
    pub readonly: bool,
    /// Past the host's page cache (`O_DIRECT`)
    pub direct: bool,
    /// What a flush of the guest's does: writeback (the data is on the host's disk) or unsafe (nothing)
    #[arg(value_parser = kv::from_str::<Cache>)]
    pub cache: Cache,
    /// How the host's system calls are made: auto, inline, io-uring or threads
    #[arg(value_parser = kv::from_str::<EngineSpec>)]
    pub engine: EngineSpec,
    /// Queues, at best one for each processor; 1 unless said
    pub queues: Option<u16>,
    /// Serial number that the guest sees, 20 bytes at most
    pub serial: Option<String>,
    /// Bytes of a logical block: 512 unless said, or 4096
    pub block_size: Option<u32>,
    /// Writes go to this qcow2 file, which is made if it is not there; the image itself is only read
    pub overlay: Option<PathBuf>,
    /// Whether the overlay stays when the VM ends, which it does unless said
    pub keep: Option<bool>,
    /// The folder that a qcow2 image's backing files may lie in; the image's own unless said
    pub backing_folder: Option<PathBuf>,
    /// Bytes a second, such as 50M; no limit unless said
    pub rate: Option<Size>,
    /// Bytes that pass at once after a pause; one second's worth unless said
    pub burst: Option<Size>,
    /// Requests a second; no limit unless said
    pub ops: Option<u64>,
    /// Requests that pass at once after a pause; one second's worth unless said
    pub ops_burst: Option<u64>,
    /// When the host's disk is full: wait (until there is room) or error (the guest gets an I/O error)
    #[arg(value_parser = kv::from_str::<OnFull>)]
    pub on_full: OnFull,
    /// The image, opened by somebody who may; then `path` is only what it is called
    #[arg(skip)]
    #[serde(skip)]
    pub opened: Option<Opened>,
}

/// An open file, which is equal to itself alone.
#[derive(Clone, Debug)]
pub struct Opened(pub Arc<File>);

impl PartialEq for Opened {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Opened {}

/// How an image is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// What becomes of data that the host's page cache holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// It is on the host's disk when the guest has flushed.
    #[default]
    Writeback,
    /// It is there when the host likes: fast, and lost with the host.
    Unsafe,
}

/// Who makes the host's system calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineSpec {
    /// What suits the image and the file system that it lies on.
    #[default]
    Auto,
    /// The I/O thread itself, one after the other: the fastest where nothing ever waits for a disk.
    Inline,
    /// The kernel, through io_uring.
    IoUring,
    /// A few threads.
    Threads,
}

/// What a write does that finds the host's disk full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFull {
    /// It waits for room.
    #[default]
    Wait,
    /// It fails.
    Error,
}

impl BlockSpec {
    /// Whether the image may have others below it.
    pub(crate) fn is_layered(&self) -> bool {
        self.format == Some(Format::Qcow2)
    }

    /// The name by which the disk is addressed while the VM runs.
    pub fn id(&self) -> String {
        let stem = || self.path.file_stem().map(OsStr::to_string_lossy).unwrap_or_default().into_owned();
        self.id.clone().unwrap_or_else(stem)
    }

    /// Bytes of a logical block.
    pub fn block_size(&self) -> u32 {
        self.block_size.unwrap_or(512)
    }

    /// How many queues the device has.
    pub fn queues(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    /// The limits on bytes and on requests, if there are any.
    pub(super) fn limits(&self) -> Option<(Option<Limit>, Option<Limit>)> {
        let limit = |rate: Option<u64>, burst: Option<u64>| {
            rate.map(|per_second| Limit { per_second, burst: burst.unwrap_or(per_second) })
        };
        let bytes = limit(self.rate.map(Size::bytes), self.burst.map(Size::bytes));
        let operations = limit(self.ops, self.ops_burst);
        (bytes.is_some() || operations.is_some()).then_some((bytes, operations))
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    ///
    /// What is wrong, and what to say instead.
    pub fn validate(&self) -> anyhow::Result<()> {
        let path = self.path.display();
        if self.path.as_os_str().is_empty() {
            bail!("A disk has no image: say --disk path=FILE");
        }
        if !matches!(self.block_size(), 512 | 4096) {
            bail!("{path}: block-size={} is not possible: it is 512 or 4096", self.block_size());
        }
        if !(1..=MOST_QUEUES).contains(&self.queues()) {
            bail!("{path}: queues={} is not possible: a disk has 1 to {MOST_QUEUES}", self.queues());
        }
        if let Some(serial) = &self.serial
            && (serial.len() > SERIAL_LENGTH || serial.chars().any(char::is_control))
        {
            bail!("{path}: serial={serial:?} is not possible: it is {SERIAL_LENGTH} bytes of printable text at most");
        }
        for (name, rate, burst) in
            [("rate", self.rate.map(Size::bytes), self.burst.map(Size::bytes)), ("ops", self.ops, self.ops_burst)]
        {
            if rate == Some(0) || burst == Some(0) {
                bail!("{path}: a limit of 0 on {name}= lets nothing through: say more, or drop it");
            }
            if rate.is_none() && burst.is_some() {
                bail!("{path}: a burst without {name}= is of no use: say {name}=, or drop it");
            }
        }
        match (&self.overlay, self.readonly) {
            (Some(overlay), true) => {
                bail!("{path}: overlay={} takes writes, which readonly refuses: drop one of them", overlay.display())
            }
            (Some(overlay), _) if *overlay == self.path => {
                bail!("{path}: the overlay is the image itself: name another")
            }
            (None, _) if self.keep.is_some() => bail!("{path}: keep= is for an overlay: say overlay=FILE, or drop it"),
            _ => {}
        }
        let qcow2 = self.format == Some(Format::Qcow2) || self.overlay.is_some();
        if qcow2 && self.engine == EngineSpec::IoUring {
            bail!("{path}: engine=io-uring is for raw images: say engine=threads, or drop it");
        }
        if qcow2 && self.direct {
            bail!("{path}: direct is for raw images: drop it");
        }
        if self.backing_folder.is_some() && self.format != Some(Format::Qcow2) {
            bail!("{path}: backing-folder= is for format=qcow2: say that, or drop it");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> BlockSpec {
        kv::from_str(text).unwrap()
    }

    #[test]
    fn the_first_word_is_the_path_and_flags_need_no_value() {
        let spec = spec("root.img,readonly,cache=unsafe,engine=io-uring,on-full=error,block-size=4096,queues=2");
        assert_eq!((spec.path.as_path(), spec.readonly, spec.direct), ("root.img".as_ref(), true, false));
        assert_eq!((spec.cache, spec.engine, spec.on_full), (Cache::Unsafe, EngineSpec::IoUring, OnFull::Error));
        assert_eq!((spec.block_size(), spec.queues(), spec.id()), (4096, 2, "root".into()));
        spec.validate().unwrap();
    }

    #[test]
    fn an_id_that_is_said_wins_over_the_files_name() {
        assert_eq!(spec("/srv/root.qcow2,id=vda,format=qcow2").id(), "vda");
        assert_eq!(spec("/srv/root.qcow2,format=qcow2").id(), "root");
    }

    #[test]
    fn a_key_that_does_not_exist_is_refused() {
        let fault = kv::from_str::<BlockSpec>("root.img,read-only").unwrap_err().to_string();
        assert!(fault.contains("read-only"), "{fault}");
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_way_out() {
        for (text, cure) in [
            ("", "path=FILE"),
            ("a,block-size=1024", "512 or 4096"),
            ("a,queues=0", "1 to 64"),
            ("a,queues=65", "1 to 64"),
            ("a,serial=123456789012345678901", "20 bytes"),
            ("a,rate=0", "rate="),
            ("a,burst=1M", "rate="),
            ("a,ops=10,ops-burst=0", "ops="),
            ("a,overlay=b,readonly", "drop one"),
            ("a,overlay=a", "name another"),
            ("a,keep=off", "overlay=FILE"),
            ("a,format=qcow2,engine=io-uring", "engine=threads"),
            ("a,overlay=b,direct", "drop it"),
            ("a,backing-folder=/srv", "format=qcow2"),
        ] {
            let fault = spec(text).validate().unwrap_err().to_string();
            assert!(fault.contains(cure), "{text}: {fault}");
        }
    }
}

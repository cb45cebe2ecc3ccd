//! The file system device (VIRTIO 1.2, section 5.11): a folder of the host's, which virtiofsd serves, a process of its
//! own that is started and watched by us.
//!
//! ```text
//! Fs ──start──▶ FsHandler ── FUSE_INIT ──▶ virtiofsd has the queues
//!  ▲                ▲                             │
//!  └──── stop ──────┴── EIO for what it had ◀─────┘ its end
//! ```
//!
//! The numbers that a guest has for its files mean something to one virtiofsd only. So one that was started has the
//! queues from the guest's next FUSE_INIT on, which is its next mount; until then every request ends in EIO.
//!
//! Left out on purpose: several request queues, which the C virtiofsd does not serve, the notification queue, and the
//! DAX window.

mod daemon;
mod handler;
mod sandbox;
mod spec;

#[cfg(test)]
mod tests;

pub use handler::FsHandler;
pub use spec::{Cache, ShareSpec};

use std::path::{Path, PathBuf};

use serde_json::Value;
use virtio::{Active, Kind, VirtQueue, VirtioDevice};

use crate::helper;
use crate::starter::{Helper, Launched, Starter};
use daemon::Daemon;
use spec::TAG_LENGTH;

const PROGRAM: &str = "virtiofsd";
/// Where distributions put it outside `PATH`.
pub const ELSEWHERE: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd"];

/// Entries of the queue for requests that must not wait for others, and of the one for all others. A request has at
/// most as many pieces, which bounds how much is read or written at once.
const QUEUE_SIZES: [u16; 2] = [128, 1024];

/// A shared folder.
pub struct Fs {
    spec: ShareSpec,
    ring_features: u64,
    /// While there is no handler that has it.
    daemon: Option<Daemon>,
}

impl Fs {
    /// Starts virtiofsd on the folder, by `starter` where there is one.
    ///
    /// # Errors
    ///
    /// The user's: what is wrong with the folder or keeps virtiofsd from serving it, and what to do about it.
    pub fn open(spec: &ShareSpec, starter: Option<&Starter>) -> anyhow::Result<Self> {
        let helper = match starter {
            Some(starter) => Helper::Starter(starter.clone(), spec.id().to_owned()),
            None => Self::helper(spec, helper::find(PROGRAM, &ELSEWHERE)),
        };
        Self::open_with(spec, helper)
    }

    /// virtiofsd, or what is in its place.
    fn helper(spec: &ShareSpec, program: Option<PathBuf>) -> Helper {
        let spec = spec.clone();
        Helper::Own(Box::new(move || Self::launch_with(&spec, program.as_deref())))
    }

    /// Starts virtiofsd.
    pub(crate) fn launch(spec: &ShareSpec) -> anyhow::Result<Launched> {
        Self::launch_with(spec, helper::find(PROGRAM, &ELSEWHERE).as_deref())
    }

    fn launch_with(spec: &ShareSpec, program: Option<&Path>) -> anyhow::Result<Launched> {
        let program = program.ok_or_else(|| {
            anyhow::anyhow!(
                "{}: there is no {PROGRAM} in PATH or {}: install it (Debian 12: `apt install qemu-system-common`), or \
                 share no folder",
                spec.id(),
                ELSEWHERE.join(", ")
            )
        })?;
        daemon::launch(program, spec)
    }

    fn open_with(spec: &ShareSpec, helper: Helper) -> anyhow::Result<Self> {
        spec.validate()?;
        let daemon = Daemon::open(spec, helper)?;
        let ring_features = daemon.features() & (virtio::features::EVENT_IDX | virtio::features::INDIRECT_DESC);
        Ok(Self { spec: spec.clone(), ring_features, daemon: Some(daemon) })
    }

    /// The name by which the device is addressed.
    pub fn id(&self) -> &str {
        self.spec.id()
    }
}

impl VirtioDevice for Fs {
    type Handler = FsHandler;

    fn kind(&self) -> Kind {
        Kind::Fs
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn ring_features(&self) -> u64 {
        self.ring_features
    }

    /// `tag` and `num_request_queues` (section 5.11.4).
    fn config(&self) -> Vec<u8> {
        let mut config = self.spec.tag.clone().into_bytes();
        config.resize(TAG_LENGTH, 0);
        config.extend(1u32.to_le_bytes());
        config
    }

    fn start(&mut self, mut active: Active) -> anyhow::Result<FsHandler> {
        let queues = [active.take(0)?, active.take(1)?];
        FsHandler::new(queues, active, &mut self.daemon)
    }

    /// The next driver begins with a virtiofsd that has no files open.
    fn stop(&mut self, handler: FsHandler) -> Vec<VirtQueue> {
        let (queues, mut daemon) = handler.stop();
        daemon.end();
        self.daemon = Some(daemon);
        queues
    }

    fn save(&self, handler: Option<&FsHandler>) -> anyhow::Result<Value> {
        anyhow::ensure!(
            handler.is_none(),
            "the files that the guest has open are virtiofsd's, which cannot save them: unmount `{}` and unbind its \
             driver first",
            self.spec.tag
        );
        Ok(Value::Null)
    }
}

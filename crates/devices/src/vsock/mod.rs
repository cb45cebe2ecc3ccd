//! The socket device (VIRTIO 1.2, section 5.10): streams between the guest and Unix sockets of the host, under the same
//! names as Firecracker's.
//!
//! ```text
//! host client ── <path>, "CONNECT 52\n" ──▶ port 52 of the guest        (answered by "OK <host's port>\n")
//! guest       ── CID 2, port 52 ──────────▶ the host's socket <path>_52
//! ```
//!
//! Everybody is an adversary here: the guest, and whoever has a socket. Left out on purpose: datagrams and SEQPACKET
//! sockets, guests that speak to each other, and the event that all connections are gone, which is for snapshots.

mod connection;
mod handler;
mod packet;
mod sys;

#[cfg(test)]
mod tests;

pub use handler::VsockHandler;

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio::{Active, Kind, VirtQueue, VirtioDevice};

use crate::{Transport, unix};

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Clients that wait to be let in.
const BACKLOG: i32 = 128;
/// What the name of a port adds to the path: `_` and ten digits.
const LONGEST_SUFFIX: usize = 11;

/// The guest's address unless said; 0 to 2 are reserved (section 5.10.4).
const DEFAULT_CID: u32 = 3;

/// Sockets between guest and host: `/run/vm1.sock,cid=3`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct VsockSpec {
    /// The Unix socket by which the host reaches the guest; the guest reaches PATH_PORT
    pub path: PathBuf,
    /// The guest's address; 3 unless said
    pub cid: Option<u32>,
    /// The device's name; vsock unless said
    pub id: Option<String>,
    /// How the guest finds it: pci, mmio or mmio-cmdline; as the machine's other devices unless said
    #[arg(value_parser = kv::from_str::<Transport>)]
    pub transport: Option<Transport>,
}

impl VsockSpec {
    /// The name by which the device is addressed while the VM runs.
    pub fn id(&self) -> &str {
        self.id.as_deref().unwrap_or("vsock")
    }

    /// The guest's address.
    pub fn cid(&self) -> u32 {
        self.cid.unwrap_or(DEFAULT_CID)
    }

    /// Checks what was asked for.
    ///
    /// # Errors
    ///
    /// What is wrong, and what to say instead.
    pub fn validate(&self) -> anyhow::Result<()> {
        let id = self.id();
        if self.path.as_os_str().is_empty() {
            bail!("{id}: sockets have no place on the host: say path=FILE");
        }
        let most = unix::LONGEST_PATH - LONGEST_SUFFIX;
        if self.path.as_os_str().len() > most {
            bail!("{id}: {} is too long for a socket: choose a path of {most} bytes or less", self.path.display());
        }
        if matches!(self.cid(), 0..DEFAULT_CID | u32::MAX) {
            bail!("{id}: cid={} is reserved: say 3 or more, below {}", self.cid(), u32::MAX);
        }
        Ok(())
    }
}

/// A socket device.
pub struct Vsock {
    spec: VsockSpec,
    listener: Arc<UnixListener>,
    /// A driver that goes on has connections that are gone.
    interrupted: bool,
}

impl Vsock {
    /// Listens at the path. Clients wait until the guest's driver is there.
    ///
    /// # Errors
    ///
    /// The spec is not possible, or the socket cannot be had.
    pub fn new(spec: &VsockSpec) -> anyhow::Result<Self> {
        spec.validate()?;
        let listener = Arc::new(unix::listen(&spec.path, BACKLOG, "the vsock device")?);
        Ok(Self { spec: spec.clone(), listener, interrupted: false })
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // At worst a dead socket is left over, and the next VM replaces it.
        let _ = fs::remove_file(&self.spec.path);
    }
}

impl VirtioDevice for Vsock {
    type Handler = VsockHandler;

    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    /// To the guest, from the guest, events (section 5.10.2).
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    /// VIRTIO_VSOCK_F_STREAM, which is also what a driver gets that accepts nothing (section 5.10.3).
    fn features(&self) -> u64 {
        1
    }

    /// `guest_cid`.
    fn config(&self) -> Vec<u8> {
        u64::from(self.spec.cid()).to_le_bytes().to_vec()
    }

    fn start(&mut self, mut active: Active) -> anyhow::Result<VsockHandler> {
        let queues = [active.take(0)?, active.take(1)?, active.take(2)?];
        let (guest, path) = (self.spec.cid().into(), self.spec.path.clone());
        let mut handler = VsockHandler::new(guest, path, queues, self.listener.clone());
        if std::mem::take(&mut self.interrupted) {
            handler.report_interruption()?;
        }
        Ok(handler)
    }

    fn stop(&mut self, handler: VsockHandler) -> Vec<VirtQueue> {
        self.interrupted = true;
        handler.stop()
    }

    fn reset(&mut self) {
        self.interrupted = false;
    }

    /// Whether there is a driver that can have connections, which end when the device stops.
    fn save(&self, handler: Option<&VsockHandler>) -> anyhow::Result<Value> {
        Ok(handler.is_some().into())
    }

    fn load(&mut self, state: Value) -> anyhow::Result<()> {
        self.interrupted = serde_json::from_value(state)?;
        Ok(())
    }
}

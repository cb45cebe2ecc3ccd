//! The console on a Unix stream socket: one client at a time, and a second one is told so and sent away.
//!
//! Whoever can connect can type at the guest's console, so the socket is made for its user only (0600).

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::sys;

/// A Unix socket to connect to; what the guest says before that waits, up to 64 KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SocketSpec {
    /// Where to make the socket; one that a dead process left there is replaced
    pub path: PathBuf,
}

/// The listening socket.
pub(super) struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    pub(super) fn open(spec: &SocketSpec) -> anyhow::Result<Self> {
        let path = &spec.path;
        remove_stale(path)?;
        let socket = sys::listen(path).with_context(|| {
            let name = path.display();
            format!("Cannot make the serial console's socket {name}: choose a short path that this user can write to")
        })?;
        Ok(Self { listener: UnixListener::from(socket), path: path.clone() })
    }

    /// The next client, if one waits.
    pub(super) fn accept(&self) -> Option<OwnedFd> {
        match self.listener.accept() {
            Ok((client, _)) => Some(client.into()),
            // WouldBlock, or a client that has left already. Out of descriptors: the client waits.
            Err(_) => None,
        }
    }

    /// Tells a client that there is one already.
    pub(super) fn refuse(client: OwnedFd) {
        let client = UnixStream::from(client);
        // It gets the line or it does not; either way it sees the end.
        let _ = sys::send(
            std::os::fd::AsFd::as_fd(&client),
            b"This serial console is busy: somebody else is connected to it\r\n",
        );
    }

    /// Its path.
    pub(super) fn describe(&self) -> String {
        format!("socket {}", self.path.display())
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // At worst a dead socket is left over, and the next VM replaces it.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes a socket that nobody listens at.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    let name = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("Cannot examine {name}: choose another path")),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("{name} exists and is no socket: remove it, or choose another path for the serial console")
        }
        Ok(_) => {}
    }
    if is_dead(path).with_context(|| format!("Cannot connect to {name} to see whether it is in use"))? {
        return fs::remove_file(path).with_context(|| format!("Cannot remove the dead socket {name}: remove it"));
    }
    bail!("{name} is in use by a running process: choose another path for the serial console")
}

fn is_dead(path: &Path) -> io::Result<bool> {
    match sys::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(true),
        // A full backlog is somebody's.
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Ok(_) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;

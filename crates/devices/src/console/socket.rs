//! The console on a Unix stream socket: one client at a time, and a second one is told so and sent away.
//!
//! Whoever can connect can type at the guest's console, so the socket is made for its user only (0600).

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::sys;
use crate::unix;

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
        let listener = unix::listen(&spec.path, 4, "the console")?;
        Ok(Self { listener, path: spec.path.clone() })
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
        let _ =
            sys::send(std::os::fd::AsFd::as_fd(&client), b"This console is busy: somebody else is connected to it\r\n");
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

#[cfg(test)]
mod tests;

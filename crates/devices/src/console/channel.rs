//! A descriptor that the console reads or writes without ever waiting for it.
//!
//! Standard input and output are shared with the shell and with other processes, so O_NONBLOCK is never set on what we
//! inherit: it would be set for all of them, and stay after our end. A terminal or a pipe is opened once more instead.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::time::Duration;

use anyhow::Context as _;
use event_manager::{EventOps, EventSet, Events};

use super::sys;

/// One direction of a console.
pub(super) struct Channel {
    file: File,
    kind: Kind,
    /// What the event loop has been asked for.
    watched: Option<EventSet>,
    warned: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A non-blocking description of our own.
    Own,
    Socket,
    /// Always ready, as regular files are.
    Ready,
    /// A blocking description that others use too. So many bytes can be written where poll promises room.
    Shared(usize),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Input,
    Output,
}

impl Channel {
    /// The best way to use a descriptor that was inherited.
    pub(super) fn inherited(fd: BorrowedFd<'_>, direction: Direction) -> anyhow::Result<Self> {
        let file = File::from(fd.try_clone_to_owned().context("Cannot duplicate a descriptor of the console")?);
        let kind = file.metadata().context("Cannot examine a descriptor of the console")?.file_type();
        if kind.is_socket() {
            return Ok(Self::new(file, Kind::Socket));
        }
        if kind.is_file() || !sys::pollable(fd).unwrap_or(true) {
            return Ok(Self::new(file, Kind::Ready));
        }
        // Through /proc this leads to the very same pipe or terminal. It fails where another user made it, where a
        // named pipe has no reader, or where /proc is not mounted.
        let again = OpenOptions::new()
            .read(direction == Direction::Input)
            .write(direction == Direction::Output)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        Ok(match again {
            Ok(file) => Self::new(file, Kind::Own),
            // A pipe with room has it for a page; a terminal, for one byte.
            Err(_) => Self::new(file, Kind::Shared(if kind.is_fifo() { 4096 } else { 1 })),
        })
    }

    /// A descriptor that is ours alone, and does not block.
    pub(super) fn own(fd: OwnedFd) -> Self {
        Self::new(File::from(fd), Kind::Own)
    }

    /// A connected socket.
    pub(super) fn socket(fd: OwnedFd) -> Self {
        Self::new(File::from(fd), Kind::Socket)
    }

    fn new(file: File, kind: Kind) -> Self {
        Self { file, kind, watched: None, warned: false }
    }

    /// Whether nobody else shares the open file, and with it a lock on it.
    pub(super) fn is_own(&self) -> bool {
        self.kind == Kind::Own
    }

    /// Whether reading never has to wait, so that the event loop takes no interest.
    pub(super) fn is_always_ready(&self) -> bool {
        self.kind == Kind::Ready
    }

    /// The open file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Reads what is there; `WouldBlock` where nothing is, and 0 at the end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.kind {
            Kind::Socket => sys::receive(self.file.as_fd(), buffer),
            Kind::Shared(_) if !sys::poll(self.file.as_fd(), libc::POLLIN, Duration::ZERO) => {
                Err(ErrorKind::WouldBlock.into())
            }
            _ => self.file.read(buffer),
        }
    }

    /// Writes what there is room for; `WouldBlock` where there is none.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.kind {
            Kind::Socket => sys::send(self.file.as_fd(), bytes),
            Kind::Shared(_) if !sys::poll(self.file.as_fd(), libc::POLLOUT, Duration::ZERO) => {
                Err(ErrorKind::WouldBlock.into())
            }
            Kind::Shared(most) => self.file.write(&bytes[..bytes.len().min(most)]),
            Kind::Own | Kind::Ready => self.file.write(bytes),
        }
    }

    /// Waits until writing makes sense, or `limit` has passed.
    pub(super) fn wait_for_room(&self, limit: Duration) {
        sys::poll(self.file.as_fd(), libc::POLLOUT, limit);
    }

    /// Tells the event loop what to wait for: `None` is nothing at all, the empty set is the far end's departure.
    pub(super) fn watch(&mut self, wanted: Option<EventSet>, token: u32, ops: &mut EventOps<'_>) {
        let wanted = wanted.filter(|_| self.kind != Kind::Ready);
        if wanted == self.watched {
            return;
        }
        let events = |set| Events::with_data(&self.file, token, set);
        let done = match (self.watched, wanted) {
            (None, Some(set)) => ops.add(events(set)),
            (Some(_), Some(set)) => ops.modify(events(set)),
            (Some(set), None) => ops.remove(events(set)),
            (None, None) => Ok(()),
        };
        match done {
            Ok(()) => self.watched = wanted,
            // The guest decides how often this runs.
            Err(error) if !std::mem::replace(&mut self.warned, true) => {
                log::error!("Cannot watch the console: {error}");
            }
            Err(_) => {}
        }
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;

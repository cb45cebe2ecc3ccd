//! The host's end of a pair of queues, whichever it is.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, BorrowedFd};

use virtio::Chain;

use super::HEADER;
use super::guard::{Guard, LOOKED_AT};
use super::passt::Passt;
use super::sys::{self, Pieces, Read};

/// The host's end of a pair of queues.
pub(super) enum Port {
    Tap(File),
    Passt(Box<Passt>),
}

impl Port {
    /// Makes the port of the pair `index` ready for a guest that has accepted `features`.
    pub(super) fn prepare(&mut self, index: usize, features: u64) -> anyhow::Result<()> {
        match self {
            Self::Tap(tap) => super::tap::prepare(tap, index, features),
            Self::Passt(passt) => {
                passt.forget();
                Ok(())
            }
        }
    }

    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tap(tap) => Some(tap.as_fd()),
            Self::Passt(passt) => passt.descriptor(),
        }
    }

    /// Whether the port has something to send of its own.
    pub(super) fn has_more(&self) -> bool {
        matches!(self, Self::Passt(passt) if passt.has_more())
    }

    /// Whether the port has something to give that its descriptor does not show.
    pub(super) fn holds_frame(&self) -> bool {
        matches!(self, Self::Passt(passt) if passt.holds_frame())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tap(_) => Ok(()),
            Self::Passt(passt) => passt.flush(),
        }
    }

    pub(super) fn receive(
        &mut self,
        pieces: &mut Pieces,
        stock: &mut VecDeque<Chain>,
        rest: &mut [u8],
    ) -> io::Result<Read> {
        match self {
            Self::Tap(tap) => pieces.read(tap.as_fd(), stock.iter(), rest),
            Self::Passt(passt) => passt.receive(stock, rest),
        }
    }

    /// Sends the frame in `chain`, with `start` in the place of its beginning.
    pub(super) fn send(&mut self, pieces: &mut Pieces, start: &[u8], chain: &mut Chain) -> io::Result<()> {
        match self {
            Self::Tap(tap) if start.is_empty() => sys::write(tap.as_fd(), chain.readable()).map(drop),
            Self::Tap(tap) => {
                let rest = chain.readable_range(start.len()..chain.readable_len()).map_err(io::Error::other)?;
                pieces.write(tap.as_fd(), start, rest).map(drop)
            }
            Self::Passt(passt) => passt.send(pieces, start, chain),
        }
    }

    /// Whether an error means the end of the port, and not of one frame.
    pub(super) fn ends_with(&self, error: &io::Error) -> bool {
        match self {
            Self::Tap(tap) => match error.raw_os_error() {
                Some(libc::EBADFD | libc::ENODEV) => true,
                // What a deleted tap says to who reads, and any tap of memory that is not there.
                Some(libc::EFAULT) => sys::hung_up(tap.as_fd()),
                _ => false,
            },
            Self::Passt(_) => !matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::InvalidInput),
        }
    }
}

/// Sends one frame. What the guard has looked at is what is sent.
pub(super) fn send(port: &mut Port, pieces: &mut Pieces, guard: Option<&Guard>, chain: &mut Chain) -> io::Result<()> {
    let Some(guard) = guard else { return port.send(pieces, &[], chain) };
    let mut start = [0; HEADER + LOOKED_AT];
    let length = chain.readable_len().min(start.len());
    let start = &mut start[..length];
    chain.read_at(0, start).map_err(io::Error::other)?;
    if guard.passes(start) { port.send(pieces, start, chain) } else { Err(ErrorKind::PermissionDenied.into()) }
}

/// Copies `bytes` into the chains, from `offset` of their room on, as far as that goes.
pub(super) fn scatter(chains: &mut VecDeque<Chain>, mut offset: usize, mut bytes: &[u8]) {
    for chain in chains {
        let room = chain.writable_len();
        let now = room.saturating_sub(offset).min(bytes.len());
        if now > 0 {
            // It cannot fail: there is as much room.
            let _ = chain.write_at(offset, &bytes[..now]);
            bytes = &bytes[now..];
        }
        offset = offset.saturating_sub(room);
    }
}

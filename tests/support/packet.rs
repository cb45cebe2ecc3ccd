//! A peer on a wire that sends what it likes: packet(7), frames with the header of virtio-net in front.
#![allow(unsafe_code, reason = "packet sockets have no safe wrapper")]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A header without offloads (VIRTIO 1.2, section 5.1.6), less the count of buffers, which packet sockets leave out.
pub(crate) const HEADER: usize = 10;

/// A socket on one of the host's interfaces.
pub(crate) struct Packets(OwnedFd);

impl Packets {
    /// Every frame is sent out of `interface`.
    pub(crate) fn on(interface: &str) -> io::Result<Self> {
        let index = fs::read_to_string(format!("/sys/class/net/{interface}/ifindex"))?;
        let index = index.trim().parse().map_err(io::Error::other)?;
        // SAFETY: numbers only.
        let socket = check(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) })?;
        // SAFETY: the descriptor has just been made, and is nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let on: libc::c_int = 1;
        let length = libc::socklen_t::try_from(size_of_val(&on)).map_err(io::Error::other)?;
        // SAFETY: the value is alive, and its length is right.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_VNET_HDR,
                (&raw const on).cast(),
                length,
            )
        })?;
        // SAFETY: all of its fields may be zero.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
        address.sll_ifindex = index;
        let length = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
        // SAFETY: the address is alive, and its length is right.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
        Ok(Self(socket))
    }

    /// Sends a header and a frame, if the host's kernel lets it. Returns whether it did.
    pub(crate) fn send(&self, header_and_frame: &[u8]) -> bool {
        // SAFETY: the bytes are alive, and as many as said.
        let sent =
            unsafe { libc::send(self.0.as_raw_fd(), header_and_frame.as_ptr().cast(), header_and_frame.len(), 0) };
        sent >= 0
    }
}

fn check(returned: libc::c_int) -> io::Result<libc::c_int> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}

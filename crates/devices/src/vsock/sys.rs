//! Between a Unix socket and guest memory, without a copy and without waiting.
#![allow(unsafe_code, reason = "std reads and writes slices, and guest memory is none")]

use std::io;
use std::mem::zeroed;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;

use virtio::IoVec;

/// The most pieces in one call (`UIO_MAXIOV`); the rest is for the next one.
const MOST_PIECES: usize = 1024;

/// Writes guest memory to the socket, as much as there is room for. The pieces belong to a chain that still exists.
pub(super) fn send(socket: &UnixStream, pieces: &[IoVec]) -> io::Result<usize> {
    let message = message(pieces);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the message lives across the call, and its pieces are guest memory, which is mapped for as long as their
    // chain exists; the kernel only reads there.
    count(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })
}

/// Reads from the socket into guest memory, as much as is there. The pieces belong to a chain that still exists.
pub(super) fn receive(socket: &UnixStream, pieces: &[IoVec]) -> io::Result<usize> {
    let mut message = message(pieces);
    // SAFETY: as in `send`; the kernel writes to guest memory, which is in no Rust object.
    count(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
}

/// Writes bytes of ours to the socket, as many as there is room for.
pub(super) fn send_bytes(socket: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the pointer and the length are one slice's.
    count(unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) })
}

/// Reads what is there into `bytes` and leaves it in the socket.
pub(super) fn peek(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
    // SAFETY: the pointer and the length are one slice's.
    count(unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), flags) })
}

/// Whether nobody has the socket's other end any more, or will use it in either direction.
pub(super) fn has_hung_up(socket: &UnixStream) -> bool {
    let mut request = libc::pollfd { fd: socket.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one pollfd, which lives across the call, which does not wait.
    unsafe { libc::poll(&raw mut request, 1, 0) };
    request.revents & libc::POLLHUP != 0
}

fn message(pieces: &[IoVec]) -> libc::msghdr {
    // SAFETY: a msghdr is numbers and pointers, for which zero is a value: no address, no control data.
    let mut message: libc::msghdr = unsafe { zeroed() };
    // An IoVec is laid out as an iovec, and sendmsg does not write to the list.
    message.msg_iov = pieces.as_ptr().cast_mut().cast();
    message.msg_iovlen = pieces.len().min(MOST_PIECES);
    message
}

fn count(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

//! The few system calls that network cards need and std does not offer.
#![allow(unsafe_code, reason = "system calls by libc; each is one call with its arguments checked by the types here")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use virtio::{Chain, IoVec};

/// The most pieces of memory in one system call (`UIO_MAXIOV`).
const MOST_PIECES: usize = 1024;

/// `linux/sockios.h`.
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// A list of pieces of memory that is made anew for each system call, in the same place.
#[derive(Default)]
pub(super) struct Pieces(Vec<libc::iovec>);

// SAFETY: the addresses are dead from the end of each call on that fills the list; only its room is kept.
unsafe impl Send for Pieces {}

impl Pieces {
    pub(super) fn new() -> Self {
        Self(Vec::with_capacity(MOST_PIECES))
    }

    fn push(&mut self, address: *mut u8, length: usize) {
        self.0.push(libc::iovec { iov_base: address.cast(), iov_len: length });
    }

    fn guest(&mut self, list: &[IoVec]) {
        for piece in list {
            self.push(piece.address(), piece.len());
        }
    }

    /// One read into the writable parts of `chains`, then into `rest`. Returns the bytes that were read. Chains beyond
    /// what one system call can take stay unused.
    pub(super) fn read<'a>(
        &mut self,
        fd: BorrowedFd<'_>,
        chains: impl Iterator<Item = &'a Chain>,
        rest: &mut [u8],
    ) -> io::Result<Read> {
        self.0.clear();
        let mut room = 0;
        for chain in chains {
            if self.0.len() + chain.writable().len() >= MOST_PIECES {
                break;
            }
            self.guest(chain.writable());
            room += chain.writable_len();
        }
        self.push(rest.as_mut_ptr(), rest.len());
        // SAFETY: the list is of guest memory, which is mapped for as long as the chains are borrowed, and of `rest`.
        let length = count(unsafe { libc::readv(fd.as_raw_fd(), self.0.as_ptr(), length(&self.0)) })?;
        Ok(Read { length, room })
    }

    /// One write of `head` and then of `body`. Returns the bytes that were written. A socket whose other end has gone is
    /// an error and no signal: Rust programs ignore that.
    pub(super) fn write(&mut self, fd: BorrowedFd<'_>, head: &[u8], body: &[IoVec]) -> io::Result<usize> {
        self.0.clear();
        if !head.is_empty() {
            self.push(head.as_ptr().cast_mut(), head.len());
        }
        self.guest(body);
        // SAFETY: the list is of `head`, which is only read, and of guest memory, whose chain the caller holds.
        count(unsafe { libc::writev(fd.as_raw_fd(), self.0.as_ptr(), length(&self.0)) })
    }
}

/// What [`Pieces::read`] has read.
pub(super) struct Read {
    /// All bytes.
    pub(super) length: usize,
    /// How many there was room for in the chains; what is beyond them is in the rest.
    pub(super) room: usize,
}

/// One write of guest memory.
pub(super) fn write(fd: BorrowedFd<'_>, list: &[IoVec]) -> io::Result<usize> {
    let length = libc::c_int::try_from(list.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: an `IoVec` is laid out as an iovec, of guest memory that is mapped for as long as the list is borrowed.
    count(unsafe { libc::writev(fd.as_raw_fd(), list.as_ptr().cast(), length) })
}

/// Whether the other end of a descriptor has gone.
pub(super) fn hung_up(fd: BorrowedFd<'_>) -> bool {
    let mut request = libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one pollfd, which lives across the call; it does not wait.
    let found = unsafe { libc::poll(&raw mut request, 1, 0) };
    found > 0 && request.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

fn length(pieces: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX)
}

fn count(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An `ifreq` with nothing but the name of an interface.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an ifreq is plain numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    // The last byte stays the zero that ends it.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

/// Calls with a pointer to an `ifreq`, as every call here on interfaces and most on taps do.
fn call(fd: BorrowedFd<'_>, ioctl: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: `request` lives across the call, and an ifreq is what every `ioctl` given here takes.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), ioctl, &raw mut *request) }).map(drop)
}

/// Makes `fd` a queue of the tap `name`, which is made if it is not there (`TUNSETIFF`).
pub(super) fn attach_tap(fd: BorrowedFd<'_>, name: &str, several: bool) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = tap_flags() | if several { flags(libc::IFF_MULTI_QUEUE) } else { 0 };
    call(fd, libc::TUNSETIFF, &mut request)
}

/// The name of the tap that `fd` is a queue of, if that is one whose frames begin with a virtio header.
pub(super) fn tap_name(fd: BorrowedFd<'_>) -> io::Result<Option<String>> {
    let mut request = request("")?;
    call(fd, libc::TUNGETIFF, &mut request)?;
    // SAFETY: the call has set the flags.
    let found = unsafe { request.ifr_ifru.ifru_flags };
    let name = request.ifr_name.iter().map(|c| c.cast_unsigned()).take_while(|c| *c != 0).collect();
    Ok(String::from_utf8(name).ok().filter(|_| found & tap_flags() == tap_flags()))
}

/// Has frames go through this queue of its tap, or no more.
pub(super) fn enable_queue(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let mut request = request("")?;
    request.ifr_ifru.ifru_flags = flags(if on { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE });
    call(fd, libc::TUNSETQUEUE, &mut request)
}

fn tap_flags() -> libc::c_short {
    flags(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
}

fn flags(flags: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(flags).expect("flags of an interface have 15 bits here")
}

/// How long the header of each frame is.
pub(super) fn set_header_length(fd: BorrowedFd<'_>, length: usize) -> io::Result<()> {
    let length = libc::c_int::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `length` lives across the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) }).map(drop)
}

/// What the tap may leave to the reader of its frames.
pub(super) fn set_offloads(fd: BorrowedFd<'_>, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) }).map(drop)
}

/// Any socket: the way to ask for the interfaces of this network namespace.
fn any_socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A call on the interface `name`, prepared and looked at by the two functions.
fn ask<T>(
    name: &str,
    ioctl: libc::Ioctl,
    prepare: impl FnOnce(&mut libc::ifreq),
    answer: impl FnOnce(&libc::ifreq) -> T,
) -> io::Result<T> {
    use std::os::fd::AsFd as _;
    let (socket, mut request) = (any_socket()?, request(name)?);
    prepare(&mut request);
    call(socket.as_fd(), ioctl, &mut request)?;
    Ok(answer(&request))
}

/// The number of an interface, if there is one with this name.
pub(super) fn index(name: &str) -> Option<libc::c_int> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name is a C string that lives across the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    libc::c_int::try_from(index).ok().filter(|index| *index != 0)
}

/// The largest packet that an interface takes.
pub(super) fn mtu(name: &str) -> io::Result<u16> {
    // SAFETY: the call has set the number.
    let mtu = ask(name, libc::SIOCGIFMTU, |_| (), |request| unsafe { request.ifr_ifru.ifru_mtu })?;
    Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
}

pub(super) fn set_mtu(name: &str, mtu: u16) -> io::Result<()> {
    ask(name, libc::SIOCSIFMTU, |request| request.ifr_ifru.ifru_mtu = mtu.into(), |_| ())
}

/// Whether an interface is set up.
pub(super) fn is_up(name: &str) -> io::Result<bool> {
    Ok(interface_flags(name)? & flags(libc::IFF_UP) != 0)
}

pub(super) fn set_up(name: &str) -> io::Result<()> {
    let flags = interface_flags(name)? | flags(libc::IFF_UP);
    ask(name, libc::SIOCSIFFLAGS, |request| request.ifr_ifru.ifru_flags = flags, |_| ())
}

fn interface_flags(name: &str) -> io::Result<libc::c_short> {
    // SAFETY: the call has set the flags.
    ask(name, libc::SIOCGIFFLAGS, |_| (), |request| unsafe { request.ifr_ifru.ifru_flags })
}

/// Makes the interface with this number a port of a bridge.
pub(super) fn join_bridge(bridge: &str, port: libc::c_int) -> io::Result<()> {
    ask(bridge, SIOCBRADDIF, |request| request.ifr_ifru.ifru_ifindex = port, |_| ())
}

/// Another descriptor for one that was inherited, which never waits and goes to no child. The inherited one stays open,
/// but goes to no child either.
pub(super) fn adopt(fd: RawFd) -> io::Result<File> {
    // SAFETY: no memory is passed; a number that is no descriptor is an error.
    let new = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the descriptor was just made and nobody else has it.
    let file = unsafe { File::from_raw_fd(new) };
    // SAFETY: no memory is passed.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: no memory is passed.
    let flags = check(unsafe { libc::fcntl(new, libc::F_GETFL) })?;
    // SAFETY: no memory is passed.
    check(unsafe { libc::fcntl(new, libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
    Ok(file)
}

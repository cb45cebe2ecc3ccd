//! Unix stream sockets that only their user can connect to (0600), made in place of what a dead process left behind.
#![allow(unsafe_code, reason = "std cannot give a socket its mode before it has a name, nor connect without waiting")]

use std::fs;
use std::io::{self, ErrorKind};
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context as _, bail};

/// The longest path that a socket can have, in bytes.
pub const LONGEST_PATH: usize = 107;

/// Listens at `path` for what `purpose` names, without blocking; so many clients may wait to be let in.
///
/// # Errors
///
/// Somebody listens there, something else is there, or the place is not one for a socket.
pub fn listen(path: &Path, backlog: libc::c_int, purpose: &str) -> anyhow::Result<UnixListener> {
    remove_stale(path, purpose)?;
    let socket = bind(path, backlog).with_context(|| {
        let name = path.display();
        format!("Cannot make {purpose}'s socket {name}: choose a short path that this user can write to")
    })?;
    Ok(UnixListener::from(socket))
}

/// Connects to the socket at `path`, without blocking now or later; `WouldBlock` where too many others wait to be let in.
///
/// # Errors
///
/// Nobody listens there.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = stream_socket()?;
    let address = address(path)?;
    // SAFETY: the address lives across the call, and the length is its own.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LENGTH) })?;
    Ok(UnixStream::from(socket))
}

/// Removes a socket that nobody listens at.
fn remove_stale(path: &Path, purpose: &str) -> anyhow::Result<()> {
    let name = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("Cannot examine {name}: choose another path")),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("{name} exists and is no socket: remove it, or choose another path for {purpose}")
        }
        Ok(_) => {}
    }
    if is_dead(path).with_context(|| format!("Cannot connect to {name} to see whether it is in use"))? {
        return fs::remove_file(path).with_context(|| format!("Cannot remove the dead socket {name}: remove it"));
    }
    bail!("{name} is in use by a running process: choose another path for {purpose}")
}

fn is_dead(path: &Path) -> io::Result<bool> {
    match connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(true),
        // A full backlog is somebody's.
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Ok(_) => Ok(false),
        Err(error) => Err(error),
    }
}

fn bind(path: &Path, backlog: libc::c_int) -> io::Result<OwnedFd> {
    let socket = stream_socket()?;
    // SAFETY: no memory is passed. Linux gives the mode of the unbound socket to the file that bind makes.
    check(unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) })?;
    let address = address(path)?;
    // SAFETY: the address lives across the call, and the length is its own.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LENGTH) })?;
    // SAFETY: no memory is passed.
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog) })?;
    Ok(socket)
}

#[allow(clippy::cast_possible_truncation, reason = "110 bytes, and constants cannot be converted otherwise")]
const ADDRESS_LENGTH: libc::socklen_t = size_of::<libc::sockaddr_un>() as libc::socklen_t;
#[allow(clippy::cast_possible_truncation, reason = "the family is 1, and constants cannot be converted otherwise")]
const FAMILY: libc::sa_family_t = libc::AF_UNIX as libc::sa_family_t;

fn address(path: &Path) -> io::Result<libc::sockaddr_un> {
    let mut address = libc::sockaddr_un { sun_family: FAMILY, sun_path: [0; LONGEST_PATH + 1] };
    let path = path.as_os_str().as_bytes();
    // An empty path would mean an address without a file.
    if path.is_empty() || path.len() > LONGEST_PATH || path.contains(&0) {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = from.cast_signed();
    }
    Ok(address)
}

fn stream_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is passed.
    let socket = check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

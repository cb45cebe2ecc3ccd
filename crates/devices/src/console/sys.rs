//! The few system calls that the console needs and std does not offer, each made safe on its own.
#![allow(unsafe_code, reason = "system calls by libc; each is one call with its arguments checked by the types here")]

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Waits until `fd` is ready for `events` (libc's POLL flags), or is beyond hope, or `limit` has passed. A signal may
/// end the wait early. Returns whether something is the matter.
pub(super) fn poll(fd: BorrowedFd<'_>, events: libc::c_short, limit: Duration) -> bool {
    let mut request = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    let limit = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one pollfd, which lives across the call.
    let ready = unsafe { libc::poll(&raw mut request, 1, limit) };
    ready > 0
}

/// Reads from a socket without waiting.
pub(super) fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are one slice's.
    let n = unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
    count(n)
}

/// Writes to a socket without waiting, and without a SIGPIPE.
pub(super) fn send(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the pointer and the length are one slice's.
    let n = unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    count(n)
}

/// A terminal's modes.
pub(super) fn modes(fd: BorrowedFd<'_>) -> io::Result<libc::termios> {
    // SAFETY: a termios is plain numbers, for which zero is a value.
    let mut modes = unsafe { zeroed() };
    // SAFETY: `modes` lives across the call.
    check(unsafe { libc::tcgetattr(fd.as_raw_fd(), &raw mut modes) })?;
    Ok(modes)
}

/// Sets a terminal's modes at once, whatever output still waits in it.
pub(super) fn set_modes(fd: BorrowedFd<'_>, modes: &libc::termios) -> io::Result<()> {
    // SAFETY: `modes` lives across the call.
    check(unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, modes) })?;
    Ok(())
}

/// A terminal's columns and rows; a serial line, for example, does not know them.
pub(super) fn window_size(fd: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Whether this process may use the terminal: it is in the foreground, or the terminal does not control it at all.
pub(super) fn in_foreground(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: no memory is passed.
    let foreground = unsafe { libc::tcgetpgrp(fd.as_raw_fd()) };
    // SAFETY: no memory is passed.
    foreground == -1 || foreground == unsafe { libc::getpgrp() }
}

/// Has the process go on where `signal` would stop or kill it; the call that caused it fails instead.
pub(super) fn ignore_signal(signal: libc::c_int) {
    // SAFETY: no handler is installed. An error is not possible for the signals that can be ignored.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Stops this process until somebody sends SIGCONT, which is the time for [`Console::resume`](super::Console::resume).
pub fn stop_this_process() {
    // SAFETY: no memory is passed; the signal cannot be handled or ignored, and returns when the process goes on.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// Makes a pair of pseudo-terminals: the controlling end, which never blocks, and the number of the other.
pub(super) fn open_pty() -> io::Result<(OwnedFd, u32)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: no memory is passed.
    let master = check(unsafe { libc::posix_openpt(flags) })?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    let master = unsafe { OwnedFd::from_raw_fd(master) };
    // SAFETY: no memory is passed.
    check(unsafe { libc::grantpt(master.as_raw_fd()) })?;
    // SAFETY: no memory is passed.
    check(unsafe { libc::unlockpt(master.as_raw_fd()) })?;
    let mut number: libc::c_uint = 0;
    // SAFETY: TIOCGPTN writes one unsigned int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) })?;
    Ok((master, number))
}

/// Opens the other end of a pty, without a path that could lead elsewhere.
pub(super) fn open_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes flags by value.
    let peer = check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(peer) })
}

/// How many bytes can be read from a terminal now.
pub(super) fn unread(fd: BorrowedFd<'_>) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    usize::try_from(count).unwrap_or(0)
}

/// Whether epoll takes `fd`: regular files and /dev/null, for example, it refuses, as they are always ready.
pub(super) fn pollable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
    match Epoll::new()?.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(false),
        Err(error) => Err(error),
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn count(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

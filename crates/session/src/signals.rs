//! Signals as events, by signalfd(2).
#![allow(unsafe_code, reason = "signalfd has no safe form")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::ptr;

/// The signals that are always taken.
const HANDLED: [i32; 6] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGTSTP, libc::SIGCONT, libc::SIGWINCH];

/// Those that a command can make something of, and that end a machine without one.
pub const PASSED_ON: [i32; 3] = [libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// Signals that arrive. Two of one kind may count as one.
pub struct Signals(File);

impl Signals {
    /// Takes the signals, and `others`, away from their default actions, for this thread and all that it starts.
    pub fn block(others: &[i32]) -> io::Result<Self> {
        // SAFETY: a signal set is plain bits; sigemptyset gives it its first value.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is valid for the call.
        unsafe { libc::sigemptyset(&raw mut set) };
        for signal in HANDLED.iter().chain(others) {
            // SAFETY: the set is valid for the call, and the signal exists.
            unsafe { libc::sigaddset(&raw mut set, *signal) };
        }
        // SAFETY: the set is valid for the call, and nobody asks for the old one.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) } {
            0 => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
        // SAFETY: the set is valid for the call, and -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is fresh and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self(file))
    }

    /// The signals that have arrived since the last call, oldest first. Does not wait.
    pub fn receive(&self) -> Vec<i32> {
        // `struct signalfd_siginfo`, whose first word is the signal's number.
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        let mut arrived = Vec::new();
        while (&self.0).read_exact(&mut info).is_ok() {
            arrived.push(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]));
        }
        arrived
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

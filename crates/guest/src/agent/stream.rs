//! A connection: any stream socket. It blocks, but for the calls here.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, Shutdown};

/// Takes what has come without waiting for more; `None` where nothing has.
pub(crate) fn receive(stream: &File, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    not_yet(rustix::net::recv(stream, buffer, RecvFlags::DONTWAIT).map(|(count, _)| count))
}

/// Sends what there is room for; `None` where there is none.
pub(crate) fn send(stream: &File, bytes: &[u8]) -> io::Result<Option<usize>> {
    not_yet(rustix::net::send(stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL))
}

/// Turns "try again" into `None`.
pub(crate) fn not_yet<T>(result: rustix::io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Waits for something of one descriptor, for at most so long. Returns whether it is there.
pub(crate) fn wait_for(fd: impl AsFd, what: PollFlags, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut list = [PollFd::new(&fd, what)];
        match poll(&mut list, Some(&timespec(left))) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// A time for poll.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

/// Says that no more will be sent, and reads on to the peer's end, for at most so long: closing with unread bytes would
/// take from the peer what was sent to it last.
pub(crate) fn finish(mut stream: &File, limit: Duration) {
    let _ = rustix::net::shutdown(stream, Shutdown::Write);
    let end = Instant::now() + limit;
    let mut buffer = [0; 4096];
    while wait_for(stream, PollFlags::IN, end.saturating_duration_since(Instant::now())) {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

//! What all processes have in common that devices start or connect to: where a program is, when one that has gone is
//! tried again, and what it had to say.

use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

/// How long after its end something is tried again: twice this at first, and twice as long after each end that comes
/// early.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// The most characters of a program's words that the log takes.
const LONGEST_LINE: usize = 300;

/// Says when something that has gone is tried again. Watch it as a descriptor.
pub(crate) struct Backoff {
    timer: TimerFd,
    pause: Duration,
    waiting: bool,
}

impl Backoff {
    /// # Errors
    ///
    /// The host has no room for a timer.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { timer: TimerFd::new()?, pause: PAUSE, waiting: false })
    }

    /// It has gone, after so long a life: sets the timer.
    pub(crate) fn schedule(&mut self, lived: Duration) {
        self.pause = if lived > LONGEST_PAUSE { PAUSE } else { (self.pause * 2).min(LONGEST_PAUSE) };
        self.set(self.pause);
    }

    /// Sets the timer to now, unless it runs.
    pub(crate) fn hurry(&mut self) {
        if !self.waiting {
            self.set(Duration::from_nanos(1));
        }
    }

    fn set(&mut self, pause: Duration) {
        self.waiting = self.timer.reset(pause, None).is_ok();
        if !self.waiting {
            log::error!("Without a timer what has gone is not tried again");
        }
    }

    /// To call when the descriptor is ready. Whether the time has come.
    pub(crate) fn due(&mut self) -> bool {
        // While the timer runs, reading it would block.
        if !self.waiting || self.timer.is_armed().unwrap_or(false) {
            return false;
        }
        let _ = self.timer.wait();
        self.waiting = false;
        true
    }
}

impl AsRawFd for Backoff {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

/// What a program says on its standard error. It never waits for us to listen.
pub(crate) struct Words(pub(crate) UnixStream);

impl Words {
    /// Ours, and the program's end.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        Ok((Self(ours), theirs.into()))
    }

    /// The last line of what it said, as a part of a sentence. Of one that said more than a socket holds it is the last
    /// that there was room for.
    pub(crate) fn last(&self) -> String {
        let mut said = Vec::new();
        // More than a socket holds is not there; the error is that the program, or a child of it, can say more.
        let _ = (&self.0).take(1 << 20).read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said);
        let line = said.lines().rev().find(|line| !line.trim().is_empty());
        let line = line.map(|line| line.trim().chars().take(LONGEST_LINE).collect::<String>());
        line.map_or_else(String::new, |line| format!(": {}", line.replace(char::is_control, " ")))
    }
}

/// Ends a child, and says how it has ended. One that ended by itself is only waited for; either way this is short.
pub(crate) fn end(child: &mut Child) -> String {
    let _ = child.kill();
    child.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// Where a program is: in `PATH` as a shell would find it, then in the folders that distributions hide it in.
pub(crate) fn find(name: &str, elsewhere: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).filter(|folder| folder.is_absolute()).map(|folder| folder.join(name));
    in_path.chain(elsewhere.iter().map(PathBuf::from)).find(|program| {
        program.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    })
}

//! The end of the machine.

use std::time::Duration;

use rustix::system::{RebootCommand, reboot};

use super::reaper::Reaper;
use super::{log, mounts, sys};

/// How long processes may take to be gone after SIGKILL: those that wait for a device may never be.
const LAST: Duration = Duration::from_secs(2);

/// Ends all processes, in `grace` by themselves. Only for PID 1.
pub(crate) fn end_processes(reaper: &Reaper, grace: Duration) {
    reaper.close();
    sys::signal_all(libc::SIGTERM);
    // One that is stopped would not hear of it.
    sys::signal_all(libc::SIGCONT);
    if !reaper.wait_until_childless(grace) {
        sys::signal_all(libc::SIGKILL);
        reaper.wait_until_childless(LAST);
    }
}

/// Powers off, with all file systems in order. Only for PID 1, which must not end in any other way.
pub(crate) fn off() -> ! {
    rustix::fs::sync();
    mounts::unmount_all();
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        log(&format!("Cannot power off: {error}"));
    }
    loop {
        std::thread::park();
    }
}

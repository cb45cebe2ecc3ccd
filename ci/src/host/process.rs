//! The processes behind the emulated host, and the signals that end it.
#![allow(unsafe_code, reason = "file descriptors are handed to children between fork and exec; signals are waited for")]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use anyhow::{Context, Result, anyhow};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, set_parent_process_death_signal};
use vmm_sys_util::signal::{block_signal, create_sigset, unblock_signal};

/// The signals that end the emulated host, and the one that tells of a new window size.
const SIGNALS: [i32; 5] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGWINCH];

/// A process that is killed when this value is dropped, and when we are.
pub(super) struct Helper(Child);

impl Helper {
    /// Starts `command` with `inherited` open in it, under the same numbers. Signals from our terminal pass it by.
    pub(super) fn start(command: &mut Command, inherited: Vec<OwnedFd>) -> Result<Self> {
        let numbers: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
        let prepare = move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            for number in &numbers {
                // SAFETY: `inherited` lives until the process has been started, so the number names an open file.
                fcntl_setfd(unsafe { BorrowedFd::borrow_raw(*number) }, FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec the closure only makes system calls: it allocates nothing and takes no lock.
        unsafe { command.pre_exec(prepare) };
        let program = command.get_program().display().to_string();
        let child = command
            .process_group(0)
            .spawn()
            .with_context(|| format!("Cannot run {program}: run `cargo xtask setup`"))?;
        drop(inherited);
        Ok(Self(child))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It fails only for a process that has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// While it lives, the signals that would end us are handed to a function instead.
pub(super) struct Signals(());

impl Signals {
    /// Has `handle` called for each signal, on another thread.
    pub(super) fn catch(mut handle: impl FnMut(i32) -> bool + Send + 'static) -> Result<Self> {
        for signal in SIGNALS {
            block_signal(signal).map_err(|error| anyhow!("Cannot block a signal: {error}"))?;
        }
        let set = create_sigset(&SIGNALS).map_err(|error| anyhow!("Cannot name signals: {error}"))?;
        std::thread::spawn(move || {
            loop {
                let mut signal = 0;
                // SAFETY: both pointers are to live values of the right types.
                let result = unsafe { libc::sigwait(&raw const set, &raw mut signal) };
                if result != 0 || !handle(signal) {
                    return;
                }
            }
        });
        Ok(Self(()))
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for signal in SIGNALS {
            let _ = unblock_signal(signal);
        }
    }
}

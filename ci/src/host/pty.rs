//! A pseudo-terminal: the terminal that a command in the emulated host sees when the caller has one.
#![allow(unsafe_code, reason = "a process becomes a session leader between fork and exec")]

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// A new pseudo-terminal of this size: the end for us and the end for the command.
pub(super) fn open(rows: u16, columns: u16) -> Result<(File, File)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .context("Cannot open a pseudo-terminal")?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(ptsname(&master, Vec::new())?, flags, Mode::empty())?;
    let master = File::from(master);
    resize(&master, rows, columns)?;
    Ok((master, File::from(slave)))
}

/// Tells the terminal its new size; who uses it gets SIGWINCH.
pub(super) fn resize(master: &File, rows: u16, columns: u16) -> Result<()> {
    Ok(tcsetwinsize(master, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?)
}

/// Makes the command's standard input, which must be a terminal, its controlling terminal, so that Ctrl-C reaches it.
pub(super) fn make_controlling(command: &mut Command) {
    let become_leader = || {
        setsid()?;
        // SAFETY: the standard library has made the command's standard input file descriptor 0 by now.
        let stdin = unsafe { BorrowedFd::borrow_raw(0) };
        ioctl_tiocsctty(stdin)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes two system calls: it allocates nothing and takes no lock.
    unsafe { command.pre_exec(become_leader) };
}

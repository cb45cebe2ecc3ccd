//! A terminal, with the test at its keyboard.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, Termios, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

use super::PATIENCE;
use super::stream::Stream;

/// A pseudo-terminal.
pub(crate) struct Pty {
    keyboard: File,
    terminal: OwnedFd,
    /// What is shown.
    pub(crate) screen: Stream,
}

impl Pty {
    pub(crate) fn open() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a pty can be had");
        grantpt(&master).expect("it is ours");
        unlockpt(&master).expect("it is ours");
        let name = ptsname(&master, Vec::new()).expect("it has a name");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = rustix::fs::open(name, flags, Mode::empty()).expect("its far end opens");
        let keyboard = File::from(master);
        let screen = Stream::read(keyboard.try_clone().expect("a descriptor can be duplicated"));
        Self { keyboard, terminal, screen }
    }

    /// The terminal as a process's stream.
    pub(crate) fn stdio(&self) -> Stdio {
        self.terminal.try_clone().expect("a descriptor can be duplicated").into()
    }

    /// Types.
    pub(crate) fn send(&mut self, keys: impl AsRef<[u8]>) {
        self.keyboard.write_all(keys.as_ref()).expect("a terminal takes keys");
    }

    /// Makes its window another size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.terminal, size).expect("a terminal has a size");
    }

    /// Whether every key goes to the program at once, Ctrl-C too.
    pub(crate) fn is_raw(&self) -> bool {
        !self.termios().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// All modes, as text that can be compared.
    pub(crate) fn modes(&self) -> String {
        format!("{:?}", self.termios())
    }

    /// Gives the terminal a mode that no program would choose by itself, by which to see that it was restored.
    pub(crate) fn set_unusual_mode(&self) {
        let mut modes = self.termios();
        modes.local_modes ^= LocalModes::ECHOK;
        tcsetattr(&self.terminal, OptionalActions::Now, &modes).expect("a terminal's modes can be set");
    }

    fn termios(&self) -> Termios {
        tcgetattr(&self.terminal).expect("a terminal has modes")
    }
}

/// Reads from a terminal until `text` has come, and not a byte more.
pub(crate) fn read_until(mut terminal: &File, text: &str) {
    let patience = Timespec::try_from(PATIENCE).expect("a short time");
    let mut read = Vec::new();
    while !read.ends_with(text.as_bytes()) {
        let ready =
            poll(&mut [PollFd::new(&terminal, PollFlags::IN)], Some(&patience)).expect("terminals can be polled");
        assert!(ready > 0, "waited {PATIENCE:?} in vain for {text:?}, and got {:?}", String::from_utf8_lossy(&read));
        let mut byte = [0];
        terminal.read_exact(&mut byte).expect("the line is not hung up");
        read.extend(byte);
    }
}

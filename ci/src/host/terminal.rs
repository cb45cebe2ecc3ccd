//! The caller's terminal while a command in the emulated host uses it.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::spec;

/// The terminal on standard input; dropping it restores its mode.
pub(super) struct Terminal {
    terminal: OwnedFd,
    before: Termios,
}

impl Terminal {
    /// The terminal, if standard input is one.
    pub(super) fn of_stdin() -> Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let terminal = stdin.as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal).context("Cannot read the terminal's mode")?;
        Ok(Some(Self { terminal, before }))
    }

    /// What the command is to see.
    pub(super) fn spec(&self) -> Result<spec::Terminal> {
        let (rows, columns) = self.size()?;
        let (stdout, stderr) = (io::stdout().is_terminal(), io::stderr().is_terminal());
        Ok(spec::Terminal { rows, columns, stdout, stderr })
    }

    /// Rows and columns.
    pub(super) fn size(&self) -> Result<(u16, u16)> {
        let size = tcgetwinsize(&self.terminal).context("Cannot read the terminal's size")?;
        Ok((size.ws_row, size.ws_col))
    }

    /// From now on every key goes to the command, Ctrl-C too.
    pub(super) fn make_raw(&self) -> Result<()> {
        let mut raw = self.before.clone();
        raw.make_raw();
        tcsetattr(&self.terminal, OptionalActions::Now, &raw).context("Cannot set the terminal's mode")
    }

    /// Where to write what the command shows.
    pub(super) fn writer(&self) -> Result<File> {
        Ok(File::from(self.terminal.try_clone()?))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // There is nobody to tell of a failure.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

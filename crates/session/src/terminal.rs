//! The terminal that a command in a guest is given: raw while it runs, and as it was afterwards.

use std::io::{self, IsTerminal as _};

use anyhow::{Context as _, ensure};
use guest::request::Size;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Standard input as a raw terminal, until this is dropped.
pub(crate) struct Raw(Termios);

impl Raw {
    /// # Errors
    ///
    /// Standard input is no terminal.
    pub(crate) fn enter() -> anyhow::Result<Self> {
        ensure!(io::stdin().is_terminal(), "the input is no terminal: leave out --tty");
        let before = tcgetattr(io::stdin()).context("cannot ask for the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).context("cannot change the terminal's settings")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// The size of the terminal that is standard input.
pub fn size() -> Option<Size> {
    let size = tcgetwinsize(io::stdin()).ok()?;
    Some(Size { rows: size.ws_row, columns: size.ws_col })
}

//! The console on a pseudo-terminal, for programs such as screen, picocom or minicom.
//!
//! We keep the readers' end open too: readers may then come and go without the line being hung up, output waits in
//! between, and the line stays raw, without an echo that the guest would take for input.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::{sys, terminal};

/// A pseudo-terminal; its name is printed at start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct PtySpec {
    /// A symbolic link to make to it, removed at the end
    pub link: Option<PathBuf>,
}

/// Who reads nothing for so long at the end is not there.
const PATIENCE: Duration = Duration::from_millis(50);

/// The far end of a pseudo-terminal and the link to it.
pub(super) struct Pty {
    name: PathBuf,
    link: Option<PathBuf>,
    /// Held open, so that the line is never hung up for want of readers.
    peer: OwnedFd,
}

impl Pty {
    /// Makes a pseudo-terminal. Returns the end that the console uses as well.
    pub(super) fn open(spec: &PtySpec) -> anyhow::Result<(Self, OwnedFd)> {
        let (master, number) =
            sys::open_pty().context("Cannot make a pseudo-terminal for it: is /dev/pts mounted, and not full?")?;
        let peer = raw_peer(&master).context("Cannot set up its pseudo-terminal")?;
        let mut pty = Self { name: format!("/dev/pts/{number}").into(), link: None, peer };
        if let Some(link) = &spec.link {
            make_link(&pty.name, link)?;
            pty.link = Some(link.clone());
        }
        Ok((pty, master))
    }

    /// Takes the line up again after somebody has hung it up, which a login session does at its end.
    pub(super) fn reopen(&mut self, master: &impl AsFd) -> io::Result<()> {
        self.peer = raw_peer(master)?;
        Ok(())
    }

    /// Waits until the reader has taken everything, which is lost when we close our end: as long as there is progress,
    /// but no longer than `limit`. A reader who is not there makes none.
    pub(super) fn wait_for_reader(&self, limit: Duration) {
        let (start, mut progress) = (Instant::now(), Instant::now());
        let mut unread = usize::MAX;
        // Poll moves what is under way to where it is counted.
        while sys::poll(self.peer.as_fd(), libc::POLLIN, Duration::ZERO) {
            let now = sys::unread(self.peer.as_fd());
            if now < unread {
                (unread, progress) = (now, Instant::now());
            }
            if progress.elapsed() > PATIENCE || start.elapsed() > limit {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Its name, and the link's.
    pub(super) fn describe(&self) -> String {
        let name = self.name.display();
        self.link.as_ref().map_or_else(|| format!("pty {name}"), |link| format!("pty {name}, {}", link.display()))
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        if let Some(link) = &self.link
            && fs::read_link(link).is_ok_and(|target| target == self.name)
        {
            // At worst a link is left over, and the next VM replaces it.
            let _ = fs::remove_file(link);
        }
    }
}

fn raw_peer(master: &impl AsFd) -> io::Result<OwnedFd> {
    let peer = sys::open_peer(master.as_fd())?;
    let mut modes = terminal::raw(&sys::modes(peer.as_fd())?);
    modes.c_oflag &= !libc::OPOST;
    sys::set_modes(peer.as_fd(), &modes)?;
    Ok(peer)
}

/// Links `link` to `name` in one step. A link to a pseudo-terminal that is there already is a dead VM's.
fn make_link(name: &Path, link: &Path) -> anyhow::Result<()> {
    let shown = link.display();
    match fs::read_link(link) {
        Ok(target) if target.starts_with("/dev/pts") => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        _ => bail!("{shown} exists and is no link to a pseudo-terminal: remove it, or choose another link"),
    }
    let mut temporary = link.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    std::os::unix::fs::symlink(name, &temporary)
        .and_then(|()| fs::rename(&temporary, link))
        .with_context(|| format!("Cannot make the link {shown}: choose a place that this user can write to"))
}

#[cfg(test)]
mod tests;

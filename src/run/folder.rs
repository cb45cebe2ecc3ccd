//! The folder of one run: the sockets to its guest, and the console's log.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// How many lines of the console are shown when a machine fails.
const LAST_LINES: usize = 20;

/// A folder that nobody else can enter. It is removed with this.
pub(crate) struct Folder(PathBuf);

impl Folder {
    /// Makes it below `XDG_RUNTIME_DIR`, or else below the folder for temporary files.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let path = base.join(format!("vmm-run-{}", std::process::id()));
        // One that is there was left by a process of the same number, or is somebody else's: then making it fails, too.
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("Cannot remove {}", path.display()));
            }
            _ => {}
        }
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("Cannot make {}: set XDG_RUNTIME_DIR to a folder of yours", path.display()))?;
        Ok(Self(path))
    }

    /// The socket by which the host reaches the guest.
    pub(crate) fn vsock(&self) -> PathBuf {
        self.0.join("vsock")
    }

    /// The socket that the guest reaches at `port`.
    pub(crate) fn guests_port(&self, port: u32) -> PathBuf {
        self.0.join(format!("vsock_{port}"))
    }

    /// What the guest says at its console.
    pub(crate) fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }

    /// The last lines of the console, for people.
    pub(crate) fn last_console_lines(&self) -> String {
        last_lines(&fs::read(self.console()).unwrap_or_default())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl AsRef<Path> for Folder {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

/// The last lines of what a guest wrote, without what could do something to a terminal.
fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().rev().filter(|line| !line.trim().is_empty()).take(LAST_LINES).collect();
    let clean = |line: &&str| format!("  | {}\n", line.trim_end().replace(char::is_control, " "));
    lines.iter().rev().map(clean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_a_guest_do_nothing_to_a_terminal() {
        let all: String = (0..30).map(|number| format!("line {number}\r\n\n")).collect();
        let shown = last_lines(format!("{all}\x1b[2Jend\r\n").as_bytes());
        assert_eq!(shown.lines().count(), LAST_LINES);
        assert!(shown.starts_with("  | line 11\n") && shown.ends_with("  |  [2Jend\n"), "{shown}");
    }
}

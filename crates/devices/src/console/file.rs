//! The console in a file: appended to, and rotated so that a guest cannot fill the disk.
//!
//! `path` is the newest, `path.1` the one before, up to `path.keep`. Each holds at most `max` bytes of what we write.
//! The file is private to its user (0600), locked against a second VM, and never a symbolic link: who can write to its
//! folder could have it lead anywhere.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use kv::Size;
use serde::{Deserialize, Serialize};

use super::sys;

/// A file that takes the guest's output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FileSpec {
    /// The file; what it holds is kept
    pub path: PathBuf,
    /// Bytes after which the file becomes PATH.1 and a new one begins
    #[serde(default = "default_max")]
    pub max: Size,
    /// How many earlier files are kept, PATH.1 being the latest
    #[serde(default = "default_keep")]
    pub keep: u32,
}

fn default_max() -> Size {
    Size(16 << 20)
}

fn default_keep() -> u32 {
    3
}

/// More files than this are a mistake, and would make each rotation slow.
const MOST_KEPT: u32 = 1000;

/// The open file.
#[derive(Debug)]
pub(super) struct LogFile {
    spec: FileSpec,
    file: File,
    /// Bytes in the file.
    size: u64,
}

impl LogFile {
    pub(super) fn open(spec: &FileSpec) -> anyhow::Result<Self> {
        if spec.max.bytes() < 4096 {
            bail!("Its file needs max=4K or more, not {}", spec.max);
        }
        if spec.keep > MOST_KEPT {
            bail!("Its file can keep {MOST_KEPT} earlier files at most, not {}", spec.keep);
        }
        // A limit on file sizes shall make the write fail, not end the process.
        sys::ignore_signal(libc::SIGXFSZ);
        let (file, size) = append(&spec.path)?;
        Ok(Self { spec: spec.clone(), file, size })
    }

    /// Writes some of `bytes`, into the next file where this one is full.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let max = self.spec.max.bytes();
        if self.size >= max {
            self.rotate()?;
        }
        let room = usize::try_from(max.saturating_sub(self.size)).unwrap_or(usize::MAX);
        let written = self.file.write(&bytes[..bytes.len().min(room)])?;
        self.size = self.size.saturating_add(written as u64);
        Ok(written)
    }

    /// Moves every file on by one number and begins a new one. When this fails it can be called again.
    fn rotate(&mut self) -> io::Result<()> {
        if self.spec.keep == 0 {
            self.file.set_len(0)?;
            self.size = 0;
            return Ok(());
        }
        // Up to the first gap, so that an attempt after one that failed half-way loses nothing.
        let gap = (1..self.spec.keep).find(|number| !self.numbered(*number).exists());
        for number in (0..gap.unwrap_or(self.spec.keep)).rev() {
            match fs::rename(self.numbered(number), self.numbered(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                // Not there: somebody took it away, or an attempt before this one came so far.
                _ => {}
            }
        }
        let (file, size) = append(&self.spec.path).map_err(io::Error::other)?;
        (self.file, self.size) = (file, size);
        Ok(())
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut path = OsString::from(&self.spec.path);
        if number > 0 {
            path.push(format!(".{number}"));
        }
        path.into()
    }
}

/// Opens `path` to append to, and returns its size too.
fn append(path: &Path) -> anyhow::Result<(File, u64)> {
    let name = path.display();
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        // A pipe is refused below, and opening one shall not wait for its reader.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| explain(error, path))?;
    let metadata = file.metadata().with_context(|| format!("Cannot examine its file {name}"))?;
    if !metadata.is_file() {
        bail!("{name} is not a regular file: name one for it, or one that does not exist yet");
    }
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            bail!("{name} is another console's: give each a file of its own")
        }
        // A file system without locks is no reason to have no console.
        Err(TryLockError::Error(_)) | Ok(()) => Ok((file, metadata.len())),
    }
}

fn explain(error: io::Error, path: &Path) -> anyhow::Error {
    let cure = match error.raw_os_error() {
        Some(libc::EISDIR) => "it is a directory, name a file in it",
        Some(libc::ELOOP) => "it is a symbolic link, name the file itself",
        Some(libc::ENOENT) => "its directory does not exist, create it first",
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => "choose a place that this user can write to",
        Some(libc::ENXIO) => "it is not a regular file, name one or one that does not exist yet",
        _ => "choose another path",
    };
    anyhow::Error::new(error).context(format!("Cannot write to {}: {cure}", path.display()))
}

#[cfg(test)]
mod tests;

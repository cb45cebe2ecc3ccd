//! The archive that an initramfs is: cpio in the "newc" format, written without root and always the same for the same
//! content.
//!
//! Format: `Documentation/driver-api/early-userspace/buffer-format.rst` of the Linux kernel. Archives may follow each
//! other in one initramfs. Left out: hard links, owners other than root, times (all 0), checksums.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An initramfs in the making. Paths are relative to its root and without a leading slash; the directories above an
/// entry are made by themselves.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    paths: BTreeSet<String>,
}

impl Archive {
    /// Adds a regular file with the permissions `mode`.
    ///
    /// # Errors
    ///
    /// As for the others: the path is there already, or the file is too large (`InvalidInput`).
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | mode, (0, 0), content)
    }

    /// Adds a directory, unless it is there.
    ///
    /// # Errors
    ///
    /// As for [`Archive::file`].
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        if self.paths.contains(path) {
            return Ok(());
        }
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Adds a symbolic link to `target`.
    ///
    /// # Errors
    ///
    /// As for [`Archive::file`].
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device node for root.
    ///
    /// # Errors
    ///
    /// As for [`Archive::file`].
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, CHARACTER | 0o600, (major, minor), &[])
    }

    /// The finished archive.
    ///
    /// # Errors
    ///
    /// As for [`Archive::file`].
    pub fn finish(mut self) -> io::Result<Vec<u8>> {
        self.append("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent)?;
        }
        if !self.paths.insert(path.to_owned()) {
            return Err(invalid(format!("{path} stands twice in an initramfs")));
        }
        self.append(path, mode, device, content)
    }

    fn append(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let number =
            |count: usize| u32::try_from(count).map_err(|_| invalid(format!("{path} is too large for an initramfs")));
        let (size, inode, name_size) = (number(content.len())?, number(self.paths.len())?, number(path.len() + 1)?);
        self.bytes.extend_from_slice(b"070701");
        let (uid, gid, links, time, checksum) = (0, 0, 1, 0, 0);
        for field in [inode, mode, uid, gid, links, time, size, 0, 0, device.0, device.1, name_size, checksum] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
        Ok(())
    }

    /// Headers and contents start at multiples of four.
    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn cpio_lists_what_was_written() {
        let mut archive = Archive::default();
        archive.file("bin/tool", 0o755, b"#!/bin/sh\n").unwrap();
        archive.symlink("bin/other", "tool").unwrap();
        archive.character_device("dev/console", 5, 1).unwrap();
        let bytes = archive.finish().unwrap();
        let mut cpio = Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
            .env("TZ", "UTC")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = cpio.wait_with_output().unwrap();
        let lines: Vec<String> = String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(|line| line.split_whitespace().filter(|word| *word != "1970").collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(
            lines,
            [
                "drwxr-xr-x 1 0 0 0 Jan 1 bin",
                "-rwxr-xr-x 1 0 0 10 Jan 1 bin/tool",
                "lrwxrwxrwx 1 0 0 4 Jan 1 bin/other -> tool",
                "drwxr-xr-x 1 0 0 0 Jan 1 dev",
                "crw------- 1 0 0 5, 1 Jan 1 dev/console",
            ]
        );
    }

    #[test]
    fn the_same_path_twice_is_refused() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, b"one").unwrap();
        let error = archive.file("init", 0o755, b"two").unwrap_err();
        assert_eq!(error.to_string(), "init stands twice in an initramfs");
    }
}

//! The sender's side of a copy.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstat, openat, readlinkat, statat};

use super::entry::{Entry, Kind};
use crate::frame::{self, MOST_PAYLOAD};

/// How deep folders may be.
const DEEPEST: usize = 128;

/// Sends a file or folder, with all that is in it. If `source` is a symbolic link, what it leads to is sent; further
/// links are sent as they are. Returns how many things were left out, being neither files nor folders nor links.
///
/// # Errors
///
/// Something cannot be read, which the message names, or the stream failed. Without the end the receiver knows that the
/// copy is not whole.
pub fn send(source: &Path, output: &mut impl Write) -> io::Result<u64> {
    let real = source.canonicalize().map_err(|error| named(&error, source))?;
    let name = source.file_name().or_else(|| real.file_name());
    if !real.is_dir() && !real.is_file() {
        return Err(io::Error::other(format!("{} is neither a file nor a folder", source.display())));
    }
    let name =
        name.ok_or_else(|| io::Error::other("The root of all files has no name to copy it by: copy what is in it"))?;
    let mut sender = Sender { output, buffer: vec![0; MOST_PAYLOAD].into(), path: name.into(), skipped: 0, depth: 0 };
    sender.send(CWD, real.as_os_str())?;
    let skipped = sender.skipped;
    frame::write_frame(output, frame::Kind::End, &[])?;
    Ok(skipped)
}

struct Sender<'a, W> {
    output: &'a mut W,
    buffer: Box<[u8]>,
    /// Where we are.
    path: PathBuf,
    skipped: u64,
    depth: usize,
}

impl<W: Write> Sender<'_, W> {
    fn send(&mut self, folder: impl AsFd, name: &OsStr) -> io::Result<()> {
        let folder = folder.as_fd();
        let found = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|error| self.cannot(error))?;
        // What is no file is not opened: with a device that can do something, with a pipe it waits.
        let open = |flags| {
            let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            openat(folder, name, flags, Mode::empty())
        };
        match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => {
                let file = open(OFlags::empty()).map_err(|error| self.cannot(error))?;
                self.entry(Kind::File, fstat(&file)?.st_mode)?;
                self.bytes(file.into())
            }
            FileType::Directory => {
                let folder = open(OFlags::DIRECTORY).map_err(|error| self.cannot(error))?;
                self.entry(Kind::Folder, fstat(&folder)?.st_mode)?;
                self.content(&folder)
            }
            FileType::Symlink => {
                let target = readlinkat(folder, name, Vec::new()).map_err(|error| self.cannot(error))?;
                self.entry(Kind::Link(OsStr::from_bytes(target.as_bytes()).into()), 0)
            }
            _ => {
                self.skipped += 1;
                Ok(())
            }
        }
    }

    fn entry(&mut self, kind: Kind, mode: u32) -> io::Result<()> {
        let entry = Entry { path: self.path.clone(), kind, mode };
        frame::write_frame(self.output, frame::Kind::Entry, &entry.encode())
    }

    fn bytes(&mut self, mut file: File) -> io::Result<()> {
        loop {
            let count = file.read(&mut self.buffer).map_err(|error| self.cannot(error))?;
            frame::write_frame(self.output, frame::Kind::Data, &self.buffer[..count])?;
            if count == 0 {
                return Ok(());
            }
        }
    }

    fn content(&mut self, folder: &OwnedFd) -> io::Result<()> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(io::Error::other(format!("{} is deeper than {DEEPEST} folders", self.path.display())));
        }
        for entry in Dir::read_from(folder).map_err(|error| self.cannot(error))? {
            let entry = entry.map_err(|error| self.cannot(error))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                self.path.push(name);
                self.send(folder, name)?;
                self.path.pop();
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn cannot(&self, error: impl Into<io::Error>) -> io::Error {
        named(&error.into(), &self.path)
    }
}

fn named(error: &io::Error, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("Cannot read {}: {error}", path.display()))
}

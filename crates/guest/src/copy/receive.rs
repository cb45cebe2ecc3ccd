//! The receiver's side of a copy.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fchmod, mkdirat, openat, openat2, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::entry::{Entry, Kind};
use crate::frame::{self, Frame, invalid};
use crate::request::Answer;

/// What a folder must let its owner do while things are put into it.
const FILLED: u32 = 0o700;

/// How many folders may wait for their mode.
const MOST_WAITING: usize = 1024;

/// How much a receiver takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Files, folders and links.
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
}

impl Limits {
    /// For a sender that is trusted.
    pub const NONE: Self = Self { entries: u64::MAX, bytes: u64::MAX };
}

/// Receives a copy. If `destination` is a folder, it goes into it under its own name; otherwise it becomes
/// `destination`, in a folder that must be there. Files and links that are in the way are replaced, folders are kept
/// and filled.
///
/// # Errors
///
/// Something could not be made, the sender gave up ([`Answer::Failed`], whose message this is), sent more than the
/// limits, or what is refused (`InvalidData`). What came before that stays.
pub fn receive(destination: &Path, input: &mut impl Read, limits: Limits) -> io::Result<()> {
    let first = match next(input)? {
        Frame { kind: frame::Kind::Entry, payload } => Entry::decode(&payload)?,
        frame => return Err(unexpected(frame.kind)),
    };
    if first.path.components().count() != 1 {
        return Err(invalid("The peer's copy does not begin with one name"));
    }
    let (root, name) = if destination.is_dir() {
        (destination, first.path.as_os_str())
    } else {
        let name = destination.file_name().ok_or_else(|| in_the_way(destination))?;
        let parent = destination.parent().filter(|parent| !parent.as_os_str().is_empty());
        (parent.unwrap_or(Path::new(".")), name)
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = openat(CWD, root, flags, Mode::empty()).map_err(|error| named(&error.into(), root))?;
    let mut receiver = Receiver { folder, theirs: first.path.clone(), ours: name.into(), limits, waiting: Vec::new() };
    receiver.take(first, input)?;
    loop {
        let frame = next(input)?;
        match frame.kind {
            frame::Kind::Entry => receiver.take(Entry::decode(&frame.payload)?, input)?,
            frame::Kind::End => return receiver.set_modes(),
            kind => return Err(unexpected(kind)),
        }
    }
}

struct Receiver {
    /// Where everything goes.
    folder: OwnedFd,
    /// The sender's name for what is copied, and ours.
    theirs: PathBuf,
    ours: OsString,
    /// What is left of them.
    limits: Limits,
    /// Folders that are not to be writable, once they are filled.
    waiting: Vec<(PathBuf, u32)>,
}

impl Receiver {
    fn take(&mut self, entry: Entry, input: &mut impl Read) -> io::Result<()> {
        self.limits.entries = self.limits.entries.checked_sub(1).ok_or_else(too_much)?;
        let rest = entry.path.strip_prefix(&self.theirs);
        let rest = rest.map_err(|_| invalid("The peer's copy has an entry beside what is copied"))?;
        let path = match rest.as_os_str() {
            rest if rest.is_empty() => PathBuf::from(&self.ours),
            rest => Path::new(&self.ours).join(rest),
        };
        self.make(&path, entry, input).map_err(|error| match error.kind() {
            // Said already what it is.
            ErrorKind::InvalidData | ErrorKind::Other | ErrorKind::UnexpectedEof => error,
            _ => named(&error, &path),
        })
    }

    fn make(&mut self, path: &Path, entry: Entry, input: &mut impl Read) -> io::Result<()> {
        let parent = self.open(path.parent().unwrap_or(Path::new("")), OFlags::PATH)?;
        let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
        if entry.kind == Kind::Folder {
            return match mkdirat(&parent, name, Mode::from_raw_mode(entry.mode | FILLED)) {
                Ok(()) => self.set_mode(path, entry.mode),
                Err(Errno::EXIST) if is_folder(&parent, name)? => Ok(()),
                Err(error) => Err(error.into()),
            };
        }
        match unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        if let Kind::Link(target) = entry.kind {
            return Ok(symlinkat(target, &parent, name)?);
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(&parent, name, flags, Mode::from_raw_mode(0o600))?);
        self.fill(&mut file, input)?;
        Ok(fchmod(&file, Mode::from_raw_mode(entry.mode))?)
    }

    fn fill(&mut self, file: &mut File, input: &mut impl Read) -> io::Result<()> {
        loop {
            let frame = next(input)?;
            if frame.kind != frame::Kind::Data {
                return Err(unexpected(frame.kind));
            }
            if frame.payload.is_empty() {
                return Ok(());
            }
            let count = u64::try_from(frame.payload.len()).unwrap_or(u64::MAX);
            self.limits.bytes = self.limits.bytes.checked_sub(count).ok_or_else(too_much)?;
            file.write_all(&frame.payload)?;
        }
    }

    /// Gives a new folder its mode, at once if it can be filled with that.
    fn set_mode(&mut self, path: &Path, mode: u32) -> io::Result<()> {
        if mode & FILLED != FILLED {
            self.waiting.push((path.to_owned(), mode));
            return if self.waiting.len() < MOST_WAITING { Ok(()) } else { self.set_modes() };
        }
        // The mask of this process has taken from it what it was made with.
        Ok(fchmod(self.open(path, OFlags::RDONLY)?, Mode::from_raw_mode(mode))?)
    }

    /// Those above others last: the others could not be reached any more.
    fn set_modes(&mut self) -> io::Result<()> {
        for (path, mode) in std::mem::take(&mut self.waiting).into_iter().rev() {
            fchmod(self.open(&path, OFlags::RDONLY)?, Mode::from_raw_mode(mode))?;
        }
        Ok(())
    }

    /// Opens a folder of the copy.
    fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat2(&self.folder, path, flags, Mode::empty(), resolve) {
            Err(Errno::LOOP | Errno::XDEV) => {
                Err(invalid(format!("The peer's copy goes through the link {path:?}, which is refused")))
            }
            result => Ok(result?),
        }
    }
}

fn is_folder(parent: &OwnedFd, name: &std::ffi::OsStr) -> io::Result<bool> {
    let found = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(found.st_mode) == FileType::Directory)
}

/// The next frame, unless the sender has given up.
fn next(input: &mut impl Read) -> io::Result<Frame> {
    let frame = frame::read_frame(input)?;
    let frame = frame.ok_or_else(|| io::Error::new(ErrorKind::UnexpectedEof, "The peer ended the copy early"))?;
    match frame.kind {
        frame::Kind::Message => match frame.message()? {
            Answer::Failed { message } => Err(io::Error::other(message)),
            _ => Err(unexpected(frame.kind)),
        },
        _ => Ok(frame),
    }
}

fn unexpected(kind: frame::Kind) -> io::Error {
    invalid(format!("The peer sent {kind:?} in a copy, where it was not due"))
}

fn too_much() -> io::Error {
    invalid("The peer's copy is larger than the limit")
}

fn in_the_way(path: &Path) -> io::Error {
    io::Error::other(format!("{} has no name to make it by", path.display()))
}

fn named(error: &io::Error, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("Cannot make {path:?}: {error}"))
}

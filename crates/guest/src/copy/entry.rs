//! One thing of a copy: a byte for the kind, two for the mode (little-endian), the path, and for a link a zero and
//! where it leads.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::frame::invalid;

/// The bits of a mode that are copied.
pub(super) const MODE: u32 = 0o777;

/// The longest path (`PATH_MAX`), in bytes.
const LONGEST: usize = 4096;

/// A file, folder or link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is, relative to where the copy is.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Its permissions, of 9 bits. A link has none.
    pub mode: u32,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file, whose bytes follow.
    File,
    /// A folder.
    Folder,
    /// A symbolic link to this, which may be anything.
    Link(PathBuf),
}

impl Entry {
    /// As the payload of a frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (kind, target) = match &self.kind {
            Kind::File => (0, None),
            Kind::Folder => (1, None),
            Kind::Link(target) => (2, Some(target)),
        };
        let mut payload = vec![kind];
        payload.extend(u16::try_from(self.mode & MODE).expect("nine bits").to_le_bytes());
        payload.extend(self.path.as_os_str().as_bytes());
        if let Some(target) = target {
            payload.push(0);
            payload.extend(target.as_os_str().as_bytes());
        }
        payload
    }

    /// Of the payload of a frame.
    ///
    /// # Errors
    ///
    /// It is no entry, or its path is not one that stays where it is: absolute, empty, too long, or with `..` in it
    /// (`InvalidData`).
    pub fn decode(payload: &[u8]) -> io::Result<Self> {
        let [kind, low, high, rest @ ..] = payload else { return Err(invalid("The peer's copy has an empty entry")) };
        let mut parts = rest.splitn(2, |byte| *byte == 0);
        let path = parts.next().unwrap_or_default();
        let kind = match (kind, parts.next()) {
            (0, None) => Kind::File,
            (1, None) => Kind::Folder,
            (2, Some(target)) if is_target(target) => Kind::Link(path_of(target)),
            _ => return Err(invalid("The peer's copy has an entry that is neither file nor folder nor link")),
        };
        let name = |name: &[u8]| !matches!(name, b"" | b"." | b"..");
        if path.len() >= LONGEST || !path.split(|byte| *byte == b'/').all(name) {
            let path = path_of(&path[..path.len().min(LONGEST)]);
            return Err(invalid(format!("The peer's copy has an entry with the path {path:?}, which is refused")));
        }
        Ok(Self { path: path_of(path), kind, mode: u32::from(u16::from_le_bytes([*low, *high])) & MODE })
    }
}

fn is_target(target: &[u8]) -> bool {
    !target.is_empty() && target.len() < LONGEST && !target.contains(&0)
}

fn path_of(bytes: &[u8]) -> PathBuf {
    Path::new(OsStr::from_bytes(bytes)).to_owned()
}

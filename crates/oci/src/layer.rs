//! A layer: a tar archive, read as what an adversary made (POSIX.1-2017 pax, "ustar Interchange Format" and "pax Header
//! Block", GNU's long names; image specification 1.1, "Image Layer Filesystem Changeset").
//!
//! Only headers are read here. Contents stay where they are in the layer's file. Left out: sparse files, which no tool
//! puts into layers, and times finer than a second, which the file system image cannot hold.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, bail, ensure};
use tar::{EntryType, Header};

/// An archive consists of these.
const BLOCK: u64 = 512;
/// The most bytes of a path and of a name in it (Linux' PATH_MAX and NAME_MAX).
pub(crate) const MOST_PATH: usize = 4096;
const MOST_NAME: usize = 255;
/// The most bytes of what stands before an entry: long names and extended attributes.
const MOST_EXTENSION: u64 = 1 << 20;
/// The most entries in a layer and files in an image, and the most bytes of their names and attributes.
pub(crate) const MOST_FILES: usize = 1 << 20;
pub(crate) const MOST_BYTES: usize = 256 << 20;
/// Where pax headers keep extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// What a layer says of one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Names with slashes between them; nothing for the root. None of them is `.` or `..`.
    pub path: Vec<u8>,
    /// What is there.
    pub kind: Kind,
    /// Who may do what with it.
    pub meta: Meta,
}

/// What is the same for files of all kinds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u32,
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A folder.
    Folder,
    /// A file, whose content is a part of the layer's file.
    File {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        length: u64,
    },
    /// A symbolic link to what it says.
    Symlink(Vec<u8>),
    /// The same file as at a path, which is like [`Entry::path`].
    Link(Vec<u8>),
    /// A device with its major and minor numbers.
    Character(u32, u32),
    /// A device with its major and minor numbers.
    Block(u32, u32),
    /// A named pipe.
    Pipe,
}

/// Reads all entries of the layer in `file`, which has `length` bytes.
///
/// # Errors
///
/// Names the entry that cannot be, and says why.
pub fn read(file: &File, length: u64) -> anyhow::Result<Vec<Entry>> {
    let mut archive = Archive { file, length, at: 0, headers: 0 };
    let (mut entries, mut bytes) = (Vec::new(), 0);
    while let Some(raw) = archive.next()? {
        let shown = printable(&raw.path);
        let attributes = raw.xattrs.iter().map(|(name, value)| name.len() + value.len());
        bytes += raw.path.len() + raw.link.len() + attributes.sum::<usize>();
        ensure!(bytes <= MOST_BYTES, "its names and attributes have too many bytes: {MOST_BYTES} are the most");
        entries.push(raw.entry().with_context(|| format!("the entry {shown}"))?);
    }
    Ok(entries)
}

/// A name for people.
pub(crate) fn printable(path: &[u8]) -> String {
    path.escape_ascii().take(200).map(char::from).collect()
}

/// A tar archive in a file.
struct Archive<'a> {
    file: &'a File,
    length: u64,
    at: u64,
    headers: usize,
}

/// An entry with what stood before it.
struct Raw {
    header: Header,
    path: Vec<u8>,
    link: Vec<u8>,
    /// Numbers that replace the header's.
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<u64>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    offset: u64,
    length: u64,
}

impl Archive<'_> {
    /// The next entry.
    fn next(&mut self) -> anyhow::Result<Option<Raw>> {
        let (mut long_path, mut long_link, mut pax) = (None, None, Vec::new());
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let mut size = header.entry_size().context("a header has no size")?;
            match header.entry_type() {
                EntryType::GNULongName => long_path = Some(self.name(size)?),
                EntryType::GNULongLink => long_link = Some(self.name(size)?),
                EntryType::XHeader => pax = self.extension(size)?,
                EntryType::XGlobalHeader => drop(self.extension(size)?),
                _ => {
                    let mut raw = Raw {
                        path: long_path.unwrap_or_else(|| header.path_bytes().into_owned()),
                        link: long_link
                            .unwrap_or_else(|| header.link_name_bytes().map(Cow::into_owned).unwrap_or_default()),
                        header,
                        uid: None,
                        gid: None,
                        mtime: None,
                        xattrs: Vec::new(),
                        offset: self.at,
                        length: 0,
                    };
                    raw.extend(&pax, &mut size)?;
                    // Where others have nothing, some tools give a size all the same.
                    if raw.is_file() {
                        raw.length = self.skip(size)?;
                    }
                    return Ok(Some(raw));
                }
            }
        }
    }

    /// The next header, unless the archive ends.
    fn header(&mut self) -> anyhow::Result<Option<Header>> {
        // Two empty blocks are its end, or simply nothing.
        if self.at == self.length {
            return Ok(None);
        }
        self.headers += 1;
        // Each may have a header of attributes before it.
        ensure!(self.headers <= 2 * MOST_FILES, "it has too many entries: {MOST_FILES} are the most");
        let mut header = Header::new_old();
        let at = self.skip_from(BLOCK)?;
        self.file.read_exact_at(header.as_mut_bytes(), at)?;
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        // The field that holds the sum counts as spaces.
        let bytes = header.as_bytes().iter().enumerate();
        let sum: u32 = bytes.map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) }).sum();
        ensure!(header.cksum().is_ok_and(|said| said == sum), "it is no tar archive, or damaged");
        Ok(Some(header))
    }

    /// Goes past content. Returns its length.
    fn skip(&mut self, size: u64) -> anyhow::Result<u64> {
        self.skip_from(size)?;
        Ok(size)
    }

    /// Goes past `size` bytes and what fills their last block. Returns where they begin.
    fn skip_from(&mut self, size: u64) -> anyhow::Result<u64> {
        let start = self.at;
        let end = start.checked_add(size).filter(|end| *end <= self.length).context("it is cut off")?;
        // The last block may lack what fills it.
        self.at = end.next_multiple_of(BLOCK).min(self.length);
        Ok(start)
    }

    fn extension(&mut self, size: u64) -> anyhow::Result<Vec<u8>> {
        ensure!(size <= MOST_EXTENSION, "a name or its attributes have {size} bytes: {MOST_EXTENSION} are the most");
        let at = self.skip_from(size)?;
        let mut bytes = vec![0; usize::try_from(size)?];
        self.file.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    fn name(&mut self, size: u64) -> anyhow::Result<Vec<u8>> {
        let mut name = self.extension(size)?;
        if name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }
}

impl Raw {
    /// Takes what a pax header says.
    fn extend(&mut self, pax: &[u8], size: &mut u64) -> anyhow::Result<()> {
        let mut pax = pax;
        while !pax.is_empty() {
            let (key, value, rest) = record(pax).context("a pax header is damaged")?;
            pax = rest;
            let whole = || {
                let text = std::str::from_utf8(value).ok()?.split('.').next()?;
                Some(u64::try_from(text.parse::<i64>().ok()?).unwrap_or(0))
            };
            let number = || whole().with_context(|| format!("{}={} is no number", printable(key), printable(value)));
            match key {
                b"path" => self.path = value.to_vec(),
                b"linkpath" => self.link = value.to_vec(),
                b"size" => *size = number()?,
                b"uid" => self.uid = Some(number()?),
                b"gid" => self.gid = Some(number()?),
                b"mtime" => self.mtime = Some(number()?),
                _ if key.starts_with(b"GNU.sparse.") => bail!("sparse files are not understood"),
                _ => {
                    if let Some(name) = key.strip_prefix(XATTR).filter(|name| is_kept(name)) {
                        self.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        Ok(())
    }

    fn is_file(&self) -> bool {
        matches!(self.header.entry_type(), EntryType::Regular | EntryType::Continuous)
    }

    fn entry(self) -> anyhow::Result<Entry> {
        let header = &self.header;
        let number = |own: Option<u64>, header: std::io::Result<u64>| -> anyhow::Result<u32> {
            let number = own.map_or(header, Ok).context("its header is damaged")?;
            u32::try_from(number).ok().with_context(|| format!("its owner {number} is none that Linux has"))
        };
        let meta = Meta {
            mode: header.mode().context("its header is damaged")? & 0o7777,
            uid: number(self.uid, header.uid())?,
            gid: number(self.gid, header.gid())?,
            mtime: u32::try_from(self.mtime.or(header.mtime().ok()).unwrap_or(0)).unwrap_or(u32::MAX),
            xattrs: self.xattrs,
        };
        let device = || -> anyhow::Result<(u32, u32)> {
            let (major, minor) = (header.device_major()?, header.device_minor()?);
            let (major, minor) = major.zip(minor).context("it is a device without a number")?;
            // As many bits as Linux has for them.
            ensure!(major < 1 << 12 && minor < 1 << 20, "there is no device {major}:{minor}");
            Ok((major, minor))
        };
        let kind = match header.entry_type() {
            // Before there were folders, a slash said it.
            EntryType::Regular | EntryType::Continuous if self.path.ends_with(b"/") => Kind::Folder,
            EntryType::Regular | EntryType::Continuous => Kind::File { offset: self.offset, length: self.length },
            EntryType::Directory => Kind::Folder,
            EntryType::Symlink => Kind::Symlink(target(self.link)?),
            EntryType::Link => Kind::Link(clean(&self.link).context("what it is a hard link to")?),
            EntryType::Char => device().map(|(major, minor)| Kind::Character(major, minor))?,
            EntryType::Block => device().map(|(major, minor)| Kind::Block(major, minor))?,
            EntryType::Fifo => Kind::Pipe,
            other => bail!("its kind {:?} is not understood", char::from(other.as_byte())),
        };
        let path = clean(&self.path)?;
        ensure!(!path.is_empty() || kind == Kind::Folder, "the root is no folder");
        Ok(Entry { path, kind, meta })
    }
}

/// The first pax record: its length as text, a space, key, equals sign, value, line's end. Returns key, value and the rest.
///
/// tar's own reader takes a line's end in a value for that of the record, and attributes do have them.
fn record(pax: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = pax.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&pax[..space]).ok()?.parse().ok()?;
    let (record, rest) = pax.split_at_checked(length)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], rest))
}

/// A path without what leads nowhere. One that leads upwards is refused; one that begins with a slash begins at the image's
/// root like any other, as container tools have it.
fn clean(path: &[u8]) -> anyhow::Result<Vec<u8>> {
    ensure!(path.len() <= MOST_PATH, "its path is longer than {MOST_PATH} bytes");
    ensure!(!path.contains(&0), "its path has a zero byte in it");
    let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, [] | [b'.'])).collect();
    ensure!(!names.contains(&&b".."[..]), "its path has .. in it, which could lead out of the image");
    ensure!(names.iter().all(|name| name.len() <= MOST_NAME), "a name in its path is longer than {MOST_NAME} bytes");
    Ok(names.join(&b'/'))
}

/// What a symbolic link says, wherever that leads: only the guest follows it.
fn target(link: Vec<u8>) -> anyhow::Result<Vec<u8>> {
    ensure!((1..MOST_PATH).contains(&link.len()) && !link.contains(&0), "it is a symbolic link to nothing that can be");
    Ok(link)
}

/// Whether the guest's file system can hold an attribute, and it means what it meant: an overlay's own would have the guest's
/// overlay look for files elsewhere.
fn is_kept(name: &[u8]) -> bool {
    let known = [&b"user."[..], b"security.", b"trusted."].iter().any(|space| name.starts_with(space));
    let fits = name.len() <= MOST_NAME && !name.contains(&0) && !name.contains(&b'=');
    known && fits && !name.starts_with(b"trusted.overlay.")
}

#[cfg(test)]
mod tests;

//! Images on this host: folders and archives in the image layout (image specification 1.1, "Image Layout"), and what
//! `docker save` writes.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::OFlags;

use crate::blob::{self, Claim, Digest};
use crate::layer::{self, Kind as FileKind};
use crate::manifest::{self, MOST_BYTES};
use crate::reference::{Kind, Local};
use crate::source::{Blob, Image, follow};
use crate::tree::Tree;

/// The file that a layout's folder or archive begins with, and the one of `docker save`.
const INDEX: &str = "index.json";
const SAVED: &str = "manifest.json";

/// A folder or archive of blobs.
pub(crate) struct Store {
    place: Place,
    kind: Kind,
    tag: Option<String>,
}

enum Place {
    Folder(PathBuf),
    Archive(File, Tree),
}

impl Store {
    pub(crate) fn open(local: &Local) -> anyhow::Result<Self> {
        let path = &local.path;
        let shown = path.display();
        let is_folder = fs::metadata(path).with_context(|| format!("there is no image at {shown}: check the path"))?;
        let place = if is_folder.is_dir() {
            Place::Folder(path.clone())
        } else {
            let (file, length) = open_file(path)?;
            ensure!(!is_packed(&file), "{shown} is a packed archive: unpack it first (gunzip, zstd -d or xz -d)");
            let mut tree = Tree::default();
            layer::read(&file, length).and_then(|entries| tree.add(0, entries)).with_context(|| shown.to_string())?;
            Place::Archive(file, tree)
        };
        let has = |name| place.open(name).is_ok();
        let kind = match (local.kind, &place) {
            (Some(Kind::Layout), Place::Archive(..)) => bail!("{shown} is no folder: say oci-archive:{shown}"),
            (Some(kind @ (Kind::OciArchive | Kind::DockerArchive)), Place::Folder(_)) => {
                bail!(
                    "{shown} is a folder, which is no {}: say oci:{shown}",
                    if kind == Kind::OciArchive { "oci-archive" } else { "docker-archive" }
                )
            }
            (Some(kind), _) => kind,
            (None, Place::Folder(_)) => Kind::Layout,
            (None, Place::Archive(..)) if has(INDEX) => Kind::OciArchive,
            (None, Place::Archive(..)) => Kind::DockerArchive,
        };
        let first = if kind == Kind::DockerArchive { SAVED } else { INDEX };
        ensure!(has(first), "{shown} is no image: there is no {first} in it");
        Ok(Self { place, kind, tag: local.tag.clone() })
    }

    /// What the image consists of.
    pub(crate) fn image(&self) -> anyhow::Result<Image> {
        let tag = self.tag.as_deref();
        if self.kind != Kind::DockerArchive {
            let index = self.read(INDEX)?;
            return follow(&index, tag, |_, claim| blob::read(self.open_blob(&Blob::of(claim))?, &claim, MOST_BYTES));
        }
        let (config, layers) = manifest::saved(&self.read(SAVED)?, tag)?;
        let config = self.read(&config)?;
        let blob = |name: String| {
            let size = self.place.open(&name)?.1;
            Ok(Blob { claim: Claim { digest: None, size }, name: Some(name) })
        };
        let layers = layers.into_iter().map(blob).collect::<anyhow::Result<_>>()?;
        Ok(Image { digest: Digest::of(&config), config, layers })
    }

    /// Opens a blob.
    pub(crate) fn open_blob(&self, blob: &Blob) -> anyhow::Result<Box<dyn Read + '_>> {
        let name = match (&blob.name, blob.claim.digest) {
            (Some(name), _) => name.clone(),
            (None, Some(digest)) => format!("blobs/sha256/{}", digest.hex()),
            (None, None) => bail!("a blob has neither digest nor name"),
        };
        Ok(self.place.open(&name)?.0)
    }

    /// Reads a file that others name.
    fn read(&self, name: &str) -> anyhow::Result<Vec<u8>> {
        let (file, length) = self.place.open(name)?;
        blob::read(file, &Claim { digest: None, size: length }, MOST_BYTES).with_context(|| name.to_owned())
    }
}

impl Place {
    /// Opens a file, and says how long it is.
    fn open(&self, name: &str) -> anyhow::Result<(Box<dyn Read + '_>, u64)> {
        match self {
            Self::Folder(folder) => {
                let (file, length) = open_file(&folder.join(name))?;
                Ok((Box::new(file), length))
            }
            Self::Archive(file, tree) => match tree.find(name.as_bytes()).map(|node| &node.kind) {
                Some(FileKind::File { offset, length }) => {
                    Ok((Box::new(Part { file, at: *offset, left: *length }), *length))
                }
                _ => bail!("{} is not in the archive: make it anew", layer::printable(name.as_bytes())),
            },
        }
    }
}

/// Opens what has to be a file, and says how long it is.
fn open_file(path: &Path) -> anyhow::Result<(File, u64)> {
    let shown = path.display();
    // A pipe would keep us waiting for its other end.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path);
    let file = file.with_context(|| format!("cannot open {shown}: check the image"))?;
    let metadata = file.metadata()?;
    ensure!(metadata.is_file(), "{shown} is no file: check the image");
    Ok((file, metadata.len()))
}

/// Whether an archive is packed as a whole (gzip, zstd, xz, bzip2).
fn is_packed(file: &File) -> bool {
    let mut start = [0; 4];
    let read = file.read_exact_at(&mut start, 0).is_ok();
    read && [&[0x1f, 0x8b][..], &[0x28, 0xb5, 0x2f, 0xfd], &[0xfd, 0x37, 0x7a], b"BZh"]
        .iter()
        .any(|magic| start.starts_with(magic))
}

/// A part of a file.
pub(crate) struct Part<'a> {
    pub(crate) file: &'a File,
    pub(crate) at: u64,
    pub(crate) left: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

//! Where an image comes from, and what it consists of.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{bail, ensure};

use crate::blob::{self, Claim, Digest};
use crate::local::Store;
use crate::manifest::Manifest;
use crate::reference::Reference;
use crate::registry::{Patience, Registry};

/// Indexes of indexes of indexes.
const MOST_INDEXES: usize = 4;

/// A folder, an archive or a registry.
pub(crate) enum Source {
    Local(Box<Store>),
    Registry(Box<Registry>),
}

/// What an image consists of.
#[derive(Debug)]
pub(crate) struct Image {
    /// The manifest's.
    pub(crate) digest: Digest,
    /// The configuration, as it is.
    pub(crate) config: Vec<u8>,
    /// From the lowest to the highest.
    pub(crate) layers: Vec<Blob>,
}

/// A blob of an image.
#[derive(Debug)]
pub(crate) struct Blob {
    pub(crate) claim: Claim,
    /// Its name in an archive that does not name blobs by their digests.
    pub(crate) name: Option<String>,
}

/// What a digest in a manifest is of; registries keep them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Document {
    Manifest,
    Config,
}

impl Blob {
    pub(crate) fn of(claim: Claim) -> Self {
        Self { claim, name: None }
    }
}

impl Source {
    pub(crate) fn open(reference: &Reference, patience: Patience) -> anyhow::Result<Self> {
        Ok(match reference {
            Reference::Local(local) => Self::Local(Box::new(Store::open(local)?)),
            Reference::Registry(name) => Self::Registry(Box::new(Registry::new(name, patience)?)),
        })
    }

    pub(crate) fn image(&self) -> anyhow::Result<Image> {
        match self {
            Self::Local(store) => store.image(),
            Self::Registry(registry) => registry.image(),
        }
    }

    /// Unpacks a layer into `file`. What has to be kept meanwhile is in `folder`, and has no name.
    pub(crate) fn unpack(
        &self,
        blob: &Blob,
        content: Digest,
        file: &File,
        most: u64,
        folder: &Path,
    ) -> anyhow::Result<u64> {
        let packed: Box<dyn Read> = match self {
            Self::Local(store) => store.open_blob(blob)?,
            Self::Registry(registry) => {
                ensure!(blob.claim.size <= most, "it is larger than the cache may be: say VMM_IMAGE_CACHE=SIZE");
                Box::new(registry.fetch(&blob.claim, Some(folder))?)
            }
        };
        blob::unpack(packed, &blob.claim, content, file, most)
    }
}

/// Follows an index to the image that is meant. `read` gets what it names.
pub(crate) fn follow(
    start: &[u8],
    tag: Option<&str>,
    mut read: impl FnMut(Document, Claim) -> anyhow::Result<Vec<u8>>,
) -> anyhow::Result<Image> {
    let mut bytes = start.to_vec();
    let mut tag = tag;
    for _ in 0..MOST_INDEXES {
        match Manifest::read(&bytes, tag.take())? {
            Manifest::Index(claim) => bytes = read(Document::Manifest, claim)?,
            Manifest::Image { config, layers } => {
                let digest = Digest::of(&bytes);
                let config = read(Document::Config, config)?;
                return Ok(Image { digest, config, layers: layers.into_iter().map(Blob::of).collect() });
            }
        }
    }
    bail!("an index leads to another one {MOST_INDEXES} times: name the image by its digest")
}

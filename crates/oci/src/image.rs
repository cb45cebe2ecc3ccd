//! From a reference to a file system image in the cache.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use serde::Serialize;

use crate::blob::{Digest, NoRoom};
use crate::cache::{Cache, Ready};
use crate::manifest::{self, Config};
use crate::reference::Reference;
use crate::registry::Patience;
use crate::source::{self, Source};
use crate::tree::Tree;
use crate::{layer, squash};

/// An image that is ready to use, for `vmm`.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Image {
    /// The file system image.
    pub path: PathBuf,
    /// The manifest's digest.
    pub digest: String,
    /// What runs in it.
    pub config: Config,
}

/// Gets an image ready. What a registry's name means is asked there only if it is not known yet, or if `ask` says so.
///
/// # Errors
///
/// There is no such image, or it is damaged, or there is no room for it.
pub fn get(cache: &Cache, reference: &str, ask: bool, patience: Patience) -> anyhow::Result<Image> {
    let reference = reference.parse::<Reference>()?.absolute()?;
    let name = reference.to_string();
    if !ask && matches!(reference, Reference::Registry(_)) {
        let known = cache.names()?.into_iter().find(|named| named.reference == name);
        if let Some(known) = known
            && let Some(Ready { path, config }) = cache.ready(&known.image)?
        {
            return Ok(Image { path, digest: known.digest, config });
        }
    }
    let image = (|| {
        let source = Source::open(&reference, patience)?;
        let image = source.image()?;
        let ready = unpack(cache, &source, &image, &name)?;
        Ok(Image { path: ready.path, digest: image.digest.to_string(), config: ready.config })
    })();
    image.map_err(|error: anyhow::Error| {
        let full = error.chain().any(|cause| cause.is::<NoRoom>());
        let folder = cache.folder().display();
        let error = if full {
            error.context(format!("{folder} has no room: `vmm image prune` or XDG_CACHE_HOME helps"))
        } else {
            error
        };
        error.context(format!("cannot get the image {name}"))
    })
}

/// Unpacks an image into the cache, unless it is there.
fn unpack(cache: &Cache, source: &Source, image: &source::Image, name: &str) -> anyhow::Result<Ready> {
    let key = Digest::of(&image.config);
    let known = |name: &crate::cache::Named| name.digest == image.digest.to_string() && name.image == key.hex();
    if let Some(ready) = cache.ready(&key.hex())?
        && cache.names()?.iter().any(|named| named.reference == name && known(named))
    {
        return Ok(ready);
    }
    let locked = cache.lock()?;
    if cache.ready(&key.hex())?.is_none() {
        let (config, contents) = manifest::config(&image.config)?;
        let mut tree = Tree::default();
        let layers = merge(cache, source, image, &contents, &mut tree)?;
        if let Some(folder) = config.working_dir.as_deref() {
            tree.make_folder(folder.as_bytes()).with_context(|| format!("the image's working directory {folder:?}"))?;
        }
        locked.keep(key, &config, |path| squash::write(&tree, &layers, path))?;
    }
    locked.note(name, image.digest, key)?;
    cache.ready(&key.hex())?.context("the image has gone from the cache: try again")
}

/// Puts the layers on top of each other. Returns the files with their contents, which have no names.
fn merge(
    cache: &Cache,
    source: &Source,
    image: &source::Image,
    contents: &[Digest],
    tree: &mut Tree,
) -> anyhow::Result<Vec<std::fs::File>> {
    let (count, said) = (image.layers.len(), contents.len());
    ensure!(count == said, "the image has {count} layers and its configuration says {said}: it is damaged");
    let mut left = cache.most();
    let mut files = Vec::new();
    for (number, (blob, content)) in image.layers.iter().zip(contents).enumerate() {
        if std::io::stderr().is_terminal() {
            eprintln!("vmm-oci: layer {} of {count}, {} KiB", number + 1, blob.claim.size.div_ceil(1024));
        }
        let file = tempfile::tempfile_in(cache.folder()).map_err(NoRoom)?;
        let layer = || format!("layer {} of {count}", number + 1);
        let length = source.unpack(blob, *content, &file, left, cache.folder()).with_context(layer)?;
        left -= length;
        tree.add(number, layer::read(&file, length).with_context(layer)?).with_context(layer)?;
        files.push(file);
    }
    Ok(files)
}

#[cfg(test)]
mod tests;

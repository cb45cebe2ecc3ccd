//! Layers and images for tests.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use crate::blob::Digest;

/// An entry of a layer, as it is written: nothing about it is checked.
pub(crate) struct Item<'a> {
    name: &'a str,
    kind: EntryType,
    content: &'a [u8],
    target: &'a str,
    owner: (u64, u64),
    mode: u32,
    device: (u32, u32),
}

impl<'a> Item<'a> {
    pub(crate) fn of(name: &'a str, kind: EntryType, content: &'a [u8]) -> Self {
        Self { name, kind, content, target: "t", owner: (0, 0), mode: 0o644, device: (0, 0) }
    }

    pub(crate) fn file(name: &'a str, content: &'a [u8]) -> Self {
        Self::of(name, EntryType::Regular, content)
    }

    pub(crate) fn folder(name: &'a str) -> Self {
        Self::of(name, EntryType::Directory, b"").mode(0o755)
    }

    pub(crate) fn symlink(name: &'a str, target: &'a str) -> Self {
        Self { target, ..Self::of(name, EntryType::Symlink, b"") }
    }

    pub(crate) fn link(name: &'a str, target: &'a str) -> Self {
        Self { target, ..Self::of(name, EntryType::Link, b"") }
    }

    pub(crate) fn device(name: &'a str, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::of(name, EntryType::Char, b"") }
    }

    pub(crate) fn owner(self, uid: u64, gid: u64) -> Self {
        Self { owner: (uid, gid), ..self }
    }

    pub(crate) fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    /// The header, without what does not fit.
    pub(crate) fn header(&self) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(self.kind);
        header.set_mode(self.mode);
        header.set_uid(self.owner.0);
        header.set_gid(self.owner.1);
        header.set_mtime(1_000_000);
        header.set_size(self.content.len() as u64);
        header.set_device_major(self.device.0).unwrap();
        header.set_device_minor(self.device.1).unwrap();
        let old = header.as_old_mut();
        for (field, text) in [(&mut old.name, self.name), (&mut old.linkname, self.target)] {
            let length = text.len().min(field.len());
            field[..length].copy_from_slice(&text.as_bytes()[..length]);
        }
        header.set_cksum();
        header
    }
}

/// A layer with these entries.
pub(crate) fn layer_of(items: &[Item<'_>]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for item in items {
        for (kind, text) in [(EntryType::GNULongName, item.name), (EntryType::GNULongLink, item.target)] {
            if text.len() > 100 {
                let text = [text.as_bytes(), b"\0"].concat();
                archive.append(&Item::of("long", kind, &text).header(), &text[..]).unwrap();
            }
        }
        archive.append(&item.header(), item.content).unwrap();
    }
    archive.into_inner().unwrap()
}

/// The blobs of an image with these layers, and its manifest's descriptor.
pub(crate) fn image_of(layers: &[Vec<u8>], config: &Value) -> (Vec<Vec<u8>>, Value) {
    let describe = |blob: &[u8]| json!({ "digest": Digest::of(blob).to_string(), "size": blob.len() });
    let contents: Vec<String> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    let config =
        json!({ "architecture": "amd64", "os": "linux", "config": config, "rootfs": { "diff_ids": contents } });
    let config = config.to_string().into_bytes();
    let descriptors: Vec<Value> = layers.iter().map(|layer| describe(layer)).collect();
    let manifest = json!({ "schemaVersion": 2, "config": describe(&config), "layers": descriptors });
    let manifest = manifest.to_string().into_bytes();
    let descriptor = describe(&manifest);
    (layers.iter().cloned().chain([config, manifest]).collect(), descriptor)
}

/// Makes a layout of images: their blobs, and their descriptors.
pub(crate) fn layout_of(folder: &Path, blobs: &[Vec<u8>], manifests: &[Value]) {
    fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
    for blob in blobs {
        fs::write(folder.join("blobs/sha256").join(Digest::of(blob).hex()), blob).unwrap();
    }
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    fs::write(folder.join("index.json"), index.to_string()).unwrap();
}

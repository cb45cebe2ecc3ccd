//! Manifests, indexes and configurations: which blobs an image consists of, for which machine, and what runs in it
//! (image specification 1.1; Docker's manifest version 2, schema 2, which says the same).
//!
//! Left out: images for other machines than x86-64 with Linux, and the configuration's ports, volumes and stop signal.

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::blob::{Claim, Digest};

/// The most bytes of a manifest, an index or a configuration, as registries have it.
pub const MOST_BYTES: u64 = 4 << 20;
/// The most layers; container tools stop at 127.
const MOST_LAYERS: usize = 512;
/// Where a layout says its images' names.
const NAME: &str = "org.opencontainers.image.ref.name";

/// What a registry is asked for.
pub(crate) const MEDIA_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// A manifest or an index.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Clone, Debug, Deserialize)]
struct Descriptor {
    digest: String,
    size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: std::collections::HashMap<String, String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

impl Descriptor {
    fn claim(&self) -> anyhow::Result<Claim> {
        Ok(Claim { digest: Some(self.digest.parse()?), size: self.size })
    }
}

/// What a manifest or an index comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Manifest {
    /// An image, of these blobs.
    Image {
        /// What runs in it.
        config: Claim,
        /// From the lowest to the highest.
        layers: Vec<Claim>,
    },
    /// An index, and the manifest in it that is meant.
    Index(Claim),
}

impl Manifest {
    /// Reads one. `tag` is the image that is wanted of an index of several.
    ///
    /// # Errors
    ///
    /// It is not understood, or has none or several images that could be meant.
    pub fn read(bytes: &[u8], tag: Option<&str>) -> anyhow::Result<Self> {
        let document: Document = serde_json::from_slice(bytes).context("the manifest is not understood")?;
        let Some(config) = document.config else {
            return choose(&document.manifests, tag)?.claim().map(Self::Index);
        };
        ensure!(document.layers.len() <= MOST_LAYERS, "the image has more than {MOST_LAYERS} layers");
        let layers = document.layers.iter().map(Descriptor::claim).collect::<anyhow::Result<_>>()?;
        Ok(Self::Image { config: config.claim()?, layers })
    }
}

/// The image that is meant: of the given name, for this machine, and the only one.
fn choose<'a>(all: &'a [Descriptor], tag: Option<&str>) -> anyhow::Result<&'a Descriptor> {
    let name = |image: &Descriptor| image.annotations.get(NAME).cloned();
    let named = all.iter().filter(|image| tag.is_none() || name(image).as_deref() == tag);
    let ours = |image: &&Descriptor| {
        image.platform.as_ref().is_none_or(|platform| platform.os == "linux" && platform.architecture == "amd64")
    };
    let mut found: Vec<&Descriptor> = named.filter(ours).collect();
    // Tools repeat an image.
    found.dedup_by(|a, b| a.digest == b.digest);
    match found[..] {
        [only] => Ok(only),
        [] => {
            let name = |image: &Descriptor| {
                let platform = image.platform.as_ref();
                let platform = platform.map(|platform| format!("{}/{}", platform.os, platform.architecture));
                name(image).into_iter().chain(platform).collect::<Vec<_>>().join(" for ")
            };
            let tag = tag.map(|tag| format!(" {tag}")).unwrap_or_default();
            bail!("there is no image{tag} for linux/amd64 there: {}", list(all.iter().map(name)))
        }
        _ => match found.iter().filter_map(|image| name(image)).collect::<Vec<_>>() {
            names if names.len() == found.len() => {
                bail!("there are several images: say which one with :TAG, one of {}", list(names.into_iter()))
            }
            // An index of one image's variants: the first one suits best.
            _ => Ok(found[0]),
        },
    }
}

/// Others' words, for people.
fn list(words: impl Iterator<Item = String>) -> String {
    let text = words.take(20).collect::<Vec<_>>().join(", ");
    let text = if text.is_empty() { "there is nothing".to_owned() } else { text };
    text.chars().take(500).collect::<String>().replace(char::is_control, " ")
}

/// What `docker save` says of an image.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The names of an image's configuration and layers in a `docker save` archive.
///
/// # Errors
///
/// The list is not understood, or has none or several images that could be meant.
pub fn saved(bytes: &[u8], tag: Option<&str>) -> anyhow::Result<(String, Vec<String>)> {
    let all: Vec<Saved> = serde_json::from_slice(bytes).context("manifest.json is not understood")?;
    let tags = |image: &Saved| image.repo_tags.clone().unwrap_or_default();
    let names = list(all.iter().flat_map(tags));
    let mut found = all.into_iter().filter(|image| tag.is_none_or(|tag| tags(image).iter().any(|other| other == tag)));
    let Some(image) = found.next() else { bail!("that image is not in the archive; these are: {names}") };
    ensure!(found.next().is_none(), "there are several images: say which one with :TAG, one of {names}");
    ensure!(image.layers.len() <= MOST_LAYERS, "the image has more than {MOST_LAYERS} layers");
    Ok((image.config, image.layers))
}

/// An image's configuration, as far as it is used.
#[derive(Debug, Deserialize)]
struct Document2 {
    architecture: Option<String>,
    os: Option<String>,
    #[serde(default)]
    config: Option<Config>,
    rootfs: Option<Rootfs>,
}

#[derive(Debug, Deserialize)]
struct Rootfs {
    diff_ids: Vec<String>,
}

/// What runs in an image; the names are the specification's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Config {
    /// What is put before the command.
    pub entrypoint: Option<Vec<String>>,
    /// The command, unless another is given.
    pub cmd: Option<Vec<String>>,
    /// `NAME=VALUE` each.
    pub env: Option<Vec<String>>,
    /// `NAME|UID[:GROUP|GID]`.
    pub user: Option<String>,
    /// The folder that the command starts in.
    pub working_dir: Option<String>,
}

/// Reads an image's configuration. Returns what runs in it, and the digests of what is in its layers.
///
/// # Errors
///
/// It is not understood, or is of an image for another machine.
pub fn config(bytes: &[u8]) -> anyhow::Result<(Config, Vec<Digest>)> {
    let document: Document2 = serde_json::from_slice(bytes).context("the image's configuration is not understood")?;
    let rootfs = document.rootfs.context("this is no container image: its configuration names no layers")?;
    let known = |said: Option<&str>, wanted| said.is_none_or(|said| said.is_empty() || said == wanted);
    let (os, architecture) = (document.os.as_deref(), document.architecture.as_deref());
    if !known(os, "linux") || !known(architecture, "amd64") {
        let platform = list([os, architecture].into_iter().flatten().map(str::to_owned));
        bail!("the image is for {platform}, and machines here are linux, amd64: name an image for those");
    }
    ensure!(rootfs.diff_ids.len() <= MOST_LAYERS, "the image has more than {MOST_LAYERS} layers");
    let layers = rootfs.diff_ids.iter().map(|digest| digest.parse()).collect::<anyhow::Result<_>>()?;
    Ok((document.config.unwrap_or_default(), layers))
}

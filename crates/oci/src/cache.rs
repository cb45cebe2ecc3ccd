//! Images that are ready to use, in `$XDG_CACHE_HOME/vmm/images` or `~/.cache/vmm/images`.
//!
//! | file | what it holds |
//! |---|---|
//! | `HEX.squashfs` | the files of the image whose configuration has the digest HEX; its time of change is that of its last use |
//! | `HEX.json` | what runs in it |
//! | `index.json` | what references mean |
//! | `lock` | who changes anything has it locked |
//! | `new-*` | what somebody with the lock is making; what is left of one without it is removed |
//!
//! A configuration's digest covers those of all that is in the layers, so equal images are unpacked once. Files appear
//! whole, under their names, or not at all. Removing one does no harm to the machine that has it open.

use std::env;
use std::fs::{self, DirBuilder, File, FileTimes};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::blob::{Digest, NoRoom};
use crate::manifest::Config;

/// What the cache may hold in bytes, unless `VMM_IMAGE_CACHE` says.
const MOST: u64 = 10 << 30;
/// The most bytes of what is read whole.
const MOST_JSON: u64 = 16 << 20;
/// Somebody who was told of an image has so long to open it.
const FRESH: Duration = Duration::from_secs(60);

/// The cache.
pub struct Cache {
    folder: PathBuf,
    most: u64,
}

/// What a reference means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// The reference, from any folder.
    pub reference: String,
    /// The manifest's digest.
    pub digest: String,
    /// The configuration's, which is the name of its files.
    pub image: String,
    /// When it was last fetched, in seconds since 1970.
    pub fetched: u64,
}

/// An image that is ready to use.
#[derive(Debug, PartialEq, Eq)]
pub struct Ready {
    /// The file system image.
    pub path: PathBuf,
    /// What runs in it.
    pub config: Config,
}

/// The right to change the cache.
pub struct Locked<'a> {
    cache: &'a Cache,
    _lock: File,
}

impl Cache {
    /// The user's own.
    ///
    /// # Errors
    ///
    /// There is no place for it, or it is not the user's alone.
    pub fn of_user() -> anyhow::Result<Self> {
        let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        let most = match env::var("VMM_IMAGE_CACHE") {
            Ok(text) => {
                let size: kv::Size =
                    text.parse().ok().with_context(|| format!("VMM_IMAGE_CACHE={text:?} is no size: say 10G"))?;
                size.bytes()
            }
            Err(_) => MOST,
        };
        Self::at(base.context("there is no folder for images: set HOME")?.join("vmm/images"), most)
    }

    /// The one in `folder`, which is made if it is missing, and has to be private. It holds `most` bytes.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn at(folder: PathBuf, most: u64) -> anyhow::Result<Self> {
        let shown = folder.display();
        let made =
            DirBuilder::new().recursive(true).mode(0o700).create(&folder).and_then(|()| fs::symlink_metadata(&folder));
        let metadata = made.with_context(|| format!("cannot use the folder {shown}: set XDG_CACHE_HOME to another"))?;
        ensure!(metadata.is_dir(), "{shown} is no folder: remove it, or set XDG_CACHE_HOME");
        let user = rustix::process::geteuid().as_raw();
        ensure!(metadata.uid() == user, "{shown} is user {}'s and not yours: set XDG_CACHE_HOME", metadata.uid());
        ensure!(metadata.mode() & 0o077 == 0, "{shown} is open to other users: say `chmod 700 {shown}`");
        Ok(Self { folder, most })
    }

    /// What it may hold, in bytes.
    pub fn most(&self) -> u64 {
        self.most
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Waits until nobody else changes the cache.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn lock(&self) -> anyhow::Result<Locked<'_>> {
        let path = self.folder.join("lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.with_context(|| format!("cannot open {}", path.display()))?;
        flock(&lock, FlockOperation::LockExclusive).with_context(|| format!("cannot lock {}", path.display()))?;
        let locked = Locked { cache: self, _lock: lock };
        locked.sweep();
        Ok(locked)
    }

    /// The image with a configuration's digest, which has been used now.
    ///
    /// # Errors
    ///
    /// It is damaged.
    pub fn ready(&self, image: &str) -> anyhow::Result<Option<Ready>> {
        let path = self.image(image);
        let Ok(file) = File::open(&path) else { return Ok(None) };
        let Some(config) = read_json(&self.config(image))? else { return Ok(None) };
        // Nothing depends on it but which one goes first.
        let _ = file.set_times(FileTimes::new().set_modified(SystemTime::now()));
        Ok(Some(Ready { path, config }))
    }

    /// What all references mean.
    ///
    /// # Errors
    ///
    /// The list is damaged.
    pub fn names(&self) -> anyhow::Result<Vec<Named>> {
        Ok(read_json(&self.folder.join("index.json"))?.unwrap_or_default())
    }

    /// The bytes of an image, if it is there.
    pub fn size(&self, image: &str) -> Option<u64> {
        fs::metadata(self.image(image)).ok().map(|metadata| metadata.len())
    }

    fn image(&self, image: &str) -> PathBuf {
        self.folder.join(format!("{image}.squashfs"))
    }

    fn config(&self, image: &str) -> PathBuf {
        self.folder.join(format!("{image}.json"))
    }

    /// All images: when they were last used, how large they are and what they are called.
    fn images(&self) -> anyhow::Result<Vec<(SystemTime, u64, String)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name().into_string().unwrap_or_default();
            if let Some(image) = name.strip_suffix(".squashfs") {
                let metadata = entry.metadata()?;
                found.push((metadata.modified()?, metadata.len(), image.to_owned()));
            }
        }
        found.sort();
        Ok(found)
    }
}

impl Locked<'_> {
    /// Keeps an image: `make` writes its file system to the path that it is given.
    ///
    /// # Errors
    ///
    /// That of `make`, or the host's; nothing is left then.
    pub fn keep(
        &self,
        image: Digest,
        config: &Config,
        make: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let name = image.hex();
        // It is removed again, unless it is renamed. Its maker wants nothing to be there yet.
        let new = tempfile::TempPath::try_from_path(self.cache.folder.join(format!("new-{name}")))?;
        make(&new)?;
        self.write(&self.cache.config(&name), config)?;
        new.persist(self.cache.image(&name)).map_err(|error| NoRoom(error.error))?;
        File::open(&self.cache.folder).and_then(|folder| folder.sync_all()).map_err(NoRoom)?;
        Ok(())
    }

    /// Notes what a reference means.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn note(&self, reference: &str, digest: Digest, image: Digest) -> anyhow::Result<()> {
        let mut names = self.cache.names()?;
        names.retain(|named| named.reference != reference);
        let fetched = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        names.push(Named { reference: reference.to_owned(), digest: digest.to_string(), image: image.hex(), fetched });
        self.rename(&names)?;
        self.make_room(&image.hex())
    }

    /// Forgets a reference, or an image by its digest or its manifest's; an image that has no other name goes. Returns
    /// whether there was such a thing.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn forget(&self, what: &str) -> anyhow::Result<bool> {
        let mut names = self.cache.names()?;
        let before = names.len();
        names.retain(|named| {
            named.reference != what && named.digest != what && format!("sha256:{}", named.image) != what
        });
        self.rename(&names)?;
        self.prune(false)?;
        Ok(names.len() < before)
    }

    /// Removes the images without a name, or all. Returns how many bytes there are more.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn prune(&self, all: bool) -> anyhow::Result<u64> {
        if all {
            self.rename(&[])?;
        }
        let names = self.cache.names()?;
        let mut freed = 0;
        for (_, size, image) in self.cache.images()? {
            if !names.iter().any(|named| named.image == image) {
                self.remove(&image)?;
                freed += size;
            }
        }
        Ok(freed)
    }

    /// Removes images until the rest is small enough, those first that were not used for longest.
    fn make_room(&self, but: &str) -> anyhow::Result<()> {
        let images = self.cache.images()?;
        let mut sum: u64 = images.iter().map(|(_, size, _)| size).sum();
        for (used, size, image) in images {
            if sum <= self.cache.most {
                break;
            }
            if image != but && used.elapsed().is_ok_and(|age| age > FRESH) {
                self.remove(&image)?;
                sum -= size;
            }
        }
        let mut names = self.cache.names()?;
        names.retain(|named| self.cache.size(&named.image).is_some());
        self.rename(&names)
    }

    fn remove(&self, image: &str) -> anyhow::Result<()> {
        for path in [self.cache.image(image), self.cache.config(image)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn rename(&self, names: &[Named]) -> anyhow::Result<()> {
        self.write(&self.cache.folder.join("index.json"), &names)
    }

    fn write(&self, path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
        let write = || -> std::io::Result<()> {
            let mut file = NamedTempFile::with_prefix_in("new-", &self.cache.folder)?;
            file.write_all(&serde_json::to_vec(value)?)?;
            file.as_file().sync_all()?;
            file.persist(path)?;
            Ok(())
        };
        write().map_err(|error| NoRoom(error).into())
    }

    /// Removes what those have left that were killed.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.cache.folder).into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(b"new-") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> anyhow::Result<Option<T>> {
    let shown = path.display();
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.with_context(|| format!("cannot open {shown}"))?,
    };
    let mut bytes = Vec::new();
    file.take(MOST_JSON + 1).read_to_end(&mut bytes).with_context(|| format!("cannot read {shown}"))?;
    match serde_json::from_slice(&bytes) {
        Ok(value) if bytes.len() as u64 <= MOST_JSON => Ok(Some(value)),
        _ => bail!("{shown} is damaged: remove it"),
    }
}

#[cfg(test)]
mod tests;

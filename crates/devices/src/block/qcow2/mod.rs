//! qcow2 images, by the imago crate: copy on write, backing images, overlays.
//!
//! Whoever made the image is an adversary: its header is checked before imago allocates what it says, the chain of
//! backing images is bounded, without circles, and stays in one folder, and no image may name a file for its data.
//! Backing images are opened here, one by one, so that each is locked; imago opens nothing by itself.
//!
//! Left out on purpose: encryption, compression other than deflate, external data files, internal snapshots, live
//! changes of size.
#![allow(unsafe_code, reason = "guest memory is handed to imago as volatile slices")]

mod header;

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use anyhow::{Context as _, bail};
use imago::file::File as Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::raw::Raw;
use imago::{FormatAccess, FormatCreateBuilder as _, StorageOpenOptions};
use vm_memory::VolatileSlice;

use super::job::{Job, Op};
use super::raw::open_locked;
use super::spec::{BlockSpec, Format, Opened};
use super::sys;

type Layer = imago::qcow2::Qcow2<Storage, Arc<FormatAccess<Storage>>>;

/// More backing images than this, one behind the other, are a mistake.
const DEEPEST: usize = 16;

/// An open qcow2 image.
#[derive(Debug)]
pub(super) struct Qcow2 {
    /// A discard must have the image for itself; all else shares it.
    access: RwLock<FormatAccess<Storage>>,
    writable: bool,
}

impl Qcow2 {
    /// Opens what `spec` names: a qcow2 image, or an overlay over an image of either format.
    pub(super) fn open(spec: &BlockSpec) -> anyhow::Result<Self> {
        let mut chain = Chain { opened: spec.opened.clone(), ..Chain::default() };
        sys::ignore_file_size_signal();
        let access = match &spec.overlay {
            None => {
                let folder = spec.backing_folder.as_deref().or_else(|| spec.path.parent());
                chain.qcow2(&spec.path, !spec.readonly, folder)?
            }
            Some(overlay) => {
                let base = chain.base(spec)?;
                open_overlay(&mut chain, overlay, spec, base)?
            }
        };
        if !access.size().is_multiple_of(spec.block_size().into()) {
            bail!("{}: its size is no whole number of {}-byte blocks", spec.path.display(), spec.block_size());
        }
        Ok(Self { access: RwLock::new(access), writable: !spec.readonly })
    }

    pub(super) fn size(&self) -> u64 {
        self.read().size()
    }

    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Does `job`, all of it.
    pub(super) fn execute(&self, job: &Job) -> io::Result<u64> {
        let Job { op, offset, length, .. } = *job;
        match op {
            Op::Read => {
                let slices = volatile(job);
                let (buffers, _guard) = IoVectorMut::from_volatile_slice(&slices);
                self.read().readv(buffers, offset)?;
            }
            Op::Write | Op::WriteThrough => {
                let slices = volatile(job);
                let (buffers, _guard) = IoVector::from_volatile_slice(&slices);
                let image = self.read();
                image.writev(buffers, offset)?;
                if op == Op::WriteThrough {
                    image.flush()?;
                    image.sync()?;
                }
            }
            Op::Flush => {
                let image = self.read();
                image.flush()?;
                image.sync()?;
            }
            Op::Discard => self.write().discard_to_any(offset, length)?,
            Op::Punch => self.write().discard_to_zero(offset, length)?,
            Op::Zero => self.read().write_zeroes(offset, length)?,
        }
        Ok(length)
    }

    fn read(&self) -> RwLockReadGuard<'_, FormatAccess<Storage>> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, FormatAccess<Storage>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn volatile(job: &Job) -> Vec<VolatileSlice<'_>> {
    let slice = |buffer: &libc::iovec| {
        // SAFETY: the buffer is guest memory that stays mapped for as long as the job exists, and volatile slices are
        // made for memory that the guest may change meanwhile.
        unsafe { VolatileSlice::new(buffer.iov_base.cast(), buffer.iov_len) }
    };
    job.buffers().iter().map(slice).collect()
}

/// The images that have been opened for one disk, by device and inode.
#[derive(Default)]
struct Chain {
    seen: HashSet<(u64, u64)>,
    /// The first of them, if somebody has opened it.
    opened: Option<Opened>,
}

impl Chain {
    /// The image below an overlay, which is only read.
    fn base(&mut self, spec: &BlockSpec) -> anyhow::Result<FormatAccess<Storage>> {
        let path = &spec.path;
        if spec.format == Some(Format::Qcow2) {
            return self.qcow2(path, false, spec.backing_folder.as_deref().or_else(|| path.parent()));
        }
        let file = self.file(path, false)?;
        if spec.format.is_none() && header::has_magic(&file) {
            bail!(
                "{} is a qcow2 image: say format=qcow2, or format=raw if it is to be read byte for byte",
                path.display()
            );
        }
        raw(file, path)
    }

    /// A qcow2 image and, through its header, those behind it, which must lie in `folder`.
    fn qcow2(&mut self, path: &Path, write: bool, folder: Option<&Path>) -> anyhow::Result<FormatAccess<Storage>> {
        let file = self.file(path, write)?;
        let name = path.display();
        header::check(&file).with_context(|| format!("The disk image {name} is not usable"))?;
        let mut layer = layer(file, path, write)?;
        let backing = layer.implicit_backing_file().cloned();
        let format = layer.implicit_backing_format().cloned();
        let backing = match backing {
            None => None,
            Some(named) => {
                let path = resolve(path, Path::new(&named), folder)?;
                Some(Arc::new(match format.as_deref() {
                    Some("qcow2") => self.qcow2(&path, false, folder)?,
                    Some("raw" | "file") => {
                        let file = self.file(&path, false)?;
                        raw(file, &path)?
                    }
                    Some(format) => {
                        bail!("{name} has a backing image of the format {format:?}: only raw and qcow2 will do")
                    }
                    None => bail!(
                        "{name} does not say of which format its backing image is: use `qemu-img rebase -u -F raw -b {named} \
                         {name}`, or -F qcow2"
                    ),
                }))
            }
        };
        layer.set_backing(backing);
        Ok(FormatAccess::new(layer))
    }

    /// Opens a file for the first and only time.
    fn file(&mut self, path: &Path, write: bool) -> anyhow::Result<File> {
        let file = open_locked((path, self.opened.take().as_ref()), write, false)?;
        self.add(&file, path)?;
        Ok(file)
    }

    fn add(&mut self, file: &File, path: &Path) -> anyhow::Result<()> {
        let name = path.display();
        let metadata = file.metadata().with_context(|| format!("Cannot examine the disk image {name}"))?;
        if !self.seen.insert((metadata.dev(), metadata.ino())) {
            bail!(
                "{name} is, by way of its backing images, its own backing image: name an image whose chain has an end"
            );
        }
        if self.seen.len() > DEEPEST {
            bail!("{name} is the {DEEPEST}th backing image of a chain: merge some of them with `qemu-img commit`");
        }
        Ok(())
    }
}

/// Opens one qcow2 file without what it names.
fn layer(file: File, path: &Path, write: bool) -> anyhow::Result<Layer> {
    let name = path.display();
    let mut layer = Layer::open_image(storage(file, path, write)?, write)
        .with_context(|| format!("The qcow2 image {name} is not usable: examine it with `qemu-img check {name}`"))?;
    if layer.requires_external_data_file() {
        bail!("{name} keeps its data in another file, which is not possible: convert it with `qemu-img convert`");
    }
    layer.set_data_file(None);
    Ok(layer)
}

fn raw(file: File, path: &Path) -> anyhow::Result<FormatAccess<Storage>> {
    let image = Raw::open_image(storage(file, path, false)?, false);
    image.map(FormatAccess::new).with_context(|| format!("Cannot open the disk image {}", path.display()))
}

fn storage(file: File, path: &Path, write: bool) -> anyhow::Result<Storage> {
    let options = StorageOpenOptions::new().filename(path).write(write);
    Storage::from_open_file(file, options).with_context(|| format!("Cannot open the disk image {}", path.display()))
}

/// Where the backing image is that the header of the image at `path` names, which must be in `folder`.
fn resolve(path: &Path, named: &Path, folder: Option<&Path>) -> anyhow::Result<PathBuf> {
    let name = path.display();
    let absolute = path.parent().unwrap_or(Path::new("")).join(named);
    let real = |path: &Path| {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        fs::canonicalize(path).with_context(|| format!("Cannot find {}, for the disk image {name}", path.display()))
    };
    let found = real(&absolute)?;
    let folder = real(folder.unwrap_or(Path::new("")))?;
    if !found.starts_with(&folder) {
        bail!(
            "{name} has a backing image outside of {}, {}: if that is meant, say backing-folder=FOLDER for one that holds both",
            folder.display(),
            found.display()
        );
    }
    Ok(found)
}

/// Opens the overlay, or makes it, over `base`.
fn open_overlay(
    chain: &mut Chain,
    overlay: &Path,
    spec: &BlockSpec,
    base: FormatAccess<Storage>,
) -> anyhow::Result<FormatAccess<Storage>> {
    let name = overlay.display();
    let keep = spec.keep.unwrap_or(true);
    let below = fs::canonicalize(&spec.path).with_context(|| format!("Cannot find {}", spec.path.display()))?;
    let created = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(overlay);
    match created {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && keep => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            bail!("The overlay {name} is there already, and keep=off would delete it: name one that is not")
        }
        other => drop(other.with_context(|| format!("Cannot make the overlay {name}: choose another path"))?),
    }
    let file = open_locked((overlay, None), true, false)?;
    if !keep {
        // Its name goes at once, so that however this process ends, the file goes with it.
        fs::remove_file(overlay).with_context(|| format!("Cannot unlink the overlay {name}"))?;
    }
    chain.add(&file, overlay)?;
    let again = || file.try_clone().with_context(|| format!("Cannot open the overlay {name}"));
    // Empty is what is new, and what somebody stopped making.
    if file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
        let format = if spec.format == Some(Format::Qcow2) { "qcow2" } else { "raw" };
        let text = below.to_str().with_context(|| format!("{} is not UTF-8: rename it", below.display()))?;
        Layer::create_builder(storage(again()?, overlay, true)?)
            .size(base.size())
            .backing(text.into(), format.into())
            .create()
            .with_context(|| format!("Cannot make the overlay {name}"))?;
    }
    header::check(&file).with_context(|| format!("The overlay {name} is not usable: name another, or delete it"))?;
    let mut layer = layer(again()?, overlay, true)?;
    let over = layer.implicit_backing_file().and_then(|named| {
        let folder = overlay.parent().unwrap_or(Path::new(""));
        fs::canonicalize(folder.join(named)).ok()
    });
    if over.as_ref() != Some(&below) {
        bail!("{name} is no overlay over {}: name another, or delete it", below.display());
    }
    layer.set_backing(Some(Arc::new(base)));
    Ok(FormatAccess::new(layer))
}

#[cfg(test)]
mod tests;

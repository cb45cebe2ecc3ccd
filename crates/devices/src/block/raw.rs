//! A raw image: a file, or a block device of the host, byte for byte what the guest sees.
//!
//! It is locked, for one writer or any number of readers, for as long as it is open. What begins like a qcow2 image is
//! refused unless `format=raw` was said: a guest that wrote such a header into its raw disk could otherwise have us
//! open any file as its backing image at the next start.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, bail};

use super::job::{Job, Op};
use super::spec::{BlockSpec, Opened};
use super::sys;

/// The first bytes of a qcow2 image.
pub(super) const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// An open raw image.
#[derive(Debug)]
pub(super) struct Raw {
    pub(super) file: File,
    /// Bytes, a whole number of blocks.
    pub(super) size: u64,
    /// Ranges can be given back to the host.
    pub(super) can_punch: bool,
    /// Writes and reads wait for no disk.
    pub(super) in_memory: bool,
    /// With `O_DIRECT`, what addresses and lengths in memory must be a multiple of.
    pub(super) memory_alignment: Option<usize>,
}

impl Raw {
    pub(super) fn open(spec: &BlockSpec) -> anyhow::Result<Self> {
        let name = spec.path.display();
        let file = open_locked((&spec.path, spec.opened.as_ref()), !spec.readonly, spec.direct)?;
        if spec.format.is_none() && has_magic(&file, &spec.path)? {
            bail!(
                "{name} is a qcow2 image: say format=qcow2, or format=raw if the guest is to see the file byte for byte"
            );
        }
        let mut memory_alignment = None;
        if spec.direct {
            let (memory, offset) = sys::direct_alignment(&file);
            if offset > spec.block_size() {
                bail!("{name} needs block-size={offset} for direct: say that, or drop direct");
            }
            memory_alignment = usize::try_from(memory).ok();
        }
        let size = size(&file, &spec.path, spec.block_size())?;
        let in_memory = !spec.direct && sys::in_memory(&file);
        let is_device = file.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device());
        // A device beyond whose end nothing can be tried says so at the first request.
        let can_punch = !spec.readonly && (is_device || sys::can_punch(&file, size));
        sys::ignore_file_size_signal();
        Ok(Self { file, size, can_punch, in_memory, memory_alignment })
    }

    /// Does `job` at once, as far as it goes.
    pub(super) fn execute(&self, job: &Job) -> io::Result<u64> {
        match self.memory_alignment {
            Some(alignment) if !job.is_aligned(alignment) => self.bounce(job),
            _ => sys::execute(&self.file, job),
        }
    }

    /// Whether the job can go to the kernel as it is.
    pub(super) fn is_aligned(&self, job: &Job) -> bool {
        self.memory_alignment.is_none_or(|alignment| job.is_aligned(alignment))
    }

    /// Does a piece of a job whose memory the guest has not aligned as `O_DIRECT` wants it, by way of memory that is.
    /// No driver that we know does that to us, so it is slow.
    fn bounce(&self, job: &Job) -> io::Result<u64> {
        let mut page = Page([0; PAGE]);
        let length = usize::try_from(job.length).unwrap_or(usize::MAX).min(PAGE);
        let piece = &mut page.0[..length];
        match job.op {
            Op::Read => {
                let count = self.file.read_at(piece, job.offset)?;
                sys::scatter(&piece[..count], job);
                Ok(count as u64)
            }
            _ => {
                sys::gather(job, piece);
                let count = self.file.write_at(piece, job.offset)?;
                if job.op == Op::WriteThrough {
                    self.file.sync_data()?;
                }
                Ok(count as u64)
            }
        }
    }

    /// The size that the file has now, a whole number of blocks.
    pub(super) fn size_now(&self, path: &Path, block_size: u32) -> anyhow::Result<u64> {
        size(&self.file, path, block_size)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        sys::unlock(&self.file);
    }
}

const PAGE: usize = 4096;

/// Memory that suits every `O_DIRECT`.
#[repr(align(4096))]
struct Page([u8; PAGE]);

/// Opens an image, which is a file or a block device, and locks it. One that somebody has opened must be open for what
/// is wanted of it.
pub(super) fn open_locked(image: (&Path, Option<&Opened>), write: bool, direct: bool) -> anyhow::Result<File> {
    let (path, opened) = image;
    let name = path.display();
    let direct = if direct { libc::O_DIRECT } else { 0 };
    let file = match opened {
        Some(Opened(file)) => {
            let (readable, writable) =
                sys::access(file).with_context(|| format!("Cannot examine the disk image {name}"))?;
            if !readable || (write && !writable) {
                let missing = if readable { "writing, which the drive is for" } else { "reading" };
                bail!("The descriptor of the disk image {name} is not open for {missing}: open it for both");
            }
            file.try_clone().with_context(|| format!("Cannot duplicate the descriptor of the disk image {name}"))?
        }
        None => OpenOptions::new()
            .read(true)
            .write(write)
            // A pipe is refused below, and opening one shall not wait for its other end.
            .custom_flags(direct | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(|error| explain(error, path, write, direct != 0))?,
    };
    let kind = file.metadata().with_context(|| format!("Cannot examine the disk image {name}"))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        bail!("{name} is neither a file nor a block device: name one of these as the disk image");
    }
    // io_uring would report that it has to wait, instead of waiting.
    sys::set_flags(&file, direct).with_context(|| format!("Cannot set up the disk image {name}"))?;
    match sys::lock(&file, write) {
        Ok(()) => Ok(file),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            let others = if write { "another VM uses it" } else { "another VM writes to it" };
            bail!(
                "The disk image {name} is locked, {others}: stop that one (`lsof {name}` names it), have all of them use it \
                 readonly, or give each an overlay of its own (overlay=FILE)"
            )
        }
        // Without locks, as on some network file systems, a disk is still a disk.
        Err(error) => {
            log::warn!("Cannot lock the disk image {name}, let no other VM use it: {error}");
            Ok(file)
        }
    }
}

fn explain(error: io::Error, path: &Path, write: bool, direct: bool) -> anyhow::Error {
    let cure = match error.raw_os_error() {
        Some(libc::ENOENT) => "it does not exist, check the path or make it first (`truncate -s 8G FILE`)",
        Some(libc::EISDIR) => "it is a directory, name a file in it",
        Some(libc::EACCES | libc::EPERM | libc::EROFS) if write => {
            "this user may not write to it, say readonly or change its mode"
        }
        Some(libc::EACCES | libc::EPERM) => "this user may not read it, change its mode",
        Some(libc::EINVAL) if direct => "its file system has no direct access, drop direct",
        Some(libc::ENXIO) => "it is neither a file nor a block device",
        Some(libc::EBUSY) => "the host uses it, unmount it first",
        _ => "choose another path",
    };
    anyhow::Error::new(error).context(format!("Cannot open the disk image {}: {cure}", path.display()))
}

/// Bytes in an image, which must be a whole number of blocks.
fn size(file: &File, path: &Path, block_size: u32) -> anyhow::Result<u64> {
    let name = path.display();
    // The metadata of a block device say nothing of its size.
    let size = (&mut &*file).seek(SeekFrom::End(0)).with_context(|| format!("Cannot tell the size of {name}"))?;
    if size == 0 {
        bail!("The disk image {name} is empty: give it a size first (`truncate -s 8G {name}`)");
    }
    if !size.is_multiple_of(block_size.into()) {
        bail!(
            "The disk image {name} has {size} bytes, which is no whole number of {block_size}-byte blocks: if it is \
             complete, fill it up with `truncate -s %{block_size} {name}`"
        );
    }
    Ok(size)
}

/// Whether the file begins like a qcow2 image.
fn has_magic(file: &File, path: &Path) -> anyhow::Result<bool> {
    let mut page = Page([0; PAGE]);
    let read = file.read_at(&mut page.0, 0);
    read.with_context(|| format!("Cannot read the disk image {}", path.display()))?;
    Ok(page.0.starts_with(&QCOW2_MAGIC))
}

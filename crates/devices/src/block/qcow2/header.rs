//! What a qcow2 header claims, held against the file before anything is allocated for it (QEMU's `docs/interop/qcow2`).

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, bail};

use crate::block::raw::QCOW2_MAGIC;

/// The bytes of a version 2 header.
const LENGTH: usize = 72;
/// The largest top-level table, which is also QEMU's limit.
const LARGEST_TABLE: u64 = 32 << 20;
/// An entry's bits that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Whether the file begins like a qcow2 image.
pub(super) fn has_magic(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).is_ok() && magic == QCOW2_MAGIC
}

/// Checks that `file` is a qcow2 image, and that the tables of which its header speaks lie in it.
pub(super) fn check(file: &File) -> anyhow::Result<()> {
    if !has_magic(file) {
        bail!("it is not a qcow2 image: drop format=qcow2 if it is raw");
    }
    let length = (&mut &*file).seek(SeekFrom::End(0)).context("its size cannot be told")?;
    let mut header = [0; LENGTH];
    file.read_exact_at(&mut header, 0).context("it ends within its header: copy it again")?;
    let word = |at: usize| -> u64 { header[at..at + 4].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)) };
    let long = |at: usize| word(at) << 32 | word(at + 4);
    let (version, cluster_bits, size) = (word(4), word(20), long(24));
    if !(2..=3).contains(&version) {
        bail!("it is of version {version}, and only 2 and 3 are known: convert it with `qemu-img convert`");
    }
    if !(9..=21).contains(&cluster_bits) {
        bail!("its header is corrupt, copy it again: it has clusters of 2^{cluster_bits} bytes");
    }
    if word(32) != 0 {
        bail!("it is encrypted, which is not possible here: decrypt it with `qemu-img convert`");
    }
    let cluster = 1 << cluster_bits;
    let (l1, entries) = (long(40), word(36));
    let inside = |what: &str, offset: u64, bytes: u64| {
        if bytes > LARGEST_TABLE {
            bail!("its header is corrupt, copy it again: its {what} has {bytes} bytes");
        }
        match offset.checked_add(bytes) {
            Some(end) if end <= length => Ok(()),
            _ => bail!("it is shorter than its header says: copy it again, this one has {length} bytes"),
        }
    };
    inside("L1 table", l1, entries * 8)?;
    inside("refcount table", long(48), word(56) * cluster)?;
    // Each entry of the L1 table stands for a cluster full of entries of 8 bytes, each of which stands for a cluster.
    if size.div_ceil(cluster * (cluster / 8)) > entries {
        bail!("its header is corrupt, copy it again: its L1 table is too small for {size} bytes");
    }
    check_entries(file, l1, entries, length, cluster)
}

/// Checks that the L2 tables to which the L1 table leads lie in the file.
fn check_entries(file: &File, table: u64, entries: u64, length: u64, cluster: u64) -> anyhow::Result<()> {
    let mut raw = vec![0; usize::try_from(entries * 8).context("its L1 table does not fit in memory")?];
    file.read_exact_at(&mut raw, table).context("its L1 table cannot be read")?;
    let (entries, _) = raw.as_chunks::<8>();
    for entry in entries {
        let offset = u64::from_be_bytes(*entry) & OFFSET;
        if offset != 0 && (!offset.is_multiple_of(cluster) || offset.saturating_add(cluster) > length) {
            bail!(
                "its L1 table leads to {offset:#x}, and it has {length} bytes: it is corrupt or was not copied in full, try \
                 `qemu-img check -r all`"
            );
        }
    }
    Ok(())
}

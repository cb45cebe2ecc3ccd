//! Writes a tree as one read-only file system image: a tar archive, in order and without surprises, for sqfstar, which
//! knows owners, devices, hard links and attributes without being root.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;

use anyhow::{Context as _, bail, ensure};
use tar::{EntryType, Header};

use crate::blob::NoRoom;
use crate::layer::{Kind, Meta};
use crate::local::Part;
use crate::tree::{Node, Tree};

/// What makes the image. lz4 is read faster than a disk, and every kernel that reads squashfs has it.
const PROGRAM: &str = "sqfstar";
const OPTIONS: [&str; 5] = ["-comp", "lz4", "-no-progress", "-quiet", "-no-duplicates"];
/// The archive's unit.
const BLOCK: usize = 512;
/// What is read of sqfstar's complaints.
const MOST_WORDS: u64 = 64 << 10;

/// Writes `tree`, whose files' contents are in `layers`, to a new file at `path`.
///
/// # Errors
///
/// There is no sqfstar, or no room; the file may be there in parts then.
pub fn write(tree: &Tree, layers: &[File], path: &Path) -> anyhow::Result<()> {
    let mut said = tempfile::tempfile().map_err(NoRoom)?;
    let root = tree.files().find(|(path, _)| path.is_empty()).map(|(_, node)| node.meta.clone());
    let Meta { mode, uid, gid, mtime, .. } = root.unwrap_or(Meta { mode: 0o755, ..Meta::default() });
    let mut command = Command::new(PROGRAM);
    command.args(OPTIONS).args(["-root-mode", &format!("{mode:o}")]);
    for (option, number) in [("-root-uid", uid), ("-root-gid", gid), ("-root-time", mtime)] {
        command.arg(option).arg(number.to_string());
    }
    // Its own default is the time of the day.
    command.arg("-mkfs-time").arg("0").arg(path);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(said.try_clone().map_err(NoRoom)?);
    let child = command.spawn();
    let mut child = child.with_context(|| format!("cannot run {PROGRAM}: say `apt install squashfs-tools`"))?;
    let input = child.stdin.take().context("sqfstar has no input")?;
    let written = archive(tree, layers, BufWriter::with_capacity(256 << 10, input));
    let status = child.wait().with_context(|| format!("cannot wait for {PROGRAM}"))?;
    if !status.success() {
        let words = last_words(&mut said);
        // It does not always say why it could not write.
        let full = ["No space left", "Disk quota", "File too large", "Failed to write to output filesystem"];
        if full.iter().any(|sign| words.contains(sign)) {
            bail!(NoRoom(io::Error::new(io::ErrorKind::StorageFull, words)));
        }
        bail!("{PROGRAM} has failed ({status}): {words}");
    }
    written?;
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| NoRoom(error).into())
}

/// The last thing that sqfstar said.
fn last_words(said: &mut File) -> String {
    let length = said.metadata().map_or(0, |metadata| metadata.len());
    let mut bytes = vec![0; usize::try_from(length.min(MOST_WORDS)).unwrap_or(0)];
    let read = said.read_exact_at(&mut bytes, length.saturating_sub(MOST_WORDS));
    let text = String::from_utf8_lossy(if read.is_ok() { &bytes } else { b"" }).into_owned();
    // It ends in advice on how to try again, which is of no use here.
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<&str> = lines.filter(|line| line.contains("FATAL") || line.contains("rror")).collect();
    lines.join("; ").replace(char::is_control, " ").chars().take(500).collect()
}

/// Writes the tree as a tar archive.
fn archive(tree: &Tree, layers: &[File], mut out: impl Write) -> anyhow::Result<()> {
    let mut links: HashMap<*const Node, &[u8]> = HashMap::new();
    for (path, node) in tree.files().filter(|(path, _)| !path.is_empty()) {
        if Rc::strong_count(node) > 1 {
            if let Some(first) = links.get(&Rc::as_ptr(node)) {
                head(&mut out, path, &Kind::Link(first.to_vec()), &node.meta)?;
                continue;
            }
            links.insert(Rc::as_ptr(node), path);
        }
        head(&mut out, path, &node.kind, &node.meta)?;
        if let Kind::File { offset, length } = node.kind {
            let layer = layers.get(node.layer).context("a file is in no layer")?;
            let copied = io::copy(&mut Part { file: layer, at: offset, left: length }, &mut out)?;
            ensure!(copied == length, "a layer has become shorter");
            pad(&mut out, length)?;
        }
    }
    out.write_all(&[0; 2 * BLOCK])?;
    Ok(out.flush()?)
}

/// Writes the header of a file, and before it what does not fit.
fn head(out: &mut impl Write, path: &[u8], kind: &Kind, meta: &Meta) -> io::Result<()> {
    let (entry_type, link, length) = match kind {
        Kind::Folder => (EntryType::Directory, None, 0),
        Kind::File { length, .. } => (EntryType::Regular, None, *length),
        Kind::Symlink(target) => (EntryType::Symlink, Some(target), 0),
        Kind::Link(target) => (EntryType::Link, Some(target), 0),
        Kind::Character(..) => (EntryType::Char, None, 0),
        Kind::Block(..) => (EntryType::Block, None, 0),
        Kind::Pipe => (EntryType::Fifo, None, 0),
    };
    let mut header = Header::new_ustar();
    header.set_entry_type(entry_type);
    header.set_mode(meta.mode);
    header.set_uid(meta.uid.into());
    header.set_gid(meta.gid.into());
    header.set_mtime(meta.mtime.into());
    header.set_size(length);
    if let Kind::Character(major, minor) | Kind::Block(major, minor) = kind {
        header.set_device_major(*major)?;
        header.set_device_minor(*minor)?;
    }
    let mut records = Vec::new();
    if !fit(&mut header.as_old_mut().name, path) {
        record(&mut records, b"path", path);
    }
    if let Some(link) = link.filter(|link| !fit(&mut header.as_old_mut().linkname, link)) {
        record(&mut records, b"linkpath", link);
    }
    if !matches!(kind, Kind::Link(_)) {
        for (name, value) in &meta.xattrs {
            record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
    }
    if !records.is_empty() {
        let mut extension = Header::new_ustar();
        extension.set_entry_type(EntryType::XHeader);
        fit(&mut extension.as_old_mut().name, b"pax");
        extension.set_size(records.len() as u64);
        extension.set_cksum();
        out.write_all(extension.as_bytes())?;
        out.write_all(&records)?;
        pad(out, records.len() as u64)?;
    }
    header.set_cksum();
    out.write_all(header.as_bytes())
}

/// Puts a name into its field, if it fits.
fn fit(field: &mut [u8; 100], name: &[u8]) -> bool {
    let part = name.len().min(field.len());
    field[..part].copy_from_slice(&name[..part]);
    part == name.len()
}

/// A pax record: its own length, a space, the key, an equals sign, the value and a line's end.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} ").as_bytes());
    records.extend_from_slice(&[key, b"=", value, b"\n"].concat());
}

/// Fills the last block.
fn pad(out: &mut impl Write, length: u64) -> io::Result<()> {
    let over = usize::try_from(length % BLOCK as u64).unwrap_or(0);
    out.write_all(&[0; BLOCK][..(BLOCK - over) % BLOCK])
}

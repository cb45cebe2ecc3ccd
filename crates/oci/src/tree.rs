//! The layers of an image as one tree, in memory: what the guest will see (image specification 1.1, "Applying
//! Changesets" and "Whiteouts").
//!
//! Nothing is made on the host here: paths are keys of a map, and links lead to other keys or nowhere.

use std::collections::BTreeMap;
use std::rc::Rc;

use anyhow::{Context as _, bail, ensure};

use crate::layer::{self, Entry, MOST_BYTES, MOST_FILES, MOST_PATH, Meta, printable};

/// As many symbolic links as Linux follows in one path.
const MOST_LINKS: usize = 40;

/// What names begin with that remove something.
const WHITEOUT: &[u8] = b".wh.";
/// Removes all that lower layers have in its folder.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names of this kind are old tools' own.
const RESERVED: &[u8] = b".wh..wh.";

/// A tree of files.
#[derive(Debug, Default)]
pub struct Tree {
    /// By path; the root's is empty. A folder comes before what is in it, and is there if that is.
    files: BTreeMap<Vec<u8>, Rc<Node>>,
    /// Of all paths and attributes.
    bytes: usize,
}

/// A file of any kind. Hard links are several paths that have the same one.
#[derive(Debug, PartialEq, Eq)]
pub struct Node {
    /// What it is; never [`layer::Kind::Link`].
    pub kind: layer::Kind,
    /// The number of the layer that holds its content.
    pub layer: usize,
    /// Who may do what with it.
    pub meta: Meta,
}

impl Tree {
    /// Puts a layer on top: first it removes, then it adds, in whichever order its entries are.
    ///
    /// # Errors
    ///
    /// Names the entry that cannot be there, and says why.
    pub fn add(&mut self, layer: usize, entries: Vec<Entry>) -> anyhow::Result<()> {
        let (removing, adding): (Vec<_>, Vec<_>) =
            entries.into_iter().partition(|entry| split(&entry.path).1.starts_with(WHITEOUT));
        for entry in removing {
            self.white_out(&entry.path).with_context(|| format!("the entry {}", printable(&entry.path)))?;
        }
        for entry in adding {
            let shown = printable(&entry.path);
            self.take(layer, entry).with_context(|| format!("the entry {shown}"))?;
        }
        Ok(())
    }

    /// All files, each folder before what is in it.
    pub fn files(&self) -> impl Iterator<Item = (&[u8], &Rc<Node>)> {
        self.files.iter().map(|(path, node)| (path.as_slice(), node))
    }

    /// What a path leads to, if all links in it are followed.
    pub fn find(&self, path: &[u8]) -> Option<&Node> {
        let mut place = self.place(path).ok()?;
        for _ in 0..MOST_LINKS {
            let node = self.files.get(&place)?;
            let layer::Kind::Symlink(target) = &node.kind else { return Some(node) };
            let folder = if target.starts_with(b"/") { &[][..] } else { split(&place).0 };
            place = self.place(&join(folder, target)).ok()?;
        }
        None
    }

    /// Makes a folder where there is nothing, as container tools do with the one that the command starts in.
    ///
    /// # Errors
    ///
    /// Something else is in its way.
    pub fn make_folder(&mut self, path: &[u8]) -> anyhow::Result<()> {
        let place = self.place(path)?;
        match self.files.get(&place) {
            Some(_) => Ok(()),
            None => self.insert(place, Rc::new(Node::folder())),
        }
    }

    fn white_out(&mut self, path: &[u8]) -> anyhow::Result<()> {
        let (folder, name) = split(path);
        if name == OPAQUE {
            let folder = self.place(folder)?;
            self.remove_below(&folder);
        } else if !name.starts_with(RESERVED) {
            let name = &name[WHITEOUT.len()..];
            ensure!(!matches!(name, [] | b"." | b".."), "it removes nothing that can be there");
            let place = self.place(&join(folder, name))?;
            self.remove(&place);
        }
        Ok(())
    }

    fn take(&mut self, layer: usize, entry: Entry) -> anyhow::Result<()> {
        let Entry { path, kind, meta } = entry;
        let place = self.place(&path)?;
        let layer::Kind::Link(target) = kind else {
            return self.insert(place, Rc::new(Node { kind, layer, meta }));
        };
        let target = self.place(&target)?;
        let file = self.files.get(&target).filter(|file| file.kind != layer::Kind::Folder).cloned();
        let file = file.with_context(|| format!("it is a hard link to {}, which is no file", printable(&target)))?;
        if place == target { Ok(()) } else { self.insert(place, file) }
    }

    fn insert(&mut self, place: Vec<u8>, node: Rc<Node>) -> anyhow::Result<()> {
        ensure!(place.len() <= MOST_PATH, "its path is longer than {MOST_PATH} bytes");
        self.make_parents(&place)?;
        let stays = node.kind == layer::Kind::Folder
            && self.files.get(&place).is_some_and(|file| file.kind == layer::Kind::Folder);
        if !stays {
            self.remove(&place);
        }
        self.put(place, node)
    }

    /// Makes the folders above a path where they are missing.
    fn make_parents(&mut self, place: &[u8]) -> anyhow::Result<()> {
        let mut missing = Vec::new();
        let mut above = place;
        while !above.is_empty() {
            above = split(above).0;
            match self.files.get(above) {
                Some(file) if file.kind == layer::Kind::Folder => break,
                Some(_) => bail!("it is below {}, which is no folder", printable(above)),
                None => missing.push(above.to_vec()),
            }
        }
        missing.into_iter().rev().try_for_each(|path| self.put(path, Rc::new(Node::folder())))
    }

    fn put(&mut self, place: Vec<u8>, node: Rc<Node>) -> anyhow::Result<()> {
        let length = place.len();
        self.bytes += length + node.bytes();
        if let Some(before) = self.files.insert(place, node) {
            self.bytes -= length + before.bytes();
        }
        ensure!(self.files.len() <= MOST_FILES, "the image has more than {MOST_FILES} files");
        ensure!(self.bytes <= MOST_BYTES, "the image's names and attributes have more than {MOST_BYTES} bytes");
        Ok(())
    }

    /// Removes a file, or a folder with all that is in it.
    fn remove(&mut self, place: &[u8]) {
        if let Some(node) = self.files.remove(place) {
            self.bytes -= place.len() + node.bytes();
            if node.kind == layer::Kind::Folder {
                self.remove_below(place);
            }
        }
    }

    fn remove_below(&mut self, folder: &[u8]) {
        let start = if folder.is_empty() { vec![0] } else { join(folder, b"") };
        // Its last byte is a slash, and the next one comes after all that begins with it.
        let inside = self.files.range(start.clone()..).map(|(path, _)| path);
        let inside: Vec<_> = inside.take_while(|path| folder.is_empty() || path.starts_with(&start)).cloned().collect();
        for path in inside {
            if let Some(node) = self.files.remove(&path) {
                self.bytes -= path.len() + node.bytes();
            }
        }
    }

    /// Where a path leads if the links in it are followed, but for its last name. No link leads out of the tree.
    fn place(&self, path: &[u8]) -> anyhow::Result<Vec<u8>> {
        let (folder, name) = split(path);
        let mut left: Vec<Vec<u8>> = names(folder).rev().map(<[u8]>::to_vec).collect();
        let mut place: Vec<u8> = Vec::new();
        let mut links = 0;
        while let Some(name) = left.pop() {
            if name == b".." {
                place.truncate(split(&place).0.len());
                continue;
            }
            let next = join(&place, &name);
            match self.files.get(&next).map(|file| &file.kind) {
                Some(layer::Kind::Symlink(target)) => {
                    links += 1;
                    ensure!(links <= MOST_LINKS, "its path has too many symbolic links in it");
                    if target.starts_with(b"/") {
                        place.clear();
                    }
                    left.extend(names(target).rev().map(<[u8]>::to_vec));
                }
                _ => place = next,
            }
            ensure!(place.len() <= MOST_PATH, "its path is longer than {MOST_PATH} bytes");
        }
        Ok(if name.is_empty() { place } else { join(&place, name) })
    }
}

impl Node {
    /// A folder that no layer has an entry for.
    fn folder() -> Self {
        Self { kind: layer::Kind::Folder, layer: 0, meta: Meta { mode: 0o755, ..Meta::default() } }
    }

    /// The bytes that its layer made it have.
    fn bytes(&self) -> usize {
        let link = if let layer::Kind::Symlink(target) = &self.kind { target.len() } else { 0 };
        link + self.meta.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
    }
}

/// The folder and the last name of a path.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() { name.to_vec() } else { [folder, b"/", name].concat() }
}

fn names(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, [] | [b'.']))
}

#[cfg(test)]
mod tests;

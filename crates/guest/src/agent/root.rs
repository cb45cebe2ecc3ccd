//! A tree of files that others have filled, whose symbolic links must not lead out of it.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, unlinkat};
use rustix::io::Errno;

/// The folder that `/` means within.
pub(crate) struct Root(OwnedFd);

impl Root {
    /// Opens a folder as it is mounted now.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// Opens what is at a path, as a place only.
    pub(crate) fn find(&self, path: &Path) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        Ok(openat2(&self.0, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    /// A folder, which is made where it is missing, with those above it.
    pub(crate) fn folder(&self, path: &Path) -> io::Result<OwnedFd> {
        let mut so_far = PathBuf::new();
        let mut place = self.find(&so_far)?;
        for name in names(path)? {
            so_far.push(name);
            place = match self.find(&so_far) {
                Ok(place) => place,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    mkdirat(&place, name, Mode::from_raw_mode(0o755))?;
                    self.find(&so_far)?
                }
                Err(error) => return Err(error),
            };
        }
        Ok(place)
    }

    /// A file, which is made where it is missing, with the folders above it.
    pub(crate) fn file(&self, path: &Path) -> io::Result<OwnedFd> {
        let (folder, name) = self.parent(path)?;
        match self.find(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => drop(create(&folder, name)?),
            found => return found,
        }
        self.find(path)
    }

    /// Puts a file in the place of whatever file or link is there.
    pub(crate) fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        let (folder, name) = self.parent(path)?;
        match unlinkat(&folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        create(&folder, name)?.write_all(text.as_bytes())
    }

    fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a std::ffi::OsStr)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        Ok((self.folder(path.parent().unwrap_or(Path::new("")))?, name))
    }
}

/// The path of an open place, for calls that take nothing else. It needs `/proc`.
pub(crate) fn path_of(place: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", place.as_raw_fd()).into()
}

fn create(folder: &OwnedFd, name: &std::ffi::OsStr) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(folder, name, flags, Mode::from_raw_mode(0o644))?.into())
}

/// The names in a path, which may not lead upwards.
fn names(path: &Path) -> io::Result<Vec<&std::ffi::OsStr>> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path has .. in it"));
            }
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A folder with `root` in it, the tree, and `outside`, which it must not reach.
    fn tree() -> (tempfile::TempDir, Root) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("root")).unwrap();
        fs::create_dir(folder.path().join("outside")).unwrap();
        let root = Root::open(&folder.path().join("root")).unwrap();
        (folder, root)
    }

    #[test]
    fn missing_folders_and_files_are_made() {
        let (folder, root) = tree();
        root.folder(Path::new("/a/b")).unwrap();
        root.file(Path::new("a/c/file")).unwrap();
        root.write(Path::new("a/c/file"), "text").unwrap();
        assert!(folder.path().join("root/a/b").is_dir());
        assert_eq!(fs::read_to_string(folder.path().join("root/a/c/file")).unwrap(), "text");
    }

    #[test]
    fn links_lead_nowhere_outside() {
        let (folder, root) = tree();
        let at = |name: &str| folder.path().join(name);
        symlink(at("outside"), at("root/absolute")).unwrap();
        symlink("../outside", at("root/relative")).unwrap();
        symlink("../../outside/file", at("root/file")).unwrap();
        for path in ["absolute/x", "relative/x"] {
            assert!(root.folder(Path::new(path)).is_err(), "{path} is a link that leads nowhere in the tree");
        }
        fs::create_dir(at("root/outside")).unwrap();
        root.folder(Path::new("relative/x")).unwrap();
        assert!(at("root/outside/x").is_dir(), "as it would after chroot");
        root.write(Path::new("file"), "text").unwrap();
        assert_eq!(fs::read_to_string(at("root/file")).unwrap(), "text");
        assert_eq!(fs::read_dir(at("outside")).unwrap().count(), 0);
    }

    #[test]
    fn a_path_that_leads_upwards_is_refused() {
        let (_folder, root) = tree();
        assert_eq!(root.folder(Path::new("../outside")).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(root.write(Path::new("a/../../x"), "").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

//! The host's own programs as a guest's root: folders that are shared read-only, and the part of `/etc` that programs
//! need and that anybody may read.
//!
//! Never there: homes, `/root`, `/run`, `/var`, and whatever in `/etc` is not in the list below.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, ensure};
use guest::initramfs::Archive;

/// Folders with programs and libraries. Where one is a link, as most are in Debian, so is the guest's.
const FOLDERS: [&str; 8] = ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "opt"];

/// Files and folders of `/etc` without secrets. Names, addresses and name servers are the guest's own.
const ETC: [&str; 35] = [
    "alternatives",
    "bash.bashrc",
    "ca-certificates",
    "ca-certificates.conf",
    "debian_version",
    "default/locale",
    "environment",
    "fonts",
    "gai.conf",
    "group",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "locale.conf",
    "localtime",
    "login.defs",
    "lsb-release",
    "magic",
    "mime.types",
    "nsswitch.conf",
    "os-release",
    "passwd",
    "perl",
    "pki",
    "profile",
    "profile.d",
    "protocols",
    "python3",
    "rpc",
    "services",
    "shells",
    "ssl",
    "terminfo",
];

/// More than any host has in those.
const MOST_BYTES: usize = 16 << 20;
const MOST_FILES: usize = 4096;
/// Folders of folders.
const MOST_DEPTH: usize = 8;

/// The names, below `/`, of the folders to share. Puts the links among them into the archive.
pub(crate) fn folders(archive: &mut Archive) -> anyhow::Result<Vec<&'static str>> {
    let mut shared = Vec::new();
    for name in FOLDERS {
        let path = Path::new("/").join(name);
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if metadata.is_symlink() {
            let target = path.read_link().with_context(|| format!("cannot read {}", path.display()))?;
            archive.symlink(name, text(&target)?)?;
        } else if metadata.is_dir() && fs::read_dir(&path).is_ok_and(|mut entries| entries.next().is_some()) {
            shared.push(name);
        }
    }
    Ok(shared)
}

/// Puts the part of the host's `/etc` into the archive.
pub(crate) fn etc(archive: &mut Archive) -> anyhow::Result<()> {
    let mut copied = Copied { archive, files: 0, bytes: 0 };
    copied.archive.directory("etc")?;
    for name in ETC {
        copied.take(Path::new("/etc"), name, 0)?;
    }
    Ok(())
}

struct Copied<'a> {
    archive: &'a mut Archive,
    files: usize,
    bytes: usize,
}

impl Copied<'_> {
    /// Takes `name` in `base`, if it is there and anybody may read it.
    fn take(&mut self, base: &Path, name: &str, depth: usize) -> anyhow::Result<()> {
        let path = base.join(name);
        let Ok(metadata) = path.symlink_metadata() else { return Ok(()) };
        let inside = format!("etc/{name}");
        self.files += 1;
        ensure!(self.files <= MOST_FILES && depth <= MOST_DEPTH, "{} has too many files to copy", base.display());
        if metadata.is_symlink() {
            self.archive.symlink(&inside, text(&path.read_link()?)?)?;
        } else if metadata.is_dir() {
            self.archive.directory(&inside)?;
            let Ok(entries) = fs::read_dir(&path) else { return Ok(()) };
            let mut names = entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
            names.sort();
            for inner in names.iter().filter_map(|inner| inner.to_str()) {
                self.take(base, &format!("{name}/{inner}"), depth + 1)?;
            }
        } else if metadata.is_file() && metadata.mode() & 0o004 != 0 {
            let Ok(content) = fs::read(&path) else { return Ok(()) };
            self.bytes += content.len();
            ensure!(self.bytes <= MOST_BYTES, "{} has too much in it to copy", base.display());
            self.archive.file(&inside, metadata.mode() & 0o755, &content)?;
        }
        Ok(())
    }
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_not_everybody_may_read_stays_on_the_host() {
        let host = tempfile::tempdir().unwrap();
        fs::create_dir(host.path().join("ssl")).unwrap();
        for (name, mode) in [("ssl/public", 0o644), ("ssl/private", 0o640)] {
            fs::write(host.path().join(name), name).unwrap();
            fs::set_permissions(host.path().join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let mut archive = Archive::default();
        Copied { archive: &mut archive, files: 0, bytes: 0 }.take(host.path(), "ssl", 0).unwrap();
        let bytes = archive.finish().unwrap();
        let has = |name: &str| bytes.windows(name.len()).any(|window| window == name.as_bytes());
        assert!(has("etc/ssl/public") && !has("ssl/private"));
    }

    #[test]
    fn secrets_are_not_in_the_list() {
        for secret in ["shadow", "gshadow", "ssh", "sudoers", "machine-id", "hostname", "resolv.conf"] {
            assert!(!ETC.contains(&secret), "{secret}");
        }
    }
}

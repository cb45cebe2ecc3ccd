//! The folder of a run: one root folder for all contenders, the initramfs that is made of it, the file that all of them
//! have as their disk, and what container runtimes want beside.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use boot::image;
use guest::initramfs::Archive;
use tempfile::TempDir;

use crate::tools::Tool;

/// The size of the disks in bytes.
pub(crate) const DISK: usize = 64 << 20;

/// The folder of a run. It is removed when it is dropped.
pub(crate) struct Site {
    folder: TempDir,
    /// Why there is no kernel for machines, or where it is.
    kernel: Result<PathBuf, String>,
}

impl Site {
    /// Makes the folder. `needs_disk`: some measure has a disk; `tools` are in the root folder, too.
    pub(crate) fn make(kernel: Option<&Path>, needs_disk: bool, tools: &[Tool]) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("vmm-bench-").tempdir().context("cannot make a folder")?;
        let site = Self { folder, kernel: find_kernel(kernel) };
        let place = site.folder.path().display().to_string();
        let made = site.fill(needs_disk, tools);
        made.with_context(|| {
            format!("cannot make what is measured in {place}: set TMPDIR to a folder with more room")
        })?;
        Ok(site)
    }

    fn fill(&self, needs_disk: bool, tools: &[Tool]) -> anyhow::Result<()> {
        let root = self.root();
        for folder in ["dev", "proc", "sys", "tmp", "run", "etc"] {
            fs::create_dir_all(root.join(folder))?;
        }
        // Servers look for the users that they could become.
        fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/false\nnobody:x:65534:65534::/:/bin/false\n")?;
        fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
        // A container that gives up its rights, as a database does, still enters.
        for folder in [self.folder.path(), root.as_path()] {
            fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
        }
        fs::copy(env::current_exe()?, root.join("init"))?;
        fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
        self.write_initramfs(false)?;
        if !tools.is_empty() {
            tools.iter().try_for_each(|tool| tool.copy_into(&root))?;
            self.write_initramfs(true)?;
        }
        if needs_disk {
            // Content that no file system leaves out, and that is on the medium: what is read must come from there.
            let mut disk = File::create(self.disk())?;
            let piece: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
            for _ in 0..DISK / piece.len() {
                disk.write_all(&piece)?;
            }
            disk.sync_all()?;
        }
        Ok(())
    }

    fn write_initramfs(&self, with_tools: bool) -> anyhow::Result<()> {
        let mut archive = Archive::default();
        archive.character_device("dev/console", 5, 1)?;
        archive.character_device("dev/null", 1, 3)?;
        pack(&self.root(), &self.root(), &mut archive)?;
        Ok(fs::write(self.initramfs(with_tools), archive.finish()?)?)
    }

    /// The root folder.
    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// The same as an initramfs. Tools are many times larger than the workload, so what does without has one without.
    pub(crate) fn initramfs(&self, with_tools: bool) -> PathBuf {
        self.folder.path().join(if with_tools { "initramfs-tools" } else { "initramfs" })
    }

    /// The file that is everybody's disk: in the root folder, but in no initramfs.
    pub(crate) fn disk(&self) -> PathBuf {
        self.root().join("disk")
    }

    /// A folder for a contender's own files.
    pub(crate) fn own(&self, name: &str) -> io::Result<PathBuf> {
        let own = self.folder.path().join("own").join(name);
        fs::create_dir_all(&own)?;
        Ok(own)
    }

    /// The kernel of machines.
    pub(crate) fn kernel(&self) -> Result<&Path, &str> {
        self.kernel.as_deref().map_err(String::as_str)
    }

    /// The kernel as an uncompressed ELF file.
    pub(crate) fn vmlinux(&self) -> anyhow::Result<PathBuf> {
        let kernel = self.kernel().map_err(|why| anyhow!("{why}"))?;
        let place = self.folder.path().join("vmlinux");
        if !place.exists() {
            let content = fs::read(kernel).with_context(|| format!("cannot read {}", kernel.display()))?;
            let is_elf = content.starts_with(b"\x7fELF");
            let content = if is_elf { content } else { image::unpack_vmlinux(kernel, &image::open(kernel)?)? };
            fs::write(&place, content).context("cannot unpack the kernel")?;
        }
        Ok(place)
    }
}

/// Adds what is in a folder to an archive, in the order of its names.
fn pack(root: &Path, folder: &Path, archive: &mut Archive) -> anyhow::Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let name = path.strip_prefix(root)?.to_str().context("a file's name is not text")?.to_owned();
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            archive.directory(&name)?;
            pack(root, &path, archive)?;
        } else if metadata.is_symlink() {
            archive.symlink(&name, fs::read_link(&path)?.to_str().context("a link's target is not text")?)?;
        } else {
            archive.file(&name, metadata.permissions().mode() & 0o777, &fs::read(&path)?)?;
        }
    }
    Ok(())
}

/// The kernel that is named, or else the one that `vmm run` has: installed, or the host's own.
fn find_kernel(named: Option<&Path>) -> Result<PathBuf, String> {
    let readable = |path: &Path| File::open(path).is_ok();
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let data = variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local/share")));
    let installed = data.map(|data| data.join("vmm/kernel"));
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let own = PathBuf::from(format!("/boot/vmlinuz-{release}"));
    installed.into_iter().chain([own]).find(|path| readable(path)).ok_or_else(|| {
        "there is no kernel for machines: say --kernel PATH, or `vmm kernel install PATH` once (`cargo xtask kernel` \
         builds one)"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_initramfs_holds_what_the_root_folder_holds() {
        let site = Site::make(Some(Path::new("/nowhere")), false, &[]).unwrap();
        let archive = fs::read(site.initramfs(false)).unwrap();
        let root = fs::read(site.root().join("init")).unwrap();
        assert!(archive.windows(4).any(|window| window == b"init"));
        assert!(archive.len() > root.len() && !site.disk().exists());
    }
}

//! The modules that a distribution's kernel needs before its guest has a root: found by `modules.dep` (depmod(8)), and put
//! into the initramfs in the order in which they need each other.
//!
//! Left out on purpose: soft dependencies, parameters, and modules for what a run's guest does not have. The guest's kernel
//! unpacks what is compressed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use boot::{KernelSpec, image};
use guest::initramfs::Archive;

use super::kernel;

/// What every run's guest needs.
const ALWAYS: [&str; 4] = ["virtio_pci", "overlay", "virtiofs", "vmw_vsock_virtio_transport"];
/// No list of a kernel's modules is as long, and no module as large.
const MOST_LIST: u64 = 16 << 20;
const MOST_MODULE: u64 = 64 << 20;
/// No module needs as many others.
const MOST_MODULES: usize = 256;

/// Puts what the kernel needs into the initramfs: `more` is what this guest has beside what all have. Nothing for a kernel
/// that says no release or has no folder of modules: all that it can do is in it.
pub(super) fn add(
    archive: &mut Archive,
    kernel: &KernelSpec,
    more: impl IntoIterator<Item = &'static str>,
) -> anyhow::Result<()> {
    let file = image::open(&kernel.path)?;
    let Some(release) = image::release(&kernel.path, &file)? else { return Ok(()) };
    let folders = [kernel::modules_place().ok(), Some(PathBuf::from("/lib/modules"))];
    let Some(folder) = folders.into_iter().flatten().map(|folder| folder.join(&release)).find(|path| path.is_dir())
    else {
        return Ok(());
    };
    let list = Modules::read(&folder)?;
    let mut order = String::new();
    for path in list.needed(ALWAYS.into_iter().chain(more))? {
        let name = path.rsplit('/').next().unwrap_or(path);
        let content = bounded(&folder.join(path), MOST_MODULE)?;
        archive.file(&format!("modules/{name}"), 0o644, &content)?;
        order.push_str(name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    Ok(())
}

/// The modules of one kernel.
struct Modules {
    folder: PathBuf,
    /// By name: the path, and those of all that it needs, the deepest last.
    known: BTreeMap<String, Vec<String>>,
    /// Names of what is in the kernel itself.
    builtin: BTreeSet<String>,
}

impl Modules {
    fn read(folder: &Path) -> anyhow::Result<Self> {
        let text = |name: &str| {
            let bytes = bounded(&folder.join(name), MOST_LIST)?;
            String::from_utf8(bytes).with_context(|| format!("{} is no text", folder.join(name).display()))
        };
        let dependencies =
            text("modules.dep").context("without a list of its modules the kernel cannot be used: run depmod")?;
        let builtin = text("modules.builtin").unwrap_or_default();
        let known = dependencies.lines().filter_map(|line| {
            let (path, needs) = line.split_once(':')?;
            let paths = [path].into_iter().chain(needs.split_whitespace()).map(str::to_owned).collect();
            Some((name(path), paths))
        });
        Ok(Self { folder: folder.to_owned(), known: known.collect(), builtin: builtin.lines().map(name).collect() })
    }

    /// The paths of what these modules need and of themselves, in the order in which they are loaded.
    fn needed<'name>(&self, names: impl Iterator<Item = &'name str>) -> anyhow::Result<Vec<&str>> {
        let mut order: Vec<&str> = Vec::new();
        for name in names.filter(|name| !self.builtin.contains(*name)) {
            let paths = self.known.get(name).with_context(|| {
                format!(
                    "the kernel with the modules in {} has no {name}, which a run needs: say another --kernel",
                    self.folder.display()
                )
            })?;
            for path in paths.iter().rev() {
                let stays = !path.starts_with('/') && !path.split('/').any(|part| part == "..");
                ensure!(stays, "{}: {path} leads out of it", self.folder.join("modules.dep").display());
                if !order.contains(&path.as_str()) {
                    order.push(path);
                }
            }
            ensure!(order.len() < MOST_MODULES, "{} is damaged: run depmod", self.folder.join("modules.dep").display());
        }
        Ok(order)
    }
}

/// A module's name, as its file's: without folder and ending, and with `_` as the kernel has it.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn bounded(path: &Path, most: u64) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes));
    read.with_context(|| format!("cannot read {}", path.display()))?;
    ensure!((bytes.len() as u64) < most, "{} is too large to be what it should be", path.display());
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn modules(dependencies: &str) -> Modules {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("modules.dep"), dependencies).unwrap();
        fs::write(folder.path().join("modules.builtin"), "kernel/fs/overlayfs/overlay.ko\n").unwrap();
        Modules::read(folder.path()).unwrap()
    }

    #[test]
    fn what_a_module_needs_comes_before_it_once_and_what_is_built_in_does_not_come() {
        let modules = modules(
            "kernel/fs/fuse/virtiofs.ko.xz: kernel/fs/fuse/fuse.ko.xz kernel/virtio/virtio.ko.xz\n\
             kernel/virtio/virtio-pci.ko.xz: kernel/virtio/virtio_ring.ko.xz kernel/virtio/virtio.ko.xz\n",
        );
        let order = modules.needed(["virtio_pci", "overlay", "virtiofs"].into_iter()).unwrap();
        let names: Vec<_> = order.into_iter().map(name).collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_pci", "fuse", "virtiofs"]);
        let error = modules.needed(["vsock"].into_iter()).unwrap_err().to_string();
        assert!(error.contains("vsock") && error.contains("--kernel"), "{error}");
    }

    #[test]
    fn a_list_that_leads_elsewhere_is_refused() {
        for path in ["/etc/shadow", "../../etc/shadow.ko", "kernel/../../x.ko"] {
            let error = modules(&format!("a.ko: {path}\n")).needed(["a"].into_iter()).unwrap_err().to_string();
            assert!(error.contains("leads out"), "{error}");
        }
    }
}

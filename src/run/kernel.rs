//! The kernel that runs have unless they name another: a file in the user's data folder.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use boot::{KernelSpec, image};

use crate::exit::Usage;

/// The kernel that is there for all runs.
pub(super) fn installed() -> anyhow::Result<KernelSpec> {
    let path = place()?;
    ensure!(
        path.exists(),
        "there is no kernel at {}: say --kernel PATH, or `vmm kernel install PATH` once; it needs virtio, virtio-fs, \
         overlayfs and vsock built in (`cargo xtask kernel` builds one)",
        path.display()
    );
    Ok(KernelSpec { path, ..KernelSpec::default() })
}

/// Makes the kernel at `path` the one that is there for all runs. Returns where it is now.
pub(crate) fn install(path: &Path) -> anyhow::Result<PathBuf> {
    let place = place()?;
    let folder = place.parent().context("the data folder is no folder")?;
    let kernel = image::open(path).and_then(|kernel| image::check(path, &kernel).map(|()| kernel));
    let mut kernel = kernel.map_err(|error| Usage(error.to_string()))?;
    fs::create_dir_all(folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    // Runs that are being started find the old one or the new one.
    let new = folder.join(format!("kernel.{}", std::process::id()));
    let copied = File::create(&new).and_then(|mut file| {
        io::copy(&mut kernel, &mut file)?;
        file.sync_all()?;
        fs::rename(&new, &place)
    });
    copied.inspect_err(|_| drop(fs::remove_file(&new))).with_context(|| format!("Cannot write {}", place.display()))?;
    Ok(place)
}

/// Where it is: `$XDG_DATA_HOME/vmm/kernel`, or else `~/.local/share/vmm/kernel`.
fn place() -> anyhow::Result<PathBuf> {
    let folder = |name| env::var_os(name).filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let home = || Some(folder("HOME")?.join(".local/share"));
    let data = folder("XDG_DATA_HOME").or_else(home).context("there is no data folder: set HOME")?;
    Ok(data.join("vmm/kernel"))
}

//! The kernel that runs have unless they name another: the one in the user's data folder, or else the host's own.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use boot::{KernelSpec, image};

use crate::exit::Usage;

/// The kernel that a run has without a word.
pub(super) fn unless_said() -> anyhow::Result<KernelSpec> {
    let installed = place()?;
    let hosts = hosts_own();
    let path = [installed.clone(), hosts.clone()].into_iter().find(|path| File::open(path).is_ok());
    let path = path.with_context(|| {
        format!(
            "there is no kernel at {}, and the host's own is not to be read at {}: say --kernel PATH, or `vmm kernel \
             install PATH` once, of a kernel with virtio, virtio-fs, overlayfs and vsock (`cargo xtask kernel` builds one), \
             or of a distribution's package",
            installed.display(),
            hosts.display()
        )
    })?;
    Ok(KernelSpec { path, ..KernelSpec::default() })
}

/// Makes the kernel at `path`, or in the Debian package there, the one that is there for all runs. Returns where it is now.
pub(crate) fn install(path: &Path) -> anyhow::Result<PathBuf> {
    if path.extension().is_some_and(|ending| ending == "deb") {
        return install_package(path);
    }
    let place = place()?;
    let kernel = image::open(path).and_then(|kernel| image::check(path, &kernel).map(|()| kernel));
    let mut kernel = kernel.map_err(|error| Usage(error.to_string()))?;
    let folder = data()?;
    fs::create_dir_all(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
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

/// The package's modules come first: without them its kernel is of no use.
fn install_package(package: &Path) -> anyhow::Result<PathBuf> {
    let folder = data()?;
    let new = folder.join(format!("package.{}", std::process::id()));
    fs::create_dir_all(&new).with_context(|| format!("Cannot make {}", new.display()))?;
    let installed = install_unpacked(package, &new);
    fs::remove_dir_all(&new).with_context(|| format!("Cannot remove {}", new.display()))?;
    installed
}

fn install_unpacked(package: &Path, new: &Path) -> anyhow::Result<PathBuf> {
    let name = package.display();
    run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(new), "dpkg")?;
    let modules = only(&new.join("lib/modules")).or_else(|_| only(&new.join("usr/lib/modules")));
    let modules = modules.with_context(|| format!("{name} is not the package of a kernel with its modules"))?;
    let release = modules.file_name().context("a release has a name")?;
    let mut vmlinuz = std::ffi::OsString::from("vmlinuz-");
    vmlinuz.push(release);
    let kernel = new.join("boot").join(vmlinuz);
    ensure!(kernel.exists(), Usage(format!("{name} holds modules and no kernel: name the package linux-image-…")));
    // depmod wants them where they will be.
    let root = modules.ancestors().nth(3).context("modules lie deep enough")?;
    run(Command::new("/sbin/depmod").arg("--basedir").arg(root).arg(release), "kmod")?;
    let place = modules_place()?;
    fs::create_dir_all(&place).with_context(|| format!("Cannot make {}", place.display()))?;
    let target = place.join(release);
    if target.exists() {
        fs::remove_dir_all(&target).with_context(|| format!("Cannot remove {}", target.display()))?;
    }
    fs::rename(&modules, &target).with_context(|| format!("Cannot write {}", target.display()))?;
    install(&kernel)
}

/// The one thing in a folder.
fn only(folder: &Path) -> anyhow::Result<PathBuf> {
    let mut entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let first = entries.next().context("it is empty")??.path();
    ensure!(entries.next().is_none(), "there is more than one in {}", folder.display());
    Ok(first)
}

/// Runs a program of a Debian package, whose words are shown if it fails.
fn run(command: &mut Command, package: &str) -> anyhow::Result<()> {
    let program = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("cannot run {program}: install the package {package}"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), Usage(format!("{program} failed: {}", words.trim().replace('\n', "; "))));
    Ok(())
}

/// The kernel of this host, where distributions keep it.
fn hosts_own() -> PathBuf {
    Path::new("/boot").join(format!("vmlinuz-{}", rustix::system::uname().release().to_string_lossy()))
}

/// Where the installed one is: `kernel` in the data folder.
fn place() -> anyhow::Result<PathBuf> {
    Ok(data()?.join("kernel"))
}

/// Where its modules are, below their release: `modules` in the data folder.
pub(super) fn modules_place() -> anyhow::Result<PathBuf> {
    Ok(data()?.join("modules"))
}

/// The data folder: `$XDG_DATA_HOME/vmm`, or else `~/.local/share/vmm`.
fn data() -> anyhow::Result<PathBuf> {
    let folder = |name| env::var_os(name).filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let home = || Some(folder("HOME")?.join(".local/share"));
    let data = folder("XDG_DATA_HOME").or_else(home).context("there is no data folder: set HOME")?;
    Ok(data.join("vmm"))
}

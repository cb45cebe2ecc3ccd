//! What guests and the emulated host are made of, made on demand and kept in the [`cache`].

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use guest::initramfs::Archive;

use crate::apt::{self, Package};
use crate::cache;
use crate::image::{self, ImageSpec};
use crate::{database, kernel, progress};

/// The modules that the emulated host loads, with what they need. The kernel there can load others by itself.
const HOST_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtiofs",
    "overlay",
    "kvm-amd",
    "tun",
    "dummy",
    "veth",
    "bridge",
    "vhost_net",
    "vhost_vsock",
    "nf_tables",
    "nft_chain_nat",
    "nft_masq",
    "nft_ct",
    "nf_conntrack_bridge",
];

/// The modules that stand ready in the shell's guest, for each of Debian's kernels.
const GUEST_MODULES: &[&str] = &["button", "evdev", "pvpanic-mmio"];

/// Raised when what is made of a kernel's package changes, so that it is made anew.
const KERNEL_RECIPE: &str = "2";

/// Raised when what is made of the emulated host's modules changes, so that they are made anew.
const HOST_RECIPE: &str = "2";

/// Debian's kernels, by flavour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// Linux 6.1 for virtual machines; its payload is lz4.
    Cloud61,
    /// Linux 6.12 for virtual machines; its payload is zstd.
    Cloud612,
    /// Linux 6.1 for any machine; its payload is xz.
    Generic61,
}

/// A Debian kernel, unpacked from its package.
pub(crate) struct Kernel {
    /// What `uname -r` says.
    pub(crate) release: String,
    /// The bzImage.
    pub(crate) vmlinuz: PathBuf,
    /// The ELF file that the bzImage holds, with its relocations.
    pub(crate) vmlinux: PathBuf,
    /// Package and version, for records and cache keys.
    pub(crate) package: String,
    /// The directory that holds `lib/modules/RELEASE`.
    pub(crate) root: PathBuf,
}

/// The newest Debian kernel of a flavour, from its package.
pub(crate) fn debian_kernel(flavour: Flavour) -> Result<Kernel> {
    let (prefix, suffix) = match flavour {
        Flavour::Cloud61 => ("linux-image-6.1.", "-cloud-amd64"),
        Flavour::Cloud612 => ("linux-image-6.12.", "-cloud-amd64"),
        Flavour::Generic61 => ("linux-image-6.1.", "-amd64"),
    };
    let package = Package::newest(prefix, suffix)?;
    let release = package.name.replacen("linux-image-", "", 1);
    let root = cache::entry(&package.name, &[&package.version, KERNEL_RECIPE], |dir| {
        let progress = progress::step(&format!("Getting Debian's kernel {release}"));
        package.unpack(dir)?;
        fs::remove_dir_all(dir.join("usr"))?;
        apt::run(Command::new(tool("depmod")).arg("--basedir").arg(dir).arg(&release))?;
        let vmlinuz = dir.join(format!("boot/vmlinuz-{release}"));
        let vmlinux = boot::image::unpack_vmlinux(&vmlinuz, &boot::image::open(&vmlinuz)?)?;
        fs::write(dir.join("boot/vmlinux"), vmlinux)?;
        drop(progress);
        Ok(())
    })?;
    Ok(Kernel {
        vmlinuz: root.join(format!("boot/vmlinuz-{release}")),
        vmlinux: root.join("boot/vmlinux"),
        package: format!("{} {}", package.name, package.version),
        release,
        root,
    })
}

/// An initramfs whose init reboots at once, for measuring; with `mark`, it first writes 0x7b to I/O port 0x500.
pub(crate) fn reboot_initramfs(mark: bool) -> Result<PathBuf> {
    const SOURCE: &str = include_str!("../guest/reboot.rs");
    const LINK: &str = "link-args=-nostdlib -nostartfiles -static -Wl,--build-id=none -Wl,-z,noseparate-code";
    let name = if mark { "initramfs-mark" } else { "initramfs-reboot" };
    let entry = cache::entry(name, &[SOURCE, LINK], |dir| {
        let source = dir.join("reboot.rs");
        let program = dir.join("reboot");
        fs::write(&source, SOURCE)?;
        let mut rustc = rustc(&source, &program);
        rustc.args(["-C", LINK]).args(mark.then_some("--cfg=mark"));
        apt::run(&mut rustc)?;
        let mut archive = Archive::default();
        archive.file("init", 0o755, &fs::read(&program)?)?;
        Ok(fs::write(dir.join("initramfs"), archive.finish()?)?)
    })?;
    Ok(entry.join("initramfs"))
}

/// The compiler, told to make a small static program.
fn rustc(source: &Path, program: &Path) -> Command {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition", "2024", "--crate-type", "bin", "-C", "panic=abort", "-C", "opt-level=s"]);
    rustc.args(["-C", "strip=symbols", "-C", "relocation-model=static", "-C", "target-feature=+crt-static"]);
    rustc.arg(source).arg("-o").arg(program);
    rustc
}

/// An initramfs of busybox, for any kernel. Its init runs what the kernel's command line says as `run="COMMANDS"`; without
/// that it gives a root shell, whose prompt is `guest# `, on the console. At the end of either it powers the machine
/// off. The command `facts` prints what the guest sees, `power-button` has a press of the power button end it,
/// `vsock-echo` sends back what the host sends, and `/modules/RELEASE` holds modules of Debian's cloud kernels to `insmod`.
pub(crate) fn shell_initramfs() -> Result<PathBuf> {
    const SCRIPTS: [(&str, &str); 3] = [
        ("init", include_str!("../guest/init.sh")),
        ("bin/facts", include_str!("../guest/facts.sh")),
        ("bin/power-button", include_str!("../guest/power-button.sh")),
    ];
    const ECHO: &str = include_str!("../guest/vsock-echo.rs");
    let kernels = [debian_kernel(Flavour::Cloud61)?, debian_kernel(Flavour::Cloud612)?];
    let package = Package::named("busybox-static")?;
    let modules = GUEST_MODULES.join(" ");
    let mut inputs = vec![package.version.as_str(), &modules, ECHO];
    inputs.extend(kernels.iter().map(|kernel| kernel.package.as_str()));
    inputs.extend(SCRIPTS.map(|(_, script)| script));
    let entry = cache::entry("initramfs-shell", &inputs, |dir| {
        package.unpack(&dir.join("package"))?;
        let busybox = dir.join("package/bin/busybox");
        let mut archive = Archive::default();
        for directory in ["dev", "proc", "sys", "tmp", "etc"] {
            archive.directory(directory)?;
        }
        archive.character_device("dev/console", 5, 1)?;
        archive.file("bin/busybox", 0o755, &fs::read(&busybox)?)?;
        for applet in apt::output(Command::new(&busybox).arg("--list"))?.lines() {
            if applet != "busybox" {
                archive.symlink(&format!("bin/{applet}"), "busybox")?;
            }
        }
        for (path, script) in SCRIPTS {
            archive.file(path, 0o755, script.as_bytes())?;
        }
        let (source, program) = (dir.join("vsock-echo.rs"), dir.join("vsock-echo"));
        fs::write(&source, ECHO)?;
        apt::run(&mut rustc(&source, &program))?;
        archive.file("bin/vsock-echo", 0o755, &fs::read(&program)?)?;
        for kernel in &kernels {
            add_modules(&mut archive, &format!("modules/{}", kernel.release), kernel, GUEST_MODULES)?;
        }
        fs::remove_dir_all(dir.join("package"))?;
        Ok(fs::write(dir.join("initramfs"), archive.finish()?)?)
    })?;
    Ok(entry.join("initramfs"))
}

/// A directory of links to all that the integration tests boot, under names that do not change:
///
/// | name | what |
/// |---|---|
/// | `debian-6.1-vmlinuz`, `debian-6.1-vmlinux` | Debian's 6.1 cloud kernel, packed (lz4) and unpacked |
/// | `debian-6.12-vmlinuz`, `debian-6.12-vmlinux` | Debian's 6.12 cloud kernel, packed (zstd) and unpacked |
/// | `debian-6.1-generic-vmlinuz`, `debian-6.1-generic-vmlinux` | Debian's 6.1 kernel for any machine, packed (xz) and unpacked |
/// | `debian-6.1` | the folder of the first one's package: `boot`, `lib/modules` |
/// | `small-bzImage`, `small-vmlinux` | the small kernel |
/// | `debian` | a folder as `cargo xtask image` makes it, with nginx and fio |
/// | `database` | with `servers`, a folder with a database on a disk ([`database::disk`]) |
/// | `initramfs-shell` | [`shell_initramfs`] |
/// | `initramfs-reboot`, `initramfs-mark` | [`reboot_initramfs`] without and with the mark |
pub(crate) fn directory(servers: bool) -> Result<PathBuf> {
    let mut links = Vec::new();
    for (name, flavour) in [
        ("debian-6.1", Flavour::Cloud61),
        ("debian-6.12", Flavour::Cloud612),
        ("debian-6.1-generic", Flavour::Generic61),
    ] {
        let kernel = debian_kernel(flavour)?;
        if flavour == Flavour::Cloud61 {
            links.push((name.into(), kernel.root));
        }
        links.push((format!("{name}-vmlinuz"), kernel.vmlinuz));
        links.push((format!("{name}-vmlinux"), kernel.vmlinux));
    }
    let small = kernel::small_kernel()?;
    links.push(("small-bzImage".into(), small.bzimage));
    links.push(("small-vmlinux".into(), small.vmlinux));
    links.push(("debian".into(), image::debian_image(&ImageSpec::with(&["fio", "nginx-light"]))?));
    if servers {
        links.push(("database".into(), database::disk()?));
    }
    links.push(("initramfs-shell".into(), shell_initramfs()?));
    links.push(("initramfs-reboot".into(), reboot_initramfs(false)?));
    links.push(("initramfs-mark".into(), reboot_initramfs(true)?));
    let inputs: Vec<String> = links.iter().map(|(name, path)| format!("{name} {}", path.display())).collect();
    let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
    cache::entry("assets", &inputs, |dir| {
        for (name, path) in &links {
            symlink(path, dir.join(name))?;
        }
        Ok(())
    })
}

/// The part of the emulated host's initramfs that is always the same: its modules, and `modules` that lists them in
/// the order of loading.
pub(crate) fn host_modules(kernel: &Kernel) -> Result<PathBuf> {
    let wanted = HOST_MODULES.join(" ");
    let entry = cache::entry("host-modules", &[&kernel.package, &wanted, HOST_RECIPE], |dir| {
        let mut archive = Archive::default();
        add_modules(&mut archive, "modules", kernel, HOST_MODULES)?;
        Ok(fs::write(dir.join("initramfs"), archive.finish()?)?)
    })?;
    Ok(entry.join("initramfs"))
}

/// Adds `modules` and all that they need to `directory` of an initramfs, uncompressed, with their names in the order of
/// loading in its file `order`.
fn add_modules(archive: &mut Archive, directory: &str, kernel: &Kernel, modules: &[&str]) -> Result<()> {
    let mut names = String::new();
    for module in modules_in_order(kernel, modules)? {
        let name = module.file_name().context("A module has no name")?.to_string_lossy();
        let name = name.trim_end_matches(".xz").trim_end_matches(".ko");
        archive.file(&format!("{directory}/{name}.ko"), 0o644, unsigned(&read_module(&module)?))?;
        names.push_str(name);
        names.push('\n');
    }
    Ok(archive.file(&format!("{directory}/order"), 0o644, names.as_bytes())?)
}

/// The files of `modules` and of all that they need, each after what it needs.
fn modules_in_order(kernel: &Kernel, modules: &[&str]) -> Result<Vec<PathBuf>> {
    // The machine's own configuration, with its options and aliases, is not for this kernel.
    let output = Command::new(tool("modprobe"))
        .args(["--config", "/dev/null"])
        .args(["--show-depends", "--all", "--set-version", &kernel.release, "--dirname"])
        .arg(&kernel.root)
        .args(modules)
        .output()
        .context("Cannot run modprobe: run `cargo xtask setup`")?;
    anyhow::ensure!(
        output.status.success(),
        "modprobe does not find all modules of {}: {}",
        kernel.package,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let mut files = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        // Each line is `insmod FILE` or `builtin NAME`.
        if let Some(file) = line.strip_prefix("insmod ") {
            let file = PathBuf::from(file.trim());
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    Ok(files)
}

/// A module without the signature at its end (kernel's `include/linux/module_signature.h`), which takes longer to verify
/// than the module to load.
fn unsigned(module: &[u8]) -> &[u8] {
    const MARK: &[u8] = b"~Module signature appended~\n";
    const DESCRIPTION: usize = 12;
    let content = || {
        let signed = module.strip_suffix(MARK)?;
        let (signed, length) = signed.split_last_chunk::<4>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        signed.get(..signed.len().checked_sub(length)?.checked_sub(DESCRIPTION - 4)?)
    };
    content().unwrap_or(module)
}

/// A module as the kernel takes it: Debian's 6.12 keeps them compressed.
fn read_module(file: &Path) -> Result<Vec<u8>> {
    let content = fs::read(file).with_context(|| format!("Cannot read {}", file.display()))?;
    if file.extension().is_none_or(|extension| extension != "xz") {
        return Ok(content);
    }
    let mut module = Vec::new();
    std::io::copy(&mut lzma_rust2::XzReader::new(content.as_slice(), false), &mut module)
        .with_context(|| format!("Cannot unpack {}", file.display()))?;
    Ok(module)
}

/// Administration tools are in a directory that an ordinary user's PATH lacks.
fn tool(name: &str) -> PathBuf {
    let path = Path::new("/sbin").join(name);
    if path.exists() { path } else { PathBuf::from(name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_loses_its_signature_and_nothing_else() {
        let signed = [&b"module"[..], b"signature", &[0; 8], &[0, 0, 0, 9], b"~Module signature appended~\n"].concat();
        assert_eq!(unsigned(&signed), b"module");
        assert_eq!(unsigned(b"module"), b"module");
        let damaged = [&[0; 8][..], &[0, 1, 0, 9], b"~Module signature appended~\n"].concat();
        assert_eq!(unsigned(&damaged), damaged);
    }
}

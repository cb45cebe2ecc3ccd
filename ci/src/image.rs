//! `cargo xtask image`: makes a Debian image, and beside it the kernel and the initrd that it holds and a file that
//! boots them: `vmm --config debian.toml`.
//!
//! mmdebstrap installs the packages from where the machine's own apt has its own, and mke2fs fills the file system
//! with them. Nothing is mounted, so an ordinary user can do it too, in a user namespace. The whole disk is one ext4
//! with the label `debian`.
//!
//! With an ssh key root logs in by ssh, with that key alone. **Without one root logs in at the console, with no
//! password**: whoever reaches the console is root.
//!
//! The same inputs make the same content: packages as apt's lists have them, files no younger than these lists, a fixed
//! UUID. Left out: the same bytes (inodes have the times of the making), partitions and boot loader (the VMM loads the
//! kernel), recommended packages, architectures other than x86-64.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use kv::Size;

use crate::{apt, cache, progress, setup};

mod files;
mod sources;

use sources::Sources;

/// What every image is made of, beside what Debian calls essential.
const PACKAGES: &[&str] = &[
    "dbus",
    "e2fsprogs",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "lz4",
    "netbase",
    "procps",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
];

/// The kernel, unless the packages that are asked for have one.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Identifies the file system, and seeds its directories' hashes.
const UUID: &str = "5ad1b5d4-6a0b-4b3e-9a3f-d2a4ce7f2b4e";

/// Debian does not fit into less, and ext4 does not go beyond.
const SIZES: std::ops::RangeInclusive<Size> = Size(512 << 20)..=Size(16 << 40);

const CONFIGURE: &str = include_str!("image/configure.sh");
const FILL: &str = include_str!("image/fill.sh");

/// What `cargo xtask image` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The folder for debian.img, vmlinuz, initrd.img and debian.toml
    #[arg(long, value_name = "FOLDER", default_value = "debian")]
    out: PathBuf,
    #[command(flatten)]
    image: ImageSpec,
}

/// An image as asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ImageSpec {
    /// The size of the disk; only what is written takes space
    #[arg(long, default_value = "2G")]
    pub(crate) size: Size,
    /// Debian's suite, such as bookworm; the machine's own unless said
    #[arg(long)]
    pub(crate) suite: Option<String>,
    /// The public key that lets root in by ssh; without it root logs in at the console with no password
    #[arg(long, value_name = "FILE")]
    pub(crate) ssh_key: Option<PathBuf>,
    /// The guest's name
    #[arg(long, default_value = "debian")]
    pub(crate) hostname: String,
    /// Packages beside the base system, as NAME or NAME=VERSION; a linux-image-… replaces the cloud kernel
    #[arg(value_name = "PACKAGE")]
    pub(crate) packages: Vec<String>,
}

/// Makes the image, or finds it in the cache, and copies it to where it is asked for.
pub(crate) fn run(args: &Args) -> Result<()> {
    let image = args.out.join("debian.img");
    ensure!(
        !image.exists(),
        "{} exists already, and a guest may have written to it: remove it, or give another folder with --out",
        image.display()
    );
    args.image.check()?;
    setup::run()?;
    let made = debian_image(&args.image)?;
    fs::create_dir_all(&args.out)
        .with_context(|| format!("Cannot make the folder {}: give another one with --out", args.out.display()))?;
    // The image comes last and under its name when it is whole, since that is what a later run refuses to touch.
    for (name, copy) in [
        ("vmlinuz", "vmlinuz"),
        ("initrd.img", "initrd.img"),
        ("debian.toml", "debian.toml"),
        ("debian.img", "debian.img.new"),
    ] {
        let mut cp = Command::new("cp");
        cp.args(["--sparse=always", "--reflink=auto"]).arg(made.join(name)).arg(args.out.join(copy));
        apt::run(&mut cp)
            .with_context(|| format!("Cannot fill the folder {}: give another one with --out", args.out.display()))?;
    }
    fs::rename(args.out.join("debian.img.new"), &image)?;
    println!("{}", args.out.join("debian.toml").display());
    Ok(())
}

/// The folder of the cache that holds debian.img, vmlinuz, initrd.img and debian.toml; a guest is given a copy.
pub(crate) fn debian_image(spec: &ImageSpec) -> Result<PathBuf> {
    spec.check()?;
    let key = spec.ssh_key.as_deref().map(read_key).transpose()?;
    let sources = Sources::of_machine(spec.suite.as_deref())?;
    let packages = spec.all_packages(key.is_some()).join(",");
    let size = spec.size.to_string();
    let key_text = key.as_deref().unwrap_or_default();
    let (mirrors, files, toml) = (sources.lines.join("\n"), files::text(), toml());
    let inputs = [
        &sources.suite,
        &mirrors,
        &sources.lists,
        &packages,
        &size,
        &spec.hostname,
        key_text,
        UUID,
        CONFIGURE,
        FILL,
        &files,
        &toml,
    ];
    cache::entry("debian", &inputs, |folder| {
        let work = tempfile::tempdir()?;
        let files = work.path().join("files.tar");
        files::archive(&files, &spec.hostname, key.as_deref())?;
        install(&sources, &packages, &files, &folder.join("root.tar"))?;
        fill(folder, spec.size, sources.time)?;
        Ok(fs::write(folder.join("debian.toml"), &toml)?)
    })
}

/// The image that `cargo xtask image` makes when nothing else is asked for, as [`debian_image`] returns it.
pub(crate) fn plain_debian_image() -> Result<PathBuf> {
    let size = "2G".parse().context("A size is not understood")?;
    let hostname = "debian".to_owned();
    debian_image(&ImageSpec { size, suite: None, ssh_key: None, hostname, packages: Vec::new() })
}

impl ImageSpec {
    /// What `cargo xtask image PACKAGE…` asks for.
    pub(crate) fn with(packages: &[&str]) -> Self {
        let packages = packages.iter().map(|package| (*package).to_owned()).collect();
        Self { size: Size(2 << 30), suite: None, ssh_key: None, hostname: "debian".into(), packages }
    }

    /// Says what is wrong before anything is downloaded.
    fn check(&self) -> Result<()> {
        ensure!(
            SIZES.contains(&self.size),
            "--size {} is not between {} and {}: give a size such as 2G",
            self.size,
            SIZES.start(),
            SIZES.end()
        );
        let is_name = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        ensure!(
            is_name(&self.hostname) && (1..=63).contains(&self.hostname.len()) && !self.hostname.starts_with('-'),
            "--hostname {:?} is no name of a host: use up to 63 letters, digits and hyphens",
            self.hostname
        );
        if let Some(suite) = &self.suite {
            ensure!(
                !suite.is_empty() && suite.bytes().all(|byte| byte.is_ascii_lowercase()),
                "--suite {suite:?} is no suite of Debian: give a name such as bookworm"
            );
        }
        for package in &self.packages {
            ensure!(
                is_package(package),
                "{package:?} is no package: give NAME or NAME=VERSION, such as nginx, in small letters"
            );
        }
        self.ssh_key.as_deref().map(read_key).transpose().map(|_| ())
    }

    /// The packages to install, each once and in an order that does not depend on how they were said.
    fn all_packages(&self, ssh: bool) -> Vec<&str> {
        let mut packages = PACKAGES.to_vec();
        packages.extend(self.packages.iter().map(String::as_str));
        if !packages.iter().any(|package| package.starts_with("linux-image-")) {
            packages.push(KERNEL);
        }
        packages.extend(ssh.then_some("openssh-server"));
        packages.sort_unstable();
        packages.dedup();
        packages
    }
}

/// Debian's rules for names and versions (Debian Policy, sections 5.6.7 and 5.6.12). Nothing else that apt understands
/// goes, such as a pattern or a file.
fn is_package(text: &str) -> bool {
    let (name, version) = text.split_once('=').unwrap_or((text, "0"));
    let lower = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() > 1
        && name.bytes().next().is_some_and(lower)
        && name.bytes().all(|byte| lower(byte) || b"+-.".contains(&byte))
        && version.bytes().next().is_some_and(|byte| byte.is_ascii_digit())
        && version.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.:~".contains(&byte))
}

/// The public key in a file, as a line.
fn read_key(file: &Path) -> Result<String> {
    let name = file.display();
    let text = fs::read_to_string(file).map_err(|error| {
        anyhow!("Cannot read the ssh key {name} ({error}): give --ssh-key a public key such as id_ed25519.pub")
    })?;
    ensure!(!text.contains("PRIVATE KEY"), "{name} is a private key: give --ssh-key the public one, {name}.pub");
    let key = text.trim();
    let is_key = ["ssh-", "ecdsa-", "sk-"].iter().any(|kind| key.starts_with(kind)) && key.contains(' ');
    ensure!(
        is_key && !key.contains('\n'),
        "{name} holds no public key: give --ssh-key a file of one line, ssh-… AAAA…"
    );
    Ok(format!("{key}\n"))
}

/// The file that boots the image; what it names is beside it.
fn toml() -> String {
    "# Boots the image beside it: vmm --config debian.toml\n\
     kernel = \"vmlinuz\"\n\
     initrd = \"initrd.img\"\n\
     cmdline = \"root=/dev/vda rw\"\n\
     mem = \"512M\"\n\
     \n\
     [[disk]]\n\
     path = \"debian.img\"\n"
        .to_owned()
}

/// Installs `packages` and what they need, with the archive `files`, and writes all of it to the archive `tar`.
fn install(sources: &Sources, packages: &str, files: &Path, tar: &Path) -> Result<()> {
    let step = progress::step(&format!("Installing Debian {} into an image; this takes a minute", sources.suite));
    let mode = if rustix::process::geteuid().is_root() { "root" } else { "unshare" };
    let mut mmdebstrap = Command::new("mmdebstrap")
        .args([&format!("--mode={mode}"), "--variant=minbase", "--architectures=amd64", "--format=tar"])
        .args(sources.options.iter().map(|option| format!("--aptopt={option}")))
        .arg(format!("--include={packages}"))
        // Before the packages: what makes the initramfs reads some of the files.
        .arg(format!("--essential-hook=tar-in {} /", files.display()))
        .arg(format!("--customize-hook={CONFIGURE}"))
        .arg(&sources.suite)
        .arg("-")
        .args(&sources.lines)
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("SOURCE_DATE_EPOCH", sources.time.to_string())
        .stdin(Stdio::null())
        .stdout(fs::File::create(tar)?)
        .stderr(Stdio::piped())
        .spawn()
        .context("Cannot run mmdebstrap: run `cargo xtask setup`")?;
    let mut said = Vec::new();
    for line in BufReader::new(mmdebstrap.stderr.take().context("mmdebstrap has no output")?).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim().to_owned();
        if let Some(now) = line.strip_prefix("I: ") {
            step.at(now);
        }
        said.push(line);
    }
    let status = mmdebstrap.wait()?;
    if status.success() { Ok(()) } else { Err(install_fault(&said, &sources.suite)) }
}

/// What went wrong, in one line, from all that mmdebstrap and what it runs have said.
fn install_fault(said: &[String], suite: &str) -> Error {
    let after = |mark: &str| said.iter().find_map(|line| line.split_once(mark).map(|(_, rest)| rest));
    if let Some(name) = after("Unable to locate package ") {
        return anyhow!(
            "Debian {suite} has no package {name}: check its name (only Debian's section main is searched)"
        );
    }
    if let Some(name) = after("has no installation candidate").and(after("E: Package ")) {
        return anyhow!("Debian {suite} has no package {}: check its name", name.split(' ').next().unwrap_or(name));
    }
    if after("does not have a Release file").is_some() {
        return anyhow!("The machine's mirror has no suite {suite}: check the name that --suite gives");
    }
    if after("No space left on device").is_some() {
        return no_space();
    }
    let errors =
        said.iter().filter(|line| line.contains("rror") || line.starts_with("E: ") || line.contains("newuidmap"));
    let errors: Vec<&str> = errors.map(String::as_str).collect();
    anyhow!("mmdebstrap failed; it said: {}", errors.join("; "))
}

fn no_space() -> Error {
    anyhow!("There is no space left: set TMPDIR and VMM_CACHE to folders with a few gigabytes")
}

/// Makes the files of the image in `folder` out of its `root.tar`.
fn fill(folder: &Path, size: Size, time: u64) -> Result<()> {
    let step = progress::step("Filling the image's file system");
    let mut command = Command::new("unshare");
    if rustix::process::geteuid().is_root() {
        command = Command::new("sh");
    } else {
        // A namespace in which the owners of the archive's files exist.
        command.args(["--map-root-user", "--map-auto", "sh"]);
    }
    command.args(["-c", FILL, "fill"]).arg(folder).arg((size.bytes() >> 10).to_string()).arg(UUID);
    command.env("E2FSPROGS_FAKE_TIME", time.to_string());
    let filled = apt::run(&mut command);
    drop(step);
    let Err(error) = filled else { return Ok(()) };
    let text = error.to_string();
    if text.contains("No space left on device") {
        return Err(no_space());
    }
    if text.contains("Could not allocate") {
        bail!("The packages do not fit into --size {size}: give a larger one");
    }
    Err(error.context("Cannot fill the image's file system"))
}

#[cfg(test)]
mod tests;

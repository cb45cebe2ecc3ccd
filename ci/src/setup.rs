//! `cargo xtask setup`: installs the Debian packages that the other verbs need, and only those that are missing. The
//! servers of the example fleets, which a Debian starts when it has them, are installed by `cargo xtask test --all` alone.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{apt, progress};

/// Every package that the project needs beside Rust: the emulated host, the tests, and the small kernel's build.
const PACKAGES: &[&str] = &[
    // The emulated host.
    "kmod",
    "qemu-system-common",
    "qemu-system-x86",
    // The tests.
    "busybox-static",
    "cpio",
    "crun",
    "dnsmasq-base",
    "iproute2",
    "nftables",
    "passt",
    "procps",
    "qemu-utils",
    "squashfs-tools",
    "strace",
    // The small kernel's build.
    "bc",
    "binutils",
    "bison",
    "flex",
    "gcc",
    "libelf-dev",
    "lz4",
    "make",
    "tar",
    "xz-utils",
    // The Debian images; uidmap is for ordinary users.
    "debian-archive-keyring",
    "e2fsprogs",
    "mmdebstrap",
    "uidmap",
];

/// What the machines of the example fleets run.
const SERVERS: &[&str] = &["haproxy", "libdbd-pg-perl", "nginx", "postgresql-15"];

/// Installs what is missing.
pub(crate) fn run() -> Result<()> {
    install(PACKAGES)
}

/// Installs what is missing for the long tests.
pub(crate) fn with_servers() -> Result<()> {
    install(&[PACKAGES, SERVERS].concat())
}

fn install(packages: &[&str]) -> Result<()> {
    let missing = apt::missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    let line = format!("apt-get install --no-install-recommends --yes {}", missing.join(" "));
    let Some(prefix) = administrator() else {
        bail!("Packages are missing, and they can be installed by an administrator only. Run:\n    sudo {line}");
    };
    let progress = progress::step(&format!("Installing {}", missing.join(", ")));
    let install = || {
        let mut words = prefix.iter().copied().chain(line.split(' '));
        let mut command = Command::new(words.next().context("There is no command")?);
        apt::run(command.args(words).env("DEBIAN_FRONTEND", "noninteractive"))
    };
    // Lists that are missing or out of date make it fail: that is the time to fetch them, and not before.
    if install().is_err() {
        progress.at("fetching apt's lists");
        let mut words = prefix.iter().copied().chain(["apt-get", "-qq", "update"]);
        apt::run(Command::new(words.next().context("There is no command")?).args(words))?;
        progress.at("installing");
        install().with_context(|| format!("Cannot install the packages. Run:\n    sudo {line}\nFor this"))?;
    }
    drop(progress);
    Ok(())
}

/// What to put before a command so that an administrator runs it: nothing for root, sudo if it asks no password.
fn administrator() -> Option<&'static [&'static str]> {
    if rustix::process::geteuid().is_root() {
        return Some(&[]);
    }
    let sudo = Command::new("sudo").args(["--non-interactive", "true"]).output();
    sudo.is_ok_and(|output| output.status.success()).then_some(&["sudo", "--non-interactive"])
}

//! The QEMU that emulates the host.
//!
//! The one of Debian 12, 7.2, has faults where it emulates SVM: VMRUN and #VMEXIT clear a bit in its word of pending
//! interrupts without a lock, so an interrupt that another thread sets at that moment is lost, and with a timer's the
//! host stands still; memory of the host is corrupted now and then. Debian's backports have one in which neither was
//! seen. It is downloaded into the cache, with lists of packages of our own, and not installed.
//!
//! Where it cannot be had the old one emulates a single processor and counts instructions, so that timers run on the
//! processor's own thread. That is several times slower.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use crate::{apt, cache, progress};

/// QEMU's major version from which on it emulates SVM well enough for all tests.
const FIRST_SOUND: u32 = 10;
const PROGRAM: &str = "qemu-system-x86_64";
/// The program, its modules, and its firmware; the libraries that it needs are those that the old one needs.
const PACKAGES: [&str; 4] = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];
const FIRMWARE: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The QEMU to use.
#[derive(Debug)]
pub(crate) struct Emulator {
    program: PathBuf,
    firmware: Vec<PathBuf>,
    /// As it says itself, such as `10.0.2`.
    pub(crate) version: String,
}

impl Emulator {
    /// The installed one, if it is new enough, or else one from the cache.
    pub(crate) fn find() -> Result<&'static Self> {
        static FOUND: OnceLock<Emulator> = OnceLock::new();
        if let Some(found) = FOUND.get() {
            return Ok(found);
        }
        let installed = Self::new(PathBuf::from(PROGRAM), Vec::new())?;
        let found = if installed.is_sound() {
            installed
        } else {
            Self::from_backports(&installed.version).unwrap_or_else(|error| {
                eprintln!("The emulated host is slow, because QEMU {} is at hand only: {error:#}", installed.version);
                installed
            })
        };
        Ok(FOUND.get_or_init(|| found))
    }

    fn from_backports(installed: &str) -> Result<Self> {
        let folder = cache::entry("qemu", &[installed], download)?;
        let firmware = FIRMWARE.iter().map(|firmware| folder.join(firmware)).collect();
        let emulator = Self::new(folder.join("usr/bin").join(PROGRAM), firmware)?;
        ensure!(emulator.is_sound(), "the backports have QEMU {}", emulator.version);
        Ok(emulator)
    }

    fn new(program: PathBuf, firmware: Vec<PathBuf>) -> Result<Self> {
        let said = apt::output(Command::new(&program).arg("--version"))?;
        let version = said.split_whitespace().nth(3).context("QEMU does not say its version")?.to_owned();
        Ok(Self { program, firmware, version })
    }

    /// Whether several threads of it can emulate a host.
    pub(crate) fn is_sound(&self) -> bool {
        let major = self.version.split('.').next().and_then(|major| major.parse().ok());
        major.is_some_and(|major: u32| major >= FIRST_SOUND)
    }

    /// The command, with its firmware.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        for folder in &self.firmware {
            command.arg("-L").arg(folder);
        }
        command
    }
}

/// Unpacks the packages from the backports of the distribution whose packages apt knows.
fn download(folder: &Path) -> Result<()> {
    let step = progress::step("Downloading a newer QEMU for the emulated host");
    let targets = apt::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(CODENAME) $(COMPONENT)",
        "Created-By: Packages",
    ]))?;
    let (uri, codename) = distribution(&targets).context("apt knows no distribution: run `apt-get update`")?;
    let apt = tempfile::tempdir_in(folder)?;
    for folder in ["lists/partial", "cache/archives/partial", "packages"] {
        fs::create_dir_all(apt.path().join(folder))?;
    }
    let lines = [codename.to_owned(), format!("{codename}-backports")]
        .map(|suite| format!("deb [signed-by={KEYRING}] {uri} {suite} main\n"));
    fs::write(apt.path().join("sources.list"), lines.concat())?;
    let apt_get = |words: &[&str]| {
        let place = |option: &str, path: &str| format!("{option}={}", apt.path().join(path).display());
        let mut command = Command::new("apt-get");
        for option in [
            place("Dir::Etc::sourcelist", "sources.list"),
            place("Dir::State::lists", "lists"),
            place("Dir::Cache", "cache"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        apt::run(command.arg("-qq").args(words).current_dir(apt.path().join("packages")))
    };
    apt_get(&["update"])?;
    let packages = PACKAGES.map(|package| format!("{package}/{codename}-backports"));
    apt_get(&[&["download"], &packages.each_ref().map(String::as_str)[..]].concat())?;
    for file in fs::read_dir(apt.path().join("packages"))? {
        apt::run(Command::new("dpkg").arg("-x").arg(file?.path()).arg(folder))?;
    }
    drop(step);
    Ok(())
}

/// Where the distribution's own packages come from, and its name.
fn distribution(targets: &str) -> Option<(&str, &str)> {
    targets.lines().find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
        [uri, codename, "main"] if !codename.contains('-') => Some((uri, codename)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distribution_is_neither_its_updates_nor_somebody_elses_packages() {
        let targets = "http://a.example/other stable-x extra\nhttp://a.example/debian/ bookworm-updates main\n\
                       http://a.example/debian/ bookworm main\n";
        assert_eq!(distribution(targets), Some(("http://a.example/debian/", "bookworm")));
        assert_eq!(distribution(""), None);
    }

    #[test]
    fn the_qemu_of_debian_12_is_not_sound_and_those_after_it_are() {
        let emulator =
            |version: &str| Emulator { program: PathBuf::new(), firmware: Vec::new(), version: version.into() };
        assert!(!emulator("7.2.22").is_sound());
        assert!(emulator("10.0.2").is_sound());
    }
}

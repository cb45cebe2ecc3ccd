//! Debian packages, asked for through apt and dpkg: what is installed, which version there is, and their content.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail, ensure};

use crate::cache;

/// A package in the version that apt would install.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
}

impl Package {
    /// The package of this name.
    pub(crate) fn named(name: &str) -> Result<Self> {
        Self::remembered(&[name], || {
            candidate(name)?.with_context(|| format!("apt knows no package {name}: run `apt-get update`"))
        })
    }

    /// The newest package whose name is `prefix`, numbers, `suffix`, such as `linux-image-6.1.` `0-56` `-cloud-amd64`.
    pub(crate) fn newest(prefix: &str, suffix: &str) -> Result<Self> {
        Self::remembered(&[prefix, suffix], || ask_for_newest(prefix, suffix))
    }

    /// Asking apt takes a second, so its answer is kept for as long as its lists stay the same.
    fn remembered(question: &[&str], ask: impl FnOnce() -> Result<Self>) -> Result<Self> {
        if package_lists()?.is_empty() {
            update_lists()?;
        }
        let lists = package_lists()?;
        let answer = cache::entry("package", &[question, &[&lists]].concat(), |dir| {
            let package = ask()?;
            Ok(fs::write(dir.join("answer"), format!("{}={}", package.name, package.version))?)
        })?;
        let answer = fs::read_to_string(answer.join("answer"))?;
        let (name, version) = answer.split_once('=').context("The cache holds a damaged package name")?;
        Ok(Self { name: name.to_owned(), version: version.to_owned() })
    }

    /// Downloads the package and unpacks its files into `directory`. Nothing is installed.
    pub(crate) fn unpack(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        let download = tempfile::tempdir_in(directory)?;
        run(Command::new("apt-get")
            .args(["-qq", "-o", "APT::Sandbox::User=root", "download"])
            .arg(format!("{}={}", self.name, self.version))
            .current_dir(download.path()))
        .with_context(|| {
            format!("Cannot download {} {}: check the network, then run `apt-get update`", self.name, self.version)
        })?;
        for file in fs::read_dir(download.path())? {
            run(Command::new("dpkg").arg("-x").arg(file?.path()).arg(directory))?;
        }
        Ok(())
    }
}

/// Which of `packages` are not installed.
pub(crate) fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    // dpkg-query fails when it knows nothing of one of the packages, and still prints the others.
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .args(packages)
        .stderr(Stdio::null())
        .output()
        .context("Cannot run dpkg-query: the set-up needs Debian 12 or a distribution made from it")?;
    let installed = String::from_utf8_lossy(&output.stdout);
    let is_installed = |package: &str| installed.lines().any(|line| line == format!("{package} installed"));
    Ok(packages.iter().copied().filter(|package| !is_installed(package)).collect())
}

/// Fetches apt's lists of packages, for which one must be root.
pub(crate) fn update_lists() -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "apt has no lists of packages yet: run `sudo apt-get update` once");
    run(Command::new("apt-get").args(["-qq", "update"])).context("Cannot fetch apt's lists of packages")
}

/// Names, sizes and times of apt's lists, so that a change of them is seen.
pub(crate) fn package_lists() -> Result<String> {
    let mut lists = Vec::new();
    for file in fs::read_dir("/var/lib/apt/lists").context("Cannot read apt's lists of packages")? {
        let file = file?;
        let name = file.file_name().to_string_lossy().into_owned();
        if name.contains("_Packages") {
            let metadata = file.metadata()?;
            let modified = metadata.modified()?.duration_since(UNIX_EPOCH)?.as_secs();
            lists.push(format!("{name} {} {modified}", metadata.len()));
        }
    }
    lists.sort();
    Ok(lists.join("\n"))
}

fn ask_for_newest(prefix: &str, suffix: &str) -> Result<Package> {
    let names = output(Command::new("apt-cache").args(["pkgnames", prefix]))?;
    let mut found: Vec<(Vec<u64>, &str)> = names
        .lines()
        .filter_map(|name| Some((numbers(name.strip_prefix(prefix)?.strip_suffix(suffix)?)?, name)))
        .collect();
    found.sort_unstable();
    for (_, name) in found.into_iter().rev() {
        if let Some(package) = candidate(name)? {
            return Ok(package);
        }
    }
    bail!(
        "apt knows no package {prefix}*{suffix}: the set-up needs the packages of Debian 12 with its security updates, \
         and `apt-get update` run"
    )
}

/// The version of a package that apt would install. Of some names that apt knows it can install none.
fn candidate(name: &str) -> Result<Option<Package>> {
    let policy = output(Command::new("apt-cache").args(["policy", name]))?;
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    Ok(version
        .filter(|version| *version != "(none)")
        .map(|version| Package { name: name.to_owned(), version: version.to_owned() }))
}

/// The numbers in `0-56` or `117+deb12`; nothing for another flavour's name, such as `0-56-rt`.
fn numbers(middle: &str) -> Option<Vec<u64>> {
    let middle = middle.strip_suffix("+deb12").unwrap_or(middle);
    middle.split(['.', '-']).map(|number| number.parse().ok()).collect()
}

/// Runs a quiet command; what it printed is in the error if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    output(command).map(|_| ())
}

/// Runs a quiet command. Returns what it printed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output()
        .with_context(|| format!("Cannot run {program}: run `cargo xtask setup`"))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed ({}): {}", output.status, message.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_names_order_by_their_numbers_and_other_flavours_are_left_out() {
        assert!(numbers("0-100") > numbers("0-56"));
        assert!(numbers("117+deb12") > numbers("99+deb12"));
        assert_eq!(numbers("0-56-rt"), None);
        assert_eq!(numbers("0-56-cloud"), None);
    }

    #[test]
    fn an_unknown_package_is_missing_and_dpkg_is_not() {
        assert_eq!(missing(&["dpkg", "no-such-package"]).unwrap(), ["no-such-package"]);
    }
}

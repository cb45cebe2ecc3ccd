//! Kept tools in the root folder: the program, the libraries that it loads, the loader.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

use crate::contender::in_path;
use crate::measure::Group;
use crate::result::Skipped;

/// A tool that is installed here.
#[derive(Clone, Debug)]
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    pub(crate) program: PathBuf,
}

/// A group of measures, the tool for it, its Debian package, and what is done without it.
const KEPT: [(Group, &str, &str, &str); 4] = [
    (Group::Disk, "fio", "fio", "the workload measures the disk"),
    (Group::Network, "iperf3", "iperf3", "the workload measures the network"),
    (Group::Services, "nginx", "nginx-light", "no web server is measured"),
    (Group::Services, WRK, "wrk", "no web server is measured"),
];
/// What loads a web server: from the host's side only.
pub(crate) const WRK: &str = "wrk";

/// The kept tools for these groups that are installed here, and those that are not.
pub(crate) fn find(groups: &[Group]) -> (Vec<Tool>, Vec<Skipped>) {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for (_, name, package, without) in KEPT.into_iter().filter(|(group, ..)| groups.contains(group)) {
        match in_path(name) {
            Some(program) => found.push(Tool { name, program }),
            None => missing.push(Skipped {
                what: name.to_owned(),
                why: format!("it is not installed (Debian 12: apt install {package}): {without}"),
            }),
        }
    }
    (found, missing)
}

impl Tool {
    /// Copies it, with its libraries, to the places that they have on the host.
    pub(crate) fn copy_into(&self, root: &Path) -> anyhow::Result<()> {
        let bin = root.join("bin");
        fs::create_dir_all(&bin)?;
        fs::copy(&self.program, bin.join(self.name)).with_context(|| format!("cannot copy {}", self.name))?;
        for library in libraries(&self.program)? {
            let place = root.join(library.strip_prefix("/")?);
            if !place.exists() {
                fs::create_dir_all(place.parent().context("a library is in a folder")?)?;
                fs::copy(&library, &place).with_context(|| format!("cannot copy {}", library.display()))?;
            }
        }
        Ok(())
    }
}

/// The libraries that a program loads, and the loader, as `ldd` lists them.
fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output =
        Command::new("ldd").arg(program).output().context("cannot run ldd (Debian 12: apt install libc-bin)")?;
    // A static program has none, and ldd says so by failing.
    let text = String::from_utf8_lossy(&output.stdout);
    let missing = text.lines().find(|line| line.contains("not found"));
    ensure!(missing.is_none(), "{} lacks a library: {}", program.display(), missing.unwrap_or_default().trim());
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

//! Kept tools in the root folder: the program, the libraries that it loads, the loader.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

/// A tool that is installed here.
#[derive(Clone, Debug)]
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    pub(crate) program: PathBuf,
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

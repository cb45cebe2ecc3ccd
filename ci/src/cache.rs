//! What is downloaded or built once and kept outside the clone: `$VMM_CACHE`, else `$XDG_CACHE_HOME/vmm`, else
//! `~/.cache/vmm`.
//!
//! An entry is a directory named by what it is and by a hash of all that it was made from, so a changed recipe makes a
//! new entry and never finds a stale one. It is made under another name and then renamed: it is there whole or not at
//! all. A lock makes a second process wait for the first instead of doing the same work.
//!
//! Left out: throwing old entries away. `rm -r` of the whole directory is always safe while nothing runs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// The entry `name` made from `inputs`, made by `make` (which fills the directory it is given) if it is not there yet.
pub(crate) fn entry(name: &str, inputs: &[&str], make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    entry_in(&root()?, name, inputs, make)
}

/// The cache's directory; it may not exist yet.
pub(crate) fn root() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(path) = variable("VMM_CACHE") {
        return std::path::absolute(path).context("VMM_CACHE does not name a directory");
    }
    let base = match (variable("XDG_CACHE_HOME"), variable("HOME")) {
        (Some(cache), _) => PathBuf::from(cache),
        (None, Some(home)) => Path::new(&home).join(".cache"),
        (None, None) => bail!("There is no place for the cache: set VMM_CACHE to a directory"),
    };
    Ok(base.join("vmm"))
}

fn entry_in(root: &Path, name: &str, inputs: &[&str], make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let path = root.join(format!("{name}-{}", key(inputs)));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(root).with_context(|| {
        format!("Cannot make the cache {}: set VMM_CACHE to a directory that can be written", root.display())
    })?;
    let lock = File::create(path.with_added_extension("lock")).context("Cannot lock the cache")?;
    lock.lock().context("Cannot lock the cache")?;
    if path.exists() {
        return Ok(path);
    }
    // The lock is held, so what an interrupted run left under this name belongs to nobody.
    let unfinished = path.with_added_extension("new");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).with_context(|| format!("Cannot remove {}", unfinished.display()))?;
    }
    fs::create_dir(&unfinished).with_context(|| format!("Cannot write to the cache {}", root.display()))?;
    make(&unfinished).with_context(|| format!("Cannot make {name} for the cache"))?;
    fs::rename(&unfinished, &path).with_context(|| format!("Cannot move {} into the cache", path.display()))?;
    Ok(path)
}

/// Sixteen hexadecimal digits that stand for `inputs`. Lengths are hashed too: `["ab", "c"]` is not `["a", "bc"]`.
fn key(inputs: &[&str]) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        hash.update((input.len() as u64).to_le_bytes());
        hash.update(input);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_made_once_for_the_same_inputs_and_anew_for_others() {
        let root = tempfile::tempdir().unwrap();
        let made = std::cell::Cell::new(0);
        let make = |dir: &Path| {
            made.set(made.get() + 1);
            Ok(fs::write(dir.join("content"), "whole")?)
        };
        let first = entry_in(root.path(), "thing", &["ab", "c"], make).unwrap();
        let again = entry_in(root.path(), "thing", &["ab", "c"], make).unwrap();
        let other = entry_in(root.path(), "thing", &["a", "bc"], make).unwrap();
        assert_eq!(first, again);
        assert_ne!(first, other);
        assert_eq!(made.get(), 2);
        assert_eq!(fs::read_to_string(first.join("content")).unwrap(), "whole");
    }

    #[test]
    fn a_failed_entry_is_not_there_and_can_be_made_later() {
        let root = tempfile::tempdir().unwrap();
        entry_in(root.path(), "thing", &[], |dir| {
            fs::write(dir.join("content"), "half")?;
            bail!("the network is gone")
        })
        .unwrap_err();
        let path = entry_in(root.path(), "thing", &[], |dir| {
            assert!(!dir.join("content").exists(), "the half-made content is gone");
            Ok(())
        })
        .unwrap();
        assert!(path.is_dir());
    }

    #[test]
    fn two_at_once_make_an_entry_once() {
        let root = tempfile::tempdir().unwrap();
        let made = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    entry_in(root.path(), "thing", &[], |_| {
                        made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        Ok(())
                    })
                    .unwrap();
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }
}

//! Where a fleet's files are while it runs, and who has it: a folder below the one for run-time files, with a lock that
//! is held for as long as the fleet lives.

use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use fleet::plan::Places;
use rustix::fs::{FlockOperation, flock};

/// The longest that a fleet takes to end once all of its machines were told to; their own time comes on top.
const END: Duration = Duration::from_secs(600);

/// Where one fleet's files are.
pub(crate) struct Place {
    name: String,
    pub(crate) folder: PathBuf,
}

impl Place {
    /// The place of the fleet with this name. Makes nothing.
    pub(crate) fn of(name: &str) -> anyhow::Result<Self> {
        fleet::spec::name(name)?;
        Ok(Self { name: name.to_owned(), folder: runtime().join("vmm/fleets").join(name) })
    }

    /// Takes it: nobody else runs this fleet until the file is closed. Nothing of an earlier one is left.
    pub(crate) fn take(&self) -> anyhow::Result<Option<File>> {
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        make(&self.folder).with_context(|| {
            format!("cannot make {}: set XDG_RUNTIME_DIR to a folder of yours", self.folder.display())
        })?;
        let Some(lock) = self.lock()? else { return Ok(None) };
        for old in ["secrets", "logs"] {
            let path = self.folder.join(old);
            let _ = fs::remove_dir_all(&path);
            make(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        for old in [self.socket(), self.pasta(), self.folder.join("log")] {
            let _ = fs::remove_file(old);
        }
        Ok(Some(lock))
    }

    fn lock(&self) -> anyhow::Result<Option<File>> {
        let path = self.folder.join("lock");
        let file = OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// Whether nobody runs the fleet.
    pub(crate) fn is_free(&self) -> anyhow::Result<bool> {
        Ok(!self.folder.exists() || self.lock()?.is_some())
    }

    /// Waits until nobody runs it any more.
    pub(crate) fn wait_until_free(&self) -> anyhow::Result<()> {
        let start = Instant::now();
        while !self.is_free()? {
            if start.elapsed() > END {
                bail!("{} is still locked after {} s", self.folder.display(), END.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("control")
    }

    /// Where pasta says that it is ready.
    pub(crate) fn pasta(&self) -> PathBuf {
        self.folder.join("pasta.pid")
    }

    /// The folders that machines have of us.
    pub(crate) fn places(&self) -> Places {
        Places { runtime: self.folder.clone(), volumes: data().join("vmm/volumes").join(&self.name) }
    }

    /// Removes the fleet's named volumes.
    pub(crate) fn remove_volumes(&self) -> anyhow::Result<()> {
        let path = self.places().volumes;
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }
}

/// The folder for run-time files, which the machines are told, too: in the fleet's namespaces everybody is root.
pub(crate) fn runtime() -> PathBuf {
    let root = || rustix::process::geteuid().is_root().then(|| PathBuf::from("/run"));
    folder("XDG_RUNTIME_DIR").or_else(root).unwrap_or_else(env::temp_dir)
}

/// The folder for data that stays.
fn data() -> PathBuf {
    let home = || folder("HOME").map(|home| home.join(".local/share"));
    folder("XDG_DATA_HOME").or_else(home).unwrap_or_else(|| "/var/lib".into())
}

fn folder(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|folder| !folder.is_empty()).map(PathBuf::from)
}

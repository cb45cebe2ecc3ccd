//! The folders whose files a request at the control socket may name (`--api-folder`). Any other file comes with the request
//! as a descriptor, so that what a machine can open is known at its start.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use devices::DeviceRequest;
use machine::{ControlError, ControlRequest, VmConfig};
use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
use rustix::io::Errno;

use crate::exit::Usage;

/// Where a machine is controlled, and what it may open then.
pub(crate) struct Api<'a> {
    /// The socket's path.
    pub(crate) socket: &'a Path,
    pub(crate) folders: Folders,
}

/// What was allowed at the start.
pub(crate) struct Folders(Vec<(PathBuf, OwnedFd)>);

impl Folders {
    /// # Errors
    ///
    /// The user's: there is no such folder.
    pub(crate) fn open(paths: &[PathBuf]) -> anyhow::Result<Self> {
        let folder = |path: &PathBuf| {
            let absolute = std::path::absolute(path).context("Cannot tell the current folder")?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened = open(path, flags, Mode::empty()).map_err(|error| {
                Usage(format!("Cannot open --api-folder {} ({error}): name a folder", path.display()))
            })?;
            Ok((absolute, opened))
        };
        Ok(Self(paths.iter().map(folder).collect::<anyhow::Result<_>>()?))
    }

    /// Where they are.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(|(path, _)| path.as_path())
    }

    /// Opens the file that a request names, if it names one. The one that is in the drive need not be opened again.
    ///
    /// # Errors
    ///
    /// It is in none of the folders, or cannot be opened.
    pub(crate) fn open_for(&self, request: ControlRequest, config: &VmConfig) -> Result<ControlRequest, ControlError> {
        match request {
            ControlRequest::Device(DeviceRequest::ChangeDrive { id, path, file: None }) => {
                let drive = config.devices.disk.iter().find(|disk| disk.id() == id);
                let file = match drive {
                    Some(disk) if disk.path != path => Some(self.file(&path, !disk.readonly)?),
                    _ => None,
                };
                Ok(ControlRequest::Device(DeviceRequest::ChangeDrive { id, path, file }))
            }
            request => Ok(request),
        }
    }

    fn file(&self, path: &Path, write: bool) -> Result<File, ControlError> {
        let inside = self.0.iter().find_map(|(folder, opened)| Some((path.strip_prefix(folder).ok()?, opened)));
        let name = path.display();
        let Some((inside, folder)) = inside else {
            return Err(ControlError::Device(format!(
                "{name} is in no folder that this machine may open files of: send it as a descriptor, as vmm ctl does, or \
                 start the machine with --api-folder"
            )));
        };
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        // A pipe is refused later, and opening one shall not wait for its other end.
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        // No link and no `..` leads out.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
        let opened = openat2(folder, inside, flags, Mode::empty(), resolve);
        opened.map(File::from).map_err(|error| {
            let cure = match error {
                Errno::NOENT => "it does not exist, check the path or make it first (`truncate -s 8G FILE`)",
                Errno::XDEV => "a link leads out of --api-folder, name the file itself",
                Errno::ISDIR => "it is a directory, name a file in it",
                Errno::ACCESS | Errno::PERM | Errno::ROFS => "check its mode: the drive needs to read and to write",
                _ => "choose another path",
            };
            ControlError::Device(format!("Cannot open the disk image {name} ({error}): {cure}"))
        })
    }
}

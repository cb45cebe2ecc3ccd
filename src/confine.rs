//! What a machine's process keeps when it confines itself: the files that its configuration names, and those that it has
//! besides.

use std::env;
use std::path::{Path, PathBuf};

use boot::cache::Cache;
use machine::VmConfig;
use sandbox::{Access, End, Mode, Needs};
use session::{OURS, Session};

use crate::exit::STOPPED;
use crate::folders::Api;

/// What a machine has besides its configuration.
pub(crate) struct Around<'a> {
    pub(crate) cache: Option<&'a Cache>,
    pub(crate) api: Option<&'a Api<'a>>,
    pub(crate) session: Option<&'a Session>,
}

/// Confines the process, which has one thread.
pub(crate) fn confine(mode: Mode, config: &VmConfig, around: &Around<'_>) -> anyhow::Result<()> {
    let code = if around.session.is_some() { OURS } else { STOPPED };
    let needs = Needs { files: files(config, around), host_network: config.devices.uses_host_interfaces() };
    sandbox::confine(mode, &needs, End { code, last: devices::console::restore_terminal })
}

fn files(config: &VmConfig, around: &Around<'_>) -> Vec<(PathBuf, Access)> {
    let named = config.files();
    let read = named.read.into_iter().chain(OF_THE_HOST.map(PathBuf::from)).map(|path| (path, Access::Read));
    let written = named.written.into_iter().map(|path| (path, Access::Write));
    let made = named.made.iter().map(|path| (folder_of(path), Access::Make));
    let sockets = named.sockets.iter().map(PathBuf::as_path).chain(around.api.map(|api| api.socket));
    let sockets = sockets.map(|path| (folder_of(path), Access::Sockets));
    let cache = around.cache.map(|cache| (cache.folder().to_owned(), Access::Make));
    let folders =
        around.api.into_iter().flat_map(|api| api.folders.paths()).map(|path| (path.to_owned(), Access::Write));
    let session = around.session.and_then(Session::folder).into_iter();
    let session =
        session.flat_map(|folder| [(folder.to_owned(), Access::Make), (folder_of(folder), Access::RemoveFolders)]);
    read.chain(written).chain(made).chain(sockets).chain(cache).chain(folders).chain(session).collect()
}

/// What every machine reads: random bytes, how many processors there are, and the process's own descriptors.
const OF_THE_HOST: [&str; 3] = ["/dev/urandom", "/sys/devices/system/cpu", "/proc/self/fd"];

/// The folder that a file is made in, where the current folder is the one of a name alone.
fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => env::current_dir().unwrap_or_else(|_| PathBuf::from(".")),
    }
}

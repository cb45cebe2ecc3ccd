//! Commands that are executables of their own: what runs guests is not to be larger for them.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context as _;

use crate::exit::Usage;

/// Becomes the executable, with these words.
pub(crate) fn become_it(name: &str, words: impl IntoIterator<Item = OsString>) -> anyhow::Result<ExitCode> {
    let error = Command::new(find(name)?).args(words).exec();
    Err(error).with_context(|| format!("Cannot run {name}"))
}

/// Where it is: beside this one, or else in `PATH`.
pub(crate) fn find(name: &str) -> anyhow::Result<PathBuf> {
    let beside = env::current_exe().ok().map(|own| own.with_file_name(name));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places = beside.into_iter().chain(env::split_paths(&path).map(|folder| folder.join(name)));
    let found = places.find(|place| place.is_file());
    Ok(found.ok_or_else(|| {
        Usage(format!(
            "{name} is neither beside vmm nor in PATH: put it there (`cargo install --path crates/{}`)",
            if name == "vmm-ctl" { "api" } else { name.trim_start_matches("vmm-") }
        ))
    })?)
}

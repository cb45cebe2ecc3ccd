//! The verbs on fleets are another program's, `vmm-fleet`, so that a single machine does not carry what it never uses.

use std::env;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::Context as _;

use crate::exit::Usage;

const PROGRAM: &str = "vmm-fleet";

/// What that program is told.
#[derive(Debug, clap::Args)]
pub(super) struct FleetArgs {
    /// See --help after the verb
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) words: Vec<OsString>,
}

/// Becomes that program: the one beside this one, or the one in `PATH`.
pub(super) fn run(verb: &str, words: &[OsString]) -> anyhow::Result<ExitCode> {
    let beside = env::current_exe().context("Cannot tell which program this is")?.with_file_name(PROGRAM);
    let program = if beside.exists() { beside.clone().into_os_string() } else { PROGRAM.into() };
    let error = Command::new(&program).arg(verb).args(words).exec();
    match error.kind() {
        ErrorKind::NotFound => Err(Usage(format!(
            "there is no {PROGRAM} beside {} nor in PATH: install it there (`cargo install --path crates/fleet`)",
            beside.with_file_name("vmm").display()
        ))
        .into()),
        _ => Err(error).with_context(|| format!("Cannot run {}", program.display())),
    }
}

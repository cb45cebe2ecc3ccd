//! PID 1 of a fleet: it starts the watcher, collects whoever lost his parent, and ends with the watcher.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Context as _;
use rustix::process::{Signal, WaitOptions, set_parent_process_death_signal, setsid, wait};

use crate::namespaces;

/// Standard input is the stream to the outer process, for the watcher.
pub(crate) fn run(file: &Path, name: &str) -> anyhow::Result<ExitCode> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("cannot arrange to die with the parent")?;
    // What is typed at the outer process's terminal is not for the machines.
    setsid().context("cannot begin a session")?;
    namespaces::enter()?;
    let watcher =
        Command::new("/proc/self/exe").arg("watch").arg(file).arg(name).spawn().context("cannot start the watcher")?;
    loop {
        let Some((pid, status)) = wait(WaitOptions::empty()).context("cannot wait for a process")? else { continue };
        if u32::try_from(pid.as_raw_nonzero().get()).is_ok_and(|pid| pid == watcher.id()) {
            let code = status.exit_status().and_then(|code| u8::try_from(code).ok());
            return Ok(ExitCode::from(code.unwrap_or(1)));
        }
    }
}

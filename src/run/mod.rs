//! `vmm run`: one command in a machine of its own.
//!
//! ```text
//! RunSpec ──▶ Plan: machine, set-up, command ──▶ boot ──▶ agent connects ──▶ Session: streams, signals, exit code
//! ```
//!
//! Left out so far: OCI images, disks as roots, kernels with modules, and machines in the background.

mod folder;
pub(crate) mod kernel;
mod plan;
mod session;
mod terminal;
mod userland;

use std::process::ExitCode;
use std::time::Instant;

pub(crate) use plan::RunSpec;
pub(crate) use session::Session;

use plan::Plan;

/// The exit code for all that is ours and not the command's, as container tools have it.
pub(crate) const OURS: u8 = 125;

/// Runs the command. Returns its exit code, or 125, 126 or 127 where it did not come to run.
pub(crate) fn run(spec: &RunSpec, start: Instant) -> ExitCode {
    match try_run(spec, start) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vmm run: {error:#}");
            ExitCode::from(OURS)
        }
    }
}

fn try_run(spec: &RunSpec, start: Instant) -> anyhow::Result<ExitCode> {
    let plan = Plan::of(spec)?;
    let session = Session::listen(&plan)?;
    let machine = crate::boot::boot(&plan.machine, None, Some(&session), start);
    let console = plan.folder.last_console_lines();
    let ended = session.finish();
    let trouble = match (machine, ended) {
        (_, Some(Ok(code))) => return Ok(ExitCode::from(code)),
        // A signal has ended it, which has been said.
        (Ok(code), None) => return Ok(code),
        (_, Some(Err(error))) => error,
        (Err(error), None) => error,
    };
    eprint!("{console}");
    Err(trouble)
}

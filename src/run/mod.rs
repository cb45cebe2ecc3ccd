//! `vmm run`: one command in a machine of its own.
//!
//! ```text
//! RunSpec ──▶ Plan: machine, set-up, command ──▶ boot ──▶ agent connects ──▶ Session: streams, signals, exit code
//! ```

mod behind;
mod image;
pub(crate) mod kernel;
mod modules;
mod plan;
mod userland;

use std::process::ExitCode;
use std::time::Instant;

use session::{NotStarted, OURS, Session, code_of};

pub(crate) use plan::RunSpec;

use plan::Plan;

/// Runs the command. Returns its exit code, or 125, 126 or 127 where it did not come to run.
pub(crate) fn run(spec: &RunSpec, start: Instant) -> ExitCode {
    let code = if spec.detach && !spec.behind { behind::start() } else { try_run(spec, start) };
    code.unwrap_or_else(|error| {
        eprintln!("vmm run: {error:#}");
        ExitCode::from(code_of(&error))
    })
}

fn try_run(spec: &RunSpec, start: Instant) -> anyhow::Result<ExitCode> {
    let mut plan = Plan::of(spec)?;
    let session = if spec.behind {
        behind::session(&plan)?
    } else {
        Session::listen(plan.folder.files(), plan.setup.clone(), plan.exec.clone(), None)?
    };
    let machine = crate::boot::boot(&plan.machine, None, Some(&session), plan.sandbox, start);
    let console = plan.folder.files().last_console_lines();
    let ended = session.finish();
    if spec.behind && !spec.rm && session.has_started() {
        plan.folder.keep();
    }
    let trouble = match (machine, ended) {
        (_, Some(Ok(code))) => {
            plan.folder.ended(code, None)?;
            return Ok(ExitCode::from(code));
        }
        // A signal has ended it, which has been said.
        (Ok(code), None) => {
            plan.folder.ended(OURS, Some("a signal has ended the machine".to_owned()))?;
            return Ok(code);
        }
        (_, Some(Err(error))) | (Err(error), None) => error,
    };
    if !trouble.is::<NotStarted>() {
        eprint!("{console}");
    }
    plan.folder.ended(code_of(&trouble), Some(format!("{trouble:#}")))?;
    Err(trouble)
}

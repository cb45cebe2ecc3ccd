//! Programs that are run to their end, with a text as their input.

use std::ffi::OsStr;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::Context as _;

/// The host's or a program's fault, and nobody's who wrote the fleet's file.
#[derive(Debug)]
pub(crate) struct Failed(pub(crate) String);

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failed {}

/// Runs a program to its end.
pub(crate) fn run<A: AsRef<OsStr>>(program: &str, arguments: &[A], input: &str) -> anyhow::Result<()> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    let mut stdin = child.stdin.take().context("a pipe was asked for")?;
    // One that does not want it all has said why.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().with_context(|| format!("cannot wait for {program}"))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words = words.lines().take(3).collect::<Vec<_>>().join("; ");
    Err(Failed(format!("{program} failed ({}): {words}", output.status)).into())
}

//! The kernel: a system call that does nothing, a message to another process and back, a process from its start to its
//! end.

use std::io::{Read as _, Write as _};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::Context as _;

use super::{VERB, rate, say};

pub(super) fn all(time: Duration) -> anyhow::Result<()> {
    const CALLS: u32 = 1000;
    let calls = || {
        for _ in 0..CALLS {
            let _ = rustix::process::getppid();
        }
    };
    say("system-call", 1e9 / rate(time, f64::from(CALLS), calls));
    say("system-pipe", 1e6 / messages(time)?);
    let mut failed = None;
    let spawn = || {
        let status = ourselves("nothing").stdin(Stdio::null()).status();
        if let Err(error) = status.and_then(|status| status.exit_ok_or_error()) {
            failed = Some(error);
        }
    };
    let spawned = rate(time, 1.0, spawn);
    match failed {
        Some(error) => Err(error).context("cannot start itself"),
        None => {
            say("system-spawn", 1e6 / spawned);
            Ok(())
        }
    }
}

/// How many messages a second go to another process and come back.
fn messages(time: Duration) -> anyhow::Result<f64> {
    let mut child = ourselves("echo").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("no echo")?;
    let (mut to, mut from) = (child.stdin.take().context("a pipe")?, child.stdout.take().context("a pipe")?);
    let mut failed = None;
    let mut byte = [0];
    let rate = rate(time, 1.0, || {
        if let Err(error) = to.write_all(&byte).and_then(|()| from.read_exact(&mut byte)) {
            failed = Some(error);
        }
    });
    drop(to);
    child.wait().context("the echo does not end")?;
    failed.map_or(Ok(rate), |error| Err(error).context("the echo is silent"))
}

/// Sends back what comes, until nothing comes.
pub(super) fn echo() -> ExitCode {
    let (mut from, mut to) = (std::io::stdin().lock(), std::io::stdout().lock());
    let mut byte = [0];
    while from.read_exact(&mut byte).is_ok() {
        if to.write_all(&byte).and_then(|()| to.flush()).is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// This program once more. In all places it is named by its first word, and in none need /proc be there.
fn ourselves(group: &str) -> Command {
    let own = std::env::args_os().next().unwrap_or_else(|| "/init".into());
    let mut command = Command::new(own);
    command.arg(VERB).arg(format!("groups={group}"));
    command
}

/// A status that is no success is an error.
trait ExitOk {
    fn exit_ok_or_error(self) -> std::io::Result<()>;
}

impl ExitOk for std::process::ExitStatus {
    fn exit_ok_or_error(self) -> std::io::Result<()> {
        if self.success() { Ok(()) } else { Err(std::io::Error::other(self.to_string())) }
    }
}

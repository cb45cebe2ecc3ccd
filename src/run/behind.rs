//! Machines in the background: a process of its own runs the machine, and the one that was started waits until the command
//! runs, or does not come to.

use std::fs::OpenOptions;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context as _;
use session::{OURS, OutputLog, Ready, Session};

use super::plan::Plan;

/// Starts the process that runs the machine, and prints the machine's name when its command runs.
pub(super) fn start() -> anyhow::Result<ExitCode> {
    let mut words = std::env::args_os().skip(1);
    let mut command = Command::new("/proc/self/exe");
    // The verb comes first: it has no flags before it.
    command.args(words.next()).arg("--behind").args(words);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start a process")?;
    let mut name = String::new();
    if let Some(output) = child.stdout.take() {
        BufReader::new(output).read_line(&mut name).context("cannot hear of the machine")?;
    }
    if name.is_empty() {
        let code = child.wait().context("cannot wait for the machine")?.code();
        // It has said why.
        return Ok(ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(OURS)));
    }
    print!("{name}");
    Ok(ExitCode::SUCCESS)
}

/// In the process that runs the machine: what is to be done with the command's output, and to leave its starter's
/// terminal once it runs.
pub(super) fn session(plan: &Plan) -> anyhow::Result<Session> {
    // Whoever started us may be the leader of our group already; a signal for its terminal is not for us.
    let _ = rustix::process::setsid();
    let files = plan.folder.files();
    let name = plan.name.clone();
    // Opened now: later the process may open nothing.
    let nowhere = OpenOptions::new().write(true).open("/dev/null").context("cannot open /dev/null")?;
    let log =
        OpenOptions::new().create(true).append(true).mode(0o600).open(files.log()).context("cannot make a log")?;
    let ready = move || {
        let mut output = io::stdout();
        writeln!(output, "{name}").and_then(|()| output.flush()).context("nobody waits for the machine any more")?;
        rustix::stdio::dup2_stderr(log).context("cannot take leave of standard error")?;
        rustix::stdio::dup2_stdout(nowhere).context("cannot take leave of standard output")
    };
    let log = (OutputLog::create(files.output())?, Box::new(ready) as Ready);
    Session::listen(files, plan.setup.clone(), plan.exec.clone(), Some(log))
}

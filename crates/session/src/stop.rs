//! `vmm stop`, `kill`, `wait` and `rm`: how machines end.

use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use guest::request::{Answer, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};

use crate::agent;
use session::{End, Machine, State};

/// What a machine may take to power off, once its processes have ended.
const POWER_OFF: Duration = Duration::from_secs(5);

/// What `vmm stop` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct StopArgs {
    /// The machines
    #[arg(required = true)]
    names: Vec<String>,
    /// Seconds that processes have to end by themselves after SIGTERM
    #[arg(short = 't', long, value_name = "SECONDS", default_value_t = 10)]
    time: u32,
}

impl StopArgs {
    /// Has the processes end by themselves, then kills them, and at last the machine.
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        each(&self.names, |name| {
            let machine = Machine::running(name)?;
            let grace = Duration::from_secs(self.time.into());
            let process = agent::process(&machine)?;
            // Of a guest that does not hear of it the machine is ended all the same.
            let heard = ask_to_shut_down(&machine, grace);
            let patience = if heard.is_ok() { grace + POWER_OFF } else { Duration::ZERO };
            if !ends_within(&process, patience)? {
                kill(&machine, Signal::KILL)?;
            }
            machine.wait()?;
            println!("{name}");
            Ok(())
        })
    }
}

fn ask_to_shut_down(machine: &Machine, grace: Duration) -> anyhow::Result<()> {
    let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
    match agent::ask(machine, &Request::Shutdown { grace_ms })? {
        Answer::Done { .. } => Ok(()),
        answer => bail!("{} answers {answer:?}", machine.record.name),
    }
}

fn ends_within(process: &OwnedFd, time: Duration) -> anyhow::Result<bool> {
    let time = Timespec::try_from(time).context("such a time is too long")?;
    Ok(poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&time)).context("cannot wait")? > 0)
}

/// What `vmm kill` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct KillArgs {
    /// The machines
    #[arg(required = true)]
    names: Vec<String>,
    /// A signal for the command instead: its name or number
    #[arg(short, long, value_name = "SIGNAL", value_parser = signal)]
    signal: Option<Signal>,
}

impl KillArgs {
    /// Ends machines at once, or sends their commands a signal.
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        each(&self.names, |name| {
            let machine = Machine::running(name)?;
            // The machine's process passes the others on.
            kill(&machine, self.signal.unwrap_or(Signal::KILL))?;
            if self.signal.is_none_or(|signal| signal == Signal::KILL) {
                machine.wait()?;
            }
            println!("{name}");
            Ok(())
        })
    }
}

fn kill(machine: &Machine, signal: Signal) -> anyhow::Result<()> {
    let sent = pidfd_send_signal(agent::process(machine)?, signal);
    sent.with_context(|| format!("cannot send {} a signal", machine.record.name))
}

/// The signals that a machine's process passes on, and the one that ends it.
fn signal(text: &str) -> Result<Signal, String> {
    let known = [
        ("HUP", Signal::HUP),
        ("INT", Signal::INT),
        ("QUIT", Signal::QUIT),
        ("KILL", Signal::KILL),
        ("USR1", Signal::USR1),
        ("USR2", Signal::USR2),
        ("TERM", Signal::TERM),
    ];
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let found = known.iter().find(|(known, signal)| *known == name || signal.as_raw().to_string() == name);
    found.map(|(_, signal)| *signal).ok_or_else(|| format!("say one of {}", known.map(|(name, _)| name).join(", ")))
}

/// What `vmm wait` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct WaitArgs {
    /// The machines
    #[arg(required = true)]
    names: Vec<String>,
}

impl WaitArgs {
    /// Waits until machines have ended, and prints their exit codes.
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        each(&self.names, |name| {
            let End { code, trouble, .. } = match Machine::find(name)? {
                Machine { state: State::Ended(end), .. } => end,
                machine => machine.wait()?.with_context(|| {
                    format!("{name} has said nothing of its end: it was killed, or ran in the foreground")
                })?,
            };
            println!("{code}");
            trouble.map_or(Ok(()), |trouble| Err(anyhow!("{name}: {trouble}")))
        })
    }
}

/// What `vmm rm` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct RmArgs {
    /// The machines
    #[arg(required = true)]
    names: Vec<String>,
    /// End those that run
    #[arg(short, long)]
    force: bool,
}

impl RmArgs {
    /// Removes what is left of machines that have ended.
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        each(&self.names, |name| {
            let machine = Machine::find(name)?;
            if self.force && machine.state == State::Running {
                kill(&machine, Signal::KILL)?;
                machine.wait()?;
            }
            machine.remove()?;
            println!("{name}");
            Ok(())
        })
    }
}

/// Does something with each, and says what went wrong with which.
fn each(names: &[String], mut deal_with: impl FnMut(&str) -> anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        if let Err(error) = deal_with(name) {
            eprintln!("vmm: {error:#}");
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_a_name_with_or_without_sig_or_a_number() {
        for text in ["TERM", "term", "SIGTERM", "15"] {
            assert_eq!(signal(text), Ok(Signal::TERM), "{text}");
        }
        for text in ["", "SIG", "STOP", "99", "-1"] {
            assert!(signal(text).unwrap_err().contains("USR1"), "{text}");
        }
    }
}

//! `vmm exec`: one more command in a machine that runs.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::ExitCode;

use anyhow::Context as _;
use guest::request::{Exec, Program};
use session::{Machine, PASSED_ON, Session, Signals, Variable, code_of, environment, terminal_size};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::agent;

/// What `vmm exec` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct ExecArgs {
    /// The machine
    name: String,
    /// A variable of the command's environment; without a value, the one that it has here (can be said again)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<Variable>,
    /// The folder that the command starts in; / unless said
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Whom the command runs as in the guest; root unless said
    #[arg(short, long, value_name = "NAME|UID[:GROUP|GID]")]
    user: Option<String>,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl ExecArgs {
    /// Runs the command. Returns its exit code, or 125, 126 or 127 where it did not come to run.
    pub(crate) fn run(&self) -> ExitCode {
        let code = self.try_run().unwrap_or_else(|error| {
            eprintln!("vmm exec: {error:#}");
            code_of(&error)
        });
        ExitCode::from(code)
    }

    fn try_run(&self) -> anyhow::Result<u8> {
        let terminal = match self.tty {
            true => Some(terminal_size().context("the input is no terminal: leave out --tty")?),
            false => None,
        };
        let machine = Machine::running(&self.name)?;
        let program = Program {
            argv: self.command.clone(),
            env: environment([], &self.env, self.tty),
            cwd: self.workdir.clone(),
            user: self.user.clone(),
        };
        let exec = Exec { program, terminal, stdin: self.interactive };
        let session = Session::connected(agent::connect(&machine)?, exec)?;
        wait(&session)
    }
}

/// Passes signals on until the command ends.
fn wait(session: &Session) -> anyhow::Result<u8> {
    let signals = Signals::block(&PASSED_ON).context("cannot receive signals")?;
    let epoll = Epoll::new().context("cannot wait")?;
    for descriptor in [signals.as_fd().as_raw_fd(), session.ended().as_raw_fd()] {
        epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(EventSet::IN, 0)).context("cannot wait")?;
    }
    session.start(|| ())?;
    while !session.has_ended() {
        for signal in signals.receive() {
            match signal {
                libc::SIGWINCH => session.resize(),
                libc::SIGTSTP | libc::SIGCONT => {}
                signal => drop(session.signal(signal)),
            }
        }
        match epoll.wait(-1, &mut [EpollEvent::default(); 2]) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error).context("cannot wait"),
            _ => {}
        }
    }
    session.finish().context("the command has not ended")?
}

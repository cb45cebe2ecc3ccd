//! `cargo xtask host -- COMMAND…`: any command on any machine with real KVM.
//!
//! Where a machine's processor has no hardware virtualisation to offer, QEMU emulates one that has (AMD's SVM with nested
//! paging), and in it runs a small Linux host: Debian's stock kernel with its stock `kvm_amd`, on the machine's own
//! files, shared over virtio-fs. A command sees there what it sees outside: files, working directory, environment,
//! streams, terminal; and its exit code comes back. Other than outside are /dev (with `/dev/kvm` and `/dev/net/tun`),
//! /proc, /sys, the network (loopback and a dummy interface) and the time that things take. `/run`, `/dev/shm` and
//! `$TMPDIR` are in the emulated host's memory and start empty. `VMM_EMULATED_HOST=1` is in the environment.
//!
//! An ordinary user is root in it, and on the machine's files still who he is.
//!
//! [`session`] is the outside, [`inside`] the inside.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, PipeWriter, Write};
use std::iter;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Output};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};
use session::{Ended, Streams};
use spec::Spec;
use terminal::Terminal;

use crate::assets::{self, Flavour};

pub(crate) mod emulator;
pub(crate) mod inside;
mod network;
mod process;
mod pty;
mod session;
mod spec;
mod terminal;

/// What `cargo xtask host` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    host: Host,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// An emulated host: what it is made of, and how long it may live.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Host {
    /// End the command after so many seconds, with exit code 124. 0: never.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) timeout: u64,
    /// Memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(256..))]
    pub(crate) mem: u32,
    /// Processors.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) cpus: u8,
    /// Count time by instructions, one a nanosecond, so that the same run takes the same time. It has one processor then.
    #[arg(long, conflicts_with = "cpus")]
    pub(crate) icount: bool,
    /// A file that is its disk, /dev/vda. When it ends without warning, what it had not flushed to the disk is lost.
    #[arg(long, value_name = "FILE")]
    pub(crate) disk: Option<PathBuf>,
}

impl Default for Host {
    fn default() -> Self {
        Self { timeout: 600, mem: 4096, cpus: 1, icount: false, disk: None }
    }
}

/// Runs the verb. Returns the command's exit code.
pub(crate) fn run(args: &Args) -> Result<u8> {
    let (program, arguments) = args.command.split_first().context("There is no command to run")?;
    args.host.status(Command::new(program).args(arguments))
}

impl Host {
    /// Runs `command` (its program, arguments, working directory and changes of the environment; not its streams) on our
    /// own streams. Returns its exit code: 124 when the time was over, 128 and more when a signal ended it or us.
    pub(crate) fn status(&self, command: &Command) -> Result<u8> {
        let terminal = Terminal::of_stdin()?;
        let streams = Streams {
            input: Box::new(unbuffered(io::stdin())?),
            output: [
                match &terminal {
                    Some(terminal) => Box::new(terminal.writer()?),
                    None => Box::new(io::sink()),
                },
                Box::new(unbuffered(io::stdout())?),
                Box::new(unbuffered(io::stderr())?),
            ],
            terminal,
            catch_signals: true,
        };
        self.exit_code(command, streams)
    }

    /// Runs `command` with an empty input; all that it writes goes to `output`. Returns as [`Host::status`] does.
    pub(crate) fn status_into(&self, command: &Command, output: PipeWriter) -> Result<u8> {
        let streams = Streams {
            input: Box::new(io::empty()),
            output: [Box::new(io::sink()), Box::new(output.try_clone()?), Box::new(output)],
            terminal: None,
            catch_signals: false,
        };
        self.exit_code(command, streams)
    }

    fn exit_code(&self, command: &Command, streams: Streams) -> Result<u8> {
        Ok(match self.run(command, streams)? {
            Ended::Exited(code) => code,
            Ended::TimedOut => {
                eprintln!("xtask: the time limit of {} s is over, and the command was ended", self.timeout);
                124
            }
            Ended::Signalled(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        })
    }

    /// Runs `command` with an empty input, and collects what it writes.
    pub(crate) fn output(&self, command: &Command) -> Result<Output> {
        let (stdout, stderr) = (Collected::default(), Collected::default());
        let streams = Streams {
            input: Box::new(io::empty()),
            output: [Box::new(io::sink()), Box::new(stdout.clone()), Box::new(stderr.clone())],
            terminal: None,
            catch_signals: false,
        };
        let code = match self.run(command, streams)? {
            Ended::Exited(code) => code,
            Ended::TimedOut => {
                bail!("{} took longer than {} s", command.get_program().display(), self.timeout)
            }
            Ended::Signalled(signal) => bail!("Ended by signal {signal}"),
        };
        let status = ExitStatus::from_raw(i32::from(code) << 8);
        Ok(Output { status, stdout: stdout.take(), stderr: stderr.take() })
    }

    fn run(&self, command: &Command, streams: Streams) -> Result<Ended> {
        let kernel = assets::debian_kernel(Flavour::Cloud61)?;
        let spec = Spec {
            arguments: iter::once(command.get_program()).chain(command.get_args()).map(OsStr::to_owned).collect(),
            environment: environment(command).into_iter().collect(),
            directory: match command.get_current_dir() {
                Some(directory) => std::path::absolute(directory)?,
                None => std::env::current_dir().context("There is no working directory")?,
            },
            modules: kernel.root.clone(),
            terminal: streams.terminal.as_ref().map(Terminal::spec).transpose()?,
        };
        session::run(self, &spec, &kernel, streams)
    }
}

/// Our environment with the changes of `command` and those of the emulated host.
fn environment(command: &Command) -> BTreeMap<OsString, OsString> {
    let mut environment: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
    environment.insert("TMPDIR".into(), "/run/tmp".into());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => environment.insert(name.into(), value.into()),
            None => environment.remove(name),
        };
    }
    environment.insert("VMM_EMULATED_HOST".into(), "1".into());
    environment
}

/// The stream without the standard library's buffer, so that bytes pass as they come.
fn unbuffered(stream: impl AsFd) -> Result<File> {
    Ok(File::from(stream.as_fd().try_clone_to_owned()?))
}

/// Written by the thread that moves a stream, read when the command has ended.
#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<u8>>>);

impl Collected {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().expect("no writer panics"))
    }
}

impl Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no writer panics").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

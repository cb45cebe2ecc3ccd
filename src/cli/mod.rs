//! The command line: flags, subcommands and their help.

pub(crate) mod companion;
mod file;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use boot::KernelSpec;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::shells::{Bash, Fish, Zsh};
use devices::Devices;
use devices::console::SerialSpec;
use log::LevelFilter;
use machine::{CpusSpec, VmConfig};
use memory::MemorySpec;
use sandbox::Mode;

use crate::exit::{TABLE, Usage};
use crate::folders::{Api, Folders};
use crate::run::RunSpec;

/// Boots an unmodified Linux kernel in a small, isolated machine of its own.
///
/// `vmm --kernel bzImage --mem 512M` boots a kernel with its serial console on this terminal. Every flag that takes
/// keys (`KEY=VALUE,…`) is a table with the same keys in the file that --config names.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    boot: BootArgs,
}

#[derive(Debug, Args)]
struct BootArgs {
    #[command(flatten)]
    machine: VmConfig,

    /// A file that describes the machine in TOML, with the flags' names; flags override it
    #[arg(long, value_name = "PATH", help_heading = "The machine")]
    config: Option<PathBuf>,

    /// A Unix socket at which the machine is controlled while it runs, by vmm ctl or as Firecracker is
    #[arg(long, value_name = "PATH", help_heading = "The machine")]
    api_socket: Option<PathBuf>,

    /// A folder whose files may be named at the socket; without it, they are sent as descriptors, as vmm ctl does
    #[arg(long, value_name = "PATH", requires = "api_socket", help_heading = "The machine")]
    api_folder: Vec<PathBuf>,

    /// How strictly the process is confined
    #[arg(
        long,
        value_name = "on|strict|report|off",
        default_value = "on",
        hide_possible_values = true,
        help_heading = "The sandbox"
    )]
    sandbox: Mode,

    /// What is logged: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warn", help_heading = "The log")]
    log_level: LevelFilter,

    /// Append the log to a file instead of standard error
    #[arg(long, value_name = "PATH", help_heading = "The log")]
    log_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says whether this host can run virtual machines, and what would make it better
    Check {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// A fleet's file, to say what is wrong with that
        #[arg(conflicts_with = "json")]
        file: Option<PathBuf>,
    },
    /// Starts several machines from one file, or makes them what it says now: vmm up -f fleet.toml
    #[command(disable_help_flag = true)]
    Up(Passed),
    /// Ends the machines of a fleet in order
    #[command(disable_help_flag = true)]
    Down(Passed),
    /// Changes how many machines the services of a fleet have: vmm scale app=5
    #[command(disable_help_flag = true)]
    Scale(Passed),
    /// Shows the machines of a fleet
    #[command(disable_help_flag = true)]
    Services(Passed),
    /// Controls a machine that runs, through its --api-socket
    Ctl(Passed),
    /// Measures what a machine costs against a container and a plain process
    #[command(disable_help_flag = true)]
    Bench(Passed),
    /// Runs a command in a machine of its own: vmm run -- make test
    Run(Box<RunSpec>),
    /// Shows the machines of vmm run
    Ps(Passed),
    /// Shows what the command of a detached machine wrote
    Logs(Passed),
    /// Runs one more command in a machine: vmm exec -it NAME sh
    Exec(Passed),
    /// Copies files and folders into a machine or out of it: vmm cp NAME:/etc/hosts .
    Cp(Passed),
    /// Ends machines in order
    Stop(Passed),
    /// Ends machines at once, or sends their commands a signal
    Kill(Passed),
    /// Waits until machines have ended, and prints their exit codes
    Wait(Passed),
    /// Removes what is left of machines that have ended
    Rm(Passed),
    /// Shows what machines use, also to Prometheus
    Stats(Passed),
    /// Deals with container images: pull, ls, rm and prune
    Image(Passed),
    /// Deals with the kernel that vmm run boots
    #[command(subcommand)]
    Kernel(KernelCommand),
    /// Prints a shell's completion script
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Prints the manual page
    Man,
}

/// A shell that can complete our words.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Shell {
    /// GNU Bash
    Bash,
    /// fish
    Fish,
    /// Zsh
    Zsh,
}

/// The words of a command that is another executable's.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
struct Passed {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
enum KernelCommand {
    /// Makes a kernel the one that vmm run boots unless it names another
    Install {
        /// A bzImage or an uncompressed vmlinux, with all that a run needs built in; or a Debian package linux-image-….deb
        path: PathBuf,
    },
}

/// Does what the command line asks. `start` is when the process began.
pub(crate) fn run(start: Instant) -> anyhow::Result<ExitCode> {
    let Cli { command, boot } = match parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            error.print().context("Cannot print the help")?;
            return Ok(ExitCode::SUCCESS);
        }
        // Every code but this may be the command's own.
        Err(error) => match std::env::args_os().nth(1) {
            Some(verb) if verb == "run" => {
                eprintln!("vmm run: {}", usage(&error));
                return Ok(ExitCode::from(session::OURS));
            }
            _ => return Err(usage(&error).into()),
        },
    };
    match command {
        None => {
            let BootArgs { machine, config, api_socket, api_folder, sandbox, log_level, log_file } = boot;
            crate::logger::start(log_level, log_file.as_deref())?;
            let machine = match config {
                Some(path) => machine.over(file::read(&path)?),
                None => machine,
            };
            let folders = Folders::open(&api_folder)?;
            let api = api_socket.as_deref().map(|socket| Api { socket, folders });
            crate::boot::boot(&machine, api, None, sandbox, start)
        }
        Some(Command::Check { json, file: None }) => Ok(crate::check::run(json)),
        Some(
            Command::Check { file: Some(_), .. }
            | Command::Up(_)
            | Command::Down(_)
            | Command::Scale(_)
            | Command::Services(_),
        ) => companion::become_it("vmm-fleet", std::env::args_os().skip(1)),
        Some(Command::Ctl(passed)) => companion::become_it("vmm-ctl", passed.words),
        Some(Command::Bench(passed)) => companion::become_it("vmm-bench", passed.words),
        Some(Command::Run(spec)) => {
            crate::logger::start(LevelFilter::Warn, None)?;
            Ok(crate::run::run(&spec, start))
        }
        Some(
            Command::Ps(_)
            | Command::Logs(_)
            | Command::Exec(_)
            | Command::Cp(_)
            | Command::Stop(_)
            | Command::Kill(_)
            | Command::Wait(_)
            | Command::Rm(_)
            | Command::Stats(_),
        ) => companion::become_it("vmm-session", std::env::args_os().skip(1)),
        Some(Command::Image(passed)) => companion::become_it("vmm-oci", passed.words),
        Some(Command::Kernel(KernelCommand::Install { path })) => {
            println!("vmm run boots {} now", crate::run::kernel::install(&path)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Completions { shell }) => {
            let (mut command, mut output) = (command_with_help(), std::io::stdout());
            match shell {
                Shell::Bash => clap_complete::generate(Bash, &mut command, "vmm", &mut output),
                Shell::Fish => clap_complete::generate(Fish, &mut command, "vmm", &mut output),
                Shell::Zsh => clap_complete::generate(Zsh, &mut command, "vmm", &mut output),
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Man) => {
            let page = clap_mangen::Man::new(command_with_help());
            page.render(&mut std::io::stdout()).context("Cannot print the manual page")?;
            std::io::stdout().flush().context("Cannot print the manual page")?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn parse(words: impl Iterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let words: Vec<OsString> = words.collect();
    // Only who asks for the long help pays for putting it together.
    let asks = words.iter().any(|word| word == "--help");
    let command = if asks { command_with_help() } else { Cli::command() };
    command.try_get_matches_from(words).and_then(|matches| Cli::from_arg_matches(&matches))
}

/// The command line with the keys of every flag in its long help, from the doc comments of their types.
fn command_with_help() -> clap::Command {
    let keys = [
        ("kernel", kv::help::keys::<KernelSpec>()),
        ("mem", kv::help::keys::<MemorySpec>()),
        ("cpus", kv::help::keys::<CpusSpec>()),
        ("serial", kv::help::variants::<SerialSpec>()),
        ("console", kv::help::variants::<SerialSpec>()),
    ]
    .into_iter()
    .chain(Devices::keys());
    keys.into_iter()
        .fold(Cli::command(), |command, (flag, keys)| {
            command.mut_arg(flag, |arg| {
                let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
                arg.long_help(format!("{help}\n\n{keys}"))
            })
        })
        .after_long_help(format!("Exit codes:\n{TABLE}"))
}

/// What is wrong with the command line.
fn usage(error: &clap::Error) -> Usage {
    Usage(kv::help::one_line(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> impl Iterator<Item = OsString> {
        text.split(' ').map(OsString::from)
    }

    fn mistake(text: &str) -> String {
        usage(&parse(words(text)).unwrap_err()).to_string()
    }

    #[test]
    fn the_command_line_is_well_formed() {
        command_with_help().debug_assert();
    }

    #[test]
    fn flags_are_read_into_the_machines_configuration() {
        let cli = parse(words("vmm --kernel bzImage,entry=pvh --mem 1G,prefault --cpus 4,features=-avx2")).unwrap();
        let machine = cli.boot.machine;
        assert_eq!(machine.kernel.unwrap().path, PathBuf::from("bzImage"));
        assert!(machine.mem.unwrap().prefault);
        assert_eq!(machine.cpus.unwrap().count, 4);
    }

    #[test]
    fn two_equals_signs_replace_the_command_line() {
        let cli = parse(words("vmm --kernel x --cmdline==quiet")).unwrap();
        assert_eq!(cli.boot.machine.cmdline.unwrap().line("console=ttyS0"), "quiet");
    }

    #[test]
    fn a_mistake_is_one_line_that_names_the_flag_and_the_cure() {
        let line = mistake("vmm --kernel x --mem 12Q");
        assert!(line.contains("12Q") && line.contains("--mem") && !line.contains('\n'), "{line}");
        let line = mistake("vmm --kernl x");
        assert!(line.contains("--kernl") && line.contains("--kernel") && !line.contains('\n'), "{line}");
    }

    #[test]
    fn the_long_help_names_every_key_once() {
        let help = command_with_help().render_long_help().to_string();
        for key in ["hugepages", "prefault", "features", "pin", "entry", "Exit codes"] {
            assert_eq!(
                help.matches(&format!("  {key} ")).count() + help.matches(&format!("{key}:\n")).count(),
                1,
                "{key}"
            );
        }
    }
}

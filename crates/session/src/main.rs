//! The `vmm-session` command, which `vmm ps` and its siblings start: the commands about machines by their names.

mod agent;
mod copy;
mod exec;
mod list;
mod logs;
mod stats;
mod stop;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Deals with machines of vmm run by their names.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows the machines of vmm run
    Ps(list::PsArgs),
    /// Shows what the command of a detached machine wrote
    Logs(logs::LogsArgs),
    /// Runs one more command in a machine: vmm exec -it NAME sh
    Exec(exec::ExecArgs),
    /// Copies files and folders into a machine or out of it: vmm cp NAME:/etc/hosts .
    Cp(copy::CopyArgs),
    /// Ends machines in order
    Stop(stop::StopArgs),
    /// Ends machines at once, or sends their commands a signal
    Kill(stop::KillArgs),
    /// Waits until machines have ended, and prints their exit codes
    Wait(stop::WaitArgs),
    /// Removes what is left of machines that have ended
    Rm(stop::RmArgs),
    /// Shows what machines use, also to Prometheus
    Stats(stats::StatsArgs),
}

fn main() -> ExitCode {
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) if !error.use_stderr() => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            // Every code but this may be the command's own.
            let is_exec = std::env::args_os().nth(1).is_some_and(|verb| verb == "exec");
            let (who, code) = if is_exec { ("vmm exec", session::OURS) } else { ("vmm", 2) };
            eprintln!("{who}: {}", kv::help::one_line(&error));
            return ExitCode::from(code);
        }
    };
    let done = match command {
        Command::Exec(args) => return args.run(),
        Command::Ps(args) => args.run(),
        Command::Logs(args) => args.run(),
        Command::Cp(args) => args.run(),
        Command::Stop(args) => args.run(),
        Command::Kill(args) => args.run(),
        Command::Wait(args) => args.run(),
        Command::Rm(args) => args.run(),
        Command::Stats(args) => args.run(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("vmm: {error:#}");
        ExitCode::FAILURE
    })
}

/// How long ago, or how long, for people.
fn for_people(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_time_is_told_in_the_unit_that_suits_it() {
        for (seconds, text) in
            [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172_799, "47 h"), (172_800, "2 days")]
        {
            assert_eq!(for_people(seconds), text);
        }
    }
}

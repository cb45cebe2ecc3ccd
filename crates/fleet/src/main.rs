//! The `vmm-fleet` command, which `vmm up` and its siblings start: several machines from one file.
//!
//! ```text
//! up ──▶ outer process: signals, pasta ──▶ PID 1 of the fleet's namespaces ──▶ watcher ──▶ vmm run, once a machine
//!                    │                                                           │
//!                    └────────────── uplink, ready, end ─────────────────────────┴── control socket: ps, scale, up, down
//! ```
//!
//! Whoever of the three dies takes the others along, and all machines with them: the kernel ends a PID namespace with its
//! PID 1, and that one dies with its parent and with the watcher.

mod control;
mod host;
mod inside;
mod namespaces;
mod network;
mod place;
mod probe;
mod process;
mod publish;
mod table;
mod up;
mod watch;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Parser, Subcommand};
use control::Request;
use fleet::check::{check, read};
use fleet::spec::Fleet;
use place::Place;

/// Runs several machines from one file.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Starts a fleet, or makes a running one what its file says now
    Up {
        #[command(flatten)]
        which: Which,
        /// Return when all services are started, and healthy where they say how; the fleet stays
        #[arg(short, long)]
        detach: bool,
        /// This is the process of a fleet that somebody waits for
        #[arg(long, hide = true)]
        behind: bool,
    },
    /// Ends a fleet in order
    Down {
        #[command(flatten)]
        which: Which,
        /// Remove its named volumes, too
        #[arg(long)]
        volumes: bool,
    },
    /// Changes how many machines services have: vmm scale app=5
    Scale {
        #[command(flatten)]
        which: Which,
        /// Services and numbers
        #[arg(required = true, value_name = "SERVICE=N", value_parser = scale)]
        services: Vec<(String, u32)>,
    },
    /// Shows a fleet's machines
    Services {
        #[command(flatten)]
        which: Which,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Says everything that is wrong with a fleet's file
    Check {
        /// The file
        file: PathBuf,
    },
    /// PID 1 of a fleet
    #[command(hide = true)]
    Init { file: PathBuf, name: String },
    /// The process that runs a fleet's machines
    #[command(hide = true)]
    Watch { file: PathBuf, name: String },
}

/// Which fleet is meant.
#[derive(Debug, Args)]
struct Which {
    /// The fleet's file
    #[arg(short, long, value_name = "PATH", default_value = "fleet.toml")]
    file: PathBuf,
}

impl Which {
    /// The fleet, if nothing is wrong with its file.
    fn fleet(&self) -> anyhow::Result<(Fleet, String)> {
        let path = self.file.display();
        let text = read(&self.file).map_err(|fault| anyhow::anyhow!("{path}: {}", fault.text))?;
        match check(&self.file, &text) {
            Ok(fleet) => Ok((fleet, text)),
            Err(faults) => {
                let all: Vec<String> = faults.iter().map(|fault| format!("{path}: {fault}")).collect();
                bail!("{}", all.join("\n"))
            }
        }
    }

    /// Where it runs.
    fn place(&self) -> anyhow::Result<Place> {
        Place::of(&self.fleet()?.0.name)
    }
}

fn scale(text: &str) -> Result<(String, u32), String> {
    let (service, number) = text.split_once('=').ok_or("say SERVICE=N, such as app=5")?;
    let number = number.parse().map_err(|_| format!("`{number}` is no number of machines"))?;
    Ok((service.to_owned(), number))
}

fn main() -> ExitCode {
    let code = match Cli::parse().command {
        Command::Up { which, detach, behind } => up(&which, detach, behind),
        Command::Down { which, volumes } => down(&which, volumes),
        Command::Scale { which, services } => ask(&which, &Request::Scale(BTreeMap::from_iter(services))),
        Command::Services { which, json } => services(&which, json),
        Command::Check { file } => say_faults(&Which { file }),
        Command::Init { file, name } => inside::run(&file, &name),
        Command::Watch { file, name } => watch::run(&file, &name),
    };
    code.unwrap_or_else(|error| {
        eprintln!("vmm: {error:#}");
        // Wrong usage has a code of its own in `vmm`, and nearly everything here is a file that cannot be used.
        ExitCode::from(if error.is::<process::Failed>() { 1 } else { 2 })
    })
}

fn up(which: &Which, detach: bool, behind: bool) -> anyhow::Result<ExitCode> {
    let (fleet, text) = which.fleet()?;
    let place = Place::of(&fleet.name)?;
    if !place.is_free()? {
        let path = std::path::absolute(&which.file).context("cannot tell the current folder")?;
        control::ask(&place, &Request::Apply { path, text })?;
        println!("fleet {}: it is what {} says now", fleet.name, which.file.display());
        return Ok(ExitCode::SUCCESS);
    }
    let wrong = [host::missing(), host::taken(&fleet)].concat();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    if detach { up::behind(&which.file, &place) } else { up::run(&which.file, &fleet, &place, behind) }
}

fn say_faults(which: &Which) -> anyhow::Result<ExitCode> {
    which.fleet()?;
    let missing = host::missing();
    ensure!(missing.is_empty(), "{}", missing.join("\n"));
    println!("{}: nothing is wrong with it", which.file.display());
    Ok(ExitCode::SUCCESS)
}

fn down(which: &Which, volumes: bool) -> anyhow::Result<ExitCode> {
    let place = which.place()?;
    let running = match control::ask(&place, &Request::Down) {
        Ok(_) => true,
        Err(error) if place.is_free()? => {
            ensure!(volumes, "{error:#}");
            false
        }
        Err(error) => return Err(error),
    };
    if running {
        place.wait_until_free().context("the fleet does not end")?;
    }
    if volumes {
        place.remove_volumes()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn ask(which: &Which, request: &Request) -> anyhow::Result<ExitCode> {
    control::ask(&which.place()?, request)?;
    Ok(ExitCode::SUCCESS)
}

fn services(which: &Which, json: bool) -> anyhow::Result<ExitCode> {
    let answer = control::ask(&which.place()?, &Request::Status)?;
    match json {
        true => println!("{}", serde_json::to_string(&answer.machines)?),
        false => print!("{}", table::of(&answer.machines)),
    }
    Ok(ExitCode::SUCCESS)
}

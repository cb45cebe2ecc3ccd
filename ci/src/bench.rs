//! `cargo xtask bench`: the figures that the project promises, measured and compared with the record in `resources/`.

use anyhow::{Result, ensure};
use outcome::Outcome;
pub(crate) use outcome::with_figures;

mod boot;
mod inside;
mod io;
mod load;
mod outcome;
mod promise;
mod qemu;
mod record;
mod run;
mod table;
mod tools;

/// What `cargo xtask bench` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(clap::Subcommand)]
enum Bench {
    /// How long a machine takes from its start to its end, and how much memory and disk the VMM needs.
    Boot(boot::Args),
    /// How long vmm run takes for a command that ends at once, beside a bare boot.
    Run(run::Args),
    /// How fast disks and network cards are, beside QEMU's.
    Io(io::Args),
    /// All of these, each compared with what is promised and on record.
    Check,
    /// Write the figures on record into README's table.
    Readme,
    /// Measure what a plan says; this is what the other verbs run in the emulated host.
    #[command(hide = true)]
    Inside(inside::Args),
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.bench {
        Bench::Boot(args) => boot::run(args),
        Bench::Run(args) => run::run(args),
        Bench::Io(args) => io::run(args),
        Bench::Check => check(),
        Bench::Readme => outcome::write_readme(),
        Bench::Inside(args) => inside::run(args),
    }
}

/// Runs every suite, also when one before it failed.
fn check() -> Result<()> {
    let outcome = Outcome { check: true, record: false };
    let io = io::Args { outcome, real_time: 0, no_debian: false, engines: false };
    let results = [boot::run(&boot::Args { outcome }), run::run(&run::Args { outcome }), io::run(&io)];
    outcome::write_readme()?;
    let failed =
        results.iter().filter_map(|result| result.as_ref().err()).inspect(|error| eprintln!("{error:#}")).count();
    ensure!(failed == 0, "Suites that failed: {failed}");
    Ok(())
}

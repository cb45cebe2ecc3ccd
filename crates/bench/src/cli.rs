//! The command line.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use kv::Size;

use crate::contender::{self, Contender};
use crate::fail_if::Condition;
use crate::host::Host;
use crate::instance::{Fault, spare_cpu};
use crate::interrupt::Interrupt;
use crate::launch::Common;
use crate::measure::Group;
use crate::result::{self, Report, VERSION, write_whole};
use crate::run::Run;
use crate::site::Site;
use crate::stats::ENOUGH;
use crate::{compare, csv, html, run, table, tools};

/// The exit code where a condition of --fail-if holds.
const CONDITION_HOLDS: u8 = 3;
/// The exit code after an interrupt, as shells have it.
const INTERRUPTED: u8 = 130;

/// Measures what a machine of vmm costs against a container and a plain process.
///
/// The exit code is 0 where it was measured, 1 where that failed, 2 for wrong usage, 3 where a condition of --fail-if
/// holds, 130 after an interrupt (what was measured is written and marked as a part).
#[derive(Debug, Parser)]
#[command(
    name = "vmm bench",
    bin_name = "vmm bench",
    version,
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    bench: BenchArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says what changed from one result to another, beyond the noise of both
    Compare {
        /// The earlier result.json
        before: PathBuf,
        /// The later one
        after: PathBuf,
    },
}

#[derive(Debug, Args)]
struct BenchArgs {
    /// How much is measured: quick takes minutes, full an hour
    #[arg(long, value_enum, default_value_t = Suite::Quick)]
    suite: Suite,

    /// Only these groups of measures
    #[arg(long, value_enum, value_delimiter = ',', value_name = "GROUP,…")]
    only: Option<Vec<Group>>,

    /// Who is measured besides a plain process and vmm: crun, runc, qemu-microvm, or the path of one of these, of Firecracker
    /// or of Cloud Hypervisor; the three that are named, unless said
    #[arg(long, value_delimiter = ',', value_name = "NAME|PATH,…")]
    with: Option<Vec<String>>,

    /// The folder for result.json, result.csv and report.html
    #[arg(short, long, default_value = "vmm-bench", value_name = "DIR")]
    output: PathBuf,

    /// The kernel of machines: as vmm run has it, unless said
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,

    /// The memory of a machine
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = kv::from_str::<Size>)]
    mem: Size,

    /// Rounds: 8 in the quick suite, the fewest that can be compared, 30 in the full one
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,

    /// What the order of the rounds is drawn from, to have the same again
    #[arg(long)]
    seed: Option<u64>,

    /// Seconds that one instance may take before it is given up
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=3600))]
    time_limit: u64,

    /// Ends with exit code 3 where this surely holds: [CONTENDER.]MEASURE.ratio|median OP NUMBER, such as 'start.ratio>1.1';
    /// the contender is vmm unless said
    #[arg(long, value_name = "CONDITION")]
    fail_if: Vec<Condition>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Start, memory, processor, memory access, system calls, disk; by the workload's own measures
    Quick,
    /// The same with more rounds, the network, services, density; by kept tools where they are installed
    Full,
}

/// Does what the command line asks.
pub(crate) fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("vmm bench: {}", kv::help::one_line(&error).replace("see vmm --help", "see vmm bench --help"));
            return ExitCode::from(2);
        }
    };
    let done = match &cli.command {
        Some(Command::Compare { before, after }) => compare_files(before, after),
        None => bench(&cli.bench),
    };
    done.unwrap_or_else(|error| {
        eprintln!("vmm bench: {error:#}");
        ExitCode::FAILURE
    })
}

fn compare_files(before: &Path, after: &Path) -> anyhow::Result<ExitCode> {
    let both = Report::read(before).and_then(|before| Ok((before, Report::read(after)?)));
    match both {
        Ok((before, after)) => {
            print(&compare::text(&before, &after))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            eprintln!("vmm bench: {error:#}");
            Ok(ExitCode::from(2))
        }
    }
}

fn bench(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let interrupt = Interrupt::watch().context("cannot watch for signals")?;
    if let Some(kernel) = &args.kernel
        && let Err(error) = File::open(kernel)
    {
        eprintln!("vmm bench: cannot open the kernel {}: {error}; say --kernel with another", kernel.display());
        return Ok(ExitCode::from(2));
    }
    std::fs::create_dir_all(&args.output)
        .with_context(|| format!("cannot make {}: say -o with another folder", args.output.display()))?;
    let (contenders, mut skipped) = match contender::find(args.with.as_deref(), &interrupt) {
        Ok(found) => found,
        Err(Fault::Interrupted) => return Ok(ExitCode::from(INTERRUPTED)),
        Err(fault) => anyhow::bail!("{fault}"),
    };
    let groups = args.only.clone().unwrap_or_else(|| args.suite.groups());
    let pinned = spare_cpu();
    // In the quick suite a tool's own start would take longer than the measure.
    let (tools, missing) = if args.suite == Suite::Full { tools::find(&groups) } else { Default::default() };
    skipped.extend(missing);
    let site = Site::make(args.kernel.as_deref(), groups.contains(&Group::Disk), &tools)?;
    let (contenders, unable) = able(contenders, &site);
    skipped.extend(unable);
    if let Some(fault) = args.fail_if.iter().find_map(|condition| condition.check(&contenders, &groups).err()) {
        skipped.iter().for_each(|skipped| eprintln!("skipped: {}: {}", skipped.what, skipped.why));
        eprintln!("vmm bench: {fault}");
        return Ok(ExitCode::from(2));
    }
    let report = Report {
        version: VERSION,
        program: format!("vmm-bench {}", env!("CARGO_PKG_VERSION")),
        time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        partial: Some("nothing was measured yet".to_owned()),
        suite: args.suite.name().to_owned(),
        seed: args.seed.map_or_else(run::seed, Ok)?,
        rounds: args.rounds.unwrap_or(args.suite.rounds()),
        host: Host::here(pinned),
        noise: None,
        contenders: contenders.iter().map(Contender::described).collect(),
        skipped,
        faults: Vec::new(),
        figures: Vec::new(),
        phases: Vec::new(),
    };
    // Whether there is room and a right to write is better found before an hour of measuring than behind it.
    report.write(&args.output.join("result.json"))?;
    print(&table::head(&report))?;
    let common = Common { limit: Duration::from_secs(args.time_limit), cpu: pinned, memory: args.mem.0 >> 20 };
    let mut run = Run::new(&site, &contenders, &interrupt, common, args.suite.millis(), report);
    run.tools = tools;
    let report = run.measure(&groups);
    write(&report, &args.output)?;
    print(&table::whole(&report))?;
    print(&format!("\n{} has result.json, result.csv and report.html\n", args.output.display()))?;
    if interrupt.has_come() {
        return Ok(ExitCode::from(INTERRUPTED));
    }
    judge(&report, &args.fail_if)
}

fn judge(report: &Report, conditions: &[Condition]) -> anyhow::Result<ExitCode> {
    let mut holds = false;
    for condition in conditions {
        let (is_met, words) = condition.judge(report)?;
        holds |= is_met;
        print(&format!("{words}\n"))?;
    }
    Ok(if holds { ExitCode::from(CONDITION_HOLDS) } else { ExitCode::SUCCESS })
}

/// Those that can be started here, and why the others cannot.
fn able(contenders: Vec<Contender>, site: &Site) -> (Vec<Contender>, Vec<result::Skipped>) {
    let mut skipped = Vec::new();
    let able = contenders.into_iter().filter(|contender| match contender.inability(site) {
        None => true,
        Some(why) => {
            skipped.push(result::Skipped { what: contender.name.clone(), why });
            false
        }
    });
    (able.collect(), skipped)
}

fn write(report: &Report, folder: &Path) -> anyhow::Result<()> {
    report.write(&folder.join("result.json"))?;
    write_whole(&folder.join("result.csv"), csv::text(report).as_bytes())?;
    write_whole(&folder.join("report.html"), html::page(report).as_bytes())
}

fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    std::io::stdout().write_all(text.as_bytes()).context("cannot print")
}

impl Suite {
    fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Full => "full",
        }
    }

    fn groups(self) -> Vec<Group> {
        match self {
            Self::Quick => Group::QUICK.to_vec(),
            Self::Full => Group::FULL.to_vec(),
        }
    }

    fn rounds(self) -> u32 {
        match self {
            Self::Quick => ENOUGH,
            Self::Full => 30,
        }
    }

    fn millis(self) -> u64 {
        match self {
            Self::Quick => 50,
            Self::Full => 300,
        }
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
    fn groups_and_contenders_are_read_from_lists() {
        let cli = Cli::try_parse_from(["vmm-bench", "--only", "start,cpu", "--with", "crun,/opt/vm"]).unwrap();
        assert_eq!(cli.bench.only, Some(vec![Group::Start, Group::Cpu]));
        assert_eq!(cli.bench.with.unwrap(), ["crun", "/opt/vm"]);
        assert!(Cli::try_parse_from(["vmm-bench", "--only", "starts"]).is_err());
        assert!(Cli::try_parse_from(["vmm-bench", "--fail-if", "start.ratio"]).is_err());
    }
}

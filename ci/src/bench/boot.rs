//! `cargo xtask bench boot`: how long a machine takes from its start to its end, and what the VMM needs for it.
//!
//! Times are those of the emulated host's instruction clock, where a nanosecond is an instruction: a noise-free measure
//! of all that a VMM costs, on its side and on the guest's. The machine has one processor, 128 MiB, no console, and an
//! initramfs whose init reboots at once. QEMU's microvm with the same uncompressed kernel is the yardstick.
//!
//! Emulated hosts run side by side; on their clock none sees the others.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, ensure};

use super::inside::{Measure, Plan, Run};
use super::promise::{self, MIB, Promise, Unit};
use super::qemu;
use super::record::Record;
use crate::assets::{self, Flavour};
use crate::host::Host;
use crate::host::emulator::Emulator;
use crate::{build, kernel, progress, setup};

/// The guest's command line, the same for all but [`DEFAULTS`], whose machine has what `vmm` gives it.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=0 reboot=t panic=-1";
/// The guest's memory in bytes.
const RAM: u64 = 128 << 20;
/// What the guest of the idle machine says when it has nothing more to do.
const PROMPT: &str = "guest# ";
/// The exit code of `vmm` for a guest that rebooted.
const REBOOTED: i32 = 3;

const HEADER: &str = "\
# Figures of `cargo xtask bench boot`, written by it with --record. Times are nanoseconds on the instruction clock of the
# emulated host, memory and files are bytes. The figures hold for these versions of what they depend on.
";

/// What `cargo xtask bench boot` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write the figures to resources/numbers/boot.toml.
    #[arg(long)]
    record: bool,
    /// Fail if a figure is not as good as promised, or 3% worse than on record.
    #[arg(long)]
    check: bool,
}

const VMLINUX: &str = "spawn to exit, vmlinux";
const DEFAULTS: &str = "spawn to exit, vmlinux, own command line";
const BZIMAGE: &str = "spawn to exit, bzImage";
const NOKASLR: &str = "spawn to exit, bzImage, nokaslr";
const SMALL: &str = "spawn to exit, small vmlinux";
const SMALL_BZIMAGE: &str = "spawn to exit, small bzImage";
const QEMU: &str = "spawn to exit, vmlinux, QEMU microvm";
const FIRST: &str = "spawn to first guest instruction, vmlinux";
const EXITS: &str = "exits to user space until init, vmlinux";
const MEMORY: &str = "resident memory, idle";
const BINARY: &str = "binary, stripped, without the agent";
const AGENT: &str = "agent in the guest, stripped";

const PROMISES: [Promise; 7] = [
    Promise { figure: DEFAULTS, part_of: Some(QEMU), limit: 0.48 },
    Promise { figure: BZIMAGE, part_of: Some(VMLINUX), limit: 1.1 },
    Promise { figure: BZIMAGE, part_of: Some(NOKASLR), limit: 1.03 },
    Promise { figure: SMALL, part_of: None, limit: 0.29e9 },
    Promise { figure: MEMORY, part_of: None, limit: 2.0 * MIB },
    Promise { figure: BINARY, part_of: None, limit: 3.0 * MIB },
    Promise { figure: AGENT, part_of: None, limit: 1.5 * MIB },
];

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run()?;
    let vmm = build::vmm()?;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/numbers/boot.toml");
    let known = if args.record { None } else { Some(Record::read(&file)?) };
    let now = measure(&vmm, known.as_ref())?;
    promise::print(&now, &PROMISES, unit);
    let mut broken = promise::broken(&now, &PROMISES, unit)?;
    match known {
        None => now.write(&file, HEADER)?,
        Some(known) => match known.worse(&now, slack) {
            Some(worse) => broken.extend(worse),
            None => println!("\nNo record for these versions: `cargo xtask bench boot --record` makes one."),
        },
    }
    for line in &broken {
        println!("Worse: {line}");
    }
    ensure!(!args.check || broken.is_empty(), "Figures are worse than promised or recorded: {}", broken.len());
    Ok(())
}

/// Two pieces of 64 KiB, in which the host maps a program: where in them a function comes to lie changes with every build,
/// even with the folder that it is built in.
fn slack(figure: &str) -> u64 {
    if figure == MEMORY { 128 << 10 } else { 0 }
}

/// QEMU's figure is that of `known`, if that is of the same versions: they and the machine are all that it depends on.
fn measure(vmm: &Path, known: Option<&Record>) -> Result<Record> {
    let kernel = assets::debian_kernel(Flavour::Cloud61)?;
    let small = kernel::small_kernel()?;
    let versions = BTreeMap::from([
        ("kernel".into(), kernel.package),
        ("small kernel".into(), small.package),
        ("qemu".into(), qemu::version()?),
        ("emulated host's qemu".into(), Emulator::find()?.version.clone()),
    ]);
    let ours = Plan {
        files: BTreeMap::from([
            ("vmm".into(), vmm.to_owned()),
            ("vmlinux".into(), kernel.vmlinux.clone()),
            ("bzImage".into(), kernel.vmlinuz),
            ("small-vmlinux".into(), small.vmlinux),
            ("small-bzImage".into(), small.bzimage),
            ("reboot".into(), assets::reboot_initramfs(false)?),
            ("mark".into(), assets::reboot_initramfs(true)?),
            ("shell".into(), assets::shell_initramfs()?),
        ]),
        runs: our_runs(),
        ..Plan::default()
    };
    let theirs = known.filter(|known| known.versions == versions).and_then(|known| known.figures.get(QEMU).copied());
    let qemu = if theirs.is_some() { Plan::default() } else { qemu_plan(&kernel.vmlinux)? };
    let host = Host { timeout: TIME_LIMIT, icount: true, ..Host::default() };
    let step = progress::step("Measuring on the instruction clock; this takes some minutes");
    let mut measured = thread::scope(|scope| {
        let theirs = scope.spawn(|| qemu.carry_out(&host, TOGETHER));
        let mut measured = ours.carry_out(&host, TOGETHER)?;
        measured.extend(theirs.join().expect("a measurement does not panic")?);
        Ok::<_, anyhow::Error>(measured)
    })?;
    drop(step);

    let timed = measured.remove("timer").context("No start was timed")?;
    let started = measured.remove("start").context("No start was timed")?.value;
    let mut figures: BTreeMap<String, u64> =
        measured.into_iter().map(|(name, measured)| (name, measured.value)).collect();
    let (first, exits) = boot_timer(&timed.stderr)?;
    figures.insert(FIRST.into(), started + first);
    figures.insert(EXITS.into(), exits);
    let agent = build::agent()?;
    let size = |file: &Path| Ok::<_, anyhow::Error>(fs::metadata(file)?.len());
    figures.insert(BINARY.into(), size(vmm)? - size(&agent)?);
    figures.insert(AGENT.into(), size(&agent)?);
    figures.extend(theirs.map(|value| (QEMU.to_owned(), value)));
    Ok(Record { versions, figures })
}

fn our_runs() -> Vec<Run> {
    let vmm = |name: &str, measure, kernel: &str, initramfs: &str, more: &[&str]| {
        let cmdline = format!("--cmdline=={CMDLINE}{}", if name == NOKASLR { " nokaslr" } else { "" });
        let mut words = vec!["vmm", "--kernel", kernel, "--initrd", initramfs, "--mem", "128M"];
        if name != DEFAULTS {
            words.push(&cmdline);
        }
        words.extend(more);
        Run { name: name.to_owned(), words: words.into_iter().map(str::to_owned).collect(), measure }
    };
    let off = ["--serial", "off", "--on-reboot", "exit"];
    let timed = || Measure::Time { code: REBOOTED };
    let idle = Measure::Memory { line: PROMPT.to_owned(), ram: RAM };
    vec![
        vmm(VMLINUX, timed(), "vmlinux", "reboot", &off),
        vmm(DEFAULTS, timed(), "vmlinux", "reboot", &off),
        vmm(BZIMAGE, timed(), "bzImage", "reboot", &off),
        vmm(NOKASLR, timed(), "bzImage", "reboot", &off),
        vmm(SMALL, timed(), "small-vmlinux", "reboot", &off),
        vmm(SMALL_BZIMAGE, timed(), "small-bzImage", "reboot", &off),
        vmm("timer", timed(), "vmlinux", "mark", &[&off[..], &["--boot-timer"]].concat()),
        vmm(MEMORY, idle, "small-vmlinux", "shell", &[]),
        // The timer counts from `main`; this is what comes before it, and a little more.
        Run {
            name: "start".into(),
            words: ["vmm", "--version"].map(str::to_owned).to_vec(),
            measure: Measure::Time { code: 0 },
        },
    ]
}

/// How many runs an emulated host is started for.
const TOGETHER: usize = 5;
/// How many seconds it has for them.
const TIME_LIMIT: u64 = 240;

/// QEMU with all that it loads, so that it too runs from memory alone.
fn qemu_plan(vmlinux: &Path) -> Result<Plan> {
    let mut files = qemu::files()?;
    files.insert("vmlinux".to_owned(), vmlinux.to_owned());
    files.insert("reboot".to_owned(), assets::reboot_initramfs(false)?);
    let options = "-M microvm,acpi=off -m 128 -serial none -kernel vmlinux -initrd reboot";
    let run = Run { name: QEMU.to_owned(), words: qemu::words(CMDLINE, options), measure: Measure::Time { code: 0 } };
    Ok(Plan { files, runs: vec![run], ..Plan::default() })
}

/// What `vmm --boot-timer` says: nanoseconds from its `main` to the first guest instruction, and exits until init.
fn boot_timer(stderr: &str) -> Result<(u64, u64)> {
    let lines = || stderr.lines().filter_map(|line| line.strip_prefix("boot-timer: "));
    let first = lines().find_map(|line| line.strip_prefix("first-instruction ")?.strip_suffix(" us")?.parse().ok());
    let first: u64 = first.with_context(|| format!("No time of the first instruction in: {stderr}"))?;
    let exits = lines().find_map(|line| line.strip_prefix("exits "));
    let exits = exits.with_context(|| format!("No exits in: {stderr}"))?;
    let counts = exits.split_whitespace().filter_map(|word| word.split_once('=')?.1.parse::<u64>().ok());
    Ok((first * 1000, counts.sum()))
}

/// How figures that are no times are shown.
fn unit(name: &str) -> Unit {
    match name {
        EXITS => Unit::Count,
        _ if name.starts_with("spawn") => Unit::Time,
        _ => Unit::Bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(figures: &[(&str, u64)]) -> Record {
        let figures = figures.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        Record { versions: BTreeMap::new(), figures }
    }

    fn all(vmlinux: u64, small: u64) -> Record {
        record(&[
            (DEFAULTS, vmlinux),
            (VMLINUX, 1_000),
            (BZIMAGE, 1_050),
            (NOKASLR, 1_030),
            (QEMU, 2_500),
            (SMALL, small),
            (MEMORY, 1 << 20),
            (BINARY, 1 << 20),
            (AGENT, 1 << 20),
        ])
    }

    #[test]
    fn figures_within_the_promises_are_not_broken() {
        assert_eq!(promise::broken(&all(1_000, 290_000_000), &PROMISES, unit).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn broken_promises_are_named_with_their_limits() {
        let broken = promise::broken(&all(1_300, 291_000_000), &PROMISES, unit).unwrap();
        assert_eq!(
            broken,
            [
                "spawn to exit, vmlinux, own command line / spawn to exit, vmlinux, QEMU microvm: 0.520, promised 0.48",
                "spawn to exit, small vmlinux: 0.2910 s, promised 0.2900 s",
            ]
        );
    }

    #[test]
    fn a_promise_that_was_not_measured_is_no_promise_kept() {
        promise::broken(&record(&[(DEFAULTS, 1)]), &PROMISES, unit).unwrap_err();
    }

    #[test]
    fn the_boot_timer_s_lines_are_understood() {
        let stderr = "boot-timer: kvm 200 us\nboot-timer: first-instruction 1500 us\n\
                      boot-timer: exits io=12 mmio=3 kick=1 end=0\nvmm: the guest rebooted\n";
        assert_eq!(boot_timer(stderr).unwrap(), (1_500_000, 16));
        boot_timer("vmm: the guest rebooted\n").unwrap_err();
    }
}

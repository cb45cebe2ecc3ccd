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

use anyhow::{Context, Result};

use super::inside::{Measure, Plan, Run};
use super::outcome::Outcome;
use super::qemu;
use super::record::{Record, Suite};
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
    #[command(flatten)]
    pub(super) outcome: Outcome,
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

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run()?;
    let vmm = build::vmm()?;
    // Of a new record nothing is taken over.
    let known = if args.outcome.record { Record::default() } else { Record::read(&Suite::Boot.file())? };
    let now = measure(&vmm, &known)?;
    args.outcome.judge(Suite::Boot, &now, HEADER, slack)
}

/// Two pieces of 64 KiB, in which the host maps a program: where in them a function comes to lie changes with every build,
/// even with the folder that it is built in.
fn slack(figure: &str) -> u64 {
    if figure == MEMORY { 128 << 10 } else { 0 }
}

/// QEMU's figure is that of `known`, if that is of the same versions: they and the machine are all that it depends on.
fn measure(vmm: &Path, known: &Record) -> Result<Record> {
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
    let theirs = known.figures.get(QEMU).copied().filter(|_| known.versions == versions);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_timer_s_lines_are_understood() {
        let stderr = "boot-timer: kvm 200 us\nboot-timer: first-instruction 1500 us\n\
                      boot-timer: exits io=12 mmio=3 kick=1 end=0\nvmm: the guest rebooted\n";
        assert_eq!(boot_timer(stderr).unwrap(), (1_500_000, 16));
        boot_timer("vmm: the guest rebooted\n").unwrap_err();
    }
}

//! `cargo xtask bench run`: what `vmm run -- true` takes from its start to its end, beside the bare boot of the same
//! kernel with an init that ends at once.
//!
//! The guest's programs, and what `vmm` and its helpers read, come from the emulated host's memory: where they come from the
//! shared file system, the time that another process on the real machine takes would be charged to us.

use std::collections::BTreeMap;

use anyhow::Result;

use super::inside::{Measure, Plan, Run};
use super::outcome::Outcome;
use super::record::{Record, Suite};
use crate::host::Host;
use crate::host::emulator::Emulator;
use crate::{assets, build, kernel, progress, setup};

const HEADER: &str = "\
# Figures of `cargo xtask bench run`, written by it with --record: nanoseconds on the instruction clock of the emulated
# host. The figures hold for these versions of what they depend on.
";

/// What `cargo xtask bench run` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(super) outcome: Outcome,
}

const BARE: &str = "spawn to exit, bare boot";
const RUN: &str = "spawn to exit, vmm run -- true";
const OFF: &str = "spawn to exit, vmm run -- true, no sandbox";
const NETWORK: &str = "spawn to exit, vmm run -- true, with a network";
const FOLDER: &str = "spawn to exit, vmm run -- true, with a folder";

/// Seconds that an emulated host has for its runs.
const TIME_LIMIT: u64 = 300;
/// The exit code of `vmm` for a guest that rebooted.
const REBOOTED: i32 = 3;

/// Puts the programs that a run needs into memory, with what they read.
const PREPARE: &str = "set -e
    for program in /bin/true /usr/lib/qemu/virtiofsd $(command -v passt); do
        cp --parents --dereference $program $(ldd $program | grep -o '/[^ ]*' || true) root
    done
    # As Debian has it: /bin and /lib lead below /usr.
    for name in bin lib lib64; do
        if [ -d root/$name ]; then mkdir -p root/usr/$name; cp -a root/$name/. root/usr/$name/; rm -r root/$name; fi
        ln -s usr/$name root/$name
    done
    cp -a /etc root
    mkdir root/tmp";

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run()?;
    let small = kernel::small_kernel()?;
    let versions = BTreeMap::from([
        ("small kernel".into(), small.package),
        ("emulated host's qemu".into(), Emulator::find()?.version.clone()),
    ]);
    let files = BTreeMap::from([
        ("vmm".into(), build::vmm()?),
        ("vmlinux".into(), small.vmlinux),
        ("reboot".into(), assets::reboot_initramfs(false)?),
    ]);
    let prepare = ["/bin/mkdir -p root", "/bin/sh -c"].map(words);
    let mut prepare = prepare.to_vec();
    prepare[1].push(PREPARE.to_owned());
    let plan = Plan { files, prepare, root: Some("root".into()), runs: runs(), ..Plan::default() };
    let step = progress::step("Measuring on the instruction clock; this takes some minutes");
    let measured = plan.carry_out(&Host { timeout: TIME_LIMIT, icount: true, ..Host::default() }, 2)?;
    drop(step);
    let figures = measured.into_iter().map(|(name, measured)| (name, measured.value)).collect();
    let now = Record { versions, figures };
    args.outcome.judge(Suite::Run, &now, HEADER, |_| 0)
}

fn runs() -> Vec<Run> {
    let run = |name: &str, line: &str, code| Run {
        name: name.to_owned(),
        words: words(line),
        measure: Measure::Time { code },
    };
    let bare = "vmm --kernel vmlinux --initrd reboot --mem 512M --serial off --on-reboot exit";
    vec![
        run(BARE, bare, REBOOTED),
        run(RUN, "vmm run --kernel vmlinux --network none --workdir / -- true", 0),
        run(OFF, "vmm run --sandbox off --kernel vmlinux --network none --workdir / -- true", 0),
        run(FOLDER, "vmm run --kernel vmlinux --network none -- true", 0),
        run(NETWORK, "vmm run --kernel vmlinux --network user --workdir / -- true", 0),
    ]
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

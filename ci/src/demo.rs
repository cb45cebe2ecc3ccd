//! `cargo xtask demo`: from a fresh clone to a stock Debian kernel that answers at a shell in the VMM.

use std::io::{IsTerminal, stdin, stdout};
use std::process::Command;

use anyhow::Result;

use crate::assets::{self, Flavour};
use crate::host::Host;
use crate::place::Place;
use crate::{build, progress, setup};

/// Boots the guest. At a terminal it leaves its reader at the guest's shell; otherwise the guest prints what it sees
/// and powers off. Returns the VMM's exit code.
pub(crate) fn run() -> Result<u8> {
    setup::run()?;
    let step = progress::step("Building vmm");
    let vmm = build::vmm()?;
    drop(step);
    let kernel = assets::debian_kernel(Flavour::Cloud612)?;
    let initramfs = assets::shell_initramfs()?;
    let mut command = Command::new(&vmm);
    command.arg("--kernel").arg(kernel.vmlinuz).arg("--initrd").arg(initramfs);
    let at_terminal = stdin().is_terminal() && stdout().is_terminal();
    let timeout = if at_terminal { 0 } else { 300 };
    let place = Place::for_kernels(&vmm, Host { timeout, ..Host::default() });
    if at_terminal {
        eprintln!("Booting {}. At its shell, `exit` powers it off; Ctrl-A x leaves it at any time.", kernel.package);
    } else {
        command.args(["--cmdline", "run=facts"]);
    }
    place.status(&mut command)
}

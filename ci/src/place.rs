//! Where a command that needs KVM runs: here if this machine's KVM can boot an unmodified kernel, else in the emulated
//! host.

use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result};

use crate::host::Host;

/// Where to run.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// On this machine.
    Here,
    /// In an emulated host.
    Emulated(Host),
}

impl Place {
    /// The place for a command that boots kernels, as `vmm` finds. Says so in one line if it is an emulated host.
    pub(crate) fn for_kernels(vmm: &Path, host: Host) -> Self {
        // Its exit code says whether an unmodified kernel can run here.
        let check = Command::new(vmm).arg("check").stdin(Stdio::null()).output();
        if check.is_ok_and(|check| check.status.success()) {
            return Self::Here;
        }
        eprintln!("KVM here cannot boot an unmodified kernel: what needs it runs in the emulated host.");
        Self::Emulated(host)
    }

    /// The same with so many processors, where there is a choice.
    pub(crate) fn with_cpus(self, cpus: u8) -> Self {
        match self {
            Self::Here => Self::Here,
            Self::Emulated(host) => Self::Emulated(Host { cpus, ..host }),
        }
    }

    /// Whether it is an emulated host.
    pub(crate) fn is_emulated(&self) -> bool {
        matches!(self, Self::Emulated(_))
    }

    /// Runs `command` on our own streams. Returns its exit code, 128 and the signal's number if it died of one.
    pub(crate) fn status(&self, command: &mut Command) -> Result<u8> {
        match self {
            Self::Emulated(host) => host.status(command),
            Self::Here => {
                let name = command.get_program().display().to_string();
                let status = command.status().with_context(|| format!("Cannot run {name}"))?;
                Ok(exit_code(status))
            }
        }
    }

    /// Runs `command` with an empty input, and has `each` see the lines that it writes to both outputs as they come.
    /// Returns its exit code, as [`Place::status`] does.
    pub(crate) fn lines(&self, command: &mut Command, each: &mut dyn FnMut(&str)) -> Result<u8> {
        let (reader, writer) = std::io::pipe()?;
        match self {
            Self::Emulated(host) => std::thread::scope(|scope| {
                let run = scope.spawn(|| host.status_into(command, writer));
                pass_lines(reader, each)?;
                run.join().expect("the host's thread does not panic")
            }),
            Self::Here => {
                let name = command.get_program().display().to_string();
                let mut child = command
                    .stdin(Stdio::null())
                    .stdout(writer.try_clone()?)
                    .stderr(writer)
                    .spawn()
                    .with_context(|| format!("Cannot run {name}"))?;
                // The command's own copies of the pipe's end would keep it from ending.
                command.stdout(Stdio::null()).stderr(Stdio::null());
                pass_lines(reader, each)?;
                Ok(exit_code(child.wait()?))
            }
        }
    }
}

fn pass_lines(reader: PipeReader, each: &mut dyn FnMut(&str)) -> Result<()> {
    for line in BufReader::new(reader).split(b'\n') {
        each(&String::from_utf8_lossy(&line?));
    }
    Ok(())
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(255);
    u8::try_from(code).unwrap_or(u8::MAX)
}

/// Whether `/dev/kvm` opens. That is enough for guests of a few hundred instructions, on any processor.
pub(crate) fn local_kvm_opens() -> bool {
    File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

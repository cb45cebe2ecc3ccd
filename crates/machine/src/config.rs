//! What one machine is asked to be.

use std::path::{Path, PathBuf};

use boot::{Cmdline, KernelSpec};
use devices::console::SerialSpec;
use devices::{Devices, Files, Transport};
use memory::MemorySpec;
use serde::{Deserialize, Serialize};

use crate::cpus::CpusSpec;
use crate::error::ConfigError;

/// One machine, as flags, file and, later, the API describe it. The doc comments are the help.
///
/// What is not said is `None`, so that one description can be laid over another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
#[command(next_help_heading = "The machine")]
pub struct VmConfig {
    /// The kernel: a bzImage or an uncompressed vmlinux
    #[arg(long, value_name = "PATH[,entry=…]", value_parser = kv::from_str::<KernelSpec>)]
    #[serde(deserialize_with = "kv::text_or_table")]
    pub kernel: Option<KernelSpec>,

    /// RAM, 512M unless said
    #[arg(long, value_name = "SIZE[,…]", value_parser = kv::from_str::<MemorySpec>)]
    #[serde(deserialize_with = "kv::text_or_table")]
    pub mem: Option<MemorySpec>,

    /// Processors, 1 unless said
    #[arg(long, value_name = "N[,…]", value_parser = kv::from_str::<CpusSpec>)]
    #[serde(deserialize_with = "kv::text_or_table")]
    pub cpus: Option<CpusSpec>,

    /// The initial RAM disk or file system
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,

    /// Text for the kernel's command line, after the defaults; =TEXT (--cmdline==TEXT) replaces them
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<Cmdline>,

    /// Where the serial console goes, stdio unless said
    #[arg(long, value_name = "KIND[,…]", value_parser = kv::from_str::<SerialSpec>)]
    #[serde(deserialize_with = "kv::text_or_table")]
    pub serial: Option<SerialSpec>,

    /// A virtio console, and where it goes; with stdio the serial console is off
    #[arg(long, value_name = "KIND[,…]", value_parser = kv::from_str::<SerialSpec>)]
    #[serde(deserialize_with = "kv::text_or_table")]
    pub console: Option<SerialSpec>,

    /// The devices
    #[command(flatten)]
    #[serde(flatten)]
    pub devices: Devices,

    /// How the guest finds those that do not say: pci (unless said), mmio (by ACPI) or mmio-cmdline
    #[arg(long, value_name = "KIND", value_parser = kv::from_str::<Transport>, help_heading = "Devices")]
    pub transport: Option<Transport>,

    /// A name for messages and the process list
    #[arg(long)]
    pub name: Option<String>,

    /// When the guest reboots: restart (unless said) or exit
    #[arg(long, value_name = "ACTION", value_parser = kv::from_str::<OnEnd>)]
    pub on_reboot: Option<OnEnd>,

    /// When the guest's kernel panics: exit (unless said) or restart
    #[arg(long, value_name = "ACTION", value_parser = kv::from_str::<OnEnd>)]
    pub on_panic: Option<OnEnd>,

    /// Unpack the kernel anew, and keep nothing of it
    #[arg(long)]
    pub no_kernel_cache: bool,

    /// Print when each phase of the start was over; the guest ends the last by writing 0x7b to port 0x500
    #[arg(long)]
    pub boot_timer: bool,
}

impl VmConfig {
    /// What this description says, and where it is silent what `other` says.
    #[must_use]
    pub fn over(self, other: Self) -> Self {
        Self {
            kernel: self.kernel.or(other.kernel),
            mem: self.mem.or(other.mem),
            cpus: self.cpus.or(other.cpus),
            initrd: self.initrd.or(other.initrd),
            cmdline: self.cmdline.or(other.cmdline),
            serial: self.serial.or(other.serial),
            console: self.console.or(other.console),
            devices: self.devices.over(other.devices),
            transport: self.transport.or(other.transport),
            name: self.name.or(other.name),
            on_reboot: self.on_reboot.or(other.on_reboot),
            on_panic: self.on_panic.or(other.on_panic),
            no_kernel_cache: self.no_kernel_cache || other.no_kernel_cache,
            boot_timer: self.boot_timer || other.boot_timer,
        }
    }

    /// Where the serial console and the virtio console go. One of them is at the terminal, unless neither is to be.
    ///
    /// # Errors
    ///
    /// [`ConfigError::TwoConsoles`].
    pub fn consoles(&self) -> Result<(SerialSpec, SerialSpec), ConfigError> {
        let virtio = self.console.clone().unwrap_or(SerialSpec::Off);
        match &self.serial {
            Some(SerialSpec::Stdio) if virtio == SerialSpec::Stdio => Err(ConfigError::TwoConsoles),
            None if virtio == SerialSpec::Stdio => Ok((SerialSpec::Off, virtio)),
            serial => Ok((serial.clone().unwrap_or_default(), virtio)),
        }
    }

    /// The files that a machine of this description opens.
    pub fn files(&self) -> Files {
        let mut files = self.devices.files();
        let kernel = self.kernel.iter().map(|kernel| &kernel.path);
        files.read.extend(kernel.chain(&self.initrd).cloned());
        for console in self.serial.iter().chain(&self.console) {
            match console {
                SerialSpec::Off | SerialSpec::Stdio => {}
                SerialSpec::File(file) => files.made.push(file.path.clone()),
                // Their names go at the end.
                SerialSpec::Pty(pty) => files.sockets.extend(pty.link.clone()),
                SerialSpec::Socket(socket) => files.sockets.push(socket.path.clone()),
            }
        }
        files
    }

    /// Has the paths of files count from `folder`, where they are relative.
    pub fn resolve(&mut self, folder: &Path) {
        let kernel = self.kernel.iter_mut().map(|kernel| &mut kernel.path);
        let consoles = self.serial.iter_mut().chain(&mut self.console).filter_map(SerialSpec::path);
        for path in kernel.chain(&mut self.initrd).chain(consoles).chain(self.devices.paths()) {
            // One that is missing is refused later, and is not the folder.
            if !path.as_os_str().is_empty() {
                *path = folder.join(&*path);
            }
        }
    }
}

/// What happens when the guest ends in a way that a machine can go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnEnd {
    /// A freshly built machine, in the same process.
    Restart,
    /// The process ends.
    Exit,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_lies_over_what_was_said_before() {
        let file = VmConfig {
            name: Some("file".into()),
            cmdline: Some("quiet".to_owned().into()),
            boot_timer: true,
            ..VmConfig::default()
        };
        let flags = VmConfig { name: Some("flag".into()), ..VmConfig::default() };
        let both = flags.over(file.clone());
        assert_eq!(both.name.as_deref(), Some("flag"));
        assert_eq!((both.cmdline, both.boot_timer), (file.cmdline, true));
    }
}

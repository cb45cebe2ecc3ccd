//! What the machine is that measures: figures without it say nothing.

use std::arch::x86_64::__cpuid;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What is known of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Host {
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) memory_kib: u64,
    pub(crate) kernel: String,
    /// The maker and the product, by the firmware.
    pub(crate) product: String,
    pub(crate) governor: String,
    /// Weaknesses of the processor, with what the kernel does about them.
    pub(crate) mitigations: Vec<String>,
    pub(crate) virtualization: Virtualization,
    /// Whether this process may do all.
    pub(crate) root: bool,
    /// The processor that contenders were kept on.
    pub(crate) pinned: Option<usize>,
}

/// What is below the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Virtualization {
    /// Nothing that can be seen.
    #[default]
    Bare,
    /// A hypervisor: machines in it are nested ones.
    Nested,
    /// A program that interprets a processor: its times are those of no processor.
    Emulated,
}

impl Virtualization {
    /// In large letters; nothing for a machine that is none.
    pub(crate) fn warning(self) -> Option<&'static str> {
        match self {
            Self::Bare => None,
            Self::Nested => Some(
                "NESTED: THIS HOST IS ITSELF A VIRTUAL MACHINE. MACHINES IN IT PAY TWICE; THE FIGURES HOLD FOR NO OTHER \
                 HOST.",
            ),
            Self::Emulated => Some(
                "EMULATED: THIS HOST'S PROCESSOR IS INTERPRETED BY A PROGRAM. RATIOS HAVE LITTLE TO DO WITH THOSE OF \
                 HARDWARE.",
            ),
        }
    }
}

impl Host {
    /// Asks /proc and /sys.
    pub(crate) fn here(pinned: Option<usize>) -> Self {
        let info = read("/proc/cpuinfo");
        let name = rustix::system::uname();
        let dmi = |file| read(&format!("/sys/class/dmi/id/{file}"));
        let product = [dmi("sys_vendor"), dmi("product_name")].join(" ").trim().to_owned();
        let memory = read("/proc/meminfo");
        let total = field(&memory, "MemTotal").and_then(|total| total.split(' ').next()?.parse().ok());
        Self {
            cpu: field(&info, "model name").unwrap_or_else(|| "unknown".to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_kib: total.unwrap_or(0),
            kernel: format!("{} {}", name.sysname().to_string_lossy(), name.release().to_string_lossy()),
            governor: or_unknown(read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
            mitigations: mitigations(),
            virtualization: virtualization(),
            product: or_unknown(product),
            root: rustix::process::geteuid().is_root(),
            pinned,
        }
    }

    /// Lines for people.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let pinned = self.pinned.map_or_else(
            || "no: there is one processor only, or no right".to_owned(),
            |cpu| format!("contenders to processor {cpu}"),
        );
        let vulnerable = self.mitigations.iter().filter(|line| line.contains("Vulnerable")).count();
        vec![
            ("processor", format!("{}, {} of them", self.cpu, self.cpus)),
            ("memory", format!("{} MiB", self.memory_kib >> 10)),
            ("kernel", self.kernel.clone()),
            ("product", self.product.clone()),
            ("governor", self.governor.clone()),
            (
                "mitigations",
                format!(
                    "{} weaknesses known, {vulnerable} not mitigated (the result names them)",
                    self.mitigations.len()
                ),
            ),
            ("pinned", pinned),
        ]
    }
}

/// Asks the processor (CPUID, leaf 0x4000_0000 has the hypervisor's signature), and the files of hypervisors without it.
fn virtualization() -> Virtualization {
    let has_hypervisor = __cpuid(1).ecx >> 31 == 1;
    let leaf = __cpuid(0x4000_0000);
    let signature: Vec<u8> = [leaf.ebx, leaf.ecx, leaf.edx].iter().flat_map(|part| part.to_le_bytes()).collect();
    below(has_hypervisor, &signature, Path::new("/sys/hypervisor/type").exists())
}

/// `signature` means something only where there is a hypervisor.
fn below(has_hypervisor: bool, signature: &[u8], has_file: bool) -> Virtualization {
    match has_hypervisor {
        true if signature == b"TCGTCGTCGTCG" => Virtualization::Emulated,
        true => Virtualization::Nested,
        false if has_file => Virtualization::Nested,
        false => Virtualization::Bare,
    }
}

fn mitigations() -> Vec<String> {
    let folder = Path::new("/sys/devices/system/cpu/vulnerabilities");
    let mut all: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| format!("{}: {}", entry.file_name().to_string_lossy(), read(&entry.path().to_string_lossy())))
        .filter(|line| !line.ends_with(": Not affected"))
        .collect();
    all.sort();
    all
}

/// The value of the first line `NAME : VALUE`.
fn field(text: &str, name: &str) -> Option<String> {
    let value = |line: &str| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    };
    text.lines().find_map(value)
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn or_unknown(text: String) -> String {
    if text.is_empty() { "unknown".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_is_told_by_the_processor_and_said_in_large_letters() {
        for (has_hypervisor, signature, has_file, expected) in [
            (false, *b"TCGTCGTCGTCG", false, Virtualization::Bare),
            (true, *b"TCGTCGTCGTCG", false, Virtualization::Emulated),
            (true, *b"KVMKVMKVM\0\0\0", false, Virtualization::Nested),
            (false, [0; 12], true, Virtualization::Nested),
        ] {
            let found = below(has_hypervisor, &signature, has_file);
            assert_eq!(found, expected);
            assert_eq!(found.warning().is_none(), expected == Virtualization::Bare);
            assert_eq!(found.warning().map(str::to_uppercase).as_deref(), found.warning());
        }
    }

    #[test]
    fn this_machine_has_a_processor_and_memory() {
        let host = Host::here(None);
        assert!(host.cpus > 0 && host.memory_kib > 0 && host.kernel.starts_with("Linux"), "{host:?}");
    }
}

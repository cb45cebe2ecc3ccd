//! What is measured, by name: the one table of measures.

use serde::{Deserialize, Serialize};

/// A group of measures, as `--only` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Group {
    /// From the spawn of a process to the workload's first useful instruction, and to the end
    Start,
    /// What an idle instance adds to the host's memory
    Memory,
    /// The processor: integers, floating point, a hash, compression
    Cpu,
    /// Memory bandwidth and latency, page faults, on small and on huge pages
    Ram,
    /// System calls, messages between processes, new processes
    System,
    /// The disk, on the same backing file
    Disk,
    /// The network: throughput, latency, new connections
    Network,
    /// A web server under load
    Services,
    /// How many idle instances an amount of memory holds
    Density,
}

impl Group {
    /// Those of the quick suite.
    pub(crate) const QUICK: [Self; 6] = [Self::Start, Self::Memory, Self::Cpu, Self::Ram, Self::System, Self::Disk];
    /// All.
    pub(crate) const FULL: [Self; 9] = [
        Self::Start,
        Self::Memory,
        Self::Cpu,
        Self::Ram,
        Self::System,
        Self::Disk,
        Self::Network,
        Self::Services,
        Self::Density,
    ];

    /// Its name, as the workload and `--only` know it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Ram => "ram",
            Self::System => "system",
            Self::Disk => "disk",
            Self::Network => "network",
            Self::Services => "services",
            Self::Density => "density",
        }
    }

    /// Its heading.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Start => "Start and end",
            Self::Memory => "Memory of an idle instance",
            Self::Cpu => "Processor",
            Self::Ram => "Memory access",
            Self::System => "System calls and processes",
            Self::Disk => "Disk",
            Self::Network => "Network",
            Self::Services => "Services",
            Self::Density => "Density",
        }
    }
}

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Better {
    Lower,
    Higher,
}

/// A measure.
#[derive(Debug)]
pub(crate) struct Measure {
    pub(crate) name: &'static str,
    pub(crate) group: Group,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
    pub(crate) title: &'static str,
}

/// All measures, in the order in which they are shown.
pub(crate) const ALL: [Measure; 33] = [
    lower("start", Group::Start, "ms", "spawn to the workload's first useful instruction"),
    lower("start-exit", Group::Start, "ms", "spawn to exit"),
    lower("memory-outside", Group::Memory, "KiB", "proportional set size outside of guest RAM"),
    lower("memory-guest", Group::Memory, "KiB", "proportional set size of guest RAM"),
    lower("memory-whole", Group::Memory, "KiB", "proportional set size, both"),
    higher("cpu-integer", Group::Cpu, "M/s", "integer steps"),
    higher("cpu-float", Group::Cpu, "M/s", "floating-point steps"),
    higher("cpu-sha256", Group::Cpu, "MB/s", "SHA-256"),
    higher("cpu-compress", Group::Cpu, "MB/s", "DEFLATE compression"),
    higher("ram-read", Group::Ram, "MB/s", "read in order"),
    higher("ram-write", Group::Ram, "MB/s", "write in order"),
    higher("ram-copy", Group::Ram, "MB/s", "copy"),
    lower("ram-latency", Group::Ram, "ns", "latency of a random access, small pages"),
    lower("ram-latency-huge", Group::Ram, "ns", "latency of a random access, huge pages"),
    lower("ram-fault", Group::Ram, "ns", "first touch of 4 KiB, small pages"),
    lower("ram-fault-huge", Group::Ram, "ns", "first touch of 4 KiB, huge pages"),
    lower("system-call", Group::System, "ns", "system call that does nothing"),
    lower("system-pipe", Group::System, "us", "message to another process and back"),
    lower("system-spawn", Group::System, "us", "a process from start to end"),
    higher("disk-read", Group::Disk, "1/s", "random reads of 4 KiB, one at a time"),
    higher("disk-read-32", Group::Disk, "1/s", "random reads of 4 KiB, 32 at a time"),
    higher("disk-write-32", Group::Disk, "1/s", "random writes of 4 KiB, 32 at a time"),
    higher("disk-read-seq", Group::Disk, "MB/s", "sequential read"),
    higher("disk-write-seq", Group::Disk, "MB/s", "sequential write"),
    lower("disk-sync", Group::Disk, "us", "4 KiB written and on the medium"),
    higher("network-in", Group::Network, "Mbit/s", "one stream into the instance"),
    higher("network-out", Group::Network, "Mbit/s", "one stream out of the instance"),
    lower("network-rtt-50", Group::Network, "us", "request and response, median"),
    lower("network-rtt-99", Group::Network, "us", "request and response, 99th percentile"),
    higher("network-connect", Group::Network, "1/s", "new connections, one after another"),
    higher("nginx", Group::Services, "1/s", "nginx, requests for a small file (wrk)"),
    lower("nginx-99", Group::Services, "ms", "nginx, latency, 99th percentile (wrk)"),
    higher("density", Group::Density, "1/GiB", "idle instances that memory holds"),
];

const fn lower(name: &'static str, group: Group, unit: &'static str, title: &'static str) -> Measure {
    Measure { name, group, unit, better: Better::Lower, title }
}

const fn higher(name: &'static str, group: Group, unit: &'static str, title: &'static str) -> Measure {
    Measure { name, group, unit, better: Better::Higher, title }
}

/// The measure of this name.
pub(crate) fn named(name: &str) -> Option<&'static Measure> {
    ALL.iter().find(|measure| measure.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_stands_once() {
        for (at, measure) in ALL.iter().enumerate() {
            assert!(!ALL[..at].iter().any(|other| other.name == measure.name), "{}", measure.name);
        }
    }

    #[test]
    fn a_group_is_called_as_the_command_line_calls_it() {
        for group in Group::FULL {
            let value = clap::ValueEnum::to_possible_value(&group).unwrap();
            assert_eq!(value.get_name(), group.name());
        }
    }
}

//! The processors that are asked for: `4,features=-avx2+x,pin=0-3`.

use std::num::NonZeroU8;
use std::str::FromStr;

use kvm::x86::cpuid::FeatureMask;
use serde::{Deserialize, Serialize};

use crate::error::ConfigError;

/// Virtual processors as asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct CpusSpec {
    /// How many, 1 to 255
    pub count: u32,
    /// Features to hide (-avx2) or to insist on (+avx2), named as in /proc/cpuinfo
    pub features: FeatureMask,
    /// Host processors to pin to, one each in turn: 0-3, or 0+2+4
    pub pin: Option<HostCpus>,
}

impl CpusSpec {
    /// The most that a machine has: an APIC id is one byte, and 255 means all of them.
    const MOST: u32 = 255;

    /// Checks the number and the pins against what this host has.
    pub(crate) fn validate(&self, host: &kvm::Host) -> Result<NonZeroU8, ConfigError> {
        let most = u32::try_from(host.max_vcpus()).unwrap_or(Self::MOST).min(Self::MOST);
        let missing = self.pin.iter().flat_map(|pin| &pin.0).find(|cpu| !kvm::may_run_on(**cpu));
        if let Some(cpu) = missing {
            return Err(ConfigError::Pin(*cpu));
        }
        let count = u8::try_from(self.count).ok().and_then(NonZeroU8::new);
        count.filter(|_| self.count <= most).ok_or(ConfigError::CpuCount { asked: self.count, most })
    }
}

impl Default for CpusSpec {
    fn default() -> Self {
        Self { count: 1, features: FeatureMask::default(), pin: None }
    }
}

/// A list of host processors, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostCpus(Vec<usize>);

/// More than any kernel has; a list longer than that is a mistake.
const MOST_HOST_CPUS: usize = 8192;

impl HostCpus {
    /// The host processor for the virtual one with the given index: the list is used in turn.
    pub fn for_vcpu(&self, index: u8) -> usize {
        self.0[usize::from(index) % self.0.len()]
    }
}

impl FromStr for HostCpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no list of host processors: write 0-3, or 0+2+4");
        let number = |text: &str| text.parse::<usize>().ok().filter(|cpu| *cpu < MOST_HOST_CPUS).ok_or_else(wrong);
        let mut cpus = Vec::new();
        for part in text.split('+') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last || cpus.len() > MOST_HOST_CPUS {
                return Err(wrong());
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

impl TryFrom<String> for HostCpus {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<HostCpus> for String {
    fn from(cpus: HostCpus) -> Self {
        let words: Vec<String> = cpus.0.iter().map(usize::to_string).collect();
        words.join("+")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_host_processors_is_ranges_and_numbers() {
        let cpus: HostCpus = "0-2+8".parse().unwrap();
        assert_eq!(cpus, HostCpus(vec![0, 1, 2, 8]));
        assert_eq!([0, 3, 4].map(|index| cpus.for_vcpu(index)), [0, 8, 0]);
        assert_eq!(String::from(cpus), "0+1+2+8");
    }

    #[test]
    fn a_list_that_makes_no_sense_is_refused() {
        for text in ["", "x", "3-1", "0-99999", "1,2", "-1", "0+"] {
            assert!(text.parse::<HostCpus>().is_err(), "{text}");
        }
    }
}

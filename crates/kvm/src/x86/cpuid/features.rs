//! Feature masks, `-avx2+x`: what a user takes away, with all that depends on it, and what must be there.
//!
//! What the host offers is brought into order first, by the same rule that follows a removal: a feature is shown only
//! with what it needs, and only where KVM keeps its registers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::table::{DEPENDANTS, Feature, LEAVES, REPEATED_BY_AMD, Register, Set, UNNAMED, WORDS, Word, at};
use super::{CpuidError, Leaves, xsave};

/// Features that a user takes away (`-name`, with all that depend on it) and insists on (`+name`): `-avx2+rdrand`.
/// Empty text changes nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FeatureMask(Vec<(Wish, &'static str)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Remove,
    Demand,
}

impl FeatureMask {
    fn names(&self, wish: Wish) -> impl Iterator<Item = &'static str> {
        self.0.iter().filter(move |entry| entry.0 == wish).map(|entry| entry.1)
    }
}

impl FromStr for FeatureMask {
    type Err = CpuidError;

    fn from_str(text: &str) -> Result<Self, CpuidError> {
        let malformed = || CpuidError::Malformed { text: text.to_owned() };
        let mut mask = Vec::new();
        let mut rest = text;
        while let Some(sign) = rest.chars().next() {
            let wish = match sign {
                '-' => Wish::Remove,
                '+' => Wish::Demand,
                _ => return Err(malformed()),
            };
            // Both signs take one byte.
            let tail = &rest[1..];
            let (name, next) = tail.split_at(tail.find(['-', '+']).unwrap_or(tail.len()));
            if name.is_empty() {
                return Err(malformed());
            }
            mask.push((wish, known(name)?));
            rest = next;
        }
        Ok(Self(mask))
    }
}

impl fmt::Display for FeatureMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(wish, name)| match wish {
            Wish::Remove => write!(f, "-{name}"),
            Wish::Demand => write!(f, "+{name}"),
        })
    }
}

impl TryFrom<String> for FeatureMask {
    type Error = CpuidError;

    fn try_from(text: String) -> Result<Self, CpuidError> {
        text.parse()
    }
}

impl From<FeatureMask> for String {
    fn from(mask: FeatureMask) -> Self {
        mask.to_string()
    }
}

/// SGX: KVM offers it to a VMM that maps enclave memory into the guest.
const ENCLAVES: Feature = at("sgx");
/// SEV is for guests that the VMM has launched encrypted; one that reads of it here asks for its state.
const MEMORY_ENCRYPTION: u32 = 0x8000_001f;

/// Narrows the leaves to what the mask leaves over, and to what makes sense together.
pub(super) fn apply(leaves: &mut Leaves, mask: &FeatureMask) -> Result<(), CpuidError> {
    let mut offered = Capabilities::read(leaves);
    offered.clear(ENCLAVES);
    xsave::clear_stateless(leaves, &mut offered);
    offered.settle();

    let mut shown = offered.clone();
    mask.names(Wish::Remove).flat_map(named).for_each(|feature| shown.clear(feature));
    shown.settle();
    for name in mask.names(Wish::Demand) {
        if !named(name).any(|feature| offered.has(feature)) {
            return Err(CpuidError::NotOffered { name });
        }
        if !named(name).any(|feature| shown.has(feature)) {
            return Err(CpuidError::Contradiction { name });
        }
    }

    shown.write(leaves);
    xsave::narrow(leaves, &shown);
    for &(leaf, feature) in LEAVES {
        if !shown.has(feature) {
            leaves.remove(leaf);
        }
    }
    leaves.remove(MEMORY_ENCRYPTION);
    Ok(())
}

/// The registers of [`WORDS`] as they stand in some leaves; a missing leaf is zeros.
#[derive(Debug, Clone)]
pub(super) struct Capabilities(Set);

impl Capabilities {
    pub(super) fn read(leaves: &Leaves) -> Self {
        Self(WORDS.map(|Word(leaf, subleaf, register, _)| {
            leaves.find(leaf, subleaf).map_or(0, |entry| match register {
                Register::Eax => entry.eax,
                Register::Ebx => entry.ebx,
                Register::Ecx => entry.ecx,
                Register::Edx => entry.edx,
            })
        }))
    }

    fn write(&self, leaves: &mut Leaves) {
        for (Word(leaf, subleaf, register, _), value) in WORDS.iter().zip(self.0) {
            let Some(entry) = leaves.find_mut(*leaf, *subleaf) else { continue };
            match register {
                Register::Eax => entry.eax = value,
                Register::Ebx => entry.ebx = value,
                Register::Ecx => entry.ecx = value,
                Register::Edx => entry.edx = value,
            }
        }
        let basic = leaves.find(1, 0).map_or(0, |entry| entry.edx);
        if let Some(entry) = leaves.find_mut(0x8000_0001, 0) {
            entry.edx &= basic | !REPEATED_BY_AMD;
        }
    }

    pub(super) fn has(&self, feature: Feature) -> bool {
        self.0[feature.word] >> feature.bit & 1 == 1
    }

    pub(super) fn clear(&mut self, feature: Feature) {
        self.0[feature.word] &= !(1 << feature.bit);
    }

    /// Clears every feature that lacks one on which it depends.
    fn settle(&mut self) {
        loop {
            let before = self.0;
            for &(needed, dependants) in DEPENDANTS {
                if !self.has(needed) {
                    self.0.iter_mut().zip(dependants).for_each(|(word, bits)| *word &= !bits);
                }
            }
            if self.0 == before {
                return;
            }
        }
    }
}

/// All the bits that go by this name: the vendors have two for some.
pub(super) fn named(name: &str) -> impl Iterator<Item = Feature> {
    WORDS.iter().enumerate().flat_map(move |(word, Word(_, _, _, names))| {
        (0..)
            .zip(names.split_whitespace())
            .filter(move |(_, entry)| entry.split('|').any(|entry| entry == name))
            .map(move |(bit, _)| Feature { word, bit })
    })
}

/// The name as the table has it.
fn known(name: &str) -> Result<&'static str, CpuidError> {
    let names = || {
        let entries = WORDS.iter().flat_map(|Word(_, _, _, names)| names.split_whitespace());
        entries.flat_map(|entry| entry.split('|')).filter(|&entry| entry != UNNAMED)
    };
    names().find(|&entry| entry == name).ok_or_else(|| CpuidError::Unknown {
        name: name.to_owned(),
        hint: kv::nearest(name, names()).map_or_else(String::new, |nearest| format!("; did you mean {nearest:?}?")),
    })
}

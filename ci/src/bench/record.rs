//! Figures on record: what a build measured, with the versions that it was measured with, in a file of `resources/`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// How many percent worse than its record a figure may get.
const MARGIN: u128 = 3;

/// Whose figures they are: each suite has a file of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Suite {
    Boot,
    Run,
    Io,
}

impl Suite {
    pub(super) const ALL: [Self; 3] = [Self::Boot, Self::Run, Self::Io];

    /// Its record.
    pub(super) fn file(self) -> PathBuf {
        let name = match self {
            Self::Boot => "boot",
            Self::Run => "run",
            Self::Io => "io",
        };
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../resources/numbers/{name}.toml"))
    }
}

/// The file's content. All figures are better when smaller.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// What figures depend on and we do not make, by name. Figures of other versions are not compared.
    pub(super) versions: BTreeMap<String, String>,
    /// The figures by name, which holds the unit.
    pub(super) figures: BTreeMap<String, u64>,
}

impl Record {
    /// Reads a file. One that does not exist holds nothing.
    pub(super) fn read(file: &Path) -> Result<Self> {
        if !file.exists() {
            return Ok(Self::default());
        }
        let text = fs::read_to_string(file).with_context(|| format!("Cannot read {}", file.display()))?;
        toml::from_str(&text).with_context(|| format!("{} is no record", file.display()))
    }

    /// Writes a file, under `header`, which says what it is.
    pub(super) fn write(&self, file: &Path, header: &str) -> Result<()> {
        let folder = file.parent().context("The record has no folder")?;
        fs::create_dir_all(folder)?;
        let text = format!("{header}\n{}", toml::to_string(self)?);
        fs::write(file, text).with_context(|| format!("Cannot write {}", file.display()))
    }

    /// The figures that got worse than `self` says, one line each; nothing if the versions are others. A figure may be
    /// worse by its `slack`, too: what it can differ by without a reason.
    pub(super) fn worse(&self, now: &Self, slack: impl Fn(&str) -> u64) -> Option<Vec<String>> {
        if self.versions != now.versions {
            return None;
        }
        let mut worse = Vec::new();
        for (name, before) in &self.figures {
            let Some(after) = now.figures.get(name) else {
                worse.push(format!("{name}: on record and no longer measured"));
                continue;
            };
            let allowed = u128::from(*before) * (100 + MARGIN) / 100;
            if u128::from(*after) > allowed.max(u128::from(*before) + u128::from(slack(name))) {
                let change = ratio(*after, *before) - 1.0;
                worse.push(format!("{name}: {before} on record, {after} now, {:.1}% worse", change * 100.0));
            }
        }
        Some(worse)
    }
}

/// `a / b`, for figures that are far from the limits of either type.
#[expect(clippy::cast_precision_loss, reason = "figures have fewer than 53 bits")]
pub(super) fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(version: &str, figures: &[(&str, u64)]) -> Record {
        Record {
            versions: [("qemu".to_owned(), version.to_owned())].into(),
            figures: figures.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
        }
    }

    #[test]
    fn three_percent_worse_passes_and_four_do_not() {
        let before = record("1", &[("a", 1000), ("b", 1000), ("c", 1000)]);
        let now = record("1", &[("a", 1030), ("b", 1040), ("c", 10), ("new", 5)]);
        let worse = before.worse(&now, |_| 0).unwrap();
        assert!(matches!(&worse[..], [one] if one.starts_with("b: 1000 on record, 1040 now, 4.0%")), "{worse:?}");
    }

    #[test]
    fn slack_is_allowed_where_it_is_more_than_three_percent() {
        let worse = |now: u64| record("1", &[("a", 1000)]).worse(&record("1", &[("a", now)]), |_| 50).unwrap().len();
        assert_eq!((worse(1050), worse(1051)), (0, 1));
    }

    #[test]
    fn a_figure_that_is_gone_is_no_improvement() {
        let worse = record("1", &[("a", 1)]).worse(&record("1", &[]), |_| 0).unwrap();
        assert_eq!(worse.len(), 1);
    }

    #[test]
    fn figures_of_other_versions_are_not_compared() {
        assert_eq!(record("1", &[("a", 1)]).worse(&record("2", &[("a", 100)]), |_| 0), None);
    }

    #[test]
    fn a_record_comes_back_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("numbers/boot.toml");
        assert_eq!(Record::read(&file).unwrap(), Record::default());
        let record = record("7.2", &[("vmlinux, ns", 700_000_000)]);
        record.write(&file, "# What it is.").unwrap();
        assert_eq!(Record::read(&file).unwrap(), record);
    }
}

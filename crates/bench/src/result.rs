//! The result as it is kept: `result.json`, and how it is read again.
//!
//! A file that is read was written by somebody: its size is bounded, unknown fields are refused, and so are values that
//! no measure has.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::host::Host;
use crate::measure::{self, Better, Measure};
use crate::phases::Phases;
use crate::stats::{Estimate, Rng, Sample};

/// The format's version.
pub(crate) const VERSION: u32 = 1;
/// The largest file that is read.
const MOST: u64 = 32 << 20;
/// The contender that others are compared with.
pub(crate) const BASE: &str = "process";

/// A result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Report {
    pub(crate) version: u32,
    /// What wrote it.
    pub(crate) program: String,
    /// Seconds since 1970.
    pub(crate) time: u64,
    /// Why it is a part only; none if it is whole.
    pub(crate) partial: Option<String>,
    pub(crate) suite: String,
    /// What all order and all draws came from.
    pub(crate) seed: u64,
    pub(crate) rounds: u32,
    pub(crate) host: Host,
    /// How far a measure that is always the same spreads, as a part of its median.
    pub(crate) noise: Option<f64>,
    pub(crate) contenders: Vec<Contender>,
    /// What was not measured: it is not here, or there is no right.
    pub(crate) skipped: Vec<Skipped>,
    /// What went wrong.
    pub(crate) faults: Vec<Fault>,
    pub(crate) figures: Vec<Figure>,
    /// The phases of the start, the contenders' medians.
    pub(crate) phases: Vec<Phases>,
}

/// Who was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) program: String,
    pub(crate) version: String,
}

/// What was not measured, and what helps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Skipped {
    pub(crate) what: String,
    pub(crate) why: String,
}

/// Something went wrong with a contender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fault {
    pub(crate) contender: String,
    pub(crate) when: String,
    pub(crate) what: String,
}

/// One measure of one contender.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Figure {
    pub(crate) contender: String,
    pub(crate) measure: String,
    pub(crate) unit: String,
    pub(crate) better: Better,
    pub(crate) samples: Vec<Sample>,
    pub(crate) estimate: Option<Estimate>,
    /// How many times what the plain process costs this costs.
    pub(crate) ratio: Option<Estimate>,
}

impl Figure {
    pub(crate) fn new(contender: &str, measure: &Measure) -> Self {
        Self {
            contender: contender.to_owned(),
            measure: measure.name.to_owned(),
            unit: measure.unit.to_owned(),
            better: measure.better,
            samples: Vec::new(),
            estimate: None,
            ratio: None,
        }
    }
}

impl Report {
    /// The figure of a contender.
    pub(crate) fn figure(&self, contender: &str, measure: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.contender == contender && figure.measure == measure)
    }

    /// Adds a sample.
    pub(crate) fn add(&mut self, contender: &str, measure: &Measure, sample: Sample) {
        let is_it = |figure: &Figure| figure.contender == contender && figure.measure == measure.name;
        let at = self.figures.iter().position(is_it).unwrap_or_else(|| {
            self.figures.push(Figure::new(contender, measure));
            self.figures.len() - 1
        });
        self.figures[at].samples.push(sample);
    }

    /// Skips it, once.
    pub(crate) fn skip(&mut self, what: impl Into<String>, why: impl Into<String>) {
        let skipped = Skipped { what: what.into(), why: why.into() };
        if !self.skipped.contains(&skipped) {
            self.skipped.push(skipped);
        }
    }

    /// Estimates from the samples, always the same for the same.
    pub(crate) fn estimate(&mut self) {
        let mut rng = Rng::new(self.seed);
        let place = |name: &str| measure::ALL.iter().position(|measure| measure.name == name);
        let whose = |name: &str| self.contenders.iter().position(|contender| contender.name == name);
        self.figures.sort_by_key(|figure| (place(&figure.measure), whose(&figure.contender)));
        let bases: Vec<Figure> = self.figures.iter().filter(|figure| figure.contender == BASE).cloned().collect();
        for figure in &mut self.figures {
            figure.estimate = Estimate::of(&figure.samples, &mut rng);
            let base = bases.iter().find(|base| base.measure == figure.measure && figure.contender != BASE);
            figure.ratio =
                base.and_then(|base| Estimate::ratio(&figure.samples, &base.samples, figure.better, &mut rng));
        }
    }

    /// Writes it: whole, or not at all.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self).context("a result is JSON")?;
        write_whole(path, text.as_bytes())
    }

    /// Reads one.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let name = path.display();
        let mut text = String::new();
        let file = File::open(path).with_context(|| format!("cannot open {name}"))?;
        let read = file.take(MOST + 1).read_to_string(&mut text);
        let cure = "name a result.json that `vmm bench` of this version has written";
        read.with_context(|| format!("{name} is no result: {cure}"))?;
        ensure!(text.len() as u64 <= MOST, "{name} is larger than any result: {cure}");
        let value: Value =
            serde_json::from_str(&text).with_context(|| format!("{name} is no result, or is damaged: {cure}"))?;
        // Much of it is shown on terminals.
        ensure!(is_printable(&value), "{name} is damaged, it has control characters: {cure}");
        let version = value.get("version").and_then(Value::as_u64);
        let version = version.with_context(|| format!("{name} is no result, it has no version: {cure}"))?;
        ensure!(
            version == u64::from(VERSION),
            "{name} is of version {version} of the format, and this program knows {VERSION}: {cure}, or measure anew"
        );
        let report: Self = serde_json::from_value(value).with_context(|| format!("{name} is damaged: {cure}"))?;
        report.check().with_context(|| format!("{name} is damaged: {cure}"))?;
        Ok(report)
    }

    /// Values that no run gives are refused, before anybody divides by them.
    fn check(&self) -> anyhow::Result<()> {
        const MOST_FIGURES: usize = 10_000;
        const MOST_SAMPLES: usize = 10_000;
        ensure!(self.figures.len() <= MOST_FIGURES, "it has {} figures", self.figures.len());
        for figure in &self.figures {
            let Figure { contender, measure, samples, .. } = figure;
            ensure!(samples.len() <= MOST_SAMPLES, "{measure} of {contender} has {} samples", samples.len());
            let possible = samples.iter().all(|sample| sample.value.is_finite() && sample.value >= 0.0);
            ensure!(possible, "{measure} of {contender} has a sample that cannot be");
            for estimate in figure.estimate.iter().chain(&figure.ratio) {
                let Estimate { median, low, high } = *estimate;
                let possible = [median, low, high].iter().all(|value| value.is_finite()) && low <= high;
                ensure!(possible, "{measure} of {contender} has an interval that cannot be");
            }
        }
        Ok(())
    }
}

/// Whether no text in it has control characters.
fn is_printable(value: &Value) -> bool {
    let is_text = |text: &str| !text.contains(char::is_control);
    match value {
        Value::String(text) => is_text(text),
        Value::Array(all) => all.iter().all(is_printable),
        Value::Object(all) => all.iter().all(|(key, value)| is_text(key) && is_printable(value)),
        _ => true,
    }
}

/// Writes under another name first. What is there is replaced only by what is whole.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let new = path.with_extension(format!("new.{}", std::process::id()));
    let written = File::create(&new).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, path)
    });
    written.inspect_err(|_| drop(fs::remove_file(&new))).with_context(|| {
        format!("cannot write {}: say -o with a folder that has room and can be written", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::tests::report;

    fn read(text: &str) -> anyhow::Result<Report> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("result.json");
        fs::write(&path, text).unwrap();
        Report::read(&path)
    }

    fn text() -> String {
        serde_json::to_string(&report()).unwrap()
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("result.json");
        report().write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap(), report());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_result_of_another_version_is_named_with_the_cure() {
        let error = format!("{:#}", read(&text().replace("\"version\":1", "\"version\":9")).unwrap_err());
        assert!(error.contains("version 9") && error.contains("knows 1") && error.contains("measure anew"), "{error}");
    }

    #[test]
    fn a_damaged_result_is_refused_with_the_cure() {
        let whole = text();
        for damaged in [
            String::new(),
            whole[..whole.len() / 2].to_owned(),
            "[]".to_owned(),
            "{\"version\":1}".to_owned(),
            whole.replace("\"seed\"", "\"sead\""),
            whole.replacen("\"value\":10.0", "\"value\":-10.0", 1),
            whole.replacen("\"value\":10.0", "\"value\":1e999", 1),
            whole.replacen("\"low\":", "\"low\":9e9,\"was\":", 1),
            whole.replacen("\"quick\"", "\"\\u001b[2J\"", 1),
        ] {
            let error = format!("{:#}", read(&damaged).unwrap_err());
            assert!(error.contains("name a result.json"), "{error}");
        }
    }

    #[test]
    fn a_file_larger_than_any_result_is_not_read_to_its_end() {
        let error = Report::read(Path::new("/dev/zero")).unwrap_err();
        assert!(format!("{error:#}").contains("larger than any result"), "{error:#}");
    }
}

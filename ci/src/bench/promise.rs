//! What is promised of figures: `resources/numbers.toml`, and how promises and figures are shown.

use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::record::{Record, Suite, ratio};

const MIB: f64 = 1_048_576.0;

/// What is promised: a figure, alone or as a part of another, and its limit.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Promise {
    /// What README calls it.
    what: String,
    /// Whose record has the figures.
    pub(super) suite: Suite,
    figure: String,
    part_of: Option<String>,
    limit: Limit,
}

/// Figures are nanoseconds or bytes, by their names.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Promises {
    promise: Vec<Promise>,
}

/// All promises, as README lists them.
pub(super) fn all() -> Result<Vec<Promise>> {
    let file = "resources/numbers.toml";
    let promises: Promises = toml::from_str(include_str!("../../../resources/numbers.toml"))
        .with_context(|| format!("{file} is no list of promises"))?;
    ensure!(!promises.promise.is_empty(), "{file} promises nothing");
    Ok(promises.promise)
}

/// What is promised of a suite's figures.
pub(super) fn of(suite: Suite) -> Result<Vec<Promise>> {
    Ok(all()?.into_iter().filter(|promise| promise.suite == suite).collect())
}

/// What a figure counts.
#[derive(Clone, Copy)]
pub(super) enum Unit {
    /// Nanoseconds.
    Time,
    Bytes,
    Count,
}

impl Unit {
    /// What the figure of this name counts.
    pub(super) fn of(figure: &str) -> Self {
        if figure.contains("exits") {
            Self::Count
        } else if ["memory", "binary", "agent"].iter().any(|word| figure.contains(word)) {
            Self::Bytes
        } else {
            Self::Time
        }
    }

    pub(super) fn show(self, value: f64) -> String {
        match self {
            Self::Time if value >= 1e6 => format!("{:.4} s", value / 1e9),
            Self::Time => format!("{:.2} us", value / 1e3),
            Self::Bytes => format!("{:.2} MiB", value / MIB),
            Self::Count => format!("{value}"),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "at most {limit}"),
            Self::AtLeast(limit) => write!(f, "at least {limit}"),
        }
    }
}

impl Promise {
    fn value(&self, record: &Record) -> Option<f64> {
        let value = *record.figures.get(&self.figure)?;
        match &self.part_of {
            Some(whole) => Some(ratio(value, *record.figures.get(whole)?)),
            None => Some(ratio(value, 1)),
        }
    }

    fn kept(&self, value: f64) -> bool {
        match self.limit {
            Limit::AtMost(limit) => value <= limit,
            Limit::AtLeast(limit) => value >= limit,
        }
    }

    /// What it allows.
    fn asked(&self) -> String {
        match (&self.part_of, self.limit) {
            (Some(_), limit) => limit.to_string(),
            (None, Limit::AtMost(limit)) => format!("at most {}", Unit::of(&self.figure).show(limit)),
            (None, Limit::AtLeast(limit)) => format!("at least {}", Unit::of(&self.figure).show(limit)),
        }
    }

    /// What was measured.
    fn measured(&self, record: &Record, value: f64) -> String {
        let show =
            |figure: &str| Unit::of(figure).show(record.figures.get(figure).map_or(0.0, |value| ratio(*value, 1)));
        match &self.part_of {
            Some(whole) => format!("{value:.3} ({} of {})", show(&self.figure), show(whole)),
            None => show(&self.figure),
        }
    }

    fn line(&self, record: &Record) -> Option<String> {
        let value = self.value(record)?;
        Some(format!("{}: {}, promised {}", self.what, self.measured(record, value), self.asked()))
    }

    /// The row of README's table.
    pub(super) fn row(&self, record: &Record) -> String {
        let measured = match self.value(record) {
            Some(value) if self.kept(value) => self.measured(record, value),
            Some(value) => format!("**missed**: {}", self.measured(record, value)),
            None => "not measured".to_owned(),
        };
        format!("| {} | {} | {measured} |", self.what, self.asked())
    }
}

/// Prints all figures, and then what was promised of them.
pub(super) fn print(record: &Record, promises: &[Promise]) {
    for (name, version) in &record.versions {
        println!("{name}: {version}");
    }
    println!();
    for (name, value) in &record.figures {
        println!("{name:45} {:>12}", Unit::of(name).show(ratio(*value, 1)));
    }
    println!();
    for line in promises.iter().filter_map(|promise| promise.line(record)) {
        println!("{line}");
    }
}

/// The promises that are not kept, a line each.
pub(super) fn broken(record: &Record, promises: &[Promise]) -> Vec<String> {
    let broken = |promise: &Promise| match promise.value(record) {
        Some(value) if promise.kept(value) => None,
        Some(_) => promise.line(record),
        None => Some(format!("{}: not measured, promised {}", promise.what, promise.asked())),
    };
    promises.iter().filter_map(broken).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(figures: &[(&str, u64)]) -> Record {
        let figures = figures.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        Record { figures, ..Record::default() }
    }

    fn promises() -> Vec<Promise> {
        let text = "[[promise]]\nwhat = 'The start'\nsuite = 'boot'\nfigure = 'ours, ns'\npart_of = 'theirs, ns'\n\
                    limit = { at_most = 0.48 }\n\
                    [[promise]]\nwhat = 'Idle'\nsuite = 'boot'\nfigure = 'memory'\nlimit = { at_most = 2097152 }\n\
                    [[promise]]\nwhat = 'Reads'\nsuite = 'boot'\nfigure = 'theirs, ns'\npart_of = 'ours, ns'\n\
                    limit = { at_least = 2.0 }";
        toml::from_str::<Promises>(text).unwrap().promise
    }

    #[test]
    fn figures_within_the_promises_are_not_broken() {
        let record = record(&[("ours, ns", 1_000_000), ("theirs, ns", 2_100_000), ("memory", 2 << 20)]);
        assert_eq!(broken(&record, &promises()), Vec::<String>::new());
    }

    #[test]
    fn broken_promises_are_named_with_their_limits() {
        let record = record(&[("ours, ns", 1_000_000), ("theirs, ns", 1_900_000), ("memory", 3 << 20)]);
        assert_eq!(
            broken(&record, &promises()),
            [
                "The start: 0.526 (0.0010 s of 0.0019 s), promised at most 0.48",
                "Idle: 3.00 MiB, promised at most 2.00 MiB",
                "Reads: 1.900 (0.0019 s of 0.0010 s), promised at least 2",
            ]
        );
        assert_eq!(promises()[1].row(&record), "| Idle | at most 2.00 MiB | **missed**: 3.00 MiB |");
    }

    #[test]
    fn a_promise_that_was_not_measured_is_no_promise_kept() {
        assert_eq!(broken(&record(&[("ours, ns", 1)]), &promises()).len(), 3);
        assert!(promises()[1].row(&record(&[])).ends_with("| not measured |"));
    }

    #[test]
    fn the_project_s_promises_are_of_figures_that_have_names() {
        for promise in all().unwrap() {
            assert!(!promise.what.contains('|') && !promise.figure.is_empty(), "{}", promise.what);
        }
    }
}

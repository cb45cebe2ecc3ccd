//! What is promised of figures, and how both are shown.

use anyhow::{Context, Result};

use super::record::{Record, ratio};

pub(super) const MIB: f64 = 1_048_576.0;

/// What is promised: a figure, alone or as a part of another, and its limit.
pub(super) struct Promise {
    pub(super) figure: &'static str,
    pub(super) part_of: Option<&'static str>,
    pub(super) limit: f64,
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
    fn show(self, value: f64) -> String {
        match self {
            Self::Time => format!("{:.4} s", value / 1e9),
            Self::Bytes => format!("{:.2} MiB", value / MIB),
            Self::Count => format!("{value}"),
        }
    }
}

impl Promise {
    fn value(&self, record: &Record) -> Option<f64> {
        let value = *record.figures.get(self.figure)?;
        match self.part_of {
            Some(whole) => Some(ratio(value, *record.figures.get(whole)?)),
            None => Some(ratio(value, 1)),
        }
    }

    fn line(&self, record: &Record, unit: fn(&str) -> Unit) -> Option<String> {
        let Self { figure, part_of, limit } = self;
        let value = self.value(record)?;
        Some(match part_of {
            Some(whole) => format!("{figure} / {whole}: {value:.3}, promised {limit}"),
            None => {
                let unit = unit(figure);
                format!("{figure}: {}, promised {}", unit.show(value), unit.show(*limit))
            }
        })
    }
}

/// Prints all figures, and then what was promised of them.
pub(super) fn print(record: &Record, promises: &[Promise], unit: fn(&str) -> Unit) {
    for (name, version) in &record.versions {
        println!("{name}: {version}");
    }
    println!();
    for (name, value) in &record.figures {
        println!("{name:45} {:>12}", unit(name).show(ratio(*value, 1)));
    }
    println!();
    for line in promises.iter().filter_map(|promise| promise.line(record, unit)) {
        println!("{line}");
    }
}

/// The promises that are not kept, a line each.
pub(super) fn broken(record: &Record, promises: &[Promise], unit: fn(&str) -> Unit) -> Result<Vec<String>> {
    let mut broken = Vec::new();
    for promise in promises {
        let line = promise.line(record, unit).with_context(|| format!("{} was not measured", promise.figure))?;
        if promise.value(record).is_some_and(|value| value > promise.limit) {
            broken.push(line);
        }
    }
    Ok(broken)
}

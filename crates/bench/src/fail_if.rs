//! `--fail-if`: conditions on a result, `[CONTENDER.]MEASURE.ratio|median OP NUMBER`.
//!
//! A condition holds where the whole interval is beyond the number. One that noise may have brought about does not fail a
//! build.

use std::str::FromStr;

use anyhow::Context as _;

use crate::contender::Contender;
use crate::measure::{self, Group};
use crate::result::Report;
use crate::stats::Estimate;

/// The contender that is meant where none is said.
const OURS: &str = "vmm";

/// A condition.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Condition {
    text: String,
    contender: String,
    measure: String,
    what: What,
    is_above: bool,
    limit: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Ratio,
    Median,
}

impl FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shape =
            || format!("`{text}` is no condition: say [CONTENDER.]MEASURE.ratio|median and > or < and a number");
        let at = text.find(['<', '>']).ok_or_else(shape)?;
        let (left, right) = text.split_at(at);
        let limit: f64 = right[1..].trim().parse().map_err(|_| shape())?;
        let parts: Vec<&str> = left.trim().split('.').collect();
        let (contender, name, what) = match parts[..] {
            [name, what] => (OURS, name, what),
            [contender, name, what] => (contender, name, what),
            _ => return Err(shape()),
        };
        let what = match what {
            "ratio" => What::Ratio,
            "median" => What::Median,
            _ => return Err(shape()),
        };
        if !limit.is_finite() {
            return Err(shape());
        }
        if measure::named(name).is_none() {
            let names: Vec<&str> = measure::ALL.iter().map(|measure| measure.name).collect();
            return Err(format!("there is no measure {name}; there are {}", names.join(", ")));
        }
        Ok(Self {
            text: text.to_owned(),
            contender: contender.to_owned(),
            measure: name.to_owned(),
            what,
            is_above: right.starts_with('>'),
            limit,
        })
    }
}

impl Condition {
    /// Why a run of these will not tell: better said before an hour of measuring than behind it.
    pub(crate) fn check(&self, contenders: &[Contender], groups: &[Group]) -> Result<(), String> {
        let Self { text, contender, measure, .. } = self;
        let is_there = contenders.iter().any(|other| other.name == *contender);
        let is_asked = measure::named(measure).is_some_and(|measure| groups.contains(&measure.group));
        match (is_there, is_asked) {
            (true, true) => Ok(()),
            (false, _) => {
                Err(format!("--fail-if {text}: {contender} is not measured here: see what is skipped, and --with"))
            }
            (true, false) => Err(format!("--fail-if {text}: {measure} is not measured: see --only and --suite")),
        }
    }

    /// Whether it holds, and the words for that. A condition on what was not measured is a failure, and no pass.
    pub(crate) fn judge(&self, report: &Report) -> anyhow::Result<(bool, String)> {
        let figure = report.figure(&self.contender, &self.measure);
        let estimate = figure.and_then(|figure| match self.what {
            What::Ratio => figure.ratio,
            What::Median => figure.estimate,
        });
        let Self { text, contender, measure, .. } = self;
        let Estimate { median, low, high } = estimate
            .with_context(|| format!("--fail-if {text}: {measure} of {contender} was not measured, or too seldom"))?;
        let holds = if self.is_above { low > self.limit } else { high < self.limit };
        let verdict = if holds { "holds" } else { "does not surely hold" };
        Ok((holds, format!("fail-if {text}: {verdict}: {median:.3} ({low:.3} to {high:.3})")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::tests::report;

    fn judge(text: &str) -> anyhow::Result<bool> {
        Ok(text.parse::<Condition>().map_err(anyhow::Error::msg)?.judge(&report())?.0)
    }

    #[test]
    fn a_condition_holds_where_the_whole_interval_is_beyond_it() {
        // vmm's start is 20 ms to the process's 10 ms, in every round.
        assert!(judge("start.ratio>1.9").unwrap() && judge("vmm.start.ratio > 1.9").unwrap());
        assert!(!judge("start.ratio>2.1").unwrap() && judge("start.ratio<2.1").unwrap());
        assert!(judge("process.start.median<11").unwrap() && !judge("process.start.median>11").unwrap());
    }

    #[test]
    fn what_was_not_measured_is_no_pass() {
        let error = judge("cpu-float.ratio>1").unwrap_err();
        assert!(error.to_string().contains("cpu-float of vmm was not measured"), "{error}");
    }

    #[test]
    fn what_is_no_condition_is_told_with_its_shape() {
        for text in
            ["start.ratio", "start>1", "a.b.c.ratio>1", "start.mean>1", "start.ratio>x", "start.ratio>inf", "é<"]
        {
            let error = text.parse::<Condition>().unwrap_err();
            assert!(error.contains("[CONTENDER.]MEASURE.ratio|median"), "{error}");
        }
        assert!("starts.ratio>1".parse::<Condition>().unwrap_err().contains("start-exit"));
    }
}

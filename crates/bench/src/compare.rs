//! `vmm bench compare`: what changed from one result to another.
//!
//! What a run says of itself does not tell how runs differ. So a change counts where the interval of the ratio of both
//! excludes 1 and the ratio is farther from 1 than the noise of either machine.

use std::fmt::Write as _;

use crate::result::{Figure, Report};
use crate::stats::{Estimate, Rng};
use crate::table;

/// A change.
#[derive(Debug, PartialEq)]
struct Change<'a> {
    figure: &'a Figure,
    before: f64,
    ratio: Estimate,
}

/// What changed, for people.
pub(crate) fn text(before: &Report, after: &Report) -> String {
    let mut text = String::new();
    let mut line = |words: String| writeln!(text, "{words}").expect("a string takes every write");
    for difference in differences(before, after) {
        line(format!("Mind: {difference}"));
    }
    let (changes, compared) = changes(before, after);
    for Change { figure, before, ratio } in &changes {
        let way = if ratio.median > 1.0 { "dearer" } else { "cheaper" };
        let now = figure.estimate.map_or(0.0, |estimate| estimate.median);
        line(format!(
            "{:18} {:18} {} -> {} {}, {} times the cost ({} to {}): {way}",
            figure.contender,
            figure.measure,
            table::number(*before),
            table::number(now),
            figure.unit,
            table::number(ratio.median),
            table::number(ratio.low),
            table::number(ratio.high),
        ));
    }
    line(format!("{compared} figures are in both with enough rounds; {} changed beyond the noise", changes.len()));
    text
}

/// What makes the comparison worth less.
fn differences(before: &Report, after: &Report) -> Vec<String> {
    let mut found = Vec::new();
    let mut differ = |what: &str, one: &str, other: &str| {
        if one != other {
            found.push(format!("{what} differs: {one}, then {other}"));
        }
    };
    differ("the processor", &before.host.cpu, &after.host.cpu);
    differ("the host's kernel", &before.host.kernel, &after.host.kernel);
    differ("the governor", &before.host.governor, &after.host.governor);
    differ("the suite", &before.suite, &after.suite);
    for contender in &before.contenders {
        let Some(other) = after.contenders.iter().find(|other| other.name == contender.name) else { continue };
        differ(&format!("the version of {}", contender.name), &contender.version, &other.version);
    }
    let partial = [("the first", before), ("the second", after)];
    let partial = partial.iter().filter(|(_, report)| report.partial.is_some());
    found.extend(partial.map(|(which, _)| format!("{which} is a part of a result only")));
    found
}

fn changes<'a>(before: &Report, after: &'a Report) -> (Vec<Change<'a>>, usize) {
    let noise = before.noise.unwrap_or(0.0).max(after.noise.unwrap_or(0.0));
    let mut rng = Rng::new(before.seed ^ after.seed);
    let mut compared = 0;
    let mut changes = Vec::new();
    for figure in &after.figures {
        let Some(old) = before.figure(&figure.contender, &figure.measure) else { continue };
        let same = old.unit == figure.unit && old.better == figure.better;
        let ratio = Estimate::ratio_of_runs(&figure.samples, &old.samples, figure.better, &mut rng);
        let (Some(ratio), Some(estimate), true) = (ratio, old.estimate, same) else { continue };
        compared += 1;
        let is_beyond = ratio.median > 1.0 + noise || ratio.median < 1.0 / (1.0 + noise);
        if ratio.differs() && is_beyond {
            changes.push(Change { figure, before: estimate.median, ratio });
        }
    }
    (changes, compared)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::tests::{report, report_with};

    #[test]
    fn the_same_result_has_not_changed() {
        let text = text(&report(), &report());
        assert!(text.contains("0 changed beyond the noise") && !text.contains("Mind"), "{text}");
    }

    #[test]
    fn a_tenth_more_is_found_and_named() {
        let text = text(&report(), &report_with(22.0));
        assert!(text.contains("vmm                start") && text.contains("dearer"), "{text}");
        assert!(text.contains("1 changed beyond the noise"), "{text}");
    }

    #[test]
    fn a_change_smaller_than_the_noise_of_the_machine_is_none() {
        let (mut before, after) = (report(), report_with(22.0));
        before.noise = Some(0.2);
        assert!(text(&before, &after).contains("0 changed"));
    }

    #[test]
    fn another_processor_and_another_version_are_said() {
        let mut after = report();
        after.host.cpu = "Another".to_owned();
        after.contenders[1].version = "2".to_owned();
        let text = text(&report(), &after);
        assert!(text.contains("Mind: the processor differs"), "{text}");
        assert!(text.contains("Mind: the version of vmm differs: 1, then 2"), "{text}");
    }
}

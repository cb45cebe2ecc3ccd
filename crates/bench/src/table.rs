//! The result on the terminal.

use std::fmt::Write as _;

use crate::measure::{self, Group};
use crate::phases::Phases;
use crate::result::{BASE, Figure, Report};
use crate::stats::{CONFIDENCE, ENOUGH, Estimate};

/// Why nothing is said of restoring and cloning.
pub(crate) const NOT_MEASURED: &str =
    "Not measured: restore and clone of snapshots, since vmm has no snapshots yet; there is nothing to compare.";

/// What is said before it begins.
pub(crate) fn head(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |words: String| writeln!(text, "{words}").expect("a string takes every write");
    if let Some(warning) = report.host.virtualization.warning() {
        line(format!("{warning}\n"));
    }
    for (name, value) in report.host.lines() {
        line(format!("{name:12} {value}"));
    }
    line(format!("{:12} {}, {} rounds, seed {}", "suite", report.suite, report.rounds, report.seed));
    let contenders = report.contenders.iter().map(|contender| format!("{} {}", contender.name, contender.version));
    line(format!("{:12} {}", "measured", contenders.collect::<Vec<_>>().join(", ")));
    for skipped in &report.skipped {
        line(format!("{:12} {}: {}", "skipped", skipped.what, skipped.why));
    }
    text
}

/// What is said at the end.
pub(crate) fn whole(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |words: &str| writeln!(text, "{words}").expect("a string takes every write");
    if let Some(why) = &report.partial {
        line(&format!("\nA PART ONLY: {why}"));
    }
    let groups = Group::FULL.iter().filter(|group| !figures(report, **group).is_empty());
    for group in groups {
        line(&format!("\n{}", group.title()));
        for measure in measure::ALL.iter().filter(|measure| measure.group == *group) {
            let own: Vec<&Figure> = report.figures.iter().filter(|figure| figure.measure == measure.name).collect();
            if own.is_empty() {
                continue;
            }
            line(&format!("  {} ({}, {}), {}", measure.title, measure.name, measure.unit, better(own[0])));
            for figure in own {
                line(&format!("    {}", row(figure)));
            }
        }
    }
    if !report.phases.is_empty() {
        line("\nPhases of a typical start, ms");
        report.phases.iter().for_each(|phases| line(&format!("  {}", phase_row(phases))));
    }
    let noise = report.noise.map_or("not known".to_owned(), |noise| format!("{:.1}%", noise * 100.0));
    line(&format!("\nThe machine's noise: {noise} around the median of a measure that is always the same."));
    line(&explanation());
    line(NOT_MEASURED);
    for fault in &report.faults {
        line(&format!("FAULT: {}, {}: {}", fault.contender, fault.when, fault.what));
    }
    for skipped in &report.skipped {
        line(&format!("Skipped: {}: {}", skipped.what, skipped.why));
    }
    text
}

/// What the columns mean.
pub(crate) fn explanation() -> String {
    format!(
        "Medians, with their {:.0}% intervals. The last column is the cost against the plain process: above 1 is dearer. It is \
         there where its interval excludes 1 in {ENOUGH} rounds or more.",
        CONFIDENCE * 100.0
    )
}

fn figures(report: &Report, group: Group) -> Vec<&Figure> {
    let is_of = |figure: &&Figure| measure::named(&figure.measure).is_some_and(|measure| measure.group == group);
    report.figures.iter().filter(is_of).collect()
}

fn better(figure: &Figure) -> &'static str {
    match figure.better {
        measure::Better::Lower => "less is better",
        measure::Better::Higher => "more is better",
    }
}

fn row(figure: &Figure) -> String {
    let Some(Estimate { median, low, high }) = figure.estimate else {
        return format!("{:18} no figure", figure.contender);
    };
    let interval = format!("{} to {}", number(low), number(high));
    let row = format!("{:18} {:>9}  {interval:23} {}", figure.contender, number(median), verdict(figure));
    row.trim_end().to_owned()
}

/// What may be said of a figure against the plain process's.
pub(crate) fn verdict(figure: &Figure) -> String {
    match figure.ratio {
        Some(ratio) if ratio.differs() => {
            format!("x {} ({} to {})", number(ratio.median), number(ratio.low), number(ratio.high))
        }
        Some(_) => "no difference seen".to_owned(),
        None if figure.contender == BASE => String::new(),
        None => "not compared".to_owned(),
    }
}

fn phase_row(phases: &Phases) -> String {
    let Phases { contender, process, kvm, kernel, user, whole, opaque } = phases;
    let known = |name: &str, time: Option<f64>| time.map_or(String::new(), |time| format!("  {name} {}", number(time)));
    let first = if *opaque { "process, KVM and kernel (not to be told apart)" } else { "process" };
    let row = format!("{contender:18} {first} {}{}{}", number(*process), known("KVM", *kvm), known("kernel", *kernel));
    format!("{row}  user space {}  = {} of {}", number(*user), number(phases.sum()), number(*whole))
}

/// A number with three digits that count.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        ..0.001 => format!("{value:.1e}"),
        ..1.0 => format!("{value:.3}"),
        ..10.0 => format!("{value:.2}"),
        ..100.0 => format!("{value:.1}"),
        _ => {
            let digits = format!("{value:.0}");
            let grouped = digits.as_bytes().rchunks(3).rev().map(|three| String::from_utf8_lossy(three).into_owned());
            grouped.collect::<Vec<_>>().join(",")
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::result::{Contender, Fault, Skipped, VERSION};
    use crate::stats::Sample;

    /// A result in which a process starts in 10 ms and a machine in 20 ms.
    pub(crate) fn report() -> Report {
        report_with(20.0)
    }

    pub(crate) fn report_with(vmm: f64) -> Report {
        let mut report = Report {
            version: VERSION,
            program: "vmm-bench 0".to_owned(),
            time: 1,
            partial: None,
            suite: "quick".to_owned(),
            seed: 7,
            rounds: 10,
            host: crate::host::Host::default(),
            noise: Some(0.01),
            contenders: Vec::new(),
            skipped: vec![Skipped { what: "runc".to_owned(), why: "not installed".to_owned() }],
            faults: vec![Fault {
                contender: "vmm".to_owned(),
                when: "start".to_owned(),
                what: "<b>hung</b>".to_owned(),
            }],
            figures: Vec::new(),
            phases: Vec::new(),
        };
        for (name, time) in [(BASE, 10.0), ("vmm", vmm)] {
            let version = "1".to_owned();
            report.contenders.push(Contender { name: name.to_owned(), program: name.to_owned(), version });
            for round in 0..10 {
                // A spread that the machine's noise does not hide, and that both have in the same rounds.
                let value = time * (1.0 + f64::from(round % 2) / 100.0);
                report.add(name, measure::named("start").unwrap(), Sample { round, value });
            }
        }
        report.estimate();
        report
    }

    #[test]
    fn a_ratio_is_told_only_where_there_is_a_difference() {
        let text = whole(&report());
        assert!(text.contains("x 2.00 (2.00 to 2.00)"), "{text}");
        let text = whole(&report_with(10.0));
        assert!(text.contains("no difference seen") && !text.contains("x 1.00"), "{text}");
    }

    #[test]
    fn a_part_and_faults_are_said() {
        let report = Report { partial: Some("interrupted".to_owned()), ..report() };
        let text = whole(&report);
        assert!(text.contains("A PART ONLY: interrupted") && text.contains("FAULT: vmm, start: <b>hung</b>"), "{text}");
        assert!(head(&report).contains("skipped      runc: not installed"));
    }

    #[test]
    fn numbers_have_the_digits_that_count() {
        for (value, text) in [
            (0.0, "0"),
            (0.12345, "0.123"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (123.4, "123"),
            (1_234_567.8, "1,234,568"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}

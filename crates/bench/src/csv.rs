//! `result.csv`: one line a sample.

use std::fmt::Write as _;

use crate::result::Report;

/// The file's text.
pub(crate) fn text(report: &Report) -> String {
    let mut text = "contender,measure,unit,better,round,value\n".to_owned();
    for figure in &report.figures {
        for sample in &figure.samples {
            let better = if figure.better == crate::measure::Better::Lower { "lower" } else { "higher" };
            let words = [&figure.contender, &figure.measure, &figure.unit].map(|word| quoted(word));
            writeln!(text, "{},{better},{},{}", words.join(","), sample.round, sample.value)
                .expect("a string takes every write");
        }
    }
    text
}

/// As RFC 4180 has it, where that is needed.
fn quoted(word: &str) -> String {
    if word.contains([',', '"', '\n', '\r']) { format!("\"{}\"", word.replace('"', "\"\"")) } else { word.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_is_a_line() {
        let report = crate::table::tests::report();
        let text = text(&report);
        let samples: usize = report.figures.iter().map(|figure| figure.samples.len()).sum();
        assert_eq!(text.lines().count(), samples + 1);
        assert!(text.contains("\nvmm,start,ms,lower,0,20\n"), "{text}");
    }

    #[test]
    fn a_name_with_a_comma_is_quoted() {
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
    }
}

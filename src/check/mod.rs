//! `vmm check`: can this host run a virtual machine, and what would make it run one better?
//!
//! One line a finding, the cure beside it. `FAIL` means that no machine can run and is what the exit
//! code follows; `warn` means that some feature is not to be had, or that something is slow.
//! Everything is looked at and nothing is changed.

mod devices;
mod helpers;
mod host;
mod system;
mod virtualization;

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;

use system::System;

/// Checks this host and prints what was found. The exit code is 0 only where a machine can run.
pub(crate) fn run(json: bool) -> ExitCode {
    let report = Report::of(&System::real());
    let text = if json { report.json() } else { report.to_string() };
    // Whoever closes the pipe early has read enough: the exit code still says the rest.
    let _ = writeln!(std::io::stdout().lock(), "{text}");
    report.exit_code()
}

/// All findings, most important first.
#[derive(Debug, Serialize)]
struct Report {
    usable: bool,
    findings: Vec<Finding>,
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// Something cannot be used, or is slow.
    Warn,
    /// No machine can run.
    Fail,
}

/// One thing that was looked at. The identifiers are stable: programs select by them.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    id: &'static str,
    level: Level,
    subject: &'static str,
    seen: String,
    cure: Option<String>,
}

impl Finding {
    fn ok(id: &'static str, subject: &'static str, seen: impl Into<String>) -> Self {
        Self { id, level: Level::Ok, subject, seen: seen.into(), cure: None }
    }

    fn warn(id: &'static str, subject: &'static str, seen: impl Into<String>) -> Self {
        Self { level: Level::Warn, ..Self::ok(id, subject, seen) }
    }

    fn fail(id: &'static str, subject: &'static str, seen: impl Into<String>) -> Self {
        Self { level: Level::Fail, ..Self::ok(id, subject, seen) }
    }

    fn cure(self, cure: impl Into<String>) -> Self {
        Self { cure: Some(cure.into()), ..self }
    }
}

impl Report {
    fn of(system: &System) -> Self {
        let mut findings = virtualization::findings(system);
        findings.extend(host::findings(system));
        findings.extend(devices::findings(system));
        findings.extend(helpers::findings(system));
        Self::new(findings)
    }

    fn new(findings: Vec<Finding>) -> Self {
        Self { usable: findings.iter().all(|finding| finding.level != Level::Fail), findings }
    }

    fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("strings and booleans")
    }

    fn exit_code(&self) -> ExitCode {
        if self.usable { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Aligned columns, and a last line with the verdict.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.findings.iter().map(|finding| finding.subject.len()).max().unwrap_or(0);
        for Finding { level, subject, seen, cure, .. } in &self.findings {
            let level = match level {
                Level::Ok => "ok",
                Level::Warn => "warn",
                Level::Fail => "FAIL",
            };
            write!(f, "{level:<4}  {subject:<width$}  {seen}")?;
            match cure {
                Some(cure) => writeln!(f, " — {cure}")?,
                None => writeln!(f)?,
            }
        }
        f.write_str(if self.usable {
            "A virtual machine can run here."
        } else {
            "No virtual machine can run here: see FAIL above."
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(level: Level) -> Report {
        let second = Finding { level, ..Finding::ok("b", "longer one", "bad") };
        Report::new(vec![Finding::ok("a", "one", "good"), second.cure("do this")])
    }

    #[test]
    fn columns_are_aligned_and_the_cure_stands_beside_what_was_seen() {
        assert_eq!(
            report(Level::Fail).to_string(),
            "ok    one         good\n\
             FAIL  longer one  bad — do this\n\
             No virtual machine can run here: see FAIL above."
        );
        assert_eq!(
            report(Level::Warn).to_string(),
            "ok    one         good\n\
             warn  longer one  bad — do this\n\
             A virtual machine can run here."
        );
    }

    #[test]
    fn the_exit_code_is_zero_unless_something_fails() {
        let code = |level| format!("{:?}", report(level).exit_code());
        assert_eq!(code(Level::Ok), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(code(Level::Warn), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(code(Level::Fail), format!("{:?}", ExitCode::FAILURE));
    }

    #[test]
    fn the_json_has_the_promised_keys() {
        let json: serde_json::Value = serde_json::from_str(&report(Level::Fail).json()).expect("JSON");
        assert_eq!(
            json,
            serde_json::json!({"usable": false, "findings": [
                {"id": "a", "level": "ok", "subject": "one", "seen": "good", "cure": null},
                {"id": "b", "level": "fail", "subject": "longer one", "seen": "bad", "cure": "do this"},
            ]})
        );
    }

    #[test]
    fn identifiers_are_unique_and_every_trouble_has_its_cure() {
        // A host where nothing is found, and this one.
        let empty = tempfile::tempdir().expect("a folder");
        for system in [System::at(empty.path()), System::real()] {
            let report = Report::of(&system);
            let mut ids: Vec<_> = report.findings.iter().map(|finding| finding.id).collect();
            let all = ids.len();
            ids.sort_unstable();
            ids.dedup();
            assert_eq!(ids.len(), all);
            for finding in &report.findings {
                assert!(finding.level == Level::Ok || finding.cure.is_some(), "{finding:?}");
                assert!(!finding.seen.contains('\n'), "{finding:?}");
            }
        }
    }
}

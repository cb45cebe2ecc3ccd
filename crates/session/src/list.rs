//! `vmm ps`: which machines there are.

use std::io::{self, Write as _};
use std::process::ExitCode;

use serde_json::json;

use crate::for_people;
use session::{Machine, State, now};

/// What `vmm ps` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct PsArgs {
    /// Show those that have ended, too
    #[arg(short, long)]
    all: bool,
    /// As JSON, a line for each
    #[arg(long)]
    json: bool,
}

/// The most characters of a command in the table.
const LONGEST_COMMAND: usize = 60;

impl PsArgs {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let mut machines = Machine::all()?;
        machines.retain(|machine| self.all || !matches!(machine.state, State::Ended(_)));
        let mut output = io::stdout().lock();
        if self.json {
            for machine in &machines {
                writeln!(output, "{}", as_json(machine))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        let rows: Vec<_> = machines.iter().map(row).collect();
        table(&mut output, &["NAME", "STATUS", "ROOT", "PORTS", "COMMAND"], &rows)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn row(machine: &Machine) -> Vec<String> {
    let record = &machine.record;
    let status = match &machine.state {
        State::Running => format!("up {}", for_people(now().saturating_sub(record.started))),
        State::Ended(end) => format!("ended ({}) {} ago", end.code, for_people(now().saturating_sub(end.when))),
        State::Dead => "dead".into(),
    };
    let command = record.command.join(" ").replace(char::is_control, " ");
    let mut shown: String = command.chars().take(LONGEST_COMMAND).collect();
    if shown.len() < command.len() {
        shown.push('…');
    }
    vec![record.name.clone(), status, record.root.clone(), record.ports.join(" "), shown]
}

fn as_json(machine: &Machine) -> serde_json::Value {
    let (status, end) = match &machine.state {
        State::Running => ("running", None),
        State::Ended(end) => ("ended", Some(end)),
        State::Dead => ("dead", None),
    };
    let mut value = json!(machine.record);
    value["status"] = status.into();
    value["end"] = json!(end);
    value
}

/// Columns as wide as their widest cell.
pub(crate) fn table(output: &mut impl io::Write, head: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    let head: Vec<String> = head.iter().map(ToString::to_string).collect();
    let width = |column: usize| {
        rows.iter().chain([&head]).filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    for row in [&head].into_iter().chain(rows) {
        let line: String = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}  ")).collect();
        writeln!(output, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_need_to_be() {
        let mut output = Vec::new();
        table(&mut output, &["A", "LONG"], &[vec!["long".into(), "b".into()], vec!["c".into(), String::new()]])
            .unwrap();
        assert_eq!(String::from_utf8(output).unwrap(), "A     LONG\nlong  b\nc\n");
    }
}

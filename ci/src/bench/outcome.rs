//! What becomes of figures that were measured: they are shown, compared with what was promised and with the record, and
//! can become the record, and README's table.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::promise;
use super::record::{Record, Suite};

/// What to do with the figures.
#[derive(clap::Args, Clone, Copy)]
pub(super) struct Outcome {
    /// Write the figures to resources/numbers, and README's table.
    #[arg(long)]
    pub(super) record: bool,
    /// Fail if a figure is not as good as promised, or 3% worse than on record.
    #[arg(long)]
    pub(super) check: bool,
}

impl Outcome {
    /// Shows the figures, and what is wrong with them. A figure may be worse by its `slack`.
    ///
    /// # Errors
    ///
    /// They are to be checked, and worse than promised or recorded.
    pub(super) fn judge(self, suite: Suite, now: &Record, header: &str, slack: impl Fn(&str) -> u64) -> Result<()> {
        let promises = promise::of(suite)?;
        promise::print(now, &promises);
        let mut broken = promise::broken(now, &promises);
        if self.record {
            now.write(&suite.file(), header)?;
            write_readme()?;
        } else {
            match Record::read(&suite.file())?.worse(now, slack) {
                Some(worse) => broken.extend(worse),
                None => println!("\nNo record for these versions: --record makes one."),
            }
        }
        for line in &broken {
            println!("Worse: {line}");
        }
        ensure!(!self.check || broken.is_empty(), "Figures are worse than promised or recorded: {}", broken.len());
        Ok(())
    }
}

const BEGIN: &str = "<!-- figures, written by `cargo xtask bench` -->\n";
const END: &str = "<!-- end of the figures -->\n";

/// Puts the table of promises and recorded figures into README.
pub(super) fn write_readme() -> Result<()> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = fs::read_to_string(&file).context("Cannot read README.md")?;
    fs::write(&file, with_figures(&text)?).context("Cannot write README.md")
}

/// README with the figures that are on record.
///
/// # Errors
///
/// It has no place for them, or a record cannot be read.
pub(crate) fn with_figures(readme: &str) -> Result<String> {
    let (before, rest) = readme.split_once(BEGIN).with_context(|| format!("README.md has no line {}", BEGIN.trim()))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("README.md has no line {}", END.trim()))?;
    let mut rows = String::new();
    let promises = promise::all()?;
    for suite in Suite::ALL {
        let record = Record::read(&suite.file())?;
        for promise in promises.iter().filter(|promise| promise.suite == suite) {
            rows.push_str(&promise.row(&record));
            rows.push('\n');
        }
    }
    Ok(format!("{before}{BEGIN}\n| what | promised | measured |\n|---|---|---|\n{rows}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_stand_between_their_marks_and_nothing_else_changes() {
        let readme = format!("before\n{BEGIN}old\n{END}after\n");
        let new = with_figures(&readme).unwrap();
        assert!(new.starts_with("before\n") && new.ends_with("after\n") && !new.contains("old"));
        assert_eq!(with_figures(&new).unwrap(), new);
        with_figures("nothing").unwrap_err();
    }
}

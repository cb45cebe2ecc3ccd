//! What long steps show: a spinner at a terminal, a plain line otherwise.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A step under way. It says nothing more when it is dropped half-way: then there is an error to be read.
pub(crate) struct Step {
    bar: ProgressBar,
    what: String,
}

/// Says that `what` has begun.
pub(crate) fn step(what: &str) -> Step {
    let bar = if stderr().is_terminal() {
        let bar = ProgressBar::new_spinner().with_message(what.to_owned());
        bar.set_style(
            ProgressStyle::default_spinner().template("{spinner} {msg} ({elapsed})").expect("a valid template"),
        );
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    } else {
        eprintln!("{what} …");
        ProgressBar::hidden()
    };
    Step { bar, what: what.to_owned() }
}

impl Step {
    /// Says what the step is at.
    pub(crate) fn at(&self, detail: &str) {
        self.bar.set_message(format!("{}: {detail}", self.what));
    }

    /// Runs `print`, which prints lines, without the spinner in between.
    pub(crate) fn suspend(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

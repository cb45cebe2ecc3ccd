//! `--boot-timer`: how long each phase of a start takes.

use std::fmt::Write;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Instant;

/// Remembers when each phase of a start was over. The clock starts with the process's `main`.
#[derive(Debug)]
pub struct BootTimer {
    start: Instant,
    phases: Mutex<Vec<(&'static str, Instant)>>,
}

impl BootTimer {
    /// A clock that started at `start`.
    pub fn new(start: Instant) -> Self {
        Self { start, phases: Mutex::default() }
    }

    /// The phase called `name` is over now.
    pub fn mark(&self, name: &'static str) {
        let now = Instant::now();
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).push((name, now));
    }

    /// One line a phase, `boot-timer: NAME MICROSECONDS us`, counted from the start; empties the
    /// list, so that nothing is told twice.
    pub fn report(&self) -> String {
        let mut phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner);
        phases.drain(..).fold(String::new(), |mut text, (name, at)| {
            let micros = at.duration_since(self.start).as_micros();
            writeln!(text, "boot-timer: {name} {micros} us").expect("a string takes every write");
            text
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_is_told_once_in_order() {
        let timer = BootTimer::new(Instant::now());
        timer.mark("first");
        timer.mark("second");
        let report = timer.report();
        let names: Vec<_> = report.lines().map(|line| line.split(' ').nth(1).unwrap()).collect();
        assert_eq!(names, ["first", "second"]);
        assert_eq!(timer.report(), "");
    }
}

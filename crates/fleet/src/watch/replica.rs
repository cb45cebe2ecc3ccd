//! One machine of a service over all its lives: what it is doing, and what follows from the end of a life.

use std::time::{Duration, Instant};

use fleet::plan::Machine;
use fleet::spec::{Condition, Restart, Service};

use super::life::Life;

/// So many lives that end badly and soon, one after the other, and it is given up.
const MOST_FAILURES: u32 = 6;
/// A life that long was a good one.
const GOOD: Duration = Duration::from_secs(20);
/// How long the first new start waits; each one waits twice as long as the one before.
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// One machine of a service.
pub(super) struct Replica {
    pub(super) machine: Machine,
    /// As it was when the machine was started last.
    pub(super) service: Service,
    pub(super) phase: Phase,
    pub(super) restarts: u32,
    failures: u32,
}

/// What it is doing.
///
/// ```text
///           start                 its end, where it is not to be started again
/// Waiting ────────▶ Running ──────────────────────────────────────────────────▶ Ended, GivenUp
///    ▲                 │ stop
///    └──── its end ────┴──▶ Stopping ──its end──▶ gone, or Waiting
/// ```
pub(super) enum Phase {
    /// For those that it depends on, or until then.
    Waiting(Instant),
    Running {
        life: Life,
        since: Instant,
        /// Its agent has answered.
        up: bool,
        healthy: bool,
    },
    /// It was asked to end, and is killed then.
    Stopping { life: Life, until: Instant },
    /// By itself, and as it should.
    Ended,
    /// It will not be started again.
    GivenUp,
}

impl Replica {
    pub(super) fn new(machine: Machine, service: Service) -> Self {
        Self { machine, service, phase: Phase::Waiting(Instant::now()), restarts: 0, failures: 0 }
    }

    /// Whether it does its work, as far as that is known.
    pub(super) fn is_healthy(&self) -> bool {
        matches!(self.phase, Phase::Running { up, healthy, .. } if up && (healthy || self.service.health.is_none()))
    }

    /// Whether nothing more is to be waited for.
    pub(super) fn is_settled(&self) -> bool {
        self.is_healthy() || matches!(self.phase, Phase::Ended | Phase::GivenUp)
    }

    pub(super) fn is_given_up(&self) -> bool {
        matches!(self.phase, Phase::GivenUp)
    }

    /// Whether it is what is depended on.
    pub(super) fn is(&self, condition: Condition) -> bool {
        match condition {
            Condition::Started => matches!(self.phase, Phase::Running { up: true, .. } | Phase::Ended),
            Condition::Healthy => self.is_healthy(),
            Condition::Completed => matches!(self.phase, Phase::Ended),
        }
    }

    /// The life with this number, if that is the one it has.
    pub(super) fn has_life(&self, number: u64) -> bool {
        match &self.phase {
            Phase::Running { life, .. } | Phase::Stopping { life, .. } => life.number == number,
            _ => false,
        }
    }

    /// Asks it to end. Whether there is an end to be waited for.
    pub(super) fn stop(&mut self) -> bool {
        match std::mem::replace(&mut self.phase, Phase::Ended) {
            Phase::Running { life, .. } => {
                life.terminate();
                self.phase = Phase::Stopping { life, until: Instant::now() + self.service.grace.0 };
                true
            }
            Phase::Stopping { life, until } => {
                self.phase = Phase::Stopping { life, until };
                true
            }
            _ => false,
        }
    }

    /// It has ended by itself. Returns what is to be said of that.
    pub(super) fn ended(&mut self, code: i32) -> Option<String> {
        let Phase::Running { since, up, .. } = &self.phase else { return None };
        let was_good = *up && since.elapsed() >= GOOD;
        let again = match self.service.restart {
            Restart::No => false,
            Restart::OnFailure => code != 0,
            Restart::Always => true,
        };
        if !again {
            self.phase = if code == 0 { Phase::Ended } else { Phase::GivenUp };
            return (code != 0).then(|| format!("it has ended with {code}, and is not to be started again"));
        }
        self.failures = if was_good { 1 } else { self.failures + 1 };
        if self.failures >= MOST_FAILURES {
            self.phase = Phase::GivenUp;
            return Some(format!("it has ended with {code}, {MOST_FAILURES} times in a row: it is given up"));
        }
        let wait = wait(self.failures);
        self.restarts += 1;
        self.phase = Phase::Waiting(Instant::now() + wait);
        Some(format!("it has ended with {code}, and is started again in {wait:?}"))
    }

    /// What it is doing, for people.
    pub(super) fn state(&self) -> &'static str {
        match &self.phase {
            Phase::Waiting(_) if self.failures > 0 => "waits to be started again",
            Phase::Waiting(_) => "waits",
            Phase::Running { up: false, .. } => "starts",
            Phase::Running { .. } if self.service.health.is_none() => "runs",
            Phase::Running { healthy: true, .. } => "healthy",
            Phase::Running { .. } => "unhealthy",
            Phase::Stopping { .. } => "stops",
            Phase::Ended => "completed",
            Phase::GivenUp => "given up",
        }
    }

    /// It begins anew, as `service` says now.
    pub(super) fn renew(&mut self, service: &Service) {
        self.service = service.clone();
        self.failures = 0;
        self.phase = Phase::Waiting(Instant::now());
    }
}

/// How long to wait after so many failures.
fn wait(failures: u32) -> Duration {
    let doubled = 1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
    FIRST_WAIT.saturating_mul(doubled).min(LONGEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_waits_twice_as_long_as_the_one_before_up_to_a_bound() {
        assert_eq!([1, 2, 3].map(wait), [250, 500, 1000].map(Duration::from_millis));
        assert_eq!([30, 33, 1000].map(wait), [LONGEST_WAIT; 3]);
    }
}

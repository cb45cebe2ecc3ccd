//! The phases of a start.
//!
//! | phase | process | container | vmm | other machines |
//! |---|---|---|---|---|
//! | process | spawn to the workload's `main` | the same, the runtime's work in it | spawn to vmm's `main` | cannot be seen |
//! | KVM | | | to the first instruction of the guest | cannot be seen |
//! | kernel | | | to the workload's `main` | spawn to the workload's `main` |
//! | user space | until the first byte arrives | the same | until it is written | the same |
//!
//! The whole is timed outside by the workload's first byte, the phases of a machine by other marks: `vmm --boot-timer` and
//! the guest's own clock. That they add up to the whole is checked and not made so.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::stats::median;

/// One start's phases, in milliseconds; or the medians of several starts'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Phases {
    pub(crate) contender: String,
    pub(crate) process: f64,
    pub(crate) kvm: Option<f64>,
    pub(crate) kernel: Option<f64>,
    pub(crate) user: f64,
    /// What they should add up to.
    pub(crate) whole: f64,
    /// Whether `process` is all until the workload's `main`, of which nothing more can be seen.
    pub(crate) opaque: bool,
}

impl Phases {
    /// Their sum.
    pub(crate) fn sum(&self) -> f64 {
        self.process + self.kvm.unwrap_or(0.0) + self.kernel.unwrap_or(0.0) + self.user
    }

    /// By how much of the whole the sum misses it.
    pub(crate) fn gap(&self) -> f64 {
        (self.sum() - self.whole).abs() / self.whole
    }

    /// The start whose whole is the median one: its phases are of one start and add up, which medians of each phase by
    /// itself do not.
    pub(crate) fn typical(starts: &[Self]) -> Option<&Self> {
        let mut wholes: Vec<f64> = starts.iter().map(|start| start.whole).collect();
        let median = median(&mut wholes)?;
        let distance = |start: &&Self| (start.whole - median).abs();
        starts.iter().min_by(|one, other| distance(one).total_cmp(&distance(other)))
    }
}

/// What is known of one start.
pub(crate) struct Seen<'a> {
    pub(crate) contender: &'a str,
    /// Monotonic time at the spawn.
    pub(crate) spawn_clock: Duration,
    /// From the spawn to the mark's arrival.
    pub(crate) whole: Duration,
    /// When the workload's `main` began and when it was to write its mark, on its kernel's clock.
    pub(crate) begun: Duration,
    pub(crate) marked: Duration,
    /// What the boot timer said, and how long after the spawn it did.
    pub(crate) timer: Option<(BootTimer, Duration)>,
    /// Whether the workload's kernel is the host's.
    pub(crate) shares_kernel: bool,
}

/// What `vmm --boot-timer` says, counted from vmm's `main`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootTimer {
    first_instruction: Duration,
    guest_mark: Duration,
}

/// The phase whose line comes when the guest has marked the end of its boot.
pub(crate) const LAST: &str = "boot-timer: guest-mark ";

impl BootTimer {
    /// Finds it in what vmm writes on standard error.
    pub(crate) fn read(text: &str) -> Option<Self> {
        let phase = |name: &str| {
            let micros = text.lines().find_map(|line| line.strip_prefix(name)?.strip_suffix(" us"))?;
            micros.parse().ok().map(Duration::from_micros)
        };
        let timer = Self { first_instruction: phase("boot-timer: first-instruction ")?, guest_mark: phase(LAST)? };
        (timer.first_instruction <= timer.guest_mark).then_some(timer)
    }
}

impl Seen<'_> {
    /// The phases; none where the marks contradict each other.
    pub(crate) fn phases(&self) -> Option<Phases> {
        let within = self.marked.checked_sub(self.begun)?;
        let (process, kvm, kernel) = match self.timer {
            // The line comes when the guest marks: what the timer has counted less came before vmm's `main`.
            Some((timer, arrival)) => (
                arrival.checked_sub(timer.guest_mark)?,
                Some(timer.first_instruction),
                Some(timer.guest_mark - timer.first_instruction),
            ),
            None if self.shares_kernel => (self.begun.checked_sub(self.spawn_clock)?, None, None),
            None => (self.whole.checked_sub(within)?, None, None),
        };
        let user = if self.shares_kernel { self.whole.checked_sub(process)? } else { within };
        let opaque = self.timer.is_none() && !self.shares_kernel;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Some(Phases {
            contender: self.contender.to_owned(),
            process: ms(process),
            kvm: kvm.map(ms),
            kernel: kernel.map(ms),
            user: ms(user),
            whole: ms(self.whole),
            opaque,
        })
    }
}

/// The monotonic clock at an instant that is just over.
pub(crate) fn clock_at(instant: Instant) -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now = Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0));
    now.saturating_sub(instant.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    fn seen() -> Seen<'static> {
        Seen {
            contender: "x",
            spawn_clock: ms(5000),
            whole: ms(100),
            begun: ms(70),
            marked: ms(72),
            timer: None,
            shares_kernel: false,
        }
    }

    const TIMER: &str =
        "boot-timer: memory 100 us\nboot-timer: first-instruction 9000 us\nboot-timer: guest-mark 90000 us\n";

    #[test]
    fn the_phases_of_a_machine_add_up_to_the_whole() {
        let timer = BootTimer::read(TIMER).unwrap();
        let phases = Seen { timer: Some((timer, ms(97))), ..seen() }.phases().unwrap();
        assert_eq!((phases.process, phases.kvm, phases.kernel, phases.user), (7.0, Some(9.0), Some(81.0), 2.0));
        assert!(phases.gap() < 0.02 && !phases.opaque, "{phases:?}");
    }

    #[test]
    fn the_phases_of_a_container_are_told_by_the_clock_that_it_shares() {
        let phases = Seen { shares_kernel: true, begun: ms(5090), marked: ms(5099), ..seen() }.phases().unwrap();
        assert_eq!((phases.process, phases.user, phases.opaque), (90.0, 10.0, false));
        assert!(phases.gap() < 0.02);
    }

    #[test]
    fn of_other_machines_only_the_users_part_is_known() {
        let phases = seen().phases().unwrap();
        assert_eq!((phases.process, phases.user, phases.opaque), (98.0, 2.0, true));
    }

    #[test]
    fn marks_that_contradict_each_other_make_no_phases() {
        assert_eq!(Seen { begun: ms(80), marked: ms(70), ..seen() }.phases(), None);
        let timer = BootTimer::read(TIMER).unwrap();
        assert_eq!(Seen { timer: Some((timer, ms(80))), ..seen() }.phases(), None);
        assert_eq!(BootTimer::read("boot-timer: first-instruction 9 us\nboot-timer: guest-mark 8 us\n"), None);
        assert_eq!(BootTimer::read("boot-timer: guest-mark many us\n"), None);
    }

    #[test]
    fn the_typical_start_is_one_that_happened() {
        let of = |whole| Phases { whole, ..seen().phases().unwrap() };
        let starts = [of(90.0), of(300.0), of(100.0)];
        assert_eq!(Phases::typical(&starts).unwrap().whole, 100.0);
        assert_eq!(Phases::typical(&[]), None);
    }
}

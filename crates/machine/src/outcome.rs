//! How a guest ended.

use std::fmt;

use bus::GuestEnd;
use kvm::InternalError;

/// How a guest ended, each with a line of its own and, in the command, an exit code of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It powered itself off.
    PowerOff,
    /// It asked for a reset.
    Reboot,
    /// Its kernel panicked.
    Panic,
    /// It crashed in a way that a processor answers by resetting itself.
    TripleFault,
    /// KVM could not go on.
    InternalError(InternalError),
    /// A system call that runs it failed.
    HostFailure(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "the guest powered off"),
            Self::Reboot => write!(f, "the guest rebooted"),
            Self::Panic => write!(f, "the guest's kernel panicked"),
            Self::TripleFault => write!(f, "the guest crashed with a triple fault"),
            Self::InternalError(error) => write!(f, "KVM cannot go on with the guest: {error}"),
            Self::HostFailure(error) => write!(f, "the host cannot go on with the guest: {error}"),
        }
    }
}

/// Left in the reset word before the guest starts: neither of the values that a kernel writes.
pub(crate) const UNTOUCHED: u16 = 0xb007;
/// What a kernel leaves there for a warm restart.
const WARM: u16 = 0x1234;

impl Outcome {
    /// Tells a restart, a panic and a crash apart. `reset_word` is what stands at
    /// `memory::layout::RESET_WORD` at the end; `panics_are_warm` says that this guest's command
    /// line makes a panic, and nothing else, restart warmly.
    ///
    /// A kernel that restarts by its own will first writes the reset word, whatever it does then
    /// (Linux, `native_machine_emergency_restart`). So a triple fault with a written word is a
    /// kernel that was told to restart that way, and one with the untouched word is a crash.
    pub(crate) fn of_restart(triple_fault: bool, reset_word: u16, panics_are_warm: bool) -> Self {
        match reset_word {
            WARM if panics_are_warm => Self::Panic,
            UNTOUCHED if triple_fault => Self::TripleFault,
            _ => Self::Reboot,
        }
    }

    /// The outcome of an end that the guest brought about.
    pub(crate) fn of_end(end: GuestEnd, reset_word: u16, panics_are_warm: bool) -> Self {
        match end {
            GuestEnd::PowerOff => Self::PowerOff,
            GuestEnd::Panic => Self::Panic,
            GuestEnd::Reset => Self::of_restart(false, reset_word, panics_are_warm),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_a_panic_only_where_panics_are_told_apart() {
        assert_eq!(Outcome::of_end(GuestEnd::Reset, WARM, true), Outcome::Panic);
        assert_eq!(Outcome::of_end(GuestEnd::Reset, WARM, false), Outcome::Reboot);
        assert_eq!(Outcome::of_end(GuestEnd::Reset, 0, true), Outcome::Reboot);
    }

    #[test]
    fn a_triple_fault_is_a_crash_only_where_no_kernel_announced_it() {
        assert_eq!(Outcome::of_restart(true, UNTOUCHED, true), Outcome::TripleFault);
        assert_eq!(Outcome::of_restart(true, 0, true), Outcome::Reboot);
        assert_eq!(Outcome::of_restart(true, WARM, true), Outcome::Panic);
    }

    #[test]
    fn a_reset_before_any_kernel_runs_is_a_reboot() {
        assert_eq!(Outcome::of_end(GuestEnd::Reset, UNTOUCHED, true), Outcome::Reboot);
    }
}

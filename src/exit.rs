//! Exit codes: every way in which the command ends has its own.

use std::process::ExitCode;

use machine::{ConfigError, Outcome};

/// What each exit code means, for the help, the man page and the README.
pub(crate) const TABLE: &str = "\
  0        the guest powered off, or Ctrl-A x was typed at its console
  1        the host or vmm itself failed
  2        wrong usage: a flag, a file or a host that cannot be used
  3        the guest rebooted (with --on-reboot exit)
  4        the guest's kernel panicked (with --on-panic exit)
  5        the guest crashed with a triple fault
  6        KVM cannot go on with the guest
  7        the sandbox stopped vmm (see --sandbox)
  128+N    signal N ended the guest before it powered off";

/// The exit code of a process that the sandbox stops.
pub(crate) const STOPPED: u8 = 7;

/// A mistake of the user's that has no type of its own.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// Whether an error is the user's mistake.
pub(crate) fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<ConfigError>() || error.is::<Usage>()
}

/// The exit code for an error that ends the command.
pub(crate) fn code_of(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(if is_usage(error) { 2 } else { 1 })
}

/// The exit code for the end of a guest.
pub(crate) fn code_of_outcome(outcome: &Outcome) -> ExitCode {
    ExitCode::from(match outcome {
        Outcome::PowerOff => 0,
        Outcome::HostFailure(_) => 1,
        Outcome::Reboot => 3,
        Outcome::Panic => 4,
        Outcome::TripleFault => 5,
        Outcome::InternalError(_) => 6,
    })
}

/// The exit code for a guest that was ended by a signal, as shells have it.
pub(crate) fn code_of_signal(signal: u8) -> ExitCode {
    ExitCode::from(128u8.saturating_add(signal))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_mistake_is_2_and_everything_else_is_1() {
        let usage = anyhow::Error::from(Usage("no".into()));
        let config = anyhow::Error::from(ConfigError::NoKernel).context("more words");
        assert_eq!(code_of(&usage), ExitCode::from(2));
        assert_eq!(code_of(&config), ExitCode::from(2));
        assert_eq!(code_of(&anyhow::anyhow!("host")), ExitCode::from(1));
    }

    #[test]
    fn a_signals_code_is_what_shells_say() {
        assert_eq!(code_of_signal(15), ExitCode::from(143));
    }
}

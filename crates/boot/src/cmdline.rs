//! The kernel's command line: good defaults, and what the user adds or puts in their place.
//!
//! The words are those of the kernel's admin-guide/kernel-parameters.

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use memory::layout;
use serde::{Deserialize, Serialize};

/// Said to every kernel unless the user replaces the whole line.
///
/// - `reboot=panic_warm panic=-1`: a panic ends the machine at once and, told apart from a restart
///   that was asked for, by the reset word (see [`layout::RESET_WORD`]).
/// - `tsc=reliable`: the processor's clock is KVM's business; nothing has to watch over it.
/// - `cryptomgr.notests`: no known-answer tests of every cipher at each start, which are more than half of a stock
///   kernel's boot. They guard against broken accelerators, of which a guest has none; `fips=1` brings them back.
const DEFAULTS: &str = "reboot=panic_warm panic=-1 tsc=reliable cryptomgr.notests";

/// What the user wants on the kernel's command line: `TEXT` is appended to the defaults, `=TEXT` replaces them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Cmdline {
    text: String,
    replaces: bool,
}

impl Cmdline {
    /// The whole line, with what the machine itself has to say (such as `console=`) among the defaults.
    pub fn line(&self, machine: &str) -> String {
        if self.replaces {
            return self.text.clone();
        }
        let parts = [DEFAULTS, machine, &self.text];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
    }
}

impl From<String> for Cmdline {
    fn from(text: String) -> Self {
        match text.strip_prefix('=') {
            Some(text) => Self { text: text.into(), replaces: true },
            None => Self { text, replaces: false },
        }
    }
}

impl From<Cmdline> for String {
    fn from(cmdline: Cmdline) -> Self {
        cmdline.to_string()
    }
}

impl FromStr for Cmdline {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self::from(text.to_owned()))
    }
}

impl fmt::Display for Cmdline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.replaces { "=" } else { "" }, self.text)
    }
}

/// A line that no kernel can take.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// More than the kernel reads.
    #[error("the command line has {length} bytes and this kernel takes {limit}: shorten --cmdline")]
    TooLong {
        /// Bytes of the line.
        length: usize,
        /// The most that the kernel takes.
        limit: usize,
    },
    /// A zero byte would end it, a line feed would split it.
    #[error("the command line holds a zero byte or a line feed: take it out of --cmdline")]
    Unprintable,
}

/// The line as the kernel reads it, with its terminating zero, if it fits into `limit` bytes without.
pub(crate) fn bytes(line: &str, limit: usize) -> Result<Vec<u8>, CmdlineError> {
    let area = usize::try_from(layout::CMDLINE.end - layout::CMDLINE.start).expect("a small area");
    let limit = limit.min(area - 1);
    if line.len() > limit {
        return Err(CmdlineError::TooLong { length: line.len(), limit });
    }
    if line.contains(['\0', '\n']) {
        return Err(CmdlineError::Unprintable);
    }
    Ok([line.as_bytes(), b"\0"].concat())
}

/// Whether the kernel is told not to randomise its addresses.
pub(crate) fn says_nokaslr(line: &str) -> bool {
    line.split_ascii_whitespace().any(|word| word == "nokaslr")
}

/// Whether a kernel with this line restarts warmly after a panic and never otherwise, so that the
/// reset word tells one from the other (`reboot=[panic_]MODE,…`, where only the first letter of a mode counts).
pub fn tells_panics_apart(line: &str) -> bool {
    let mut modes = (false, false);
    let values = line.split_ascii_whitespace().filter_map(|word| word.strip_prefix("reboot="));
    for mode in values.flat_map(|value| value.split(',')) {
        match mode.strip_prefix("panic_") {
            Some(mode) => modes.0 = mode.starts_with('w'),
            None => modes.1 |= mode.starts_with('w'),
        }
    }
    modes == (true, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_appended_to_the_defaults() {
        let line = Cmdline::from("quiet".to_owned()).line("console=ttyS0");
        assert!(line.starts_with("reboot=panic_warm") && line.ends_with(" console=ttyS0 quiet"), "{line}");
    }

    #[test]
    fn text_after_an_equals_sign_replaces_the_defaults() {
        let cmdline: Cmdline = "=root=/dev/vda".parse().unwrap();
        assert_eq!(cmdline.line("console=ttyS0"), "root=/dev/vda");
        assert_eq!(cmdline.to_string(), "=root=/dev/vda");
    }

    #[test]
    fn a_line_longer_than_the_kernel_takes_is_refused() {
        assert_eq!(bytes("12345", 4), Err(CmdlineError::TooLong { length: 5, limit: 4 }));
        assert_eq!(bytes("1234", 4).unwrap(), b"1234\0");
        let long = "x".repeat(1 << 16);
        assert!(matches!(bytes(&long, usize::MAX), Err(CmdlineError::TooLong { .. })));
    }

    #[test]
    fn a_line_with_a_line_feed_is_refused() {
        assert_eq!(bytes("a\nb", 100), Err(CmdlineError::Unprintable));
    }

    #[test]
    fn panics_are_told_apart_only_where_nothing_else_restarts_warmly() {
        for line in [DEFAULTS, "reboot=t,panic_warm quiet", "reboot=panic_w reboot=acpi"] {
            assert!(tells_panics_apart(line), "{line}");
        }
        for line in ["", "reboot=warm", "reboot=w,panic_warm", "reboot=panic_warm,panic_cold", "panic=-1"] {
            assert!(!tells_panics_apart(line), "{line}");
        }
    }

    #[test]
    fn nokaslr_counts_only_as_a_word() {
        assert!(says_nokaslr("quiet nokaslr"));
        assert!(!says_nokaslr("quiet nokaslr.x nonokaslr"));
    }
}

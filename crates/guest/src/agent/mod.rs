//! The agent. See [`serve`] for what it does for the host, and [`start`] for what it does as PID 1 before.

pub(crate) mod exec;
pub(crate) mod modules;
pub(crate) mod mounts;
pub(crate) mod network;
pub(crate) mod power;
pub(crate) mod probe;
pub(crate) mod program;
pub(crate) mod reaper;
pub(crate) mod root;
pub(crate) mod serve;
pub(crate) mod start;
pub(crate) mod stream;
pub(crate) mod sys;
#[cfg(test)]
mod testing;
pub(crate) mod users;

use std::io::Write as _;

/// How much memory a thread may have for its stack: there are many, and none goes deep.
pub(crate) const STACK: usize = 256 << 10;

/// Says a line at the console, if there is one.
pub(crate) fn log(line: &str) {
    let _ = writeln!(std::io::stderr(), "vmm-agent: {line}");
}

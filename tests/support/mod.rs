//! What the integration tests share: the `vmm` command as a child process, terminals to run it at, kernels of a few
//! instructions, and guests that answer questions.
//!
//! `cargo xtask test` builds these tests and runs them where KVM is real. It tells them by `VMM_BIN` what to test, and
//! by `VMM_ASSETS` where the kernels and initial file systems are that they boot.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub(crate) mod devices;
pub(crate) mod elf;
pub(crate) mod fleet;
pub(crate) mod guest;
pub(crate) mod inject;
pub(crate) mod machine;
pub(crate) mod names;
pub(crate) mod packet;
pub(crate) mod process;
pub(crate) mod project;
pub(crate) mod pty;
pub(crate) mod seccomp;
pub(crate) mod stream;
pub(crate) mod tiny;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Nothing that is waited for takes as long, however busy the machine is. Only a failing test waits so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// How often a condition is looked at that nobody announces.
const LOOK: Duration = Duration::from_millis(2);

/// The command that is tested.
pub(crate) fn vmm() -> PathBuf {
    variable("VMM_BIN").into()
}

/// A kernel or an initial file system.
pub(crate) fn asset(name: &str) -> PathBuf {
    let path = PathBuf::from(variable("VMM_ASSETS")).join(name);
    assert!(path.exists(), "{} does not exist: run `cargo xtask test --all`", path.display());
    path
}

fn variable(name: &str) -> OsString {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: run `cargo xtask test`"))
}

/// Waits until `condition` holds. `what` is it, for the failure.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        std::thread::sleep(LOOK);
    }
}

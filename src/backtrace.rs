//! Backtraces, which the release build cannot make: it has no tables for unwinding (`resources/release.ld`), and whatever
//! tried to would end the process before it has said a word.
#![allow(unsafe_code, reason = "the environment can be changed only while there is one thread")]

/// Has neither panics nor errors make any, in a build that has no tables. To be called before anything else.
pub(crate) fn switch_off() {
    if cfg!(panic = "abort") {
        for variable in ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"] {
            // SAFETY: this is the process's only thread.
            unsafe { std::env::remove_var(variable) };
        }
    }
}

//! The agent in the guest: the machine's PID 1 (as `/init` of an initramfs), or with `--service` a service of a
//! distribution that has an init of its own.
//!
//! It is static and small, since each machine has it in memory: std's threads instead of an async runtime, arguments by
//! hand, and no names but those in `/etc/passwd` and `/etc/group`.

use std::process::ExitCode;

mod agent;

use agent::{log, start};

fn main() -> ExitCode {
    let service = std::env::args_os().skip(1).any(|argument| argument == "--service");
    if service {
        log(&start::run_as_service());
    } else if std::process::id() == 1 {
        start::run_as_init();
    } else {
        log("Run it as the first process of a machine, or with --service as a service of one");
    }
    ExitCode::FAILURE
}

//! The `vmm` command: reads what is asked, does it, and says how it ended.

mod backtrace;
mod boot;
mod check;
mod cli;
mod confine;
mod consoles;
mod exit;
mod folders;
mod logger;
mod run;
mod signals;
mod trim;

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    backtrace::switch_off();
    let start = Instant::now();
    match cli::run(start) {
        Ok(code) => code,
        Err(error) => {
            // A user's mistake is told whole by its own sentence; of a failure every cause is told.
            match exit::is_usage(&error) {
                true => eprintln!("vmm: {error}"),
                false => eprintln!("vmm: {error:#}"),
            }
            exit::code_of(&error)
        }
    }
}

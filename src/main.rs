//! The `vmm` command: reads what is asked, does it, and says how it ended.

mod boot;
mod check;
mod cli;
mod exit;
mod logger;
mod signals;

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let start = Instant::now();
    match cli::run(start) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vmm: {error:#}");
            exit::code_of(&error)
        }
    }
}

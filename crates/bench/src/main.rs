//! The `vmm-bench` command, which `vmm bench` starts: what a machine costs against a container and a plain process.
//!
//! The same static program is the workload: see [`work`].

mod cli;
mod compare;
mod contender;
mod csv;
mod density;
mod fail_if;
mod host;
mod html;
mod instance;
mod interrupt;
mod launch;
mod measure;
mod netns;
mod network;
mod phases;
mod pss;
mod result;
mod run;
mod site;
mod stats;
mod table;
mod tools;
mod work;

use std::process::ExitCode;

fn main() -> ExitCode {
    if work::is_init() {
        return work::as_init();
    }
    if std::env::args_os().nth(1).is_some_and(|word| word == work::VERB) {
        return work::as_process();
    }
    cli::run()
}

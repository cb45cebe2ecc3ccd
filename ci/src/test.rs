//! `cargo xtask test`: the gate. Unit tests run on this machine; the integration tests of the `vmm` command, which boot
//! kernels, run where KVM can do that.
//!
//! The integration tests are the targets with `test = false`, so that a plain `cargo test` leaves them alone. They find
//! in their environment `VMM_BIN`, the release build of `vmm`, and `VMM_ASSETS`, the directory that
//! [`assets::directory`] describes. A test with `#[ignore]` is a long one, and `--all` runs it too.
//!
//! Left out: documentation tests.

use std::process::Command;

use anyhow::Result;

use crate::build::{self, Executable};
use crate::host::Host;
use crate::place::{self, Place};
use crate::progress::{self, Step};
use crate::{apt, assets, setup};

/// Seconds that one test executable may take; the slowest takes two minutes on a busy machine.
const TIME_LIMIT: u64 = 8 * 60;
/// The exit code of an executable that took longer in an emulated host.
const TIMED_OUT: u8 = 124;
/// Those whose guests are a few instructions long, which any KVM can run.
const ANY_KVM: [&str; 2] = ["bad_input", "tiny"];
/// How many tests that boot guests run at a time: each guest keeps a processor busy.
const BOOTING_TESTS: &str = "--test-threads=2";

/// What `cargo xtask test` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run the long tests too.
    #[arg(long)]
    all: bool,
    /// Run only the tests whose names contain this.
    filter: Option<String>,
}

/// Runs the verb. Returns whether all tests passed.
pub(crate) fn run(args: &Args) -> Result<bool> {
    setup::run()?;
    let host = Host { timeout: TIME_LIMIT, ..Host::default() };
    let step = progress::step("Building the tests");
    let vmm = build::vmm()?;
    let units = build::tests()?;
    let mut booting = build::integration_tests("vmm")?;
    let own = build::integration_tests("xtask")?;
    drop(step);

    let mut tally = Tally::default();
    let here = if place::local_kvm_opens() { Place::Here } else { Place::Emulated(host.clone()) };
    for executable in units {
        tally.run(&here, &executable, Command::new(&executable.path), args)?;
    }
    for executable in own {
        tally.run(&Place::Here, &executable, Command::new(&executable.path), args)?;
    }
    if let Some(filter) = &args.filter {
        booting = with_tests(booting, filter)?;
    }
    if !booting.is_empty() {
        let assets = assets::directory()?;
        let place = Place::for_kernels(&vmm, host);
        for executable in booting {
            let mut command = Command::new(&executable.path);
            command.arg(BOOTING_TESTS).env("VMM_BIN", &vmm).env("VMM_ASSETS", &assets);
            let any = ANY_KVM.contains(&executable.name.as_str());
            tally.run(if any { &here } else { &place }, &executable, command, args)?;
        }
    }
    Ok(tally.close())
}

/// Those that have a test whose name contains `filter`: for the others no host need be started.
fn with_tests(executables: Vec<Executable>, filter: &str) -> Result<Vec<Executable>> {
    let mut found = Vec::new();
    for executable in executables {
        let mut list = Command::new(&executable.path);
        if !apt::output(list.args(["--list", "--format", "terse", filter]))?.is_empty() {
            found.push(executable);
        }
    }
    Ok(found)
}

/// What the tests came to.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: Vec<String>,
    not_run: Vec<String>,
}

impl Tally {
    /// Runs one test executable and counts its tests.
    fn run(&mut self, place: &Place, executable: &Executable, mut command: Command, args: &Args) -> Result<()> {
        let step = progress::step(&format!("Testing {}", executable.name));
        command.current_dir(&executable.directory).env("CARGO_MANIFEST_DIR", &executable.directory);
        command.args(args.all.then_some("--include-ignored")).args(&args.filter);
        let (mut results, mut code) = attempt(place, &mut command, &step)?;
        // QEMU 7.2's emulation of nested paging comes to a standstill once in a while, with both of its processors
        // busy and no timer running any more: no test in it can notice, and none has been judged.
        if code == TIMED_OUT && matches!(place, Place::Emulated(_)) {
            step.suspend(|| eprintln!("The emulated host stood still in {}: once more in a new one.", executable.name));
            (results, code) = attempt(place, &mut command, &step)?;
        }
        self.count(&step, executable, results, code);
        Ok(())
    }

    fn count(&mut self, step: &Step, executable: &Executable, results: Results, code: u8) {
        let name = |test: String| format!("{}: {test}", executable.name);
        // One that dies has failed, whatever its tests said so far.
        let mut failed: Vec<String> = results.failed.into_iter().map(name).collect();
        if failed.is_empty() && (code != 0 || !results.finished) {
            failed.push(format!("{}: ended with exit code {code} before its tests did", executable.name));
        }
        if !failed.is_empty() {
            step.suspend(|| eprintln!("{}", results.output));
        }
        self.passed += results.passed;
        self.failed.append(&mut failed);
        self.not_run.extend(results.ignored.into_iter().map(name));
    }

    /// Prints what failed, what was not run, and the last line.
    fn close(&self) -> bool {
        for test in &self.not_run {
            println!("not run (--all runs it): {test}");
        }
        for test in &self.failed {
            println!("FAILED: {test}");
        }
        println!("{} passed, {} failed", self.passed, self.failed.len());
        self.failed.is_empty()
    }
}

/// Runs one test executable once. Returns what it said and its exit code.
fn attempt(place: &Place, command: &mut Command, step: &Step) -> Result<(Results, u8)> {
    let mut results = Results::default();
    let code = place.lines(command, &mut |line| {
        if let Some(name) = results.take(line) {
            step.at(&name);
        }
    })?;
    Ok((results, code))
}

/// What one test executable said, line by line.
#[derive(Default)]
struct Results {
    passed: u64,
    failed: Vec<String>,
    ignored: Vec<String>,
    /// Whether the line that ends a run has come.
    finished: bool,
    output: String,
}

impl Results {
    /// Takes a line. Returns the test whose result it is.
    fn take(&mut self, line: &str) -> Option<String> {
        self.output.push_str(line);
        self.output.push('\n');
        if line.starts_with("test result: ") {
            self.finished = true;
            return None;
        }
        let (name, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
        let name = name.trim_end_matches(" - should panic").to_owned();
        if result == "ok" {
            self.passed += 1;
        } else if result == "FAILED" {
            self.failed.push(name.clone());
        } else if result.starts_with("ignored") {
            self.ignored.push(name.clone());
        }
        Some(name)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn executable() -> Executable {
        Executable { name: "boot".into(), path: PathBuf::new(), directory: PathBuf::new() }
    }

    fn tally(lines: &[&str], code: u8) -> Tally {
        let mut results = Results::default();
        for line in lines {
            results.take(line);
        }
        let mut tally = Tally::default();
        tally.count(&progress::step("Testing"), &executable(), results, code);
        tally
    }

    #[test]
    fn each_result_is_counted_and_named() {
        let lines = [
            "running 3 tests",
            "test image::a ... ok",
            "test image::b ... FAILED",
            "test image::c ... ignored, takes an hour",
            "test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ];
        let tally = tally(&lines, 101);
        assert_eq!(tally.passed, 1);
        assert_eq!(tally.failed, ["boot: image::b"]);
        assert_eq!(tally.not_run, ["boot: image::c"]);
    }

    #[test]
    fn an_executable_that_dies_half_way_has_failed() {
        let tally = tally(&["running 2 tests", "test image::a ... ok"], 134);
        assert_eq!(tally.failed, ["boot: ended with exit code 134 before its tests did"]);
    }
}

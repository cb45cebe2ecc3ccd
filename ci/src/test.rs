//! `cargo xtask test`: the gate. Unit tests run on this machine; the integration tests of the `vmm` command, which boot
//! kernels, run where KVM can do that.
//!
//! The integration tests are the targets with `test = false`, so that a plain `cargo test` leaves them alone. They find
//! in their environment `VMM_BIN`, the release build of `vmm`, and `VMM_ASSETS`, the directory that
//! [`assets::directory`] describes. A test with `#[ignore]` is a long one, and `--all` runs it too.
//!
//! Left out: documentation tests.

use std::cmp::Reverse;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::build::{self, Executable};
use crate::host::Host;
use crate::place::{self, Place};
use crate::progress::{self, Step};
use crate::{apt, assets, setup};

/// Seconds that one test executable may take; the slowest takes some three minutes on an idle machine.
const TIME_LIMIT: u64 = 12 * 60;
/// And with its long tests, some of which take ten alone.
const LONG_TIME_LIMIT: u64 = 40 * 60;
/// Those whose guests are a few instructions long, which any KVM can run.
const ANY_KVM: [&str; 5] = ["bad_devices", "bad_input", "control", "sandbox", "tiny"];
/// Those whose guests have several processors: on one processor a guest's wait for each other, and for nothing else.
const SEVERAL_PROCESSORS: [&str; 1] = ["smp"];
/// Those that take minutes.
const LONGEST: [&str; 10] =
    ["fleets", "bench", "fleet", "devices", "run", "host", "debian", "machines", "image", "crash"];
/// How many tests that boot guests run at a time in one executable: each guest keeps a processor busy.
const BOOTING_TESTS: &str = "--test-threads=1";

/// What took as long is named.
const SLOW: Duration = Duration::from_secs(15);

/// What stands for a failed test in whose result's line other words stand.
const UNNAMED: &str = "a test, see its output";

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
    if args.all { setup::with_servers() } else { setup::run() }?;
    let host = Host { timeout: if args.all { LONG_TIME_LIMIT } else { TIME_LIMIT }, ..Host::default() };
    let Built { vmm, units, mut booting, mut own } = Built::by_cargo(args)?;
    if let Some(filter) = &args.filter {
        booting = with_tests(booting, filter)?;
        own = with_tests(own, filter)?;
    }

    let mut tally = Tally::default();
    if !args.all {
        tally.not_run.push(format!("{}: all of its tests", build::HEAVY));
    }
    let here = if place::local_kvm_opens() { Place::Here } else { Place::Emulated(host.clone()) };
    booting.sort_by(|a, b| a.name.cmp(&b.name));
    let unit = |executable| Job { executable, place: here.clone(), of_vmm: None, second_chance: false };
    tally.run(&units.into_iter().map(unit).collect::<Vec<_>>(), args)?;
    if !own.is_empty() || !booting.is_empty() {
        let of_vmm = Some((vmm.as_path(), assets::directory(args.all)?));
        let place = Place::for_kernels(&vmm, host);
        // They start emulated hosts themselves.
        let own_job = |executable| Job { executable, place: Place::Here, of_vmm: of_vmm.clone(), second_chance: true };
        let job = |executable: Executable| {
            let place = match executable.name.as_str() {
                _ if !args.all && has_long_tests_only(&executable) => Place::Here,
                name if ANY_KVM.contains(&name) => here.clone(),
                name if SEVERAL_PROCESSORS.contains(&name) => place.clone().with_cpus(2),
                _ => place.clone(),
            };
            Job { second_chance: place.is_emulated(), place, executable, of_vmm: of_vmm.clone() }
        };
        let mut jobs: Vec<_> = booting.into_iter().map(job).chain(own.into_iter().map(own_job)).collect();
        // What takes longest goes first.
        let place = |job: &Job<'_>| LONGEST.iter().position(|name| *name == job.executable.name);
        jobs.sort_by_key(|job| place(job).unwrap_or(LONGEST.len()));
        tally.run(&jobs, args)?;
    }
    Ok(tally.close())
}

/// What there is to test, and with what.
struct Built {
    vmm: PathBuf,
    units: Vec<Executable>,
    /// The integration tests of `vmm`.
    booting: Vec<Executable>,
    /// Those of this program.
    own: Vec<Executable>,
}

impl Built {
    /// What guests are made of is made meanwhile, and what is optimised beside what is not: each of the three has long
    /// spells on one processor.
    fn by_cargo(args: &Args) -> Result<Self> {
        let _step = progress::step("Building the tests");
        thread::scope(|scope| {
            let vmm = scope.spawn(build::vmm);
            // Few tests may need none of it.
            let assets = args.filter.is_none().then(|| scope.spawn(|| assets::directory(args.all)));
            let units = build::tests(args.all)?;
            let (booting, own) = (build::integration_tests("vmm")?, build::integration_tests("xtask")?);
            if let Some(assets) = assets {
                assets.join().expect("making assets does not panic")?;
            }
            let vmm = vmm.join().expect("Cargo's messages are read without a panic")?;
            let vmm = build::together(&vmm, args.all)?;
            Ok(Self { vmm, units, booting, own })
        })
    }
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

/// Whether no host need be started for it, since its tests are left out.
fn has_long_tests_only(executable: &Executable) -> bool {
    let list = |which: &str| {
        let output = Command::new(&executable.path).args(["--list", "--format", "terse", which]).output();
        output.map(|output| output.stdout).ok()
    };
    let all = list("--include-ignored");
    all.is_some() && list("--ignored") == all
}

/// A test executable to run.
struct Job<'a> {
    executable: Executable,
    place: Place,
    /// For integration tests: the executable of `vmm`, and the folder of the assets.
    of_vmm: Option<(&'a Path, PathBuf)>,
    /// Whether what fails runs once more, because an emulated host may be at fault.
    second_chance: bool,
}

impl Job<'_> {
    /// Runs it, and those of its tests that fail once more where they have a second chance.
    ///
    /// An emulated host has faults of its own. With QEMU 7.2 it has stood still, and a guest's kernel has had an
    /// exception between two instructions that can have none; with several processors it loses interrupts and corrupts
    /// memory. Later ones were not seen to do so on several threads. What fails twice has failed.
    fn judge(&self, args: &Args, step: &Step) -> Result<(Results, u8)> {
        let filter: Vec<&str> = args.filter.iter().map(String::as_str).collect();
        let (first, code) = self.run(args.all, &filter, step)?;
        if code == 0 || !self.second_chance {
            return Ok((first, code));
        }
        let name = &self.executable.name;
        step.suspend(|| eprintln!("{}\n{name} has failed once (exit code {code}), in an emulated host.", first.output));
        if !first.finished || first.failed.is_empty() || first.failed.iter().any(|test| test == UNNAMED) {
            let (mut second, code) = self.run(args.all, &filter, step)?;
            second.again = if code == 0 { vec!["all of it".to_owned()] } else { Vec::new() };
            return Ok((second, code));
        }
        let failed: Vec<&str> = first.failed.iter().map(String::as_str).collect();
        let (second, code) = self.run(true, &[&["--exact"], &failed[..]].concat(), step)?;
        Ok((first.mended_by(second), code))
    }

    /// Runs its tests that `filter` selects, once. Returns what it said and its exit code.
    fn run(&self, ignored_too: bool, filter: &[&str], step: &Step) -> Result<(Results, u8)> {
        let Executable { name, path, directory } = &self.executable;
        let mut command = Command::new(path);
        command.current_dir(directory).env("CARGO_MANIFEST_DIR", directory);
        command.args(ignored_too.then_some("--include-ignored")).args(filter);
        if let Some((vmm, assets)) = &self.of_vmm {
            command.arg(BOOTING_TESTS);
            command.env("VMM_BIN", vmm).env("VMM_ASSETS", assets);
        }
        let mut results = Results::default();
        let code = self.place.lines(&mut command, &mut |line| {
            if let Some(test) = results.take(line) {
                step.at(&format!("{name}: {test}"));
            }
        })?;
        Ok((results, code))
    }
}

/// What the tests came to.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: Vec<String>,
    /// Passed only when they ran once more.
    again: Vec<String>,
    not_run: Vec<String>,
    slow: Vec<(Duration, String)>,
}

impl Tally {
    /// Runs test executables, as many at a time as there are processors, and counts their tests.
    fn run(&mut self, jobs: &[Job], args: &Args) -> Result<()> {
        let names: Vec<_> = jobs.iter().map(|job| job.executable.name.as_str()).collect();
        let step = progress::step(&format!("Testing {}", names.join(", ")));
        let queue = Mutex::new(jobs.iter());
        let lanes = thread::available_parallelism()?.get().min(jobs.len());
        let (sender, ended) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..lanes {
                let (sender, queue, step) = (sender.clone(), &queue, &step);
                scope.spawn(move || {
                    let next = || queue.lock().expect("no lane panics").next();
                    while let Some(job) = next() {
                        let begin = Instant::now();
                        let result = job.judge(args, step);
                        if sender.send((job, result, begin.elapsed())).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            for (job, result, took) in ended {
                let (results, code) = result?;
                self.slow.extend((took >= SLOW).then(|| (took, job.executable.name.clone())));
                self.count(&step, &job.executable, results, code);
            }
            Ok(())
        })
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
        self.again.extend(results.again.into_iter().map(name));
        self.failed.append(&mut failed);
        self.not_run.extend(results.ignored.into_iter().map(name));
    }

    /// Prints what took long, what failed, what did so once, what was not run, and the last line.
    fn close(mut self) -> bool {
        self.slow.sort_by_key(|(took, _)| Reverse(*took));
        for (took, name) in &self.slow {
            println!("slow: {name}, {} s", took.as_secs());
        }
        for test in &self.not_run {
            println!("not run (--all runs it): {test}");
        }
        for test in &self.again {
            println!("passed only when run once more: {test}");
        }
        for test in &self.failed {
            println!("FAILED: {test}");
        }
        println!("{} passed, {} failed", self.passed, self.failed.len());
        self.failed.is_empty()
    }
}

/// What one test executable said, line by line.
#[derive(Default)]
struct Results {
    passed: u64,
    failed: Vec<String>,
    ignored: Vec<String>,
    /// Those that failed at first.
    again: Vec<String>,
    /// Whether the line that ends a run has come.
    finished: bool,
    output: String,
}

impl Results {
    /// These, once those of their tests that had failed ran again and came to `second`.
    fn mended_by(self, second: Self) -> Self {
        let again = self.failed.into_iter().filter(|test| !second.failed.contains(test));
        Self {
            passed: self.passed + second.passed,
            again: if second.finished { again.collect() } else { Vec::new() },
            failed: second.failed,
            ignored: self.ignored,
            finished: second.finished,
            output: second.output,
        }
    }

    /// Takes a line. Returns the test whose result it is.
    fn take(&mut self, line: &str) -> Option<String> {
        self.output.push_str(line);
        self.output.push('\n');
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.finished = true;
            // The names are for people; these counts are right even where a test's own words stand in a result's line.
            let count =
                |what: &str| counts.split([';', '.']).find_map(|part| part.trim().strip_suffix(what)?.parse().ok());
            self.passed = count(" passed").unwrap_or(0);
            let failed: usize = count(" failed").unwrap_or(0).try_into().unwrap_or(usize::MAX);
            self.failed.extend((self.failed.len()..failed).map(|_| UNNAMED.to_owned()));
            return None;
        }
        let (name, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
        let name = name.trim_end_matches(" - should panic").to_owned();
        if result == "FAILED" {
            self.failed.push(name.clone());
        } else if result.starts_with("ignored") {
            self.ignored.push(name.clone());
        }
        Some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn executable() -> Executable {
        Executable { name: "boot".into(), path: PathBuf::new(), directory: PathBuf::new() }
    }

    fn tally(lines: &[&str], code: u8) -> Tally {
        let mut tally = Tally::default();
        tally.count(&progress::step("Testing"), &executable(), results(lines), code);
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
    fn a_test_whose_own_words_hide_its_result_counts() {
        let lines = [
            "test a ... something that it starts says this",
            "ok",
            "test b ... and this",
            "FAILED",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ];
        let tally = tally(&lines, 101);
        assert_eq!((tally.passed, tally.failed.len()), (1, 1));
    }

    fn results(lines: &[&str]) -> Results {
        let mut results = Results::default();
        for line in lines {
            results.take(line);
        }
        results
    }

    #[test]
    fn what_passes_at_its_second_chance_is_named_and_what_fails_twice_has_failed() {
        let first = results(&[
            "test a ... ok",
            "test b ... FAILED",
            "test c ... FAILED",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ]);
        let second = results(&[
            "test b ... ok",
            "test c ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 1 filtered out; finished in 0.00s",
        ]);
        let mut tally = Tally::default();
        tally.count(&progress::step("Testing"), &executable(), first.mended_by(second), 101);
        assert_eq!(tally.passed, 2);
        assert_eq!((&tally.again[..], &tally.failed[..]), (&["boot: b".to_owned()][..], &["boot: c".to_owned()][..]));
    }

    #[test]
    fn an_executable_that_dies_half_way_has_failed() {
        let tally = tally(&["running 2 tests", "test image::a ... ok"], 134);
        assert_eq!(tally.failed, ["boot: ended with exit code 134 before its tests did"]);
    }
}

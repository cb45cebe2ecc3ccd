//! The part of a benchmark that runs in the emulated host: it copies files into memory, runs commands from there, and
//! says how long each took from spawn to exit.
//!
//! On the instruction clock time jumps to the next timer when all processors idle, so a command that waits for the
//! shared file system is charged arbitrary time. Hence everything is in memory, this program too, and only the second
//! of two runs counts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{mount_bind, mount_bind_recursive};
use rustix::process::{Pid, Signal, chroot, kill_process};
use serde::{Deserialize, Serialize};

use crate::host::Host;

/// A folder in the emulated host's memory.
const FOLDER: &str = "/run/bench";

/// How many exits all machines that there are now have made, by KVM (`debugfs`).
const EXITS: &str = "/sys/kernel/debug/kvm/exits";

/// The VMM's cache of kernels takes a file to be unchanged only when it has been so for two seconds.
const SETTLED: Duration = Duration::from_secs(3);

/// Nanoseconds that are short for a run: the host's timer tick is several percent of it.
const SHORT: u64 = 250_000_000;
/// The host's timer tick in nanoseconds.
const TICK: u64 = 4_000_000;
/// How many more runs a short one gets, spread over a tick.
const PHASES: u64 = 8;

/// How often a run may come to nothing.
const CHANCES: usize = 3;

/// What `cargo xtask bench inside` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file that holds the plan.
    plan: PathBuf,
}

/// What to measure.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Plan {
    /// Name in the folder, and the file to copy there.
    pub(super) files: BTreeMap<String, PathBuf>,
    /// Commands that are run first, one after the other; a program is a path, or a name in the folder.
    pub(super) prepare: Vec<Vec<String>>,
    /// A folder in the folder that is the root of what is measured, once it has been prepared: of the shared file system not
    /// even a name is looked up then. /proc, /sys, /dev and /run are there, too.
    pub(super) root: Option<String>,
    /// Commands that run for as long as there is something to measure.
    pub(super) services: Vec<Vec<String>>,
    pub(super) runs: Vec<Run>,
    /// Try runs that fail again, leave out those that fail for good, and say so on stderr.
    pub(super) tolerant: bool,
}

impl Plan {
    /// Has this program carry it out, `together` runs in each emulated host, as many hosts side by side as there are processors;
    /// on the instruction clock none sees the others. Returns what was measured, by the names of the runs.
    ///
    /// When it counts instructions QEMU stands still in one host of a dozen, so a run has several chances, and says so.
    pub(super) fn carry_out(self, host: &Host, together: usize) -> Result<BTreeMap<String, Measured>> {
        let Self { files, prepare, root, services, runs, tolerant } = self;
        let mut groups: Vec<Vec<Run>> = Vec::new();
        for run in runs {
            match groups.last_mut().filter(|group| group.len() < together) {
                Some(group) => group.push(run),
                None => groups.push(vec![run]),
            }
        }
        let queue = Mutex::new(groups.into_iter());
        let lane = || {
            let mut measured = BTreeMap::new();
            while let Some(runs) = { queue.lock().expect("no lane panics").next() } {
                let (files, prepare, root, services) = (files.clone(), prepare.clone(), root.clone(), services.clone());
                let plan = Self { files, prepare, root, services, runs, tolerant };
                measured.extend(plan.try_several_times(host)?);
            }
            Ok(measured)
        };
        let lanes = thread::available_parallelism()?.get();
        thread::scope(|scope| {
            let lanes: Vec<_> = (0..lanes).map(|_| scope.spawn(lane)).collect();
            let results = lanes.into_iter().map(|lane| lane.join().expect("a measurement does not panic"));
            let results: Vec<BTreeMap<_, _>> = results.collect::<Result<_>>()?;
            Ok(results.into_iter().flatten().collect())
        })
    }

    fn try_several_times(&self, host: &Host) -> Result<BTreeMap<String, Measured>> {
        // What may be left out is what QEMU stands still over most.
        let chances = if self.tolerant { 2 * CHANCES } else { CHANCES };
        for _ in 1..chances {
            match self.carry_out_together(host) {
                Ok(measured) => return Ok(measured),
                Err(error) => eprintln!("{} once more, because: {error:#}", self.names()),
            }
        }
        self.carry_out_together(host)
    }

    fn names(&self) -> String {
        self.runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>().join("; ")
    }

    /// As [`Plan::carry_out`], all runs in one emulated host, one after the other, and once.
    pub(super) fn carry_out_together(&self, host: &Host) -> Result<BTreeMap<String, Measured>> {
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), serde_json::to_string(self)?)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "inside"]).arg(file.path());
        let output = host.output(&command)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "The measurement failed: {}", errors.trim());
        eprint!("{errors}");
        serde_json::from_slice(&output.stdout).context("The measurement's output is not understood")
    }
}

/// A command line whose first word and paths are names in the folder.
#[derive(Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) name: String,
    pub(super) words: Vec<String>,
    pub(super) measure: Measure,
}

/// What is measured of a command.
#[derive(Serialize, Deserialize)]
pub(super) enum Measure {
    /// The time from spawn to exit, of the second of two runs, both of which end with `code`. Of a short one, the least of
    /// [`PHASES`] more: some waits of the kernel's end with its timer tick, so it matters when in a tick a run starts.
    Time { code: i32 },
    /// The memory of the process once it has written `line`, but for mappings of `ram` bytes: the guest's. Its addresses
    /// are not random: the host maps the other pages of the same 64 KiB along with a needed one, and where in a program
    /// those begin would be chance.
    Memory { line: String, ram: u64 },
    /// What the command writes until it ends with `code`, which it does within `limit` seconds.
    Lines { code: i32, limit: u64 },
    /// The time from spawn until the command has written `text`, which it does within `limit` seconds.
    Until { text: String, limit: u64 },
}

/// What a run gave.
#[derive(Serialize, Deserialize)]
pub(super) struct Measured {
    /// Nanoseconds or bytes.
    pub(super) value: u64,
    /// What the command wrote to stderr.
    pub(super) stderr: String,
    /// What it wrote to stdout, where that was asked for.
    pub(super) lines: Vec<Line>,
}

/// A line, and how many exits the host's machines had made when it came.
#[derive(Serialize, Deserialize)]
pub(super) struct Line {
    pub(super) text: String,
    pub(super) exits: u64,
}

/// Runs the verb: prints what was measured, by name, as JSON.
pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = Path::new(FOLDER);
    let program = folder.join("measure");
    if std::env::current_exe()? != program {
        fs::create_dir_all(folder)?;
        fs::copy(std::env::current_exe()?, &program)?;
        // This only comes back if it fails.
        return Err(Command::new(&program).args(["bench", "inside"]).arg(&args.plan).exec().into());
    }
    let plan: Plan = serde_json::from_slice(&fs::read(&args.plan)?)?;
    for (name, file) in &plan.files {
        fs::copy(file, folder.join(name)).with_context(|| format!("Cannot copy {}", file.display()))?;
    }
    for words in &plan.prepare {
        let status =
            words_command(words, folder)?.status().with_context(|| format!("Cannot run {}", words.join(" ")))?;
        ensure!(status.success(), "{} ended with {status}", words.join(" "));
    }
    if let Some(root) = &plan.root {
        enter(&folder.join(root)).with_context(|| format!("Cannot make {root} the root"))?;
    }
    let mut services = Vec::new();
    for words in &plan.services {
        services
            .push(words_command(words, folder)?.spawn().with_context(|| format!("Cannot run {}", words.join(" ")))?);
    }
    thread::sleep(SETTLED);
    let mut measured = BTreeMap::new();
    for run in &plan.runs {
        let measure = || {
            match &run.measure {
                Measure::Time { code } => time(run, folder, *code),
                Measure::Memory { line, ram } => memory(run, folder, line, *ram),
                Measure::Lines { code, limit } => lines(run, folder, *code, *limit),
                Measure::Until { text, limit } => until(run, folder, text, *limit),
            }
            .with_context(|| format!("Cannot measure {}", run.name))
        };
        let mut result = measure();
        for _ in 1..CHANCES {
            if let Some(error) = result.as_ref().err().filter(|_| plan.tolerant) {
                eprintln!("Once more, because: {error:#}");
                result = measure();
            }
        }
        match result {
            Ok(result) => drop(measured.insert(&run.name, result)),
            Err(error) if plan.tolerant => eprintln!("{error:#}"),
            Err(error) => return Err(error),
        }
    }
    for mut service in services {
        service.kill()?;
        service.wait()?;
    }
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}

/// Makes a folder the root, and a mount, as every root is; with what the kernel shows in it.
fn enter(root: &Path) -> Result<()> {
    mount_bind(root, root)?;
    for name in ["proc", "sys", "dev", "run"] {
        let place = root.join(name);
        fs::create_dir_all(&place)?;
        mount_bind_recursive(Path::new("/").join(name), &place)?;
    }
    chroot(root)?;
    Ok(std::env::set_current_dir("/")?)
}

fn command(run: &Run, folder: &Path) -> Result<Command> {
    let mut command = match run.measure {
        Measure::Memory { .. } => {
            let program = words_command(&run.words, folder)?;
            let mut command = Command::new("setarch");
            command.arg("--addr-no-randomize").arg(program.get_program()).args(program.get_args());
            command
        }
        _ => words_command(&run.words, folder)?,
    };
    surround(&mut command, folder).stderr(File::create(folder.join("stderr"))?);
    Ok(command)
}

fn words_command(words: &[String], folder: &Path) -> Result<Command> {
    let (program, arguments) = words.split_first().context("There is no command")?;
    let mut command = Command::new(folder.join(program));
    command.args(arguments);
    surround(&mut command, folder);
    Ok(command)
}

/// Gives the command its place, no input, and nobody who reads its output.
fn surround<'a>(command: &'a mut Command, folder: &Path) -> &'a mut Command {
    command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null());
    command.env("XDG_CACHE_HOME", folder.join("cache")).env("LC_ALL", "C")
}

/// Starts the command and has `read` read what it writes. It is killed after `limit` seconds.
fn read_output<T>(
    run: &Run,
    folder: &Path,
    limit: u64,
    read: impl FnOnce(&mut Child) -> Result<T>,
) -> Result<(T, Child)> {
    let mut child = command(run, folder)?.stdout(Stdio::piped()).spawn()?;
    let process = Pid::from_child(&child);
    let (done, over) = mpsc::channel::<()>();
    let result = thread::scope(|scope| {
        scope.spawn(move || {
            if over.recv_timeout(Duration::from_secs(limit)) == Err(RecvTimeoutError::Timeout) {
                // It is still there, at least as a zombie: nobody has waited for it.
                let _ = kill_process(process, Signal::KILL);
            }
        });
        let result = read(&mut child);
        drop(done);
        result
    });
    if result.is_err() {
        child.kill()?;
        child.wait()?;
    }
    Ok((result?, child))
}

fn lines(run: &Run, folder: &Path, code: i32, limit: u64) -> Result<Measured> {
    let start = Instant::now();
    let (lines, mut child) = read_output(run, folder, limit, |child| {
        let mut lines = Vec::new();
        for text in BufReader::new(child.stdout.take().context("It has no output")?).split(b'\n') {
            let exits = fs::read_to_string(EXITS).unwrap_or_default().trim().parse().unwrap_or_default();
            lines.push(Line { text: String::from_utf8_lossy(&text?).trim().to_owned(), exits });
        }
        Ok(lines)
    })?;
    let status = child.wait()?;
    let stderr = fs::read_to_string(folder.join("stderr"))?;
    ensure!(status.code() == Some(code), "It ended with {status}: {} {}", said(&lines), stderr.trim());
    Ok(Measured { value: u64::try_from(start.elapsed().as_nanos())?, stderr, lines })
}

fn said(lines: &[Line]) -> String {
    lines.iter().map(|line| line.text.as_str()).collect::<Vec<_>>().join("\n")
}

fn until(run: &Run, folder: &Path, text: &str, limit: u64) -> Result<Measured> {
    let start = Instant::now();
    let (elapsed, mut child) = read_output(run, folder, limit, |child| {
        wait_for(child, text)?;
        Ok(start.elapsed())
    })?;
    child.kill()?;
    child.wait()?;
    let stderr = fs::read_to_string(folder.join("stderr"))?;
    Ok(Measured { value: u64::try_from(elapsed.as_nanos())?, stderr, lines: Vec::new() })
}

fn time(run: &Run, folder: &Path, code: i32) -> Result<Measured> {
    let once = |phase: Option<u64>| {
        let mut command = command(run, folder)?;
        if let Some(phase) = phase {
            while clock() % TICK / (TICK / PHASES) != phase {}
        }
        let start = Instant::now();
        let status = command.status()?;
        let elapsed = start.elapsed();
        let stderr = fs::read_to_string(folder.join("stderr"))?;
        ensure!(status.code() == Some(code), "It ended with {status}: {}", stderr.trim());
        Ok(Measured { value: u64::try_from(elapsed.as_nanos())?, stderr, lines: Vec::new() })
    };
    once(None)?;
    let second = once(None)?;
    if second.value >= SHORT {
        return Ok(second);
    }
    let all: Vec<Measured> = (0..PHASES).map(|phase| once(Some(phase))).collect::<Result<_>>()?;
    all.into_iter().min_by_key(|measured| measured.value).context("Nothing was measured")
}

/// Nanoseconds on the clock that the host's timer ticks go by.
fn clock() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

fn memory(run: &Run, folder: &Path, line: &str, ram: u64) -> Result<Measured> {
    // Its standard input stays open, so that nothing ends before it is told to.
    let mut child = command(run, folder)?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let value = wait_for(&mut child, line).and_then(|()| {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", child.id()))?;
        resident(&smaps, ram)
    });
    child.kill()?;
    child.wait()?;
    Ok(Measured { value: value?, stderr: fs::read_to_string(folder.join("stderr"))?, lines: Vec::new() })
}

/// Reads what the command writes until `text` has come.
fn wait_for(child: &mut Child, text: &str) -> Result<()> {
    let output = BufReader::new(child.stdout.take().context("It has no output")?);
    let mut seen = Vec::new();
    for byte in output.bytes() {
        seen.push(byte?);
        if seen.ends_with(text.as_bytes()) {
            return Ok(());
        }
    }
    bail!("It ended without saying {text:?}: {}", String::from_utf8_lossy(&seen))
}

/// The bytes of RAM that a process's mappings hold, but for those of the guest's memory, which are `ram` bytes long.
fn resident(smaps: &str, ram: u64) -> Result<u64> {
    let mut size = 0;
    let mut resident = 0;
    let mut guest = false;
    for line in smaps.lines() {
        let kib = |value: &str| value.trim().trim_end_matches(" kB").parse().map(|kib: u64| kib * 1024);
        if let Some(value) = line.strip_prefix("Size:") {
            size = kib(value)?;
            guest |= size == ram;
        } else if let Some(value) = line.strip_prefix("Rss:").filter(|_| size != ram) {
            resident += kib(value)?;
        }
    }
    ensure!(guest, "No mapping has the size of the guest's memory");
    Ok(resident)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
00400000-00500000 r-xp 00000000 00:00 1 /vmm
Size:               1024 kB
Rss:                 600 kB
Pss:                 600 kB
7f0000000000-7f0008000000 rw-p 00000000 00:00 0
Size:             131072 kB
Rss:               90000 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Size:                132 kB
Rss:                  12 kB
";

    #[test]
    fn guest_memory_does_not_count_as_the_vmm_s() {
        assert_eq!(resident(SMAPS, 128 << 20).unwrap(), 612 * 1024);
    }

    #[test]
    fn without_guest_memory_the_figure_is_refused() {
        resident(SMAPS, 256 << 20).unwrap_err();
    }

    #[test]
    fn a_command_that_ends_otherwise_is_not_measured() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/bin/sh", folder.path().join("sh")).unwrap();
        let run = |script: &str| Run {
            name: "test".into(),
            words: ["sh", "-c", script].map(str::to_owned).to_vec(),
            measure: Measure::Time { code: 3 },
        };
        let failed = time(&run("echo broken >&2; exit 1"), folder.path(), 3).err().unwrap().to_string();
        assert!(failed.contains("broken"), "{failed}");
        assert_eq!(time(&run("echo fine >&2; exit 3"), folder.path(), 3).unwrap().stderr, "fine\n");
    }
}

//! What is measured: the same static program as a plain process, as a container's only process, and as `/init` of a
//! machine.
//!
//! It is told by words `KEY=VALUE`, or as `/init` by the kernel's command line (`bench_KEY=VALUE`, which a kernel hands
//! to its init as variables). It says one line a result, `bench: NAME VALUE`, on its standard output, which is the
//! console in a machine. Before that, as the first useful thing that it does, it writes the byte [`MARK`]: whoever
//! waits outside takes the time when it arrives.
//!
//! Left out: what kept tools measure, which [`tools`] starts.

mod cpu;
mod disk;
mod interface;
mod network;
mod pages;
mod port;
mod ram;
mod system;
mod tools;

pub(crate) use tools::HTTP;

use std::env;
use std::fmt::Display;
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};
use rustix::time::{ClockId, clock_gettime};

/// The first byte that the workload writes. Neither a kernel nor a runtime says it.
pub(crate) const MARK: u8 = 2;
/// What a line with a result begins with.
pub(crate) const RESULT: &str = "bench: ";
/// The name of the last result: all that was asked for has been said.
pub(crate) const DONE: &str = "done";
/// What the variables of the workload begin with, where it is the init of a machine.
pub(crate) const VARIABLE: &str = "bench_";
/// The hidden verb, for all but machines.
pub(crate) const VERB: &str = "work";

/// A group of measures, by its name.
type Group = (&'static str, fn(&Settings) -> anyhow::Result<()>);

/// What the workload is to do.
#[derive(Debug, Default)]
struct Settings {
    /// Groups of measures, or `idle`, `nothing`, `echo`.
    groups: Vec<String>,
    /// For how long each measure goes on.
    time: Duration,
    /// The disk or the file that stands for it.
    disk: Option<PathBuf>,
    /// Whether kept tools are here.
    has_tools: bool,
    /// How a machine is ended: it powers off unless this says `reboot`.
    reboots: bool,
}

impl Settings {
    fn new(pairs: impl Iterator<Item = (String, String)>) -> Self {
        let mut settings = Self { time: Duration::from_millis(100), ..Self::default() };
        for (key, value) in pairs {
            match key.as_str() {
                "groups" => settings.groups = value.split(',').map(str::to_owned).collect(),
                "millis" => settings.time = Duration::from_millis(value.parse().unwrap_or(100)),
                "disk" => settings.disk = Some(value.into()),
                "tools" => settings.has_tools = true,
                "end" => settings.reboots = value == "reboot",
                _ => {}
            }
        }
        settings
    }

    fn of_words(words: impl Iterator<Item = String>) -> Self {
        Self::new(words.filter_map(|word| word.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()))))
    }

    fn of_variables() -> Self {
        Self::new(env::vars().filter_map(|(key, value)| Some((key.strip_prefix(VARIABLE)?.to_owned(), value))))
    }

    fn has(&self, group: &str) -> bool {
        self.groups.iter().any(|other| other == group)
    }
}

/// Whether this process is the init of a machine, and no container's first process: that one has words.
pub(crate) fn is_init() -> bool {
    std::process::id() == 1 && env::args_os().nth(1).is_none_or(|word| word != VERB)
}

/// The workload as `/init`. Ends the machine.
pub(crate) fn as_init() -> ExitCode {
    let begun = now();
    port::mark();
    let settings = Settings::of_variables();
    mark(begun, &settings);
    if !settings.groups.is_empty() && set_up().is_ok() {
        do_it(&settings);
    }
    // What the serial port has not sent would be lost with the machine.
    let _ = rustix::termios::tcdrain(rustix::stdio::stdout());
    rustix::fs::sync();
    let _ = reboot(if settings.reboots { RebootCommand::Restart } else { RebootCommand::PowerOff });
    // Some machines end only by the other way.
    let _ = reboot(RebootCommand::Restart);
    ExitCode::FAILURE
}

/// The workload as a process.
pub(crate) fn as_process() -> ExitCode {
    let begun = now();
    let settings = Settings::of_words(env::args().skip(2));
    if settings.has("nothing") {
        return ExitCode::SUCCESS;
    }
    if settings.has("echo") {
        return system::echo();
    }
    if settings.has("serve") {
        return network::serve().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    mark(begun, &settings);
    do_it(&settings);
    ExitCode::SUCCESS
}

/// The first useful thing that the workload does.
fn mark(begun: Duration, settings: &Settings) {
    let marked = now();
    let mut out = std::io::stdout();
    let _ = out.write_all(&[MARK]).and_then(|()| out.flush());
    // One whose whole life is timed is not to be kept by more words than these.
    if settings.groups.is_empty() {
        let _ = writeln!(out, "{RESULT}begun-ns {}\n{RESULT}marked-ns {}", begun.as_nanos(), marked.as_nanos());
        say(DONE, 1);
    }
}

fn do_it(settings: &Settings) {
    if settings.groups.is_empty() {
        return;
    }
    if settings.has("idle") {
        return idle();
    }
    cpu::settle(settings.time);
    let groups: [Group; 7] = [
        ("noise", |settings| cpu::noise(settings.time)),
        ("cpu", |settings| cpu::all(settings.time)),
        ("ram", |settings| ram::all(settings.time)),
        ("system", |settings| system::all(settings.time)),
        ("disk", disk::all),
        ("network", network::all),
        ("nginx", tools::nginx),
    ];
    for (name, measure) in groups {
        if settings.has(name)
            && let Err(error) = measure(settings)
        {
            skip(name, &format!("{error:#}"));
        }
    }
    say(DONE, 1);
}

/// Does nothing until nobody is at the other end of standard input any more; in a machine, for ever.
fn idle() {
    let mut input = std::io::stdin();
    let mut byte = [0];
    while input.read(&mut byte).is_ok_and(|count| count > 0) {}
    if std::process::id() == 1 && is_init() {
        std::thread::park();
    }
}

/// The file systems that the measures need. /dev's is there where the kernel is told so.
fn set_up() -> anyhow::Result<()> {
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/tmp")] {
        mount(kind, place, kind, MountFlags::empty(), None).with_context(|| format!("cannot mount {place}"))?;
    }
    Ok(())
}

/// Says a result.
fn say(name: &str, value: impl Display) {
    // Nobody may be there to read it.
    let _ = writeln!(std::io::stdout(), "{RESULT}{name} {value}");
}

/// Says what is not measured, and why.
fn skip(name: &str, why: &str) {
    let _ = writeln!(std::io::stdout(), "{RESULT}skip {name} {}", why.replace('\n', "; "));
}

/// How many times a second `step` does its work, in which `units` are done. `step` first runs once unmeasured.
fn rate(time: Duration, units: f64, mut step: impl FnMut()) -> f64 {
    step();
    let start = Instant::now();
    let mut times = 0.0;
    loop {
        step();
        times += 1.0;
        let elapsed = start.elapsed();
        if elapsed >= time {
            return times * units / elapsed.as_secs_f64();
        }
    }
}

/// The clock that all processes of a kernel share.
fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_variables_say_the_same_and_unknown_ones_nothing() {
        let words = ["groups=cpu,ram", "millis=5", "disk=/dev/vda", "end=reboot", "quiet", "other=1"];
        let settings = Settings::of_words(words.into_iter().map(str::to_owned));
        assert_eq!(settings.groups, ["cpu", "ram"]);
        assert_eq!((settings.time, settings.reboots), (Duration::from_millis(5), true));
        assert_eq!(settings.disk, Some("/dev/vda".into()));
    }

    #[test]
    fn a_rate_counts_what_is_done_in_a_second() {
        let per_second = rate(Duration::from_millis(30), 2.0, || std::thread::sleep(Duration::from_millis(10)));
        assert!((50.0..=200.0).contains(&per_second), "{per_second}");
    }
}

//! One life of a machine: the `vmm run` that it is, from its start to its end, in two threads, and one that asks after its
//! health. What happens becomes events of the watcher.
//!
//! What a machine writes is its own business and of any length: it is kept in two files of a bounded size, and of it the
//! last lines in memory.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufReader, PipeReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use fleet::spec::Health;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::Event;
use crate::probe;

/// How many lines of its output are shown when a machine is given up.
const LAST_LINES: usize = 25;
/// A longer line is cut.
const LONGEST_LINE: usize = 4096;
/// Each of the two files has at most that much.
const LONGEST_LOG: u64 = 1 << 20;
/// What the dead one's helpers have to say is waited for so long.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How often a machine that starts is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// A machine that runs.
pub(super) struct Life {
    /// Which one, of all that there were.
    pub(super) number: u64,
    process: OwnedFd,
    /// While it is there, its health is asked after.
    _asks: Sender<()>,
}

/// What a life is made of.
pub(super) struct Start<'a> {
    pub(super) number: u64,
    /// What stands before each line of its output.
    pub(super) label: String,
    pub(super) name: String,
    pub(super) vmm: &'a Path,
    pub(super) arguments: Vec<std::ffi::OsString>,
    pub(super) runtime: PathBuf,
    pub(super) log: PathBuf,
    pub(super) health: Option<Health>,
    pub(super) events: Sender<Event>,
}

impl Life {
    /// Starts the machine.
    pub(super) fn start(start: Start<'_>) -> anyhow::Result<Self> {
        let (output, theirs) = io::pipe().context("cannot make a pipe")?;
        let errors = theirs.try_clone().context("cannot duplicate a pipe")?;
        let mut command = Command::new(start.vmm);
        command.args(&start.arguments).stdin(Stdio::null()).stdout(theirs).stderr(errors);
        let mut child = command.spawn().with_context(|| format!("cannot start {}", start.vmm.display()))?;
        drop(command);
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).context("cannot watch a process")?;
        let Start { number, label, name, runtime, log, health, events, .. } = start;
        let socket = probe::socket(&runtime, &name);

        let last = Arc::new(Mutex::new(VecDeque::new()));
        let (heard_all, all_heard) = mpsc::channel::<()>();
        let lines = last.clone();
        let read = move || {
            copy(output, &label, &log, &lines);
            drop(heard_all);
        };
        thread::Builder::new().name("output".into()).spawn(read).context("cannot start a thread")?;

        let (asks, stop) = mpsc::channel();
        let sender = events.clone();
        let ask = move || ask_after(&socket, health.as_ref(), &stop, |event| sender.send(event(number)).is_ok());
        thread::Builder::new().name("health".into()).spawn(ask).context("cannot start a thread")?;

        let wait = move || {
            let status = child.wait();
            // The pipe ends with its last holder, who may be slow to go.
            let _ = all_heard.recv_timeout(LAST_WORDS);
            let code = status.ok().map(|status| status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
            let last = last.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
            let _ = events.send(Event::Ended { life: number, code: code.unwrap_or(1), last });
        };
        thread::Builder::new().name("end".into()).spawn(wait).context("cannot start a thread")?;
        Ok(Self { number, process, _asks: asks })
    }

    /// Asks its command to end.
    pub(super) fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Ends it.
    pub(super) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        // One that has ended by itself has done what it was to do.
        let _ = pidfd_send_signal(&self.process, signal);
    }
}

/// Says when the machine is up, and then each time when its health has been asked after.
fn ask_after(socket: &Path, health: Option<&Health>, stop: &Receiver<()>, say: impl Fn(fn(u64) -> Event) -> bool) {
    let waits = |time| stop.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
    while !probe::is_up(socket) {
        if !waits(LOOK) {
            return;
        }
    }
    if !say(|life| Event::Up { life }) {
        return;
    }
    let Some(health) = health else { return };
    let mut was_healthy = false;
    let mut failures = 0;
    loop {
        if probe::is_healthy(socket, &health.check, health.timeout).unwrap_or(false) {
            (was_healthy, failures) = (true, 0);
            if !say(|life| Event::Health { life, healthy: true }) {
                return;
            }
        } else {
            failures += 1;
            if failures >= health.retries && !say(|life| Event::Health { life, healthy: false }) {
                return;
            }
        }
        // Whoever starts is waited for.
        if !waits(if was_healthy { health.interval } else { health.interval.min(5 * LOOK) }) {
            return;
        }
    }
}

/// Copies a machine's output to its log, to ours, and its last lines.
fn copy(output: PipeReader, label: &str, path: &Path, last: &Mutex<VecDeque<String>>) {
    let mut output = BufReader::new(output);
    let mut log = Log::open(path);
    let mut line = Vec::new();
    let mut end = |line: &mut Vec<u8>| {
        log.write(line);
        // It is shown at a terminal, which what a guest writes shall do nothing to.
        let text = String::from_utf8_lossy(line).trim_end().replace(char::is_control, " ");
        let _ = writeln!(io::stdout(), "{label} | {text}");
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(text);
        line.clear();
    };
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = output.read(&mut buffer) {
        for byte in &buffer[..read] {
            line.push(*byte);
            if *byte == b'\n' || line.len() == LONGEST_LINE {
                end(&mut line);
            }
        }
    }
    if !line.is_empty() {
        end(&mut line);
    }
}

/// The log, which becomes the old one when it is full.
struct Log {
    path: PathBuf,
    file: Option<File>,
    length: u64,
}

impl Log {
    fn open(path: &Path) -> Self {
        let file = File::options().create(true).append(true).open(path).ok();
        let length = file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |metadata| metadata.len());
        Self { path: path.to_owned(), file, length }
    }

    /// A log that cannot be written does not keep the machine from running.
    fn write(&mut self, line: &[u8]) {
        if self.length >= LONGEST_LOG {
            let _ = fs::rename(&self.path, self.path.with_extension("old"));
            *self = Self::open(&self.path);
        }
        if let Some(file) = &mut self.file {
            let _ = file.write_all(line);
        }
        self.length += line.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_machine_writes_is_kept_within_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web-1");
        let mut log = Log::open(&path);
        for _ in 0..5000 {
            log.write(&[b'x'; 1024]);
        }
        let length = |path: &Path| fs::metadata(path).unwrap().len();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        assert!(length(&path) <= LONGEST_LOG && length(&path.with_extension("old")) <= LONGEST_LOG + 1024);
    }

    #[test]
    fn the_last_lines_are_kept_and_do_nothing_to_a_terminal() {
        let folder = tempfile::tempdir().unwrap();
        let (output, mut theirs) = io::pipe().unwrap();
        let writer = thread::spawn(move || {
            for number in 0..100 {
                writeln!(theirs, "line {number}\x1b[2J").unwrap();
            }
            theirs.write_all(&[b'y'; 3 * LONGEST_LINE]).unwrap();
        });
        let last = Mutex::new(VecDeque::new());
        copy(output, "web-1", &folder.path().join("log"), &last);
        writer.join().unwrap();
        let last = last.into_inner().unwrap();
        assert_eq!(last.len(), LAST_LINES);
        assert!(last[0].starts_with("line ") && last[0].ends_with(" [2J"), "{}", last[0]);
        assert_eq!(last[LAST_LINES - 1].len(), LONGEST_LINE);
    }
}

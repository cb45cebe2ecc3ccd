//! One instance of a contender: a process with pipes, watched by one thread, so that the times are those at which things
//! arrive and not those at which some thread gets to it.
//!
//! What it writes is not trusted: no more than [`MOST`] bytes are kept, and it has only so much time.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::interrupt::Interrupt;

/// As much as an instance may write on one stream.
const MOST: usize = 1 << 20;

/// How to start an instance.
pub(crate) struct Launch {
    pub(crate) command: Command,
    /// What removes what it leaves behind when it was ended by force.
    pub(crate) clean: Option<Command>,
    /// The processor that it and all that it starts is to stay on.
    pub(crate) cpu: Option<usize>,
    /// How long it may take.
    pub(crate) limit: Duration,
}

/// Why an instance is of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Somebody wants all of this to end.
    Interrupted,
    /// It says something else, or ends otherwise, than it should.
    Other(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interrupted => f.write_str("interrupted"),
            Self::Other(what) => f.write_str(what),
        }
    }
}

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// This on its standard output.
    Text(&'static [u8]),
    /// Its end.
    Exit,
}

/// An instance that was started. Dropping it ends it.
pub(crate) struct Instance {
    child: Child,
    pidfd: OwnedFd,
    /// Kept open: a workload that idles ends with it.
    _stdin: Option<ChildStdin>,
    streams: [Stream; 2],
    clean: Option<Command>,
    limit: Duration,
    pub(crate) spawned: Instant,
    exited: Option<(Instant, ExitStatus)>,
}

/// What has come on one of its streams.
struct Stream {
    file: Option<File>,
    bytes: Vec<u8>,
    /// When how many bytes were there.
    arrivals: Vec<(Instant, usize)>,
}

impl Instance {
    /// Starts it.
    pub(crate) fn start(launch: Launch) -> Result<Self, Fault> {
        let Launch { mut command, clean, cpu, limit } = launch;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Ctrl-C at the terminal is for us, who then end it.
        command.process_group(0);
        // A process inherits on which processors it may run.
        let everywhere = cpu.and_then(|cpu| move_to(cpu).ok());
        let spawned = Instant::now();
        let child = command.spawn();
        if let Some(everywhere) = everywhere {
            let _ = sched_setaffinity(None, &everywhere);
        }
        let name = command.get_program().display();
        let mut child = child.map_err(|error| Fault::Other(format!("cannot start {name}: {error}")))?;
        let pidfd = pid(&child).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
        let pidfd = pidfd.map_err(|error| Fault::Other(format!("cannot watch {name}: {error}")))?;
        let streams =
            [Stream::new(child.stdout.take().map(OwnedFd::from)), Stream::new(child.stderr.take().map(OwnedFd::from))];
        let _stdin = child.stdin.take();
        Ok(Self { child, pidfd, _stdin, streams, clean, limit, spawned, exited: None })
    }

    /// Waits; returns when it came.
    pub(crate) fn wait(&mut self, until: Until, interrupt: &Interrupt) -> Result<Instant, Fault> {
        loop {
            match (until, self.exited) {
                (Until::Text(text), _) if self.streams[0].arrival(text).is_some() => {
                    return Ok(self.streams[0].arrival(text).expect("it has just been seen"));
                }
                (Until::Text(_), Some((_, status))) => return Err(self.fault(&format!("ended too early ({status})"))),
                (Until::Exit, Some((at, _))) => return Ok(at),
                _ => {}
            }
            let left = self.limit.saturating_sub(self.spawned.elapsed());
            if left.is_zero() {
                return Err(self.fault(&format!("still there after {} s", self.limit.as_secs())));
            }
            self.look(left, interrupt)?;
        }
    }

    /// Waits for something to happen, and takes it.
    fn look(&mut self, time: Duration, interrupt: &Interrupt) -> Result<(), Fault> {
        let mut polled = vec![PollFd::new(interrupt, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
        let open: Vec<usize> = (0..2).filter(|at| self.streams[*at].file.is_some()).collect();
        let files = open.iter().filter_map(|at| self.streams[*at].file.as_ref());
        polled.extend(files.map(|file| PollFd::new(file, PollFlags::IN)));
        let time = Timespec::try_from(time).map_err(|_| Fault::Other("the time limit is too long".to_owned()))?;
        match poll(&mut polled, Some(&time)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Fault::Other(format!("cannot wait: {error}"))),
        }
        let now = Instant::now();
        let ready: Vec<bool> = polled.iter().map(|one| !one.revents().is_empty()).collect();
        if ready[0] {
            return Err(Fault::Interrupted);
        }
        for (at, _) in open.into_iter().zip(&ready[2..]).filter(|(_, ready)| **ready) {
            if !self.streams[at].read(now) {
                return Err(self.fault("writes without end"));
            }
        }
        if ready[1] {
            self.streams.iter_mut().for_each(|stream| stream.drain(now));
            let status = self.child.wait().map_err(|error| Fault::Other(format!("cannot wait: {error}")))?;
            self.exited = Some((now, status));
        }
        Ok(())
    }

    /// The process that was started.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended; none if it has not.
    pub(crate) fn status(&self) -> Option<ExitStatus> {
        self.exited.map(|(_, status)| status)
    }

    /// What it wrote on its standard output.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&self.streams[0].bytes).into_owned()
    }

    /// What it wrote on its standard error.
    pub(crate) fn errors(&self) -> String {
        String::from_utf8_lossy(&self.streams[1].bytes).into_owned()
    }

    /// When this text had come on its standard error.
    pub(crate) fn error_arrival(&self, text: &str) -> Option<Instant> {
        self.streams[1].arrival(text.as_bytes())
    }

    /// What went wrong, with its last words.
    pub(crate) fn fault(&self, what: &str) -> Fault {
        let words = |stream: &Stream| {
            let text = String::from_utf8_lossy(&stream.bytes).into_owned();
            let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            let last = lines[lines.len().saturating_sub(2)..].join("; ");
            let printable: String = last.chars().filter(|c| !c.is_control()).collect();
            let from = printable.char_indices().rev().nth(299).map_or(0, |(at, _)| at);
            printable[from..].to_owned()
        };
        let said = [words(&self.streams[1]), words(&self.streams[0])].into_iter().find(|words| !words.is_empty());
        Fault::Other(said.map_or_else(|| what.to_owned(), |said| format!("{what}: {said}")))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if self.exited.is_none() {
            if let Ok(pid) = pid(&self.child) {
                let _ = kill_process_group(pid, Signal::KILL);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let ended_well = self.status().is_some_and(|status| status.success());
        if let Some(clean) = self.clean.as_mut().filter(|_| !ended_well) {
            clean.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            if let Ok(mut child) = clean.spawn() {
                let pidfd = pid(&child).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
                let time = Timespec { tv_sec: 10, tv_nsec: 0 };
                let ended = pidfd.is_ok_and(|pidfd| {
                    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&time)).is_ok_and(|ready| ready > 0)
                });
                if !ended {
                    let _ = child.kill();
                }
                let _ = child.wait();
            }
        }
    }
}

impl Stream {
    fn new(fd: Option<OwnedFd>) -> Self {
        let file = fd.map(File::from).filter(|file| {
            let flags = rustix::fs::fcntl_getfl(file);
            flags.is_ok_and(|flags| rustix::fs::fcntl_setfl(file, flags | rustix::fs::OFlags::NONBLOCK).is_ok())
        });
        Self { file, bytes: Vec::new(), arrivals: Vec::new() }
    }

    /// Takes what is there. Whether it was not too much.
    fn read(&mut self, now: Instant) -> bool {
        let Some(file) = &mut self.file else { return true };
        let mut buffer = [0; 1 << 14];
        match file.read(&mut buffer) {
            Ok(0) => self.file = None,
            Ok(count) => {
                self.bytes.extend_from_slice(&buffer[..count]);
                self.arrivals.push((now, self.bytes.len()));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.file = None,
        }
        self.bytes.len() <= MOST
    }

    /// Takes all that is there, of a process that has ended. Somebody else may still have its end of the pipe.
    fn drain(&mut self, now: Instant) {
        let mut before = usize::MAX;
        while self.file.is_some() && self.bytes.len() != before && self.bytes.len() <= MOST {
            before = self.bytes.len();
            self.read(now);
        }
    }

    /// When this had come.
    fn arrival(&self, wanted: &[u8]) -> Option<Instant> {
        let start = self.bytes.windows(wanted.len()).position(|window| window == wanted)?;
        let end = start + wanted.len();
        self.arrivals.iter().find(|(_, length)| *length >= end).map(|(at, _)| *at)
    }
}

fn pid(child: &Child) -> Result<Pid, Errno> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)
}

/// Stays on one processor; returns where it could be before.
fn move_to(cpu: usize) -> Result<CpuSet, Errno> {
    let before = sched_getaffinity(None)?;
    let mut one = CpuSet::new();
    one.set(cpu);
    sched_setaffinity(None, &one)?;
    Ok(before)
}

/// The last of the processors that we may run on, if there is another for us: contenders are put there.
pub(crate) fn spare_cpu() -> Option<usize> {
    let allowed = sched_getaffinity(None).ok()?;
    let all: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    all.last().copied().filter(|_| all.len() > 1)
}

/// Runs a command to its end, for what it says.
pub(crate) fn ask(command: Command, limit: Duration, interrupt: &Interrupt) -> Result<(ExitStatus, String), Fault> {
    let mut instance = Instance::start(Launch { command, clean: None, cpu: None, limit })?;
    instance.wait(Until::Exit, interrupt)?;
    let status = instance.status().expect("it has been waited for");
    Ok((status, instance.output()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str, limit: Duration) -> Instance {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Instance::start(Launch { command, clean: None, cpu: None, limit }).unwrap()
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_byte_and_the_end_are_seen_when_they_come() {
        let interrupt = Interrupt::watch().unwrap();
        let mut instance = start("printf 'a\\002b'; echo words >&2; exit 3", LONG);
        let marked = instance.wait(Until::Text(&[2]), &interrupt).unwrap();
        let exited = instance.wait(Until::Exit, &interrupt).unwrap();
        assert!(instance.spawned < marked && marked <= exited);
        assert_eq!(instance.status().unwrap().code(), Some(3));
        assert_eq!((instance.output().as_str(), instance.errors().as_str()), ("a\u{2}b", "words\n"));
    }

    #[test]
    fn one_that_hangs_is_ended_with_all_that_it_started() {
        let interrupt = Interrupt::watch().unwrap();
        let mut instance = start("sleep 1000 & echo $!; wait", Duration::from_millis(300));
        let fault = instance.wait(Until::Text(&[2]), &interrupt).unwrap_err();
        assert!(fault.to_string().starts_with("still there after 0 s"), "{fault}");
        let sleeper: u32 = instance.output().trim().parse().unwrap();
        drop(instance);
        // A process that nobody has waited for yet still has an entry, as a zombie.
        let state = || std::fs::read_to_string(format!("/proc/{sleeper}/stat")).ok();
        let start = Instant::now();
        while state().is_some_and(|stat| !stat.contains(") Z ")) {
            assert!(start.elapsed() < LONG, "it lives on");
        }
    }

    #[test]
    fn one_that_ends_early_is_told_with_its_last_words() {
        let interrupt = Interrupt::watch().unwrap();
        let fault = start("echo no rights >&2; exit 1", LONG).wait(Until::Text(&[2]), &interrupt).unwrap_err();
        assert_eq!(fault.to_string(), "ended too early (exit status: 1): no rights");
    }

    #[test]
    fn one_that_writes_without_end_is_stopped() {
        let interrupt = Interrupt::watch().unwrap();
        let fault = start("exec yes", LONG).wait(Until::Exit, &interrupt).unwrap_err();
        assert!(fault.to_string().starts_with("writes without end"), "{fault}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let launch = Launch { command: Command::new("/nowhere"), clean: None, cpu: None, limit: LONG };
        let fault = Instance::start(launch).err().unwrap();
        assert!(fault.to_string().starts_with("cannot start /nowhere"), "{fault}");
    }
}

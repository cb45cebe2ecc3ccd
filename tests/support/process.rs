//! The `vmm` command as a child process.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

use super::pty::Pty;
use super::stream::Stream;
use super::{PATIENCE, seccomp, vmm};

/// A `vmm` that is to be started.
pub(crate) struct Vmm {
    command: Command,
    /// Files that it reads, which exist as long as it does.
    files: Vec<Rc<TempDir>>,
}

impl Vmm {
    /// The command with these arguments.
    pub(crate) fn new<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Self {
        let mut command = Command::new(vmm());
        // The release build cannot make backtraces, and is not to try.
        command.args(arguments).env("RUST_BACKTRACE", "1");
        Self { command, files: Vec::new() }
    }

    /// The same, run by another command, such as `prlimit --nofile=8`.
    pub(crate) fn by(self, wrapper: &[&str]) -> Self {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(self.command.get_program()).args(self.command.get_args());
        command.env("RUST_BACKTRACE", "1");
        Self { command, ..self }
    }

    /// `--kernel` and its value, for a path that need not be text.
    pub(crate) fn of_kernel(kernel: &Path, arguments: &[&str]) -> Self {
        let mut vmm = Self::new(arguments);
        vmm.command.arg("--kernel").arg(kernel);
        vmm
    }

    /// Hides one of KVM's capabilities from it.
    pub(crate) fn without_capability(mut self, capability: u32) -> Self {
        seccomp::hide_capability(&mut self.command, capability);
        self
    }

    /// Keeps the files of `folder` until it has ended.
    pub(crate) fn with(mut self, folder: &Rc<TempDir>) -> Self {
        self.files.push(folder.clone());
        self
    }

    /// One more argument.
    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// More arguments.
    pub(crate) fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Starts it on pipes.
    pub(crate) fn spawn(mut self) -> Running {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut running = Running::new(self);
        running.stdout = running.child.stdout.take().map(Stream::read);
        running.stdin = running.child.stdin.take();
        running
    }

    /// Starts it with a pipe for its input, and its output going to `stdout`.
    pub(crate) fn spawn_to(mut self, stdout: impl Into<Stdio>) -> Running {
        self.command.stdin(Stdio::piped()).stdout(stdout);
        let mut running = Running::new(self);
        running.stdin = running.child.stdin.take();
        running
    }

    /// Starts it at a terminal, which it controls as a shell's command in the foreground would.
    pub(crate) fn spawn_at(self, pty: &Pty) -> Running {
        let mut vmm = self.by(&["setsid", "--ctty"]);
        vmm.command.stdin(pty.stdio()).stdout(pty.stdio());
        Running::new(vmm)
    }

    /// Runs it to its end, without input.
    pub(crate) fn run(self) -> Ended {
        let mut running = self.spawn();
        running.close_input();
        running.wait()
    }
}

/// A `vmm` that runs. Dropping it kills it.
pub(crate) struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<Stream>,
    pub(crate) stderr: Stream,
    _files: Vec<Rc<TempDir>>,
}

/// How a `vmm` ended, and what it wrote.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The exit code; none after a signal.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Running {
    fn new(vmm: Vmm) -> Self {
        let Vmm { mut command, files } = vmm;
        command.stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
        let stderr = Stream::read(child.stderr.take().expect("a pipe was asked for"));
        Self { child, stdin: None, stdout: None, stderr, _files: files }
    }

    /// Its standard output.
    pub(crate) fn stdout(&self) -> &Stream {
        self.stdout.as_ref().expect("it was started on pipes")
    }

    /// Writes to its standard input.
    pub(crate) fn send(&mut self, input: impl AsRef<[u8]>) {
        let stdin = self.stdin.as_mut().expect("it was started on pipes, and its input was not closed");
        stdin.write_all(input.as_ref()).expect("vmm reads its input");
    }

    /// Its standard input comes to its end.
    pub(crate) fn close_input(&mut self) {
        self.stdin = None;
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it runs");
    }

    /// The names of its threads.
    pub(crate) fn thread_names(&self) -> Vec<String> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("it runs");
        let name = |thread: std::io::Result<fs::DirEntry>| {
            let comm = thread.expect("it can be listed").path().join("comm");
            fs::read_to_string(comm).expect("threads only end with the machine").trim().to_owned()
        };
        threads.map(name).collect()
    }

    /// What the scheduler says of it: `R`unning, `S`leeping, stopped (`T`), …
    pub(crate) fn state(&self) -> char {
        self.proc("stat").rsplit(") ").next().and_then(|rest| rest.chars().next()).expect("it has a state")
    }

    /// The processor time that it has used, in ticks of 10 ms: /proc/PID/stat, utime and stime (proc(5)).
    pub(crate) fn processor_ticks(&self) -> u64 {
        let stat = self.proc("stat");
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("a number")).sum()
    }

    /// A file of /proc/PID.
    pub(crate) fn proc(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.child.id())).expect("it runs")
    }

    /// Whether it has not ended.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self) -> Ended {
        assert!(self.ends_within(PATIENCE), "waited {PATIENCE:?} in vain for vmm to end:\n{}", self.last_words());
        let status = self.child.wait().expect("a child can be waited for");
        let text = |stream: &Stream| String::from_utf8_lossy(&stream.whole()).into_owned();
        Ended {
            code: status.code(),
            stdout: self.stdout.as_ref().map(text).unwrap_or_default(),
            stderr: text(&self.stderr),
        }
    }

    /// Waits for its end, but no longer than `time`.
    pub(crate) fn ends_within(&self, time: Duration) -> bool {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).expect("it has not been waited for");
        let time = Timespec::try_from(time).expect("a short time");
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&time)).expect("a process can be polled") > 0
    }

    fn last_words(&self) -> String {
        let stdout = self.stdout.as_ref().map(|stream| stream.text(0)).unwrap_or_default();
        format!("{stdout}\n{}", self.stderr.text(0))
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// Asserts the exit code, and that `line` is what it said of it, alone.
    pub(crate) fn assert(&self, code: i32, line: &str) {
        assert_eq!((self.code, self.stderr.as_str()), (Some(code), format!("vmm: {line}\n").as_str()), "{self:#?}");
    }

    /// Asserts that what was asked for was refused before anything ran, in one line that contains all of `parts`.
    #[track_caller]
    pub(crate) fn assert_refused(&self, parts: &[&str]) {
        assert_eq!((self.code, self.stdout.as_str(), self.stderr.lines().count()), (Some(2), "", 1), "{self:#?}");
        assert!(self.stderr.starts_with("vmm: ") && self.stderr.ends_with('\n'), "{}", self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "{part:?} is not in {}", self.stderr);
        }
    }
}
